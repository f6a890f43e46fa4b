"""Rotary frequencies that depend on how long a sequence is, resolve_longrope before a model is traced.

Longrope (Phi-3; Ding et al., https://arxiv.org/abs/2402.13753) has two sets of frequencies, and transformers changes to
the long ones when a sequence outgrows the positions the model was first trained for. Keys in a cache cannot change with
it, so an engine has to choose once: the long ones where its cache has room for such sequences, as vLLM does, else
the short ones. "Dynamic" scaling changes beyond max_position_embeddings only, where no cache reaches.
"""

from __future__ import annotations

import copy
from typing import Any

import transformers
from torch import nn


def resolve_longrope(config: transformers.PretrainedConfig, longest: int) -> transformers.PretrainedConfig:
    """The configuration for an engine with sequences of up to `longest` tokens: a copy if it is to be another one."""
    changed = copy.deepcopy(config)
    scalings = [s for s in _scalings(changed) if longest > s.get("original_max_position_embeddings", longest)]
    for scaling in scalings:
        scaling["short_factor"] = scaling["long_factor"]
    return changed if scalings else config


def _scalings(config: transformers.PretrainedConfig) -> list[dict[str, Any]]:
    """Every longrope scaling in a configuration: one for the model, or one for each type of its layers."""
    found = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    each = [found, *(value for value in found.values() if isinstance(value, dict))]
    return [scaling for scaling in each if scaling.get("rope_type") == "longrope"]


def freeze(model: nn.Module) -> None:
    """Keep the frequencies that a model has now, however long a sequence it is given."""
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str):
            module.rope_type = "default"  # type: ignore[assignment]
        elif isinstance(kind, dict):
            module.rope_type = dict.fromkeys(kind, "default")  # type: ignore[assignment]
