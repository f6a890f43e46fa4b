"""Which tensor of a file is which parameter of the model (`model.empty_model`), and what to call one in a file.

transformers renames tensors while it loads (`block_sparse_moe` -> `mlp`, a base model's prefix, `LayerNorm.gamma`) and
stacks those of experts. Its own table of conversions, which has a row per family, says how; here the renamings are
followed and the stacking is undone, because `experts.py` has every expert's layers apart. Conversions that compute
something else (transpose, permute) are not followed: such a file is left to transformers (`match_names`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, apply_renamings

from awq_trt.checkpoint.experts import Part, parts_of
from awq_trt.checkpoint.model import empty_model, persistent_buffers, transposed_weights
from awq_trt.checkpoint.reader import Checkpoint, Reader
from awq_trt.checkpoint.safetensors import SafetensorsReader
from awq_trt.checkpoint.submodels import Submodel
from awq_trt.errors import AwqTrtError
from awq_trt.layout import DTYPES

PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
"""A fused parameter of experts -> the layers that are stacked in it, in the order of a conversion's sources."""


Place = tuple[str, Part | None]
"""Where a parameter is: the tensor of that name, whole or a part of it."""


class StoredNames:
    """Both directions, for one model, or one of several that a file holds."""

    def __init__(self, model: transformers.PreTrainedModel, submodel: Submodel | None = None) -> None:
        self._submodel = submodel or Submodel(model.config)
        self._prefix = f"{model.base_model_prefix}."
        self.names = {n for n, _ in model.named_parameters(remove_duplicate=False)}
        self.names |= {n for n, _ in model.named_buffers()}
        self._parts = parts_of(model)
        self._fused: dict[str, dict[str, Part]] = {}
        for name, part in self._parts.items():
            self._fused.setdefault(part.fused, {})[name] = part
        conversions = get_model_conversion_mapping(model)
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        kept = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
        back = [c.reverse_transform() for c in reversed(kept) if not isinstance(c, WeightConverter) or _is_stacking(c)]
        self._renamings_back = [c for c in back if isinstance(c, WeightRenaming)]
        self._converters_back = [c for c in back if isinstance(c, WeightConverter)]

    def find(self, keys: Iterable[str], loaded: bool = False) -> dict[str, Place]:
        """Parameter (or buffer) -> where it is in a file with these keys; those that must be computed are left out.

        Args:
            loaded: the keys are names in transformers' own model, where experts are fused and nothing else is renamed.
        """
        found: dict[str, Place] = {}
        for key in keys:
            own = key if loaded else self._submodel.name(key)
            for name, part in () if own is None else self._exact(own) if loaded else self._places(own):
                if name not in found or name == own:
                    found[name] = (key, part)
        return found

    def parameter(self, key: str) -> str | None:
        """The parameter that a tensor called `key` is as a whole; None where it is none."""
        return next((name for name, (_, part) in self.find([key]).items() if part is None), None)

    def key(self, name: str) -> str:
        """What transformers would call a parameter in a file of this model alone, and other tools expect."""
        key = name
        if part := self._parts.get(name):
            source, layer = part.fused.rpartition(".")[2], name.split(".")[-2]
            for converter in self._converters_back:
                fused, pattern = converter.rename_source_key(part.fused)
                if pattern is not None:
                    first, own = converter.target_patterns[0], PROJECTIONS[source].index(layer)
                    key = fused.replace(first, converter.target_patterns[own]).replace("*", str(part.expert))
                    break
        key = apply_renamings(key, self._renamings_back)
        return key if (name, None) in self._places(key) else name

    def _places(self, key: str) -> list[tuple[str, Part | None]]:
        """The parameters that a tensor is, or has parts of."""
        renamed = apply_renamings(key, self._renamings)
        for converter in self._converters:
            fused, pattern = converter.rename_source_key(renamed)
            if pattern is not None:
                name = self._expert_layer(renamed, fused, converter, pattern)
                return [] if name is None else [(name, None)]
        names = dict.fromkeys((key, *self._with_and_without_prefix(renamed)))
        return next((places for name in names if (places := self._exact(name))), [])

    def _exact(self, name: str) -> list[tuple[str, Part | None]]:
        """The parameters that have this name, or have parts of the fused one that has it."""
        return [(name, None)] if name in self.names else list(self._fused.get(name, {}).items())

    def _expert_layer(self, key: str, fused: str, converter: WeightConverter, pattern: str) -> str | None:
        """The parameter that one tensor is of those that a converter stacks; None where it does something else."""
        parent, _, source = fused.rpartition(".")
        expert = re.findall(r"\.(\d+)\.", key)[-1:]
        if not _is_stacking(converter) or source not in PROJECTIONS or not expert:
            return None
        layer = PROJECTIONS[source][converter.source_patterns.index(pattern)]
        names = self._with_and_without_prefix(f"{parent}.{expert[0]}.{layer}.weight")
        name = next((n for n in names if n in self._parts), None)
        plain = name is not None and not self._parts[name].transposed and self._parts[name].rows.step is None
        return name if plain else None

    def _with_and_without_prefix(self, name: str) -> tuple[str, str, str]:
        return name, name.removeprefix(self._prefix), self._prefix + name


def _is_stacking(converter: WeightConverter) -> bool:
    """Whether a conversion only stacks the weights of experts: lists along axis 0, gate on up along axis 1."""
    operations = [(type(o).__name__, getattr(o, "dim", None)) for o in converter.operations]
    known = [("MergeModulelist", 0), ("Concatenate", 1)]
    targets = [target.rpartition(".")[2] for target in converter.target_patterns]
    sources = len(PROJECTIONS.get(targets[0], ()))
    return len(targets) == 1 and sources == len(converter.source_patterns) and operations == known[:sources]


def parameter_readers(
    source: str, model: transformers.PreTrainedModel, found: Mapping[str, Place], stored: Mapping[str, Reader]
) -> dict[str, Reader]:
    """Parameter or persistent buffer -> what reads it as the empty model has it: Conv1D weights turned round, of fused
    experts one part. Those that are not in `found` are left out.

    Raises:
        AwqTrtError: a tensor has not the shape that the configuration says.
    """
    parameters, transposed = dict(model.named_parameters()), transposed_weights(model)
    readers: dict[str, Reader] = {}
    for name in (*parameters, *persistent_buffers(model)):
        if name not in found:
            continue
        key, part = found[name]
        read = stored[key]
        if name in parameters and isinstance(read, SafetensorsReader):
            expected = tuple(parameters[name].shape if part is None else part.shape)
            expected = expected[::-1] if name in transposed else expected
            if read.shape != expected:
                raise AwqTrtError(
                    f"{source}: tensor {key} has shape {list(read.shape)}, config.json says {list(expected)}; "
                    "one of the two is of another model."
                )
        readers[name] = _reader(read, part, name in transposed)
    return readers


def _reader(read: Reader, part: Part | None, transposed: bool) -> Reader:
    if part is not None:
        return lambda: part.of(read()[part.expert])
    return (lambda: read().t().contiguous()) if transposed else read


def match_names(
    source: str, path: Path, submodel: Submodel, stored: Mapping[str, Reader], tokenizer: Any, files: tuple[Path, ...]
) -> Checkpoint:
    """Match the names in the file with the model's parameters.

    Raises:
        AwqTrtError: a tensor is missing, or has not the shape that the configuration says.
    """
    model = empty_model(submodel.config)
    parameters = [n for n, _ in model.named_parameters()]
    names = StoredNames(model, submodel)
    found = names.find(stored)
    if missing := [n for n in parameters if n not in found]:
        stored = _converted_by_transformers(source, path, type(model), missing[0])
        found = names.find(stored, loaded=True)
    if missing := [n for n in parameters if n not in found]:
        raise AwqTrtError(f"{source}: the tensor {missing[0]} is not in the checkpoint; download it again.")
    first = stored[found[parameters[0]][0]]
    dtype = getattr(first, "dtype", None) or first().dtype  # of GGUF fp32, and reading it would dequantize it
    return Checkpoint(
        source,
        submodel.config,
        dtype if dtype in DTYPES.values() else torch.float16,
        parameter_readers(source, model, found, stored),
        tokenizer if model.main_input_name == "input_ids" else None,  # else it is of another part, or of the outputs
        transposed_weights(model),
        files,
        {name: key for name in sorted(names.names) if (key := names.key(name)) != name},
        submodel.note,
    )


def _converted_by_transformers(source: str, path: Path, cls: Any, first_missing: str) -> dict[str, Reader]:
    """Readers for a checkpoint that transformers computes something of while loading (transposes, say): in memory."""
    trouble = f"{source}: the tensor {first_missing} is not in the checkpoint; download it again"
    if not path.is_dir():
        raise AwqTrtError(f"{trouble}.")
    try:
        model, info = cls.from_pretrained(path, dtype="auto", output_loading_info=True)
    except Exception as error:
        raise AwqTrtError(f"{trouble} (transformers could not load it either: {error}).") from error
    if info["missing_keys"]:
        raise AwqTrtError(f"{trouble} ({len(info['missing_keys'])} tensors are missing).")
    parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return {name: tensor.detach for name, tensor in parameters.items()}
