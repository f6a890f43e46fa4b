"""Quantized checkpoints on disk: a Hugging Face directory in AutoAWQ's GEMM layout, written and read block by block.

AutoAWQ GEMM layout (its WQLinear_GEMM): for a layer of N outputs and K inputs, group size g, G = K / g
    <layer>.qweight  int32 [K, N/8]   8 outputs a word, nibble i is output 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]
    <layer>.qzeros   int32 [G, N/8]   the same order
    <layer>.scales   fp16 or bf16 [G, N]
A layer with a pre-scale also has `<layer>.pre_scale` [K], which AutoAWQ's format cannot carry: such a directory is
marked quant_method "awq_trt" and its files are not called model-*, so that other loaders refuse it instead of computing
something else (transformers only warns of an unknown method and goes on with random weights).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open

from awq_trt.checkpoint import (
    Checkpoint,
    empty_model,
    load_tokenizer,
    read_json,
    safetensors_index,
    transposed_weights,
)
from awq_trt.errors import AwqTrtError
from awq_trt.linear import SYMMETRIC_ZERO, QuantizedLinear
from awq_trt.safetensors_file import Stored, read_header, write_safetensors

NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
REPORT = "awq_trt.json"
"""Beside the weights: settings, what the search found per layer, and why layers stayed in float."""


def pack_nibbles(values: np.ndarray) -> np.ndarray:
    """uint8 [R, N], values 0..15, N a multiple of 8 -> int32 [R, N/8] in AutoAWQ's order."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for i, column in enumerate(NIBBLE_ORDER):
        words |= values[:, column::8].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def unpack_nibbles(words: np.ndarray) -> np.ndarray:
    """Inverse of `pack_nibbles`: int32 [R, N/8] -> uint8 [R, N]."""
    values = np.empty((words.shape[0], words.shape[1] * 8), np.uint8)
    for i, column in enumerate(NIBBLE_ORDER):
        values[:, column::8] = words.view(np.uint32) >> np.uint32(4 * i) & np.uint32(15)
    return values


def to_tensors(name: str, layer: QuantizedLinear) -> dict[str, torch.Tensor]:
    """The tensors of one layer in the file."""
    groups = layer.scales.shape[1]
    zeros = layer.zeros if layer.zeros is not None else torch.full((len(layer.q), groups), SYMMETRIC_ZERO)
    tensors = {
        f"{name}.qweight": torch.from_numpy(pack_nibbles(layer.q.numpy().T)),
        f"{name}.qzeros": torch.from_numpy(pack_nibbles(zeros.numpy().T)),
        f"{name}.scales": layer.scales.t().contiguous(),
    }
    if layer.pre_scale is not None:
        tensors[f"{name}.pre_scale"] = layer.pre_scale
    return tensors


def from_tensors(name: str, tensors: Mapping[str, torch.Tensor]) -> QuantizedLinear:
    """Inverse of `to_tensors`. Zeros that are 8 everywhere are the symmetric layer they stand for.

    Raises:
        AwqTrtError: shapes that do not fit each other.
    """
    qweight, qzeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
    k, groups, n = qweight.shape[0], scales.shape[0], scales.shape[1]
    if qweight.shape[1] * 8 != n or qzeros.shape != (groups, n // 8) or k % groups:
        raise AwqTrtError(
            f"{name}: qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales {list(scales.shape)} do "
            "not fit each other; expected [K, N/8], [K/g, N/8] and [K/g, N]."
        )
    zeros = torch.from_numpy(np.ascontiguousarray(unpack_nibbles(qzeros.numpy()).T))
    q = torch.from_numpy(np.ascontiguousarray(unpack_nibbles(qweight.numpy()).T))
    return QuantizedLinear(
        q,
        scales.t().contiguous(),
        None if bool((zeros == SYMMETRIC_ZERO).all()) else zeros,
        k // groups,
        tensors.get(f"{name}.pre_scale"),
    )


class Writer:
    """Writes a quantized checkpoint into a directory, one shard per label, in any order and by any number of runs.

    A shard is there whole or not at all, so a run that was killed goes on with those that are missing (`has`).
    """

    def __init__(self, directory: Path, checkpoint: Checkpoint, save_format: str = "awq") -> None:
        self.directory = directory
        self.checkpoint = checkpoint
        self.save_format = save_format
        directory.mkdir(parents=True, exist_ok=True)

    def has(self, label: str) -> bool:
        """Whether this shard is already written."""
        return any((self.directory / f"{stem}{label}.safetensors").exists() for stem in ("", "model-", "awq_trt-"))

    def add(self, label: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one shard. Floats become the checkpoint's dtype; Conv1D weights go back to [in, out].

        Args:
            label: names the shard, unique in this checkpoint: "outside", "block-00007".

        Raises:
            AwqTrtError: a value is NaN or Inf, or too large for the dtype.
        """
        stored = {
            name: Stored(
                tensor.t() if name in self.checkpoint.transposed else tensor,
                self.checkpoint.dtype if tensor.is_floating_point() else tensor.dtype,
            )
            for name, tensor in tensors.items()
        }
        try:
            write_safetensors(self.directory / f"{label}.safetensors", stored)
        except AwqTrtError as error:
            raise AwqTrtError(f"{self.checkpoint.source}: {error}") from error

    def add_block(
        self, label: str, name: str, tensors: Mapping[str, torch.Tensor], layers: Mapping[str, QuantizedLinear]
    ) -> None:
        """Write one block.

        Args:
            name: of the block ("model.layers.7"). tensors: its parameters in float, by their names in the block; the
                weights of `layers` among them are left out. layers: name in the block -> quantized layer.
        """
        out = {f"{name}.{n}": t for n, t in tensors.items() if n.removesuffix(".weight") not in layers}
        for layer, value in layers.items():
            out |= to_tensors(f"{name}.{layer}", value)
        self.add(label, out)

    def finish(self, group_size: int, symmetric: bool, report: dict[str, Any]) -> None:
        """Name the shards, write configuration, tokenizer, report and, last, the index. May be repeated.

        What the index holds is read from the shards that lie in the directory, whichever run wrote them.
        """
        shards = sorted(self.directory.glob("*.safetensors"))
        headers = {shard: read_header(shard) for shard in shards}
        pre_scales = any(name.endswith(".pre_scale") for header in headers.values() for name in header)
        config = copy.deepcopy(self.checkpoint.config)
        config.dtype = self.checkpoint.dtype
        config.quantization_config = {
            "quant_method": "awq_trt" if pre_scales else "awq",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": sorted(report["left_in_float"]) or None,
        }
        config.save_pretrained(self.directory)
        if self.checkpoint.tokenizer is not None:
            self.checkpoint.tokenizer.save_pretrained(self.directory)
        (self.directory / REPORT).write_text(json.dumps(report, indent=1))
        stem = "awq_trt" if pre_scales else "model"
        weight_map: dict[str, str] = {}
        size = 0
        for shard, header in headers.items():
            target = shard.name if shard.name.startswith(f"{stem}-") else f"{stem}-{shard.name}"
            shard.rename(self.directory / target)
            weight_map |= dict.fromkeys(header, target)
            size += sum(entry.bytes for entry in header.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (self.directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))


class _Linears(Mapping[str, QuantizedLinear]):
    """Layer name -> QuantizedLinear, read from the file at every access."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._names = [name.removesuffix(".qweight") for name in files if name.endswith(".qweight")]

    def __getitem__(self, name: str) -> QuantizedLinear:
        parts = [p for p in ("qweight", "qzeros", "scales", "pre_scale") if f"{name}.{p}" in self._files]
        if "qweight" not in parts:
            raise KeyError(name)
        return from_tensors(name, {f"{name}.{p}": read_tensor(self._files, f"{name}.{p}") for p in parts})

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A quantized checkpoint on disk; nothing is read before it is asked for.

    Attributes:
        source, config, dtype, tokenizer: as in `Checkpoint`; the configuration without its quantization part.
        linears: layer name -> QuantizedLinear. left_in_float: layer name -> why it was not quantized.
        report: the file awq_trt.json, {} where another tool wrote the checkpoint.
    """

    source: str
    config: transformers.PretrainedConfig
    dtype: torch.dtype
    linears: Mapping[str, QuantizedLinear]
    left_in_float: Mapping[str, str]
    report: Mapping[str, Any]
    tokenizer: Any
    files: Mapping[str, Path] = field(repr=False)
    transposed: frozenset[str] = frozenset()

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter of the model; a quantized weight as the fp32 product dequant(Q) * pre_scale, [N, K].

        Raises:
            AwqTrtError: it is not in the checkpoint.
        """
        layer = name.removesuffix(".weight")
        if f"{layer}.qweight" in self.files and name.endswith(".weight"):
            linear = self.linears[layer]
            weight = linear.dequantize().float()
            return weight if linear.pre_scale is None else weight * linear.pre_scale.float()
        if name not in self.files:
            raise AwqTrtError(f"{self.source}: the tensor {name} is missing; quantize the model again.")
        tensor = read_tensor(self.files, name)
        return tensor.t().contiguous() if name in self.transposed else tensor


def read_tensor(files: Mapping[str, Path], name: str) -> torch.Tensor:
    """Read one tensor from the safetensors file it is in."""
    with safe_open(str(files[name]), framework="pt") as handle:
        tensor: torch.Tensor = handle.get_tensor(name)
    return tensor


def is_quantized(directory: Path) -> bool:
    """True for a directory whose config.json says that it is quantized."""
    return (directory / "config.json").exists() and bool(
        read_json(directory / "config.json").get("quantization_config")
    )


def open_quantized(directory: Path | str) -> QuantizedCheckpoint:
    """Open an AWQ checkpoint in AutoAWQ's GEMM layout (or the same with pre-scales, as this package writes it).

    Raises:
        AwqTrtError: another quantization method, bit width or layout; missing or truncated files.
    """
    path = Path(directory)
    raw = read_json(path / "config.json")
    quantization = raw.get("quantization_config") or {}
    found = {key: quantization.get(key) for key in ("quant_method", "bits", "version")}
    if found["quant_method"] not in ("awq", "awq_trt") or found["bits"] != 4 or str(found["version"]).lower() != "gemm":
        raise AwqTrtError(
            f"{directory}: quantized as {found}; only AWQ with 4 bits in the GEMM layout is read. "
            "Start from the checkpoint before quantization."
        )
    config = transformers.AutoConfig.from_pretrained(path)
    del config.quantization_config
    files = safetensors_index(path, str(directory), "awq_trt" if found["quant_method"] == "awq_trt" else "model")
    report = read_json(path / REPORT) if (path / REPORT).exists() else {}
    model = empty_model(config)
    linears = _Linears(files)
    others = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and f"{n}.qweight" not in files]
    left = report.get("left_in_float") or dict.fromkeys(others, "not quantized in the checkpoint")
    dtype = next((read_tensor(files, f"{name}.scales").dtype for name in linears), torch.float16)
    return QuantizedCheckpoint(
        str(directory), config, dtype, linears, left, report, load_tokenizer(path), files, transposed_weights(model)
    )
