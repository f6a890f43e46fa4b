"""What a checkpoint says of its quantization: the layout of its layers (formats.py), or why it is not read.

Where it says so: `quantization_config` in config.json (everyone), hf_quant_config.json (ModelOpt, alone or beside it),
quantize_config.json (AutoGPTQ before it wrote config.json), quant_config.json (AutoAWQ likewise).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from awq_trt.checkpoint.config import config_json
from awq_trt.errors import AwqTrtError
from awq_trt.schema import Name, check, read_json

START_AGAIN = "Start from the checkpoint before quantization."


GroupSize = Annotated[int, Field(ge=-1, le=2**20)]


class Weights(TypedDict, total=False):
    """Of a config group of compressed-tensors."""

    num_bits: int | None
    type: Name


class ConfigGroup(TypedDict, total=False):
    """Of compressed-tensors."""

    weights: Weights | None
    format: Name | None
    input_activations: dict[str, Any] | None
    output_activations: dict[str, Any] | None


class Rotations(TypedDict, total=False):
    """`transform_config` of compressed-tensors."""

    config_groups: dict[Name, Any] | None


class Quantization(TypedDict, total=False):
    """What is read of `quantization_config`, whoever wrote it, and of the files that stand for it."""

    quant_method: Name | None
    bits: int | None
    group_size: GroupSize | None
    version: Name | None
    format: Name | None
    checkpoint_format: Name | None
    is_marlin_format: bool | None
    dynamic: dict[Name, dict[str, Any] | None] | None
    transform_config: Rotations | None
    config_groups: dict[Name, ConfigGroup | list[Any]] | None
    quant_algo: Name | None
    quantized_layers: dict[Name, dict[str, Any]] | None


class OldAutoAwq(TypedDict, total=False):
    """quant_config.json."""

    w_bit: int | None
    q_group_size: GroupSize | None


class ModelOptFile(TypedDict, total=False):
    """hf_quant_config.json."""

    quantization: dict[str, Any] | None


@dataclass(frozen=True)
class Scheme:
    """How the layers of a checkpoint are stored."""

    method: str  # its quant_method
    format: str  # a key of formats.FORMATS
    group_size: int | None  # -1 for the whole row, None where the configuration does not say (the tensors do)


def find_quantization(directory: Path) -> dict[str, Any] | None:
    """The quantization part of a checkpoint's configuration, with "quant_method"; None where there is none.

    Raises:
        AwqTrtError: a file is not readable as JSON, or of other types than those that are read.
    """
    if not (directory / "config.json").exists():
        return None
    found: dict[str, Any] = config_json(directory / "config.json").get("quantization_config") or {}
    check(found, Quantization, f"{directory / 'config.json'}, quantization_config")
    modelopt, gptq, awq = (
        directory / f"{stem}.json" for stem in ("hf_quant_config", "quantize_config", "quant_config")
    )
    if modelopt.exists() and found.get("quant_method", "modelopt") == "modelopt":
        whole = {"quant_method": "modelopt"} | (read_json(modelopt, ModelOptFile).get("quantization") or {}) | found
        return check(whole, Quantization, str(modelopt))
    if not found and gptq.exists():
        return {"quant_method": "gptq"} | read_json(gptq, Quantization)
    if not found and awq.exists():
        old = read_json(awq, OldAutoAwq)
        whole = {"quant_method": "awq", "bits": old.get("w_bit"), "group_size": old.get("q_group_size")} | old
        return check(whole, Quantization, str(awq))
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
    _require(method == "modelopt", f"quant_method {method!r} is not read; awq, gptq, compressed-tensors, modelopt are")
    return _modelopt(quantization)


def _awq(method: str, quantization: dict[str, Any]) -> Scheme:
    _require_four_bits(method, quantization.get("bits"))
    version = next((quantization[k] for k in ("version", "format", "checkpoint_format") if quantization.get(k)), "gemm")
    layout = str(version).lower()
    read = layout in ("gemm", "gemv", "gemv_fast")
    _require(read, f"AWQ in the layout {version!r}; gemm, gemv and gemv_fast are read")
    return Scheme(method, f"awq-{layout}", quantization.get("group_size"))


def _gptq(quantization: dict[str, Any]) -> Scheme:
    _require_four_bits("gptq", quantization.get("bits"))
    adapter = quantization.get("adapter")
    _require(not adapter, "GPTQ with an adapter (a low-rank correction), which is not read")
    for pattern, rule in (quantization.get("dynamic") or {}).items():
        _require_four_bits(f"gptq, layers {pattern!r} (dynamic)", (rule or {}).get("bits", 4))
    format = "marlin" if quantization.get("is_marlin_format") else None
    format = format or quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    _require(format in ("gptq", "gptq_v2"), f"GPTQ in the layout {format!r}; gptq and gptq_v2 are read")
    return Scheme("gptq", str(format), quantization.get("group_size"))


def _compressed_tensors(quantization: dict[str, Any]) -> Scheme:
    _require_float_cache(quantization, "kv_cache_scheme")
    rotations = (quantization.get("transform_config") or {}).get("config_groups") or {}
    _require(not rotations, f"compressed-tensors with rotations ({', '.join(rotations)})")
    for name, group in (quantization.get("config_groups") or {}).items():
        if not isinstance(group, dict):  # a preset: name -> targets
            group = {"weights": {"num_bits": 4} if name in ("W4A16", "W4A16_ASYM") else {"num_bits": name}}
        where, weights = f"compressed-tensors, config group {name!r}", group.get("weights") or {}
        format = group.get("format") or quantization.get("format")
        packed = format in ("pack-quantized", "mixed-precision", None)
        _require(packed, f"{where} has the format {format!r}; pack-quantized is read")
        kind = weights.get("type", "int")
        _require(kind == "int", f"{where} has weights of type {kind!r}; the kernels take integers")
        _require_four_bits(where, weights.get("num_bits"))
        for part in ("input_activations", "output_activations"):
            _require(not group.get(part), f"{where} quantizes {part}; the kernels take 16-bit activations")
    return Scheme("compressed-tensors", "pack-quantized", None)


def _modelopt(quantization: dict[str, Any]) -> Scheme:
    _require_float_cache(quantization, "kv_cache_quant_algo")
    _require_float_cache(quantization, "kv_cache_scheme")
    for layer, found in (quantization.get("quantized_layers") or {"every layer": quantization}).items():
        algorithm = found.get("quant_algo")
        _require(algorithm == "W4A16_AWQ", f"ModelOpt's quant_algo {algorithm!r} ({layer}) is not read; W4A16_AWQ is")
    return Scheme("modelopt", "modelopt", quantization.get("group_size"))


def _require(holds: bool, trouble: str) -> None:
    if not holds:
        raise AwqTrtError(f"{trouble}. {START_AGAIN}")


def _require_four_bits(where: str, bits: Any) -> None:
    _require(bits == 4, f"{where}: {bits} bits; the kernels take 4")


def _require_float_cache(quantization: dict[str, Any], key: str) -> None:
    if scheme := quantization.get(key):
        raise AwqTrtError(
            f"the KV cache is quantized too ({key} {scheme}), which the engine does not do. Remove {key} from the "
            "configuration to run with a 16-bit cache, or start from the checkpoint before quantization."
        )
