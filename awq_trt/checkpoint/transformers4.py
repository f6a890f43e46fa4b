"""config.json for loaders that are built on transformers 4, as AutoAWQ's are.

Version 5 writes the rotary embedding as one `rope_parameters` and the dtype as `dtype`. Version 4 knows neither, and
takes a base of 10000 and no scaling: https://github.com/huggingface/transformers/tree/v4.51.3/src/transformers/models
"""

from __future__ import annotations

import copy
from typing import Any

import transformers

OLD_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
"""model_type -> what version 4 calls the base and the part of the width that is turned, where it is not the same."""


def with_old_fields(config: transformers.PretrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json with version 4's fields beside those of version 5.

    Fields that would make version 5 read another model are left out; it says so itself, the result is loaded.

    Args:
        values: what `config.save_pretrained` wrote.
    """
    dtype = {"torch_dtype": values["dtype"]} if values.get("dtype") else {}
    rope = values.get("rope_parameters")
    candidates = [dtype | _rope(config.model_type, rope), dtype] if isinstance(rope, dict) else [dtype]
    expected = _loaded(config, values)
    for added in candidates:
        loaded = _loaded(config, values | added)
        if loaded is not None and {k: v for k, v in loaded.items() if k not in added} == expected:
            return values | added
    return values


def _loaded(config: transformers.PretrainedConfig, values: dict[str, Any]) -> dict[str, Any] | None:
    """What this version makes of the content of config.json; None where it refuses it."""
    try:
        loaded: dict[str, Any] = type(config).from_dict(copy.deepcopy(values)).to_dict()
    except Exception:
        return None
    rope = loaded.get("rope_parameters") or {}
    if rope.get("type") == rope.get("rope_type"):
        rope.pop("type", None)  # its older name
    return loaded


def _rope(model_type: str, rope: dict[str, Any]) -> dict[str, Any]:
    """rope_theta, rope_scaling, partial_rotary_factor; of Gemma 3, whose layers are of two kinds, also the other "
    "base."""
    local = rope.get("sliding_attention")
    whole = rope.get("full_attention") or rope
    names = OLD_NAMES.get(model_type, {})
    kept = {"rope_theta": whole.get("rope_theta"), "partial_rotary_factor": whole.get("partial_rotary_factor")}
    scaling = {k: v for k, v in whole.items() if k not in kept and v is not None}
    if scaling.get("rope_type") == "longrope" and model_type.startswith("phi"):  # version 4 wants these three there
        scaling = {"type": "longrope"} | {key: scaling[key] for key in ("short_factor", "long_factor")}
    found = {names.get(key, key): value for key, value in kept.items() if value is not None}
    found["rope_scaling"] = (
        None if scaling.get("rope_type", "default") == "default" and "type" not in scaling else scaling
    )
    if isinstance(local, dict):
        found["rope_local_base_freq"] = local.get("rope_theta")
    return found
