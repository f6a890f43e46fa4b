"""Quantized checkpoints, read layer by layer: what schemes.py lists, in the layouts of formats.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from awq_trt.checkpoint.directory import (
    load_tokenizer,
    local_path,
    read_json,
    safetensors_index,
    special_tokens,
)
from awq_trt.checkpoint.formats import OPTIONAL_PARTS, PARTS, from_parts
from awq_trt.checkpoint.model import empty_model, transposed_weights
from awq_trt.checkpoint.names import Place
from awq_trt.checkpoint.quantized_names import match_floats, match_layers
from awq_trt.checkpoint.schemes import START_AGAIN, Scheme, find_quantization, read_scheme
from awq_trt.checkpoint.submodels import choose
from awq_trt.errors import AwqTrtError
from awq_trt.layout import DTYPES
from awq_trt.linear import QuantizedLinear

REPORT = "awq_trt.json"
"""Beside the weights: settings, what the search found per layer, and why layers stayed in float."""


class _Linears(Mapping[str, QuantizedLinear]):
    """Layer name -> QuantizedLinear, read from the file at every access, floats in one dtype."""

    def __init__(
        self, files: Mapping[str, Path], layers: Mapping[str, str], scheme: Scheme, dtype: torch.dtype
    ) -> None:
        self._files, self._layers, self._scheme, self._dtype = files, layers, scheme, dtype

    def __getitem__(self, name: str) -> QuantizedLinear:
        stored, format = self._layers[name], self._scheme.format
        wanted = PARTS[format] + OPTIONAL_PARTS.get(format, ())
        parts = {p: read_tensor(self._files, f"{stored}.{p}") for p in wanted if f"{stored}.{p}" in self._files}
        layer = from_parts(format, stored, parts, self._scheme.group_size)
        scale = None if layer.pre_scale is None else _rounded(f"{stored}: pre-scale", layer.pre_scale, self._dtype)
        scales = _rounded(f"{stored}: scales", layer.scales, self._dtype)
        return dataclasses.replace(layer, scales=scales, pre_scale=scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def _rounded(what: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """ModelOpt stores its scales in fp32; the kernels multiply in 16 bits."""
    rounded = tensor.to(dtype)
    if not torch.isfinite(rounded).all():
        raise AwqTrtError(f"{what}: {float(tensor.abs().max()):.4g} overflows {dtype}. {START_AGAIN}")
    return rounded


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A quantized checkpoint on disk; nothing is read before it is asked for.

    Attributes:
        source, config, dtype, tokenizer: as in `Checkpoint`; the configuration without its quantization part.
        linears: layer name -> QuantizedLinear. left_in_float: layer name -> why it was not quantized.
        report: the file awq_trt.json, {} where another tool wrote the checkpoint.
        scheme: how the layers are stored. files: tensor name in the file -> file.
        names: parameter or buffer of the model that is stored in float -> where it is in the file.
        generation: see `checkpoint.special_tokens`.
    """

    source: str
    config: transformers.PretrainedConfig
    dtype: torch.dtype
    linears: Mapping[str, QuantizedLinear]
    left_in_float: Mapping[str, str]
    report: Mapping[str, Any]
    tokenizer: Any
    scheme: Scheme
    files: Mapping[str, Path] = field(repr=False)
    names: Mapping[str, Place] = field(repr=False)
    transposed: frozenset[str] = frozenset()
    generation: Mapping[str, Any] = field(default_factory=dict)

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter of the model; a quantized weight as the fp32 product dequant(Q) * pre_scale, [N, K].

        Raises:
            AwqTrtError: it is not in the checkpoint.
        """
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in self.linears:
            linear = self.linears[layer]
            weight = linear.dequantize().float()
            return weight if linear.pre_scale is None else weight * linear.pre_scale.float()
        if name not in self.names:
            raise AwqTrtError(f"{self.source}: the tensor {name} is missing; download the checkpoint again.")
        place = self.names[name]
        tensor = read_tensor(self.files, place.key)
        if place.part is not None:
            return place.part.of(tensor[place.part.expert])
        return tensor.t().contiguous() if name in self.transposed else tensor


def read_tensor(files: Mapping[str, Path], name: str) -> torch.Tensor:
    """Read one tensor from the safetensors file it is in."""
    with safe_open(str(files[name]), framework="pt") as handle:
        tensor: torch.Tensor = handle.get_tensor(name)
    return tensor


def is_quantized(directory: Path | str) -> bool:
    """True for a directory, or a hub id, whose configuration files say that it is quantized."""
    return find_quantization(local_path(directory)) is not None


def open_quantized(directory: Path | str) -> QuantizedCheckpoint:
    """Open a checkpoint that is quantized already, by this package or by another tool.

    Raises:
        AwqTrtError: a quantization that the kernels cannot run or that is not known; missing or truncated files;
            tensors that the model of the configuration has no place for.
    """
    path, source = local_path(directory), str(directory)
    quantization = find_quantization(path)
    if quantization is None:
        raise AwqTrtError(f"{source}: config.json does not say how it is quantized.")
    try:
        scheme = read_scheme(quantization)
    except AwqTrtError as error:
        raise AwqTrtError(f"{source}: {error}") from error
    config = transformers.AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    submodel = choose(config, source)
    config = submodel.config
    files = safetensors_index(path, source, "awq_trt" if scheme.method == "awq_trt" else "model")
    model = empty_model(config)
    layers = match_layers(model, files, scheme.format, source, submodel)
    report = read_json(path / REPORT) if (path / REPORT).exists() else {}
    others = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n not in layers]
    left = report.get("left_in_float") or dict.fromkeys(others, "not quantized in the checkpoint")
    dtype = _dtype(files, layers, scheme, config)
    tokenizer = load_tokenizer(path)
    return QuantizedCheckpoint(
        source,
        config,
        dtype,
        _Linears(files, layers, scheme, dtype),
        left,
        report,
        tokenizer,
        scheme,
        files,
        match_floats(model, files, layers, source, submodel),
        transposed_weights(model),
        special_tokens(path, config, tokenizer),
    )


def _dtype(
    files: Mapping[str, Path], layers: Mapping[str, str], scheme: Scheme, config: transformers.PretrainedConfig
) -> torch.dtype:
    """The dtype of the scales, if it is one of activations; else the configuration's, or float16."""
    part = next(part for part in PARTS[scheme.format] if "scale" in part)
    stored = read_tensor(files, f"{next(iter(layers.values()))}.{part}").dtype
    return next((t for t in DTYPES.values() if t == stored), None) or next(
        (t for t in DTYPES.values() if t == config.dtype), torch.float16
    )
