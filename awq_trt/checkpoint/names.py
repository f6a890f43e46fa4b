"""Which tensor of a file is which parameter of the model (`model.empty_model`), and what to call one in a file.

transformers renames tensors while it loads (`block_sparse_moe` -> `mlp`, a base model's prefix, `LayerNorm.gamma`) and
stacks those of experts. Its own table of conversions, which has a row per family, says how; here the renamings are
followed and the stacking is undone, because `experts.py` has every expert's layers apart. Conversions that compute
something else (transpose, permute) are not followed: such a file is left to transformers (`match_names`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from awq_trt.checkpoint.experts import Part, parts_of
from awq_trt.checkpoint.model import empty_model, persistent_buffers, transposed_weights
from awq_trt.checkpoint.reader import Reader
from awq_trt.checkpoint.safetensors import SafetensorsReader
from awq_trt.checkpoint.submodels import Submodel
from awq_trt.errors import AwqTrtError

PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
"""A fused parameter of experts -> the layers that are stacked in it, in the order of a conversion's sources."""


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What the weights of a model in float are stored as."""

Place = tuple[str, Part | None]
"""Where a parameter is: the tensor of that name, whole or a part of it."""


class StoredNames:
    """Both directions, for one model, or one of several that a file holds."""

    def __init__(self, model: transformers.PreTrainedModel, submodel: Submodel | None = None) -> None:
        self._submodel = submodel or Submodel(model.config, model.config)
        self.whole = StoredNames(empty_model(self._submodel.whole)) if self._submodel.prefixes else self
        self.model = model
        self._prefix = f"{model.base_model_prefix}."
        self.names = {n for n, _ in model.named_parameters(remove_duplicate=False)}
        self.names |= {n for n, _ in model.named_buffers()}
        self._parts = parts_of(model)
        self._fused: dict[str, dict[str, Part]] = {}
        for name, part in self._parts.items():
            self._fused.setdefault(part.fused, {})[name] = part
        self._known = dict.fromkeys((*self.names, *self._fused), True)
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
        if self.whole is not self:
            found_in_whole = self.whole.find(keys, loaded)
            own = {self._submodel.name(name): place for name, place in found_in_whole.items()}
            return {name: place for name, place in own.items() if name in self.names and name is not None}
        found: dict[str, Place] = {}
        for key in sorted(keys, key=dot_natural_key):  # transformers' order: the first of two is the one that counts
            for name, part in self._exact(key) if loaded else self._places(key):
                found.setdefault(name, (key, part))
        return found

    def renamed(self, key: str) -> str:
        """What transformers makes of a key before it looks for it in its model."""
        return self._renamed(key, self._renamings, self._converters)[0]

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
        renamed, pattern = self._renamed(key, self._renamings, self._converters)
        if pattern is not None and renamed in self._fused:
            converter = next(c for c in self._converters if pattern in c.source_patterns)
            name = self._expert_layer(apply_renamings(key, self._renamings), renamed, converter, pattern)
            return [] if name is None else [(name, None)]
        return self._exact(renamed) or self._exact(self._renamed(key, [], [])[0])

    def _renamed(self, key: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        """transformers' own: the name in its model, the base model's prefix added or removed, and which pattern of a
        conversion it matched."""
        return rename_source_key(key, renamings, converters, self._prefix[:-1], self._known)

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
        AwqTrtError: a tensor has not the shape that the configuration says, or holds integers or 8-bit floats.
    """
    parameters, transposed = dict(model.named_parameters()), transposed_weights(model)
    readers: dict[str, Reader] = {}
    for name in (*parameters, *persistent_buffers(model)):
        if name not in found:
            continue
        key, part = found[name]
        read = stored[key]
        if name in parameters:
            check_dtype(source, key, read)
        if name in parameters and isinstance(read, SafetensorsReader):
            expected = tuple(parameters[name].shape if part is None else part.shape)
            expected = expected[::-1] if name in transposed else expected
            if read.shape != expected:
                raise AwqTrtError(
                    f"{source}: tensor {key} has shape {list(read.shape)}, config.json says {list(expected)}; "
                    "one of the two is of another model."
                )
        if name in parameters and getattr(read, "size", None) not in (None, parameters[name].numel()):
            raise AwqTrtError(
                f"{source}: {key} has {read.size} values, and the model of this configuration "  # type: ignore[attr-defined]
                f"has {parameters[name].numel()} there; one of the two is of another model."
            )
        readers[name] = _reader(read, part, name in transposed)
    return readers


def check_dtype(source: str, key: str, read: Reader) -> None:
    """A weight is stored in 16, 32 or 64 bits; what is stored in 8 has scales beside it.

    Raises:
        AwqTrtError: it is not.
    """
    if isinstance(read, SafetensorsReader) and read.dtype not in FLOATS:
        raise AwqTrtError(
            f"{source}: tensor {key} is {str(read.dtype).removeprefix('torch.')}: the weights are quantized, and "
            "config.json has no quantization_config that says how (merging or saving again may have dropped it). Get "
            "the config.json that belongs to these files, or start from the checkpoint before quantization."
        )


def _reader(read: Reader, part: Part | None, transposed: bool) -> Reader:
    if part is not None:
        return lambda: part.of(read()[part.expert])
    return (lambda: read().t().contiguous()) if transposed else read
