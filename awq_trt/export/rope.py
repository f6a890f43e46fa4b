"""Rotary frequencies that depend on the length of a sequence: one set of them is chosen before a model is traced.

Longrope (Phi-3; Ding et al., https://arxiv.org/abs/2402.13753) has two sets, and transformers changes to the long one
when a sequence outgrows the positions the model was first trained for. Keys in a cache cannot change with it, so an
engine has to choose once: the long set where its cache has room for such sequences, as vLLM does, else the short one.
"Dynamic" scaling changes beyond max_position_embeddings only, where no cache reaches.
"""

from __future__ import annotations

import copy

import transformers
from torch import nn


def resolve_longrope(config: transformers.PretrainedConfig, longest: int) -> transformers.PretrainedConfig:
    """The configuration for sequences of up to `longest` tokens: a changed copy where those need the long set."""
    changed = copy.deepcopy(config)
    found = getattr(changed.get_text_config(decoder=True), "rope_parameters", None) or {}
    # one scaling for the model, or one for each type of its layers
    scalings = [s for s in (found, *found.values()) if isinstance(s, dict) and s.get("rope_type") == "longrope"]
    outgrown = [s for s in scalings if longest > s.get("original_max_position_embeddings", longest)]
    for scaling in outgrown:
        scaling["short_factor"] = scaling["long_factor"]
    return changed if outgrown else config


def freeze(model: nn.Module) -> None:
    """Keep the frequencies that a model has now, however long a sequence it is given."""
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str):
            module.rope_type = "default"  # type: ignore[assignment]
        elif isinstance(kind, dict):
            module.rope_type = dict.fromkeys(kind, "default")  # type: ignore[assignment]
