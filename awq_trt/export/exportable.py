"""Whether a model can be exported, found out from its configuration before anyone spends hours on quantizing it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import onnx
import torch
import transformers

from awq_trt.checkpoint.model import empty_model, find_blocks, persistent_buffers
from awq_trt.errors import AwqTrtError
from awq_trt.export.interface import DecoderOptions
from awq_trt.export.rope import resolve_longrope
from awq_trt.export.trace import Trace, trace

_INDEX_WORDS = ("idx", "index", "layer_id", "layer_num")
"""In names of attributes that number a block; what else differs makes it another kind."""

_SPARED = 4
"""Blocks that must be left out for a trace of fewer to be worth it: one of all can serve the export, too."""

_NOT_OF_THE_MODEL = ("quantization_config", "dtype", "torch_dtype", "_name_or_path", "transformers_version")
"""Fields of a configuration that a trace does not depend on."""


@dataclass(frozen=True)
class EarlyTrace:
    """The trace of a whole model, made before it was quantized."""

    config: dict[str, Any]
    dtype: torch.dtype
    options: DecoderOptions
    trace: Trace

    def of(self, config: transformers.PretrainedConfig, dtype: torch.dtype, options: DecoderOptions) -> Trace | None:
        """The trace, if that of this model would be the same."""
        same = (self.config, self.dtype, self.options) == (_fields(config), dtype, options)
        return self.trace if same else None


def check_exportable(
    config: transformers.PretrainedConfig,
    dtype: torch.dtype,
    options: DecoderOptions | None = None,
    look: Callable[[onnx.GraphProto], object] | None = None,
) -> EarlyTrace | None:
    """Trace a model without weights, as the export will; of a deep one, what is left with one block of each kind.

    Args:
        dtype: of activations. options: for decoders. look: is given the graph, in which each kind of block is.

    Returns:
        The trace, if it is one of the whole model and depends on nothing that is in the checkpoint.

    Raises:
        AwqTrtError: it cannot be exported; says which operator or module is in the way.
    """
    options = options or DecoderOptions()
    config = resolve_longrope(config, options.longest)
    model = empty_model(copy.deepcopy(config), attn_implementation="eager")  # what is left out is noted in its own
    traced, whole = None, True
    if _shorten(model):
        with suppress(AwqTrtError):  # perhaps because of what was left out
            traced, whole = trace(model, dtype, options), False
        model = empty_model(copy.deepcopy(config), attn_implementation="eager") if traced is None else model
    stored = persistent_buffers(model)
    traced = traced or trace(model, dtype, options)
    if look is not None:
        look(traced.model.graph)
    return EarlyTrace(_fields(config), dtype, options, traced) if whole and not stored else None


def _fields(config: transformers.PretrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in _NOT_OF_THE_MODEL}


def _shorten(model: transformers.PreTrainedModel) -> bool:
    """Take away the last blocks, as long as one of each kind stays; returns whether there were any.

    The first ones stay, so that each keeps its number.
    """
    _, blocks = find_blocks(model)
    kinds = [_kind(block) for block in blocks]
    count = 1 + max(kinds.index(kind) for kind in kinds)
    if count + _SPARED > len(blocks):
        return False
    del blocks[count:]
    text: Any = model.config.get_text_config(decoder=True)
    with suppress(Exception):  # some compute it from another field
        text.num_hidden_layers = count
    if isinstance(getattr(text, "layer_types", None), list):
        text.layer_types = text.layer_types[:count]
    return True


def _kind(block: torch.nn.Module) -> str:
    """Blocks of one kind are traced alike: same modules, same shapes, same settings."""
    shapes = [(name, *parameter.shape) for name, parameter in block.named_parameters()]
    settings = [
        (name, type(module).__name__, key, value)
        for name, module in block.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, float, str, type(None))) and not any(word in key for word in _INDEX_WORDS)
    ]
    return repr((shapes, settings))
