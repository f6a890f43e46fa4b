"""Models built from their configuration with empty parameters, and the list of repeated blocks in them."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.pytorch_utils import Conv1D

from awq_trt.checkpoint.config import by_transformers
from awq_trt.checkpoint.experts import split_experts
from awq_trt.errors import AwqTrtError

OUTPUTS = ("logits", "text_embeds", "image_embeds", "last_hidden_state")
"""What a model gives: the first of these that it has."""


class TransposedLinear(nn.Linear):
    """A layer whose weight a file holds as [in, out]: a Conv1D of transformers (GPT-2)."""


def model_class(config: transformers.PretrainedConfig) -> Any:
    """The transformers class of a configuration's architecture; it need not be one of those that transformers lists.

    Raises:
        AwqTrtError: there is none, or the configuration names none.
    """
    if not config.architectures:
        raise AwqTrtError(
            f'config.json does not say which model it is of: add "architectures": [the name of its class in '
            f"transformers]{_classes(config)}."
        )
    name = config.architectures[0]
    found = getattr(transformers, name, None)
    if found is None:
        module = type(config).__module__.replace("configuration_", "modeling_")
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            found = None
    if found is None:
        raise AwqTrtError(
            f"architecture {name!r} (model_type {config.model_type!r}) is not one that transformers "
            f"{transformers.__version__} has; update transformers, or convert the model to a known architecture."
        )
    return found


TASKS = (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_MASKED_LM_MAPPING,
         transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING)  # fmt: skip
"""Kinds of models -> the class of a family; the last holds every family, without a head."""


def name_architecture(config: transformers.PretrainedConfig) -> None:
    """Say in a configuration without `architectures` which class it is of, where only one can be meant: the causal
    language model of a family that has no other kind of head for text."""
    classes = [getattr(mapping.get(type(config), None), "__name__", None) for mapping in TASKS[:3]]
    if not config.architectures and classes[0] is not None and classes[1:] == [None, None]:
        config.architectures = [classes[0]]


def _classes(config: transformers.PretrainedConfig) -> str:
    """ ", such as X or Y", of the family's."""
    found = (getattr(mapping.get(type(config), None), "__name__", None) for mapping in TASKS)
    names = list(dict.fromkeys(name for name in found if name is not None))
    return f", such as {' or '.join(names)}" if names else ""


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, every new parameter goes to the meta device at once; buffers (rotary tables) are computed for real.

    Parameters are given no first values: on the meta device that takes a second for 30 blocks and does nothing.
    """
    initialize = transformers.PreTrainedModel.initialize_weights

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        tied = parameter.is_meta  # it is there already: keep it
        return None if tied else nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(to_meta)
    transformers.PreTrainedModel.initialize_weights = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        transformers.PreTrainedModel.initialize_weights = initialize  # type: ignore[method-assign]
        hook.remove()


def empty_model(
    config: transformers.PretrainedConfig, *, attn_implementation: str | None = None
) -> transformers.PreTrainedModel:
    """The model of a configuration in eval mode: fp32 parameters on the meta device, buffers with their values.

    Conv1D layers (GPT-2) become `TransposedLinear`, fused experts an nn.Linear for each expert and projection
    (experts.py).

    Raises:
        AwqTrtError: transformers has no class for the architecture.
    """
    cls = model_class(config)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    config = copy.deepcopy(config)  # its dtype becomes that of the model
    with _parameters_on_meta():
        model = by_transformers(cls.__name__, lambda: cls._from_config(config, dtype=torch.float32, **options))
        for parent in list(model.modules()):
            for child_name, child in list(parent.named_children()):
                if isinstance(child, Conv1D):
                    setattr(parent, child_name, TransposedLinear(child.nx, child.nf))
        split_experts(model)
    return model.eval()


def transposed_weights(model: torch.nn.Module) -> frozenset[str]:
    """Weights that a file holds as [in, out] and `empty_model` as [out, in]."""
    return frozenset(f"{n}.weight" for n, m in model.named_modules() if isinstance(m, TransposedLinear))


def persistent_buffers(model: torch.nn.Module) -> list[str]:
    """Names of the buffers that a state dict holds."""
    kept = model.state_dict(keep_vars=True)
    return [name for name, _ in model.named_buffers() if name in kept]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the repeated blocks: the outermost ModuleList that holds the most parameters.

    Raises:
        AwqTrtError: the model has no list of blocks.
    """
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise AwqTrtError(
            f"{type(model).__name__}: no list of repeated blocks (torch.nn.ModuleList) in this model, so there is "
            "nothing to quantize. Transformer encoders and decoders have one."
        )
    return max(lists, key=lambda entry: sum(p.numel() for p in entry[1].parameters()))


def check_order(where: str, names: list[str], i: int, done: int) -> None:
    """Block i is called after `done` calls.

    Raises:
        AwqTrtError: another one is next.
    """
    if i != done:
        how = "more than once" if i < done else f"before {names[done]}"
        raise AwqTrtError(
            f"{where} calls {names[i]} {how}; only models that call each of their blocks once, in order, can be run "
            "block by block."
        )


def most_tokens(config: transformers.PretrainedConfig) -> int | None:
    """Tokens of the longest text that a model was made for, where its configuration says so."""
    fields = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((value for value in fields if value), None)


def quantizable_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Name -> nn.Linear for every linear layer inside the repeated blocks."""
    prefix, blocks = find_blocks(model)
    return {f"{prefix}.{name}": m for name, m in blocks.named_modules() if isinstance(m, nn.Linear)}


def main_output(output: Any) -> str:
    """Which of the outputs of a model is exported and compared."""
    return next((name for name in OUTPUTS if output.get(name) is not None), OUTPUTS[-1])
