"""What a GGUF file says of the computation that transformers' configuration for it does not take from there.

A key of the file is read by transformers (its `GGUF_CONFIG_MAPPING`), or it says what the configuration says anyway (a
default of the family), or it is a scaling of the rotary embedding, which is put into the configuration. Any other key
that is not known to be harmless is refused by name: the model would compute something else.

Source of the keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import transformers
from transformers.integrations import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, get_gguf_config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from awq_trt.errors import AwqTrtError

OTHER_NAMES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss", "minimax-m2": "minimax_m2"}
"""Architecture -> its name in transformers' table, where that is another."""

HARMLESS = ("context_length", "vocab_size", "block_count", "tensor_data_layout", "rope.scaling.finetuned")
"""Keys that say nothing of the computation of a causal language model, or what its tensors say, too."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "use_parallel_residual": ("use_parallel_residual",),
}
"""Key -> the attribute of a configuration that has to say the same; the first that it has."""


def complete_config(
    source: str, config: transformers.PretrainedConfig, metadata: dict[str, Any], rope_freqs: np.ndarray | None
) -> None:
    """Put the scaling of the rotary embedding into a configuration, and compare the rest of a file's keys with it.

    Args:
        config: as transformers makes it of the file. metadata: the file's keys. rope_freqs: fp32 [head_dim / 2], what
            rotary frequencies are divided by; None where the file has no such tensor.

    Raises:
        AwqTrtError: a key, or a scaling, that the configuration cannot say.
    """
    architecture = metadata["general.architecture"]
    prefix = f"{architecture}."
    keys = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    scaling = {key: keys.pop(key) for key in list(keys) if key.startswith("rope.scaling.") and key not in HARMLESS}
    if scaling.get("rope.scaling.type", "none") != "none":
        _scale(source, config, prefix, scaling)
    if rope_freqs is not None:
        _scale_frequencies(source, config, rope_freqs)
    for key, value in keys.items():
        if key in HARMLESS or key in _read_by_transformers(architecture, metadata):
            continue
        implied = _implied(config, key)
        if implied is None or not _same(implied, value):
            says = "knows no such thing" if implied is None else f"has {implied}"
            raise AwqTrtError(
                f"{source}: its key {prefix}{key} is {value}, which transformers {transformers.__version__} does not "
                "read "
                f"from GGUF: its {type(config).__name__} {says}, so that the model would be another one. Take the "
                "safetensors of this model."
            )


def _read_by_transformers(architecture: str, metadata: dict[str, Any]) -> set[str]:
    """The keys, without the architecture before them, that become part of the configuration."""
    if architecture in GGUF_CONFIG_ARCHS:
        seen = _Seen(metadata)
        get_gguf_config(seen, ())
        return {key.removeprefix(f"{architecture}.") for key in seen.keys_read}
    tables: dict[str, Any] = dict(GGUF_CONFIG_MAPPING)
    table = tables.get(OTHER_NAMES.get(architecture, architecture), {})
    return {key for key, name in table.items() if name is not None}


class _Seen(dict[str, Any]):
    """A dict that notes what is asked of it."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read.add(key)
        return super().get(key, default)


def _implied(config: Any, key: str) -> Any:
    """What a configuration says of a key; None where it says nothing."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = _rope(config)
    if key in ("attention.key_length", "attention.value_length"):
        return width
    if key in ("attention.key_length_swa", "attention.value_length_swa"):
        return width
    if key in ("rope.dimension_count", "rope.dimension_count_swa"):
        return int(width * rope.get("partial_rotary_factor", 1.0))
    if key == "rope.freq_base":
        return rope.get("rope_theta")
    if key == "rope.freq_base_swa":
        return (config.rope_parameters.get("sliding_attention") or {}).get("rope_theta")
    if key in ("rope.scale_linear", "attention.causal"):
        return 1
    if key == "attention.scale":
        return (getattr(config, "query_pre_attn_scalar", None) or width) ** -0.5
    if key == "feed_forward_length" and getattr(config, "n_inner", 0) is None:
        return 4 * config.hidden_size
    if key == "attention.sliding_window" and getattr(config, "sliding_window", None) is None:
        return 0
    return next((getattr(config, name) for name in ATTRIBUTES.get(key, ()) if hasattr(config, name)), None)


def _same(a: Any, b: Any) -> bool:
    numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
    return math.isclose(a, b, rel_tol=1e-5) if numbers else bool(a == b)


def _rope(config: Any) -> dict[str, Any]:
    """The rotary embedding of a configuration; of Gemma 3 that of the layers with full attention."""
    found = getattr(config, "rope_parameters", None) or {}
    return dict(found.get("full_attention") or found)


def _set_rope(config: Any, scaling: dict[str, Any]) -> None:
    new = _rope(config) | scaling
    nested = "full_attention" in config.rope_parameters
    config.rope_parameters = {**config.rope_parameters, "full_attention": new} if nested else new


def _scale(source: str, config: Any, prefix: str, scaling: dict[str, Any]) -> None:
    """A scaling in the file's keys: linear, or YaRN (https://arxiv.org/abs/2309.00071) with its usual attention factor.
    convert_hf_to_gguf.py writes them from the same numbers that config.json has."""
    kind, factor = scaling.pop("rope.scaling.type"), scaling.pop("rope.scaling.factor", None)
    new: dict[str, Any] = {"rope_type": kind, "factor": factor}
    original = scaling.pop("rope.scaling.original_context_length", None)
    if kind == "yarn":
        new["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            if (value := scaling.pop(f"rope.scaling.yarn_{name}", None)) is not None:
                new[name] = value
        for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
            if scaling.get(f"rope.scaling.{name}", 1.0) == 1.0:
                scaling.pop(f"rope.scaling.{name}", None)
    nested = "full_attention" in (getattr(config, "rope_parameters", None) or {})
    known = kind == "linear" or (kind == "yarn" and not nested)
    if not known or None in new.values() or scaling:
        raise AwqTrtError(
            f"{source}: the scaling of its rotary embedding ({prefix}rope.scaling.type {kind!r}"
            f"{''.join(f', {key}' for key in scaling)}) is not one that is read from GGUF. Take the safetensors of "
            "this "
            "model."
        )
    _set_rope(config, new)


def _scale_frequencies(source: str, config: Any, divisors: np.ndarray) -> None:
    """The scaling of Llama 3.1 and later, of which llama.cpp stores what it does to each frequency.

    With low_freq_factor 1 and high_freq_factor 4, as all of them have, a wavelength w between original / 4 and original
    is divided by 1 / ((1 - s) / factor + s) with s = (original / w - 1) / 3, which is solved for `original` here.

    Raises:
        AwqTrtError: no such scaling gives these divisors.
    """
    values = divisors.astype(np.float64).flatten()
    theta, factor = _rope(config)["rope_theta"], float(values.max())
    if np.allclose(values, 1):
        return
    lengths = 2 * np.pi * theta ** (np.arange(len(values)) / len(values))
    between = (values > 1.0001) & (values < factor * 0.9999)
    smooth = (1 / values - 1 / factor) / (1 - 1 / factor)
    found = lengths[between] * (3 * smooth[between] + 1)
    original = round(float(np.median(found))) if between.any() else round(float(lengths[values == factor].min()) * 0.99)
    _set_rope(
        config,
        {
            "rope_type": "llama3",
            "factor": round(factor, 4),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        },
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    expected = torch.from_numpy(2 * np.pi / (lengths * values)).float()
    if frequencies.shape != expected.shape or not torch.allclose(frequencies, expected, rtol=1e-4, atol=0):
        raise AwqTrtError(
            f"{source}: the tensor rope_freqs.weight scales the rotary embedding in a way that is not that of Llama "
            "3, and "
            "is not read from GGUF. Take the safetensors of this model."
        )
