"""Quantized checkpoints on disk: Hugging Face directories, written block by block and read layer by layer.

Read: what schemes.py lists, in the layouts of formats.py. Written: AutoAWQ's GEMM layout ("awq")
and compressed-tensors' pack-quantized ("compressed-tensors").

AutoAWQ's format cannot carry a pre-scale, and transformers' loader for it skips the Conv1D layers of a GPT-2 and every
head. A directory that has one of them in INT4 is marked quant_method "awq_trt" and its files are not called model-*, so
that other loaders refuse it instead of computing something else (transformers only warns of an unknown method and goes
on with random weights). compressed-tensors has no such way out: what it cannot carry is refused. It does carry heads.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from awq_trt.checkpoint.directory import (
    GENERATION,
    load_tokenizer,
    local_path,
    read_json,
    safetensors_index,
    special_tokens,
)
from awq_trt.checkpoint.formats import OPTIONAL_PARTS, PARTS, from_parts, to_parts
from awq_trt.checkpoint.model import empty_model, transposed_weights
from awq_trt.checkpoint.names import Place
from awq_trt.checkpoint.quantized_names import match_floats, match_layers
from awq_trt.checkpoint.reader import Checkpoint
from awq_trt.checkpoint.safetensors import Stored, read_header, write_safetensors
from awq_trt.checkpoint.schemes import START_AGAIN, Scheme, find_quantization, read_scheme
from awq_trt.checkpoint.submodels import choose
from awq_trt.errors import AwqTrtError
from awq_trt.layout import DTYPES
from awq_trt.linear import QuantizedLinear

REPORT = "awq_trt.json"
"""Beside the weights: settings, what the search found per layer, and why layers stayed in float."""

SAVE_FORMATS = {"awq": "awq-gemm", "compressed-tensors": "pack-quantized"}
"""What a checkpoint can be saved as -> the layout of its layers."""

CARRY_PRE_SCALES = ("awq",)
"""Those of them that hold a pre-scale, if only for this package to read."""


class Writer:
    """Writes a quantized checkpoint into a directory, one shard per label, in any order and by any number of runs.

    A shard is there whole or not at all, so a run that was killed goes on with those that are missing (`has`).

    Args:
        save_format: a key of SAVE_FORMATS.

    Raises:
        AwqTrtError: the format cannot hold this model.
    """

    def __init__(self, directory: Path, checkpoint: Checkpoint, save_format: str = "awq") -> None:
        self.directory = directory
        self.checkpoint = checkpoint
        self.save_format = save_format
        if save_format not in SAVE_FORMATS:
            raise AwqTrtError(f"save format {save_format!r} is not one of {', '.join(SAVE_FORMATS)}.")
        if save_format == "compressed-tensors" and checkpoint.transposed:
            raise AwqTrtError(
                f"{checkpoint.source}: this model has Conv1D layers, which transformers does not look for in a "
                "compressed-tensors checkpoint; save with --save-format awq."
            )
        directory.mkdir(parents=True, exist_ok=True)

    def has(self, label: str) -> bool:
        """Whether this shard is already written."""
        return any((self.directory / f"{stem}{label}.safetensors").exists() for stem in ("", "model-", "awq_trt-"))

    def add(self, label: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one shard. Floats become the checkpoint's dtype, Conv1D weights [in, out] again, and names become those
        that transformers writes (`Checkpoint.keys`).

        Args:
            label: names the shard, unique in this checkpoint: "outside", "block-00007".

        Raises:
            AwqTrtError: a value is NaN or Inf, or too large for the dtype.
        """
        stored = {
            self._key(name): Stored(
                tensor.t() if name in self.checkpoint.transposed else tensor,
                self.checkpoint.dtype if tensor.is_floating_point() else tensor.dtype,
            )
            for name, tensor in tensors.items()
        }
        try:
            write_safetensors(self.directory / f"{label}.safetensors", stored)
        except AwqTrtError as error:
            raise AwqTrtError(f"{self.checkpoint.source}: {error}") from error

    def _key(self, name: str) -> str:
        """What a parameter, or a part of a quantized one, is called in the file."""
        keys = self.checkpoint.keys
        layer, _, part = name.rpartition(".")
        whole = keys.get(f"{layer}.weight", f"{layer}.weight")
        return keys.get(name, f"{whole.removesuffix('.weight')}.{part}")

    def add_block(
        self, label: str, name: str, tensors: Mapping[str, torch.Tensor], layers: Mapping[str, QuantizedLinear]
    ) -> None:
        """Write one block, or a part of the model that is in none.

        Args:
            name: of the block ("model.layers.7"), or "" for the model. tensors: its parameters in float, by their names
                in the block; the weights of `layers` among them are left out. layers: name in the block -> quantized
                layer.

        Raises:
            AwqTrtError: as `add`; a pre-scale that the format cannot carry.
        """
        prefix = f"{name}." if name else ""
        out = {prefix + n: t for n, t in tensors.items() if n.removesuffix(".weight") not in layers}
        for layer, value in layers.items():
            parts = to_parts(SAVE_FORMATS[self.save_format], value)
            out |= {f"{prefix}{layer}.{part}": tensor for part, tensor in parts.items()}
        self.add(label, out)

    def finish(self, group_size: int, symmetric: bool, report: dict[str, Any]) -> None:
        """Name the shards, write configuration, tokenizer, report and, last, the index. May be repeated.

        What the index holds is read from the shards that lie in the directory, whichever run wrote them.
        """
        shards = sorted(self.directory.glob("*.safetensors"))
        headers = {shard: read_header(shard) for shard in shards}
        parts = {name.rpartition(".")[2] for header in headers.values() for name in header}
        unusual = "pre_scale" in parts or bool(self.checkpoint.transposed) or report.get("lm_head") == "int4"
        ours = self.save_format == "awq" and unusual
        left = sorted(report["left_in_float"])
        config = copy.deepcopy(self.checkpoint.config)
        config.dtype = self.checkpoint.dtype
        if self.save_format == "awq":
            config.quantization_config = awq_config("awq_trt" if ours else "awq", group_size, left)
        else:
            config.quantization_config = compressed_tensors_config(group_size, symmetric, left)
        config.save_pretrained(self.directory)
        if self.checkpoint.tokenizer is not None:
            self.checkpoint.tokenizer.save_pretrained(self.directory)
        generation = [f.parent / GENERATION for f in self.checkpoint.files[:1]]
        if generation and generation[0].is_file():
            shutil.copyfile(generation[0], self.directory / GENERATION)
        (self.directory / REPORT).write_text(json.dumps(report, indent=1))
        stem = "awq_trt" if ours else "model"
        weight_map: dict[str, str] = {}
        size = 0
        for shard, header in headers.items():
            target = shard.name if shard.name.startswith(f"{stem}-") else f"{stem}-{shard.name}"
            shard.rename(self.directory / target)
            weight_map |= dict.fromkeys(header, target)
            size += sum(entry.bytes for entry in header.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (self.directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))


def awq_config(method: str, group_size: int, left_in_float: list[str]) -> dict[str, Any]:
    """`quantization_config` of a checkpoint in AutoAWQ's GEMM layout.

    Layers in float are given by their whole names: transformers compares to the end of a component, vLLM looks for them
    anywhere in a name.
    """
    return {
        "quant_method": method,
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": left_in_float or None,
    }


def compressed_tensors_config(group_size: int, symmetric: bool, left_in_float: list[str]) -> dict[str, Any]:
    """`quantization_config` of a pack-quantized checkpoint, with the fields that every version of its readers knows."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": left_in_float,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


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
