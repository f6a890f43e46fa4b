"""A decoder's sizes: a row of the benchmark's table, or read from a config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_check import UsageError

from bench.gemm.shapes import MODELS, Model

GROUP_SIZES = (128, 64, 32)
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
DECODERS = ("ForCausalLM", "ForConditionalGeneration")


def model_from(name: str) -> Model:
    """The model of a name in MODELS, of a config.json, or of the directory that holds one.

    Raises:
        UsageError: there is none, or it is no decoder whose layers these are.
    """
    if name in MODELS:
        return MODELS[name]
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give a config.json, its directory, or one of {', '.join(MODELS)}")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path}: not a model's configuration: give the config.json of a Hugging Face checkpoint")
    return model_from_config(config, str(path))


def model_from_config(config: dict[str, Any], where: str) -> Model:
    """A decoder with a gated MLP, from the fields of its config.json; group size as quantizing chooses it.

    The text model of a multimodal one is in "text_config". head_dim and num_key_value_heads may be left out.

    Raises:
        UsageError: an encoder, experts, latent attention, or a field that is missing or senseless; says `where`.
    """
    names = config.get("architectures") or []
    if names and not any(name.endswith(DECODERS) for name in names):
        raise UsageError(f"{where}: {', '.join(names)} is no decoder: there are no tokens per second to estimate")
    text = config.get("text_config") or config
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    if experts := next((name for name in EXPERTS if (text.get(name) or 0) > 1), None):
        raise UsageError(
            f"{where}: {experts} is {text[experts]}: mixtures of experts are not estimated, dense ones are"
        )
    if text.get("kv_lora_rank"):
        raise UsageError(
            f"{where}: kv_lora_rank is set: latent attention is not estimated, plain and grouped-query are"
        )
    missing = [name for name in SIZES if name not in text]
    if missing:
        raise UsageError(f"{where}: no {', '.join(missing)}: give the config.json of a decoder in Hugging Face's names")
    heads = text["num_attention_heads"]
    optional = {"num_key_value_heads": text.get("num_key_value_heads") or heads}
    optional["head_dim"] = text.get("head_dim") or (text["hidden_size"] // heads if is_size(heads) else 0)
    sizes = {name: text[name] for name in SIZES} | optional
    if wrong := [f"{name} is {value!r}" for name, value in sizes.items() if not is_size(value)]:
        raise UsageError(f"{where}: {', '.join(wrong)}: whole numbers from 1 on are wanted")
    query, key = heads * sizes["head_dim"], sizes["num_key_value_heads"] * sizes["head_dim"]
    inputs = (sizes["hidden_size"], sizes["intermediate_size"], query)
    group = next((g for g in GROUP_SIZES if all(width % g == 0 for width in inputs)), None)
    if group is None:
        raise UsageError(f"{where}: no group size divides the layers' inputs {inputs}: multiples of 32 are wanted")
    return Model(sizes["hidden_size"], query, key, sizes["intermediate_size"], sizes["num_hidden_layers"],
                 sizes["vocab_size"], group, bool(tied))  # fmt: skip


def is_size(value: object) -> bool:
    """A whole number from 1 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
