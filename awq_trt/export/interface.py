"""The interface of an exported graph: names of inputs and outputs, their dynamic dimensions, and the module to trace.

    decoder, fixed cache     input_ids, past_length[, input_length], past_key_values.N.key/value
                             -> logits, present.N.key/value
    decoder, dynamic cache   input_ids, attention_mask, past_key_values.N.key/value -> logits, present.N.key/value
    encoder                  input_ids[, attention_mask], pixel_values, or input_features -> its main output

With a fixed cache, padding is on the right, and past_length and input_length say which tokens are real. With a dynamic
one that follows from the attention mask alone: the position of a token is the number of real tokens before it, so
padding may be on either side, and an empty past is a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

from awq_trt.checkpoint.model import check_order, find_blocks, main_output
from awq_trt.errors import AwqTrtError
from awq_trt.export import kv_cache
from awq_trt.export.kv_cache import KvCache, Pairs

Dims = dict[int, str]
"""Axis -> name of a dynamic dimension."""

_BATCH: Dims = {0: "batch_size"}
_TOKENS: Dims = {0: "batch_size", 1: "sequence_length"}


@dataclass(frozen=True)
class DecoderOptions:
    """What a decoder's graph looks like."""

    kv_cache: str = "fixed"  # or "dynamic"
    capacity: int | None = None  # tokens of a sequence at most, with a fixed cache; see `kv_cache.plan_cache`
    prefill_chunk: int | None = None  # new tokens of a row in one call at most, with a fixed cache
    all_logits: bool = False  # with a fixed cache, logits of every new token instead of each row's last one

    @property
    def longest(self) -> int:
        """Tokens that a sequence may have as far as the options say; 0 for a cache that grows."""
        return self.capacity or (kv_cache.CAPACITY if self.kv_cache == "fixed" else 0)


@dataclass(frozen=True)
class Interface:
    """The module to trace, and what the inputs and outputs of its graph are called, in order."""

    module: torch.nn.Module
    inputs: dict[str, torch.Tensor | None]  # examples; None for an argument that the graph does not have
    input_dims: dict[str, Dims]
    output_dims: dict[str, Dims]
    cache: KvCache | None = None  # of a decoder with a fixed one
    decoder: bool = False


def arguments(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Arguments of the module from values of the graph's inputs: keys and values become a list of pairs."""
    past = [value for name, value in values.items() if name.startswith("past_key_values.")]
    others = tuple(value for name, value in values.items() if not name.startswith("past_key_values."))
    return (*others, list(zip(past[::2], past[1::2], strict=True))) if past else others


class _FixedDecoder(torch.nn.Module):
    """With an input_length, logits of each row's last real token, else of all."""

    def __init__(self, model: transformers.PreTrainedModel, cache: KvCache) -> None:
        super().__init__()
        self.model, self.cache = model, cache

    def forward(
        self, input_ids: torch.Tensor, past_length: torch.Tensor, input_length: torch.Tensor | None, past: Pairs
    ) -> Any:
        cache = kv_cache.FixedCache(past, past_length, self.cache)
        # only models that know no attention interface look at the mask, for its width: a bias for every slot (alibi)
        own = not self.model._supports_attention_backend
        positions = past_length[:, None] + torch.arange(input_ids.shape[1])[None]
        mask = torch.ones(input_ids.shape[0], self.cache.capacity, dtype=torch.long) if own else None
        hook = None
        if input_length is not None:
            head = self.model.get_output_embeddings()
            hook = head.register_forward_pre_hook(lambda _, x: (kv_cache.last_token(x[0], input_length),))
        try:
            with kv_cache.own_masks(self.model, past_length, input_ids.shape[1], self.cache):
                output = self.model(
                    input_ids=input_ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    return_dict=True,
                )
        finally:
            if hook is not None:
                hook.remove()
        return output.logits, [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr]


class _DynamicDecoder(torch.nn.Module):
    def __init__(self, model: transformers.PreTrainedModel, takes_positions: bool) -> None:
        super().__init__()
        self.model, self.takes_positions = model, takes_positions

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: Pairs) -> Any:
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=kv_cache.dynamic_cache(past),
            use_cache=True,
            return_dict=True,
            **({"position_ids": positions} if self.takes_positions else {}),
        )
        return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]


class _Encoder(torch.nn.Module):
    def __init__(self, model: transformers.PreTrainedModel, main: str, output: str) -> None:
        super().__init__()
        self.model, self.main, self.output = model, main, output

    def forward(self, data: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        return self.model(**{self.main: data}, **mask, return_dict=True)[self.output]


def interface_of(model: transformers.PreTrainedModel, dtype: torch.dtype, options: DecoderOptions) -> Interface:
    """The interface of a model whose parameters are fake tensors; sets its attention implementation.

    Args:
        dtype: of floating-point inputs of an encoder. options: for decoders.

    Raises:
        AwqTrtError: a kind of model that is not supported, or options that this one does not support.
    """
    arguments = signature(model.forward).parameters
    if "decoder_input_ids" in arguments:
        raise AwqTrtError(
            f"{type(model).__name__} is an encoder-decoder; only decoders (causal language models) and encoders are "
            "supported (of Whisper, the encoder)."
        )
    if not model.can_generate():
        return _encoder(model, dtype)
    if "past_key_values" not in arguments:
        raise AwqTrtError(
            f"{type(model).__name__} takes no past_key_values: it has no cache of keys and values, or keeps another "
            "state (a recurrent model); only attention caches are supported."
        )
    return _decoder(model, options)


def _decoder(model: transformers.PreTrainedModel, options: DecoderOptions) -> Interface:
    if options.kv_cache not in kv_cache.KINDS:
        raise AwqTrtError(f"KV cache {options.kv_cache!r} is not one of {', '.join(kv_cache.KINDS)}.")
    if model.config.model_type == "falcon" and model.config.alibi:
        # with "eager" transformers 5.23 adds the bias to the mask and to the scores; the setter does not know Falcon
        model.config._attn_implementation = "sdpa"
    else:
        model.set_attn_implementation("eager")
    known = DynamicCache(config=model.config).layers  # what transformers would make
    kept = [(i, type(x).__name__) for i, x in enumerate(known) if isinstance(x, LinearAttentionCacheLayerMixin)]
    if kept:
        raise AwqTrtError(
            f"{type(model).__name__} keeps more than keys and values in layer {kept[0][0]} ({kept[0][1]}: a recurrent "
            "or convolutional state); only attention caches are supported."
        )
    probe = _probe(model, input_ids=torch.zeros(1, 2, dtype=torch.long), past_key_values=DynamicCache(), use_cache=True)
    layers = getattr(probe.get("past_key_values"), "layers", None) or []
    if not layers or any(getattr(x, "keys", None) is None or x.keys.ndim != 4 for x in layers):
        raise AwqTrtError(
            f"{type(model).__name__} does not keep keys and values of every layer in its cache (a recurrent or mixed "
            "model); only attention caches are supported."
        )
    shapes = [(x.keys.shape[1], x.keys.shape[3], x.values.shape[3]) for x in layers]
    takes_positions = "position_ids" in signature(model.forward).parameters
    inputs: dict[str, torch.Tensor | None]
    plan, slots = None, [5] * len(shapes)
    if options.kv_cache == "dynamic":
        inputs = {
            "input_ids": torch.zeros(2, 3, dtype=torch.long),
            "attention_mask": torch.ones(2, 8, dtype=torch.long),
        }
        input_dims = {"input_ids": _TOKENS, "attention_mask": {0: "batch_size", 1: "total_sequence_length"}}
        output_dims = {"logits": _TOKENS}
        past_dims, present_dims = ({0: "batch_size", 2: f"{x}_sequence_length"} for x in ("past", "total"))
        module: torch.nn.Module = _DynamicDecoder(model, takes_positions)
    else:
        if not takes_positions or model.get_output_embeddings() is None:
            raise AwqTrtError(
                f"{type(model).__name__} takes no position_ids, or has no output embedding, which a fixed KV cache "
                f"needs; {kv_cache.ELSEWHERE}."
            )
        plan = kv_cache.plan_cache(model.config, shapes, options.capacity, options.prefill_chunk)
        slots = [layer.slots for layer in plan.layers]
        new = min(3, plan.prefill_chunk)
        inputs = {
            "input_ids": torch.zeros(2, new, dtype=torch.long),
            "past_length": torch.tensor([1, 0]),
            "input_length": None if options.all_logits else torch.tensor([new, 1]),
        }
        input_dims, output_dims = {"input_ids": _TOKENS, "past_length": _BATCH}, {"logits": _TOKENS}
        if not options.all_logits:
            input_dims["input_length"] = output_dims["logits"] = _BATCH
        past_dims = present_dims = _BATCH
        module = _FixedDecoder(model, plan)
        if model._supports_attention_backend:
            model.set_attn_implementation("awq_trt")
    for i, (heads, *sizes) in enumerate(shapes):
        for part, size in zip(("key", "value"), sizes, strict=True):
            name = f"past_key_values.{i}.{part}"
            inputs[name] = torch.zeros(2, heads, slots[i], size, dtype=layers[0].keys.dtype)
            input_dims[name], output_dims[f"present.{i}.{part}"] = past_dims, present_dims
    return Interface(module, inputs, input_dims, output_dims, plan, decoder=True)


def _encoder(model: transformers.PreTrainedModel, dtype: torch.dtype) -> Interface:
    main = model.main_input_name
    dims = _BATCH
    if main == "input_ids":
        data, dims = torch.zeros(2, 7, dtype=torch.long), _TOKENS
    elif main == "pixel_values":
        size = getattr(model.config, "image_size", None)
        if size is None:
            raise AwqTrtError(
                f"{type(model).__name__}: its configuration has no image_size, so it takes pictures of any size; only "
                "models of pictures of one size are supported."
            )
        height, width = (size, size) if isinstance(size, int) else size
        data = torch.zeros(2, model.config.num_channels, height, width, dtype=dtype)
    elif main == "input_features" and hasattr(model.config, "max_source_positions"):
        frames = 2 * model.config.max_source_positions  # Whisper's convolutions have a stride of 2
        data = torch.zeros(2, model.config.num_mel_bins, frames, dtype=dtype)
    else:
        raise AwqTrtError(
            f"{type(model).__name__} takes {main!r}; only models of input_ids or pixel_values, and the encoder of "
            "Whisper, are supported."
        )
    masked = main == "input_ids" and "attention_mask" in signature(model.forward).parameters
    inputs = {main: data, **({"attention_mask": torch.ones_like(data)} if masked else {})}
    output = main_output(_probe(model, **inputs))
    return Interface(
        module=_Encoder(model, main, output),
        inputs={**inputs},
        input_dims=dict.fromkeys(inputs, dims),
        output_dims={output: _BATCH if output.endswith("_embeds") else dims},
    )


def _probe(model: transformers.PreTrainedModel, **inputs: Any) -> Any:
    """The model's outputs for these inputs, as fake tensors: shapes and dtypes only.

    Raises:
        AwqTrtError: its blocks are not called once and in order.
    """
    mode = next(p.fake_mode for p in model.parameters() if isinstance(p, FakeTensor))
    fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    prefix, blocks = find_blocks(model)
    names = [f"{prefix}.{i}" for i in range(len(blocks))]
    called: list[int] = []

    def count(i: int, *_: Any) -> None:
        check_order(f"{type(model).__name__}: its forward", names, i, len(called))
        called.append(i)

    handles = [block.register_forward_pre_hook(partial(count, i)) for i, block in enumerate(blocks)]
    try:
        with mode, torch.no_grad():
            return model(**fake, return_dict=True)
    finally:
        for handle in handles:
            handle.remove()
