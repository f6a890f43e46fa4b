"""What a checkpoint says of its quantization: the layout of its layers (formats.py), or why it is not read.

Where it says so: `quantization_config` in config.json (everyone), hf_quant_config.json (ModelOpt, alone or beside it),
quantize_config.json (AutoGPTQ before it wrote config.json), quant_config.json (AutoAWQ likewise).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awq_trt.checkpoint.directory import read_json
from awq_trt.errors import AwqTrtError

START_AGAIN = "Start from the checkpoint before quantization."


@dataclass(frozen=True)
class Scheme:
    """How the layers of a checkpoint are stored."""

    method: str  # its quant_method
    format: str  # a key of formats.FORMATS
    group_size: int | None  # -1 for the whole row, None where the configuration does not say (the tensors do)


def find_quantization(directory: Path) -> dict[str, Any] | None:
    """The quantization part of a checkpoint's configuration, with "quant_method"; None where there is none.

    Raises:
        AwqTrtError: a file is not readable as JSON.
    """
    if not (directory / "config.json").exists():
        return None
    found: dict[str, Any] = read_json(directory / "config.json").get("quantization_config") or {}
    modelopt, gptq, awq = (
        directory / f"{stem}.json" for stem in ("hf_quant_config", "quantize_config", "quant_config")
    )
    if modelopt.exists() and found.get("quant_method", "modelopt") == "modelopt":
        return {"quant_method": "modelopt"} | (read_json(modelopt).get("quantization") or {}) | found
    if not found and gptq.exists():
        return {"quant_method": "gptq"} | read_json(gptq)
    if not found and awq.exists():
        old = read_json(awq)
        return {"quant_method": "awq", "bits": old.get("w_bit"), "group_size": old.get("q_group_size")} | old
    return found or None


def read_scheme(quantization: dict[str, Any]) -> Scheme:
    """The layout that a quantization configuration stands for.

    Raises:
        AwqTrtError: a method, format, bit width or activation quantization that is not read, named.
    """
    method = str(quantization.get("quant_method"))
    if method in ("awq", "awq_trt"):
        return _awq(method, quantization)
    if method == "gptq":
        return _gptq(quantization)
    if method == "compressed-tensors":
        return _compressed_tensors(quantization)
    if method == "modelopt":
        return _modelopt(quantization)
    raise AwqTrtError(
        f"quant_method {method!r} is not read; awq, gptq, compressed-tensors and modelopt are. {START_AGAIN}"
    )


def _awq(method: str, quantization: dict[str, Any]) -> Scheme:
    _four_bits(method, quantization.get("bits"))
    version = next((quantization[k] for k in ("version", "format", "checkpoint_format") if quantization.get(k)), "gemm")
    if str(version).lower() not in ("gemm", "gemv", "gemv_fast"):
        raise AwqTrtError(f"AWQ in the layout {version!r}; gemm, gemv and gemv_fast are read. {START_AGAIN}")
    return Scheme(method, f"awq-{str(version).lower()}", quantization.get("group_size"))


def _gptq(quantization: dict[str, Any]) -> Scheme:
    _four_bits("gptq", quantization.get("bits"))
    if quantization.get("adapter"):
        raise AwqTrtError(f"GPTQ with an adapter (a low-rank correction), which is not read. {START_AGAIN}")
    for pattern, rule in (quantization.get("dynamic") or {}).items():
        _four_bits(f"gptq, layers {pattern!r} (dynamic)", (rule or {}).get("bits", 4))
    format = "marlin" if quantization.get("is_marlin_format") else None
    format = format or quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if format not in ("gptq", "gptq_v2"):
        raise AwqTrtError(f"GPTQ in the layout {format!r}; gptq and gptq_v2 are read. {START_AGAIN}")
    return Scheme("gptq", str(format), quantization.get("group_size"))


def _compressed_tensors(quantization: dict[str, Any]) -> Scheme:
    _no_cache_scheme(quantization.get("kv_cache_scheme"), "kv_cache_scheme")
    if (transforms := quantization.get("transform_config") or {}).get("config_groups"):
        raise AwqTrtError(
            f"compressed-tensors with rotations ({', '.join(transforms['config_groups'])}). {START_AGAIN}"
        )
    for name, group in (quantization.get("config_groups") or {}).items():
        if not isinstance(group, dict):  # a preset: name -> targets
            group = {"weights": {"num_bits": 4} if name in ("W4A16", "W4A16_ASYM") else {"num_bits": name}}
        where = f"compressed-tensors, config group {name!r}"
        format = group.get("format") or quantization.get("format")
        if format not in ("pack-quantized", "mixed-precision", None):
            raise AwqTrtError(f"{where} has the format {format!r}; pack-quantized is read. {START_AGAIN}")
        weights = group.get("weights") or {}
        if weights.get("type", "int") != "int":
            raise AwqTrtError(
                f"{where} has weights of type {weights['type']!r}; the kernels take integers. {START_AGAIN}"
            )
        _four_bits(where, weights.get("num_bits"))
        for part in ("input_activations", "output_activations"):
            if group.get(part):
                raise AwqTrtError(f"{where} quantizes {part}; the kernels take 16-bit activations. {START_AGAIN}")
    return Scheme("compressed-tensors", "pack-quantized", None)


def _modelopt(quantization: dict[str, Any]) -> Scheme:
    cache = quantization.get("kv_cache_quant_algo") or quantization.get("kv_cache_scheme")
    _no_cache_scheme(cache, "kv_cache_quant_algo")
    layers = quantization.get("quantized_layers") or {"every layer": quantization}
    for layer, found in layers.items():
        if found.get("quant_algo") != "W4A16_AWQ":
            raise AwqTrtError(
                f"ModelOpt's quant_algo {found.get('quant_algo')!r} ({layer}) is not read; W4A16_AWQ is. {START_AGAIN}"
            )
    return Scheme("modelopt", "modelopt", quantization.get("group_size"))


def _four_bits(where: str, bits: Any) -> None:
    if bits != 4:
        raise AwqTrtError(f"{where}: {bits} bits; the kernels take 4. {START_AGAIN}")


def _no_cache_scheme(scheme: Any, key: str) -> None:
    if scheme:
        raise AwqTrtError(
            f"the KV cache is quantized too ({key} {scheme}), which the engine does not do. Remove {key} from the "
            "configuration to run with a 16-bit cache, or start from the checkpoint before quantization."
        )
