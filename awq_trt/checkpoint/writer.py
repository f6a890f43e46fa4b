"""Writing a quantized checkpoint, block by block: AutoAWQ's GEMM layout ("awq") or compressed-tensors' pack-quantized.

AutoAWQ's format cannot carry a pre-scale, and transformers' loader for it skips the Conv1D layers of a GPT-2 and every
head. A directory that has one of them in INT4 is marked quant_method "awq_trt" and its files are not called model-*, so
that other loaders refuse it instead of computing something else (transformers only warns of an unknown method and goes
on with random weights). compressed-tensors has no such way out: what it cannot carry is refused. It does carry heads.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from awq_trt.checkpoint.directory import GENERATION, TOKENIZER
from awq_trt.checkpoint.formats import to_parts
from awq_trt.checkpoint.reader import Checkpoint
from awq_trt.checkpoint.report import REPORT
from awq_trt.checkpoint.safetensors import open_safetensors, write_safetensors
from awq_trt.checkpoint.transformers4 import with_old_fields
from awq_trt.errors import AwqTrtError
from awq_trt.linear import QuantizedLinear
from awq_trt.schema import read_json, regular_file

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
                'compressed-tensors checkpoint; save with save_format="awq".'
            )
        directory.mkdir(parents=True, exist_ok=True)

    def has(self, label: str) -> bool:
        """Whether this shard is already written."""
        return any((self.directory / f"{stem}{label}.safetensors").exists() for stem in ("", "model-", "awq_trt-"))

    def add_block(
        self,
        label: str,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        layers: Mapping[str, QuantizedLinear] = MappingProxyType({}),
    ) -> None:
        """Write one shard: a block, or a part of the model that is in none. Floats become the checkpoint's dtype,
        Conv1D weights [in, out] again, and names become those that transformers writes (`Checkpoint.keys`).

        Args:
            label: names the shard, unique in this checkpoint: "outside", "block-00007".
            name: of the block ("model.layers.7"), or "" for the model.
            tensors: its parameters in float, by their names in the block; weights of `layers` are left out.
            layers: name in the block -> quantized layer.

        Raises:
            AwqTrtError: a value is NaN or Inf, or too large for the dtype; a pre-scale that the format cannot carry.
        """
        prefix = f"{name}." if name else ""
        out: dict[str, torch.Tensor] = {}
        for parameter, tensor in tensors.items():
            if parameter.removesuffix(".weight") not in layers:
                turned = prefix + parameter in self.checkpoint.transposed
                out[self._key(prefix + parameter)] = tensor.t() if turned else tensor
        for layer, value in layers.items():
            for part, tensor in to_parts(SAVE_FORMATS[self.save_format], value).items():
                out[self._key(f"{prefix}{layer}.{part}")] = tensor
        try:
            write_safetensors(self.directory / f"{label}.safetensors", out, self.checkpoint.dtype)
        except AwqTrtError as error:
            raise AwqTrtError(f"{self.checkpoint.source}: {error}") from error

    def _key(self, name: str) -> str:
        """What a parameter, or a part of a quantized one, is called in the file."""
        keys = self.checkpoint.keys
        layer, _, part = name.rpartition(".")
        whole = keys.get(f"{layer}.weight", f"{layer}.weight")
        return keys.get(name, f"{whole.removesuffix('.weight')}.{part}")

    def _write_tokenizer(self) -> None:
        """The files of the source's tokenizer as they are, so that whatever read them there reads them here. A GGUF
        file has none: its tokenizer is saved by transformers, under the class name that older versions know, too."""
        tokenizer, files = self.checkpoint.tokenizer, self.checkpoint.files
        if tokenizer is None:
            return
        if not files or files[0].suffix == ".gguf":
            tokenizer.save_pretrained(self.directory)
            place = self.directory / "tokenizer_config.json"
            values = read_json(place, dict[str, Any])
            if values.get("tokenizer_class") == "TokenizersBackend":
                place.write_text(json.dumps(values | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
            return
        source = files[-1].parent
        brings_code = type(tokenizer).__module__.startswith("transformers_modules")
        for pattern in (*TOKENIZER, *(["*.py"] if brings_code else [])):
            for file in source.glob(pattern):
                target = self.directory / file.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(regular_file(file), target)

    def finish(self, group_size: int, symmetric: bool, report: dict[str, Any]) -> None:
        """Name the shards, write configuration, tokenizer, report and, last, the index. May be repeated.

        What the index holds is read from the shards that lie in the directory, whichever run wrote them.
        """
        shards = sorted(self.directory.glob("*.safetensors"))
        headers = {shard: open_safetensors(shard, str(self.directory)) for shard in shards}
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
        values = with_old_fields(config, read_json(self.directory / "config.json", dict[str, Any]))
        (self.directory / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        self._write_tokenizer()
        for file in self.checkpoint.files[:1]:
            if (generation := file.parent / GENERATION).is_file():
                shutil.copyfile(generation, self.directory / GENERATION)
        (self.directory / REPORT).write_text(json.dumps(report, indent=1))
        stem = "awq_trt" if ours else "model"
        weight_map: dict[str, str] = {}
        size = 0
        targets = {s if s.name.startswith(f"{stem}-") else s.with_name(f"{stem}-{s.name}"): s for s in shards}
        for target, shard in sorted(targets.items()):  # one order, also after a run that was killed between two renames
            shard.rename(target)
            weight_map |= dict.fromkeys(headers[shard], target.name)
            size += sum(entry.bytes for entry in headers[shard].values())
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
