"""The KV cache of an exported decoder: how large it is, how a trace of the model writes and reads it.

    fixed     one pair of tensors [batch, kv_heads, slots, head_dim] per layer; new keys and values are written at their
              places (TensorScatter, TensorRT's KV_CACHE_UPDATE), so that past and present can be one buffer
    dynamic   past in, past and new tokens out, as transformers and other runtimes have it

Slots of a fixed cache. In a layer with full attention slot j holds the token at position j. A layer with a window W
(sliding or chunked) keeps only what its window can reach, in a ring buffer: slot j < R holds the newest token whose
position is j modulo R. With C = prefill_chunk, R is W rounded up to a multiple of C, plus C, so that every token that a
real query of the same call can see is kept. TensorRT writes linearly only, so the new tokens of a call must not wrap
round: those of a row never cross a multiple of C, and C more slots behind the ring take the padding after them.

A token attends to a slot by the position that the slot holds, never by a mask of the batch: slots beyond a row's length
have positions that no real token has reached. Padding attends to one slot at least, so that no softmax is over nothing;
its own slots behind the ring are never read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx
import torch
import transformers
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from awq_trt.errors import AwqTrtError

KINDS = ("fixed", "dynamic")
OPSET = 24
"""The first with TensorScatter and with an Attention that reads a whole cache (ONNX operators, ai.onnx 24)."""

CAPACITY = 2048
PREFILL_CHUNK = 1024
"""Defaults: slots of a layer with full attention; most new tokens of a row in one call."""

ELSEWHERE = (
    'with kv_cache="dynamic" the ONNX file can be written, for a program of yours to run: here, text is generated with '
    "a fixed one only"
)
"""What a message says of models that a fixed cache cannot serve."""

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class CacheLayer:
    """One layer's cache: keys [batch, kv_heads, slots, head_dim], values [..., value_head_dim]."""

    kv_heads: int
    head_dim: int
    value_head_dim: int
    slots: int
    window: int | None = None  # tokens that a query sees, itself too, if that is limited


@dataclass(frozen=True)
class KvCache:
    """The fixed cache of a whole decoder."""

    capacity: int  # tokens of a sequence at most
    prefill_chunk: int  # new tokens of a row in one call at most
    layers: tuple[CacheLayer, ...]


def plan_cache(
    config: transformers.PretrainedConfig,
    shapes: Sequence[tuple[int, int, int]],
    capacity: int | None,
    chunk: int | None,
) -> KvCache:
    """The fixed cache of a decoder.

    Args:
        shapes: of each layer: kv_heads, head_dim of keys, head_dim of values. capacity: most tokens of a sequence;
            None is `CAPACITY`, or what the model was made for if that is less. chunk: most new tokens of a row in one
            call; None is `PREFILL_CHUNK`, less where capacity or a window is smaller.

    Raises:
        AwqTrtError: a capacity below 2 or beyond the positions of the model, a chunk below 1 or beyond the capacity.
    """
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if capacity is None:
        capacity = min(CAPACITY, longest or CAPACITY)
    if capacity < 2 or (longest and capacity > longest):
        raise AwqTrtError(
            f"a KV cache for {capacity} tokens: it must be at least 2"
            + (f", and this model was made for {longest} positions (max_position_embeddings)." if longest else ".")
        )
    known = DynamicCache(config=config).layers  # what transformers would make
    windows = [getattr(layer, "sliding_window", None) for layer in known]
    if len(known) != len(shapes):
        windows = [None] * len(shapes)
    if chunk is None:
        chunk = min(PREFILL_CHUNK, capacity, *(w for w in windows if w))
    if not 1 <= chunk <= capacity:
        raise AwqTrtError(
            f"a prefill chunk of {chunk} tokens: it must be at least 1 and at most the capacity {capacity}."
        )
    layers = []
    for (heads, key, value), window in zip(shapes, windows, strict=True):
        ring = capacity if window is None else -(-window // chunk) * chunk + 2 * chunk
        layers.append(CacheLayer(heads, key, value, min(capacity, ring), window))
    return KvCache(capacity, chunk, tuple(layers))


def dynamic_cache(past: Pairs) -> DynamicCache:
    """A cache that holds keys and values [batch, kv_heads, past, head_dim] per layer and grows.

    Layers with a sliding window keep everything too: their window is in the mask.
    """
    cache = DynamicCache()
    for keys, values in past:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


class FixedCache(DynamicCache):
    """A cache that writes new keys and values into tensors of fixed size; for tracing only.

    Args:
        past: keys and values [batch, kv_heads, slots, head_dim] per layer. past_length: int64 [batch], tokens that each
            row's cache holds, which is the position of its first new token.
    """

    def __init__(self, past: Pairs, past_length: torch.Tensor, plan: KvCache) -> None:
        super().__init__()
        self.past_length = past_length
        self.layers = [
            _FixedLayer(keys, values, past_length, plan, layer)
            for (keys, values), layer in zip(past, plan.layers, strict=True)
        ]

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Position of the first new token of each row, int64 [batch], where others have one number for all."""
        return self.past_length


class _FixedLayer(CacheLayerMixin):
    """One layer of a fixed cache. The model's mask functions ask it for positions, where others give offsets."""

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, past_length: torch.Tensor, plan: KvCache, layer: CacheLayer
    ) -> None:
        super().__init__()
        self.keys: torch.Tensor = keys
        self.values: torch.Tensor = values
        self.past_length = past_length
        self.slots, self.chunk, self.ring = layer.slots, plan.prefill_chunk, layer.slots < plan.capacity
        self.is_sliding = layer.window is not None
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the tensors are there from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens [batch, kv_heads, new, head_dim]; returns the whole cache."""
        at = self.past_length % (self.slots - self.chunk) if self.ring else self.past_length
        self.keys, self.values = (
            _onnx("TensorScatter", (cache, new.to(cache.dtype), at), cache.shape, axis=2, mode="linear")
            for cache, new in ((self.keys, key_states), (self.values, value_states))
        )
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """(slots, the position each slot holds during this call, int64 [1 or batch, slots], negative for none)."""
        slot = torch.arange(self.slots)[None]
        if not self.ring:
            return self.slots, slot
        ring, last = self.slots - self.chunk, self.past_length[:, None] + query_length - 1
        return self.slots, torch.where(slot < ring, last - (last - slot) % ring, -1)

    def get_seq_length(self) -> int:
        """0: models ask for it to count positions, and those are given to them."""
        return 0

    def get_max_length(self) -> int:
        """Slots."""
        return self.slots


def _onnx(op: str, inputs: tuple[torch.Tensor, ...], shape: Any, version: int = OPSET, **attributes: Any) -> Any:
    """An ONNX operator in the traced graph; the output has the dtype of the first input."""
    return torch.onnx.ops.symbolic(op, inputs, attributes, dtype=inputs[0].dtype, shape=shape, version=version)


def last_token(hidden: torch.Tensor, input_length: torch.Tensor) -> torch.Tensor:
    """hidden [batch, new, K] at each row's last real token -> [batch, 1, K]; the first for a row that has none.

    A GatherND, the only one whose indices come of input_length, by which `give_all_logits` finds it.
    """
    index = (input_length - 1).clamp(min=0)[:, None, None]
    return _onnx("GatherND", (hidden, index), (hidden.shape[0], 1, hidden.shape[2]), version=13, batch_dims=1)


def give_all_logits(graph: onnx.GraphProto) -> None:
    """Change an exported graph that gives the logits of last tokens into one that gives those of all, [batch, new, V].

    For checking and scoring: everything else of the graph, and its weights, stay what they are.
    """
    lengths = {"input_length"}
    for node in graph.node:  # in topological order
        if node.op_type == "GatherND" and node.input[1] in lengths:
            del node.input[1:], node.attribute[:]
            node.op_type = "Identity"
        elif lengths & set(node.input):
            lengths.update(node.output)
    logits = next(output for output in graph.output if output.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "sequence_length"
    del graph.value_info[:]  # shapes behind the GatherND are others now


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface, as one ONNX Attention (opset 24) on the whole cache.

    As plain products with a softcap, because runtimes differ in whether the mask comes before or after it, and with
    sinks (`s_aux` [heads], gpt-oss), which the operator does not have: one more score that takes its part of the
    softmax and has no value.

    Args:
        query [batch, heads, new, head_dim]; key, value [batch, kv_heads, slots, head_dim]; attention_mask bool
        [batch, 1, new, slots].

    Returns:
        [batch, new, heads, head_dim], None
    """
    sinks = kwargs.get("s_aux")
    if kwargs.get("position_bias") is not None:
        raise AwqTrtError(f"attention with a position bias cannot be exported with a fixed KV cache; {ELSEWHERE}.")
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    batch, heads, new, _ = query.shape
    if softcap is None and sinks is None:
        shape = (batch, heads, new, value.shape[-1])
        return _onnx("Attention", (query, key, value, attention_mask), shape, scale=scale).transpose(1, 2), None
    grouped = query.reshape(batch, key.shape[1], -1, query.shape[-1])  # the queries that share a key head, together
    scores = (grouped @ key.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.reshape(batch, heads, new, -1).masked_fill(~attention_mask, float("-inf"))
    if sinks is not None:
        sink = sinks.float().reshape(1, -1, 1, 1).expand(batch, -1, new, -1)
        scores = torch.cat([sink, scores], -1)
    weights = scores.softmax(-1)[..., 0 if sinks is None else 1 :]
    weights = weights.to(query.dtype).reshape(batch, key.shape[1], grouped.shape[2], -1)
    return (weights @ value).reshape(batch, heads, new, -1).transpose(1, 2), None


def mask(
    q_length: int, q_offset: torch.Tensor, kv_offset: torch.Tensor, mask_function: Callable[..., torch.Tensor], **_: Any
) -> torch.Tensor:
    """transformers' mask interface: bool [batch, 1, new, slots] from the model's own rule (causal, sliding, chunked).

    Args:
        q_offset: int64 [batch], position of the first new token. kv_offset: int64 [1 or batch, slots], of each slot,
            from `FixedCache` and `_FixedLayer`. mask_function: (row, head, query position, key position) -> bool.
    """
    query = (q_offset[:, None] + torch.arange(q_length))[:, None, :, None]
    key = kv_offset[:, None, None, :]
    row = torch.arange(q_offset.shape[0])[:, None, None, None]
    return mask_function(row, torch.zeros((), dtype=torch.long), query, key) & (key >= 0)


def additive_mask(dtype: torch.dtype, **arguments: Any) -> torch.Tensor:
    """`mask` for models that add it to their scores: 0 or the least value of the dtype."""
    allowed = mask(**arguments)
    return torch.where(allowed, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


transformers.AttentionInterface.register("awq_trt", attention)
transformers.AttentionMaskInterface.register("awq_trt", mask)


class OwnMask:
    """In place of a table [1, 1, N, N] of what a query sees, of which a model takes the last rows by the lengths of
    queries and keys (GPT-Neo): a fixed cache is longer than what it holds, so the rows of the queries' positions.

    Args:
        table: bool [1, 1, N, N]. past_length: int64 [batch], position of each row's first new token.
    """

    def __init__(self, table: torch.Tensor, past_length: torch.Tensor, new: int) -> None:
        positions = past_length[:, None] + torch.arange(new)[None]
        self.rows = table[0, 0][positions.clamp(max=table.shape[-1] - 1)][:, None]  # bool [batch, 1, new, N]

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        """Indexed as the table is, by (:, :, queries, keys)."""
        return self.rows[..., index[-1]]


@contextmanager
def own_masks(model: torch.nn.Module, past_length: torch.Tensor, new: int, plan: KvCache) -> Iterator[None]:
    """Inside, the tables of a model that masks by lengths give the rows of the positions.

    Raises:
        AwqTrtError: it also has layers whose cache is a ring, where a slot is not a position.
    """
    tables = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.dtype == torch.bool and buffer.dim() == 4 and len({*buffer.shape[2:]}) == 1
    ]
    if tables and any(layer.slots < plan.capacity for layer in plan.layers):
        raise AwqTrtError(
            f"{type(model).__name__} masks by the lengths of queries and keys, which a fixed KV cache with a sliding "
            f"window does not give; {ELSEWHERE}."
        )
    for module, name, buffer in tables:
        del module._buffers[name]
        setattr(module, name, OwnMask(buffer, past_length, new))
    try:
        yield
    finally:
        for module, name, buffer in tables:
            delattr(module, name)
            module._buffers[name] = buffer


@contextmanager
def fixed_masks() -> Iterator[None]:
    """Inside, models that know no attention interface (Falcon) get their masks from the fixed cache."""
    for name in ("eager", "sdpa"):
        ALL_MASK_ATTENTION_FUNCTIONS[name] = additive_mask
    try:
        yield
    finally:
        for name in ("eager", "sdpa"):
            del ALL_MASK_ATTENTION_FUNCTIONS[name]
