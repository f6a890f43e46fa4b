"""Quantized checkpoints, read layer by layer: what schemes.py lists, in the layouts of formats.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from awq_trt.checkpoint.directory import (
    load_tokenizer,
    local_path,
    read_config,
    refuse_adapter,
    special_tokens,
    stored_tensors,
)
from awq_trt.checkpoint.formats import FORMATS, from_parts
from awq_trt.checkpoint.match import Match, check_tokenizer, match, refuse_unexpected
from awq_trt.checkpoint.model import transposed_weights
from awq_trt.checkpoint.names import parameter_readers
from awq_trt.checkpoint.reader import Reader
from awq_trt.checkpoint.report import read_report
from awq_trt.checkpoint.schemes import START_AGAIN, Scheme, find_quantization, read_scheme
from awq_trt.checkpoint.submodels import choose
from awq_trt.errors import AwqTrtError
from awq_trt.layout import DTYPES
from awq_trt.linear import QuantizedLinear


class _Linears(Mapping[str, QuantizedLinear]):
    """Layer name -> QuantizedLinear, read from the file at every access, floats in one dtype."""

    def __init__(
        self, stored: Mapping[str, Reader], layers: Mapping[str, str], scheme: Scheme, dtype: torch.dtype
    ) -> None:
        self._stored, self._layers, self._scheme, self._dtype = stored, layers, scheme, dtype

    def __getitem__(self, name: str) -> QuantizedLinear:
        layer, format = self._layers[name], FORMATS[self._scheme.format]
        keys = {part: f"{layer}.{part}" for part in format.parts + format.optional}
        parts = {part: self._stored[key]() for part, key in keys.items() if key in self._stored}
        linear = from_parts(self._scheme.format, layer, parts, self._scheme.group_size)
        scale = None if linear.pre_scale is None else _rounded(f"{layer}: pre-scale", linear.pre_scale, self._dtype)
        scales = _rounded(f"{layer}: scales", linear.scales, self._dtype)
        return dataclasses.replace(linear, scales=scales, pre_scale=scale)

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
    """A quantized checkpoint on disk; nothing is read before it is asked for."""

    source: str  # what the user named (path or hub id), for messages
    config: transformers.PretrainedConfig  # without its quantization part
    dtype: torch.dtype  # of the activations in the engine
    linears: Mapping[str, QuantizedLinear]  # by layer name
    left_in_float: Mapping[str, str]  # layer name -> why it was not quantized
    report: Mapping[str, Any]  # the file awq_trt.json, {} where another tool wrote the checkpoint
    tokenizer: Any
    scheme: Scheme  # how the layers are stored
    stored: Mapping[str, Reader] = field(repr=False)  # by the tensor's name in the file
    readers: Mapping[str, Reader] = field(repr=False)  # by parameter or buffer, of those that are stored in float
    transposed: frozenset[str] = frozenset()  # as in `Checkpoint`
    generation: Mapping[str, Any] = field(default_factory=dict)  # see `special_tokens`

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
        if name not in self.readers:
            raise AwqTrtError(f"{self.source}: the tensor {name} is missing; download the checkpoint again.")
        return self.readers[name]()


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
    refuse_adapter(path, source)
    quantization = find_quantization(path)
    if quantization is None:
        raise AwqTrtError(f"{source}: config.json does not say how it is quantized.")
    try:
        scheme = read_scheme(quantization)
    except AwqTrtError as error:
        raise AwqTrtError(f"{source}: {error}") from error
    config = read_config(path, source)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    stored = stored_tensors(path, source, "awq_trt" if scheme.method == "awq_trt" else "model")
    matched = match(source, choose(config, source), stored)
    model, submodel = matched.model, matched.submodel
    layers, readers = _layers(matched, stored, scheme.format, source)
    report = read_report(path)
    others = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n not in layers]
    left = report.get("left_in_float") or dict.fromkeys(others, "not quantized in the checkpoint")
    scales = next(part for part in FORMATS[scheme.format].parts if "scale" in part)
    dtypes: tuple[Any, ...] = (stored[f"{next(iter(layers.values()))}.{scales}"].dtype, submodel.config.dtype)
    dtype = next((t for t in dtypes if t in DTYPES.values()), torch.float16)
    tokenizer = load_tokenizer(path)
    check_tokenizer(source, model, tokenizer)
    return QuantizedCheckpoint(
        source,
        submodel.config,
        dtype,
        _Linears(stored, layers, scheme, dtype),
        left,
        report,
        tokenizer,
        scheme,
        stored,
        readers,
        transposed_weights(model),
        special_tokens(path, submodel.config, tokenizer),
    )


def _layers(
    match: Match, stored: Mapping[str, Reader], format: str, source: str
) -> tuple[dict[str, str], dict[str, Reader]]:
    """What the tensors in the file are; none of them is passed over.

    Returns:
        Quantized layer of the model -> its name in the file; parameter or buffer in float -> what reads it.
    """
    model, names, marker = match.model, match.names, FORMATS[format].parts[0]
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    layers: dict[str, str] = {}
    others: set[str] = set()  # quantized layers of the whole model that are not of the part that is taken
    for name in (key.removesuffix(f".{marker}") for key in stored if key.endswith(f".{marker}")):
        found = (names.parameter(f"{name}.weight") or "").removesuffix(".weight")
        if found in linears:
            layers[found] = name
        elif not found and names.whole is not names and names.whole.parameter(f"{name}.weight"):
            others.add(name)
        else:
            raise AwqTrtError(
                f"{source}: the quantized layer {name} is no linear layer of {type(model).__name__} as transformers "
                f"{transformers.__version__} builds it (fused projections or experts, or another model). {START_AGAIN}"
            )
    if not layers:
        raise AwqTrtError(f"{source}: says it is quantized, but no tensor is called *.{marker}; download it again.")
    weights = {f"{layer}.weight" for layer in layers}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        pair = {name, first.setdefault(id(parameter), name)}
        if len(pair) == 2 and pair & weights:
            quantized, *shared = sorted(pair, key=lambda n: (n not in weights, n))
            raise AwqTrtError(
                f"{source}: {quantized} is quantized, and it is the same parameter as {shared[0]}. If the checkpoint "
                'holds both, set "tie_word_embeddings": false in its config.json; else start from the checkpoint '
                "before quantization."
            )
    parts, files = {*FORMATS[format].parts, *FORMATS[format].optional}, {*layers.values(), *others}
    rest = []  # what is no part of a quantized layer
    for key in stored:
        layer, _, part = key.rpartition(".")
        if layer in files and part not in parts | {"bias"}:
            raise AwqTrtError(f"{source}: tensor {key} has no meaning in {format}. {START_AGAIN}")
        if layer not in files and part in parts - {"weight"}:
            raise AwqTrtError(f"{source}: tensor {key} belongs to no quantized linear layer. {START_AGAIN}")
        if layer not in files or (part == "bias" and bool(stored[key]().any())):  # AutoGPTQ writes a bias of zeros
            rest.append(key)
    floats = {name: place for name, place in match.found.items() if name not in weights}
    if missing := [n for n, _ in model.named_parameters() if n not in weights and n not in floats]:
        raise AwqTrtError(f"{source}: the tensor {missing[0]} is missing; download the checkpoint again.")
    refuse_unexpected(source, match, stored, rest)
    return layers, parameter_readers(source, model, floats, stored)
