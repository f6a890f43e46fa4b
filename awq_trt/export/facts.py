"""What the exporter writes about a model, into the ONNX file and from there into the plan's sidecar: types of its JSON.

Keys that are not listed may be there too. See schema.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from awq_trt.schema import Bytes, Count, Name, Size


class CacheLayer(TypedDict):
    """As `kv_cache.CacheLayer`."""

    kv_heads: Count
    head_dim: Count
    value_head_dim: Count
    slots: Count
    window: Count | None


class FixedCache(TypedDict):
    """As `kv_cache.KvCache`."""

    kind: Literal["fixed"]
    dtype: NotRequired[Name]
    capacity: Count
    prefill_chunk: Count
    layers: Annotated[list[CacheLayer], Field(min_length=1)]


class GrowingCache(TypedDict):
    """Of a decoder whose cache grows with every token."""

    kind: Literal["dynamic"]


class Generation(TypedDict, total=False):
    """As `directory.special_tokens` makes it."""

    eos_token_id: list[Size]
    bos_token_id: Size | None
    pad_token_id: Size | None


class QuantizedLayer(TypedDict):
    """As `rewrite.QuantizedNode`."""

    name: Name
    n: NotRequired[Count]
    k: NotRequired[Count]
    group_size: NotRequired[Count]
    zeros: NotRequired[bool]
    bias: NotRequired[bool]
    pre_scale: NotRequired[bool]


class FusedLayers(TypedDict):
    """Layers that one node computes."""

    name: Name
    layers: list[Name]
    splits: list[Count]


class ModelFacts(TypedDict, total=False):
    """What whoever runs the model must know."""

    model_type: Name | None
    format: Name
    dtype: Name
    kv_cache: Annotated[FixedCache | GrowingCache, Field(discriminator="kind")] | None  # None: an encoder
    logits: Name  # "last" token's of each row, or "all"
    vocab_size: Count
    generation: Generation
    tokenizer: Name | None  # its directory, relative to the ONNX file, or to the plan


class DataFacts(TypedDict):
    """The file of external data."""

    bytes: Bytes
    sha256: Name


class Metadata(ModelFacts, total=False):
    """Under `metadata.METADATA_KEY` of the ONNX file."""

    version: Name
    data: DataFacts
    max_positions: Count | None
    quantized: list[QuantizedLayer]
    fused: list[FusedLayers]
    left_in_float: dict[Name, Name]


class HeldOut(TypedDict):
    """As `accuracy.Accuracy`."""

    perplexity: float | None
    top1: float


class Agreement(TypedDict):
    """As `verify.Agreement`."""

    max_abs: float
    relative: float
    top1: float
    logits: Size
    generated: NotRequired[str]
    tokens: NotRequired[Size]
    tokens_equal: NotRequired[Size]
    gap: NotRequired[float]


class Verification(TypedDict, total=False):
    """As `verify.verify` returns it."""

    text: Name
    held_out: dict[Name, HeldOut]
    onnx: Agreement | dict[str, Any]
