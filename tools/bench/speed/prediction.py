"""Tokens per second of a whole decoder: linear layers from the table, all else from its bytes and flops.

Counted, not measured, at the full bandwidth or peak, whichever takes longer: attention over the keys and values in the
cache, the head (16 bits; in prefill for the last token only), and norms, residual sums, rotary embedding, activation
and the embedding's rows, each tensor read and written once. Not counted: LEFT_OUT. So the estimate is an upper bound
as far as these parts go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.gemm.shapes import Model, Shape
from bench.speed.table import INT4, Gpu, Table

COUNTED = "attention, head, norms, residual sums, rotary embedding, activation, embedding"
LEFT_OUT = "starts of the kernels of these, sampling, several GPUs, whether the memory suffices"
FP16_BYTES = 2


@dataclass(frozen=True)
class Step:
    """Microseconds of one pass through the model, by parts; how many of the linear layers were measured."""

    linears: float
    attention: float
    head: float
    elementwise: float
    measured: int
    layers: int

    @property
    def us(self) -> float:
        """All parts."""
        return self.linears + self.attention + self.head + self.elementwise

    def as_json(self, tokens: int) -> dict[str, Any]:
        """Rounded; with the tokens per second where a step makes or reads so many."""
        parts = {name: round(getattr(self, name), 2) for name in ("linears", "attention", "head", "elementwise")}
        return {"tokens_per_second": round(tokens / self.us * 1e6, 2), "us": round(self.us, 2), "parts_us": parts,
                "measured_layers": f"{self.measured} of {self.layers}"}  # fmt: skip


def decode_step(model: Model, table: Table, gpu: Gpu, batch: int, context: int) -> Step:
    """One new token for each of `batch` sequences that have `context` tokens in the cache."""
    cache = 2 * model.key * batch * (context + 1)  # keys and values; the new ones are written
    flops = 4 * model.query * batch * (context + 1)  # Q K^T and P V
    return step(model, table, gpu, batch, batch, 2 * model.query * batch + cache, flops)


def prefill_step(model: Model, table: Table, gpu: Gpu, tokens: int) -> Step:
    """A prompt of `tokens` tokens, one sequence."""
    moved = 2 * (model.query + model.key) * tokens  # queries, keys, values in, one output
    flops = 2 * model.query * tokens * (tokens + 1)  # half of 4 * query * tokens^2: a token sees those before it
    return step(model, table, gpu, tokens, 1, moved, flops)


def step(
    model: Model, table: Table, gpu: Gpu, tokens: int, logits: int, attention_values: int, attention_flops: int
) -> Step:
    """A pass of `tokens` tokens, `logits` of them through the head; attention's values and flops are of one block."""
    times = [table.us(Shape(n, k, model.group_size), tokens, gpu) for n, k in model.layers().values()]
    widths = 10 * model.hidden + 3 * model.mlp + 2 * (model.query + model.key)  # 2 norms, 2 sums, activation, rotary
    head = FP16_BYTES * (model.vocabulary * (model.hidden + logits) + logits * model.hidden)
    return Step(
        linears=model.blocks * sum(us for us, _ in times),
        attention=model.blocks * roofline_us(gpu, FP16_BYTES * attention_values, attention_flops),
        head=roofline_us(gpu, head, 2 * logits * model.hidden * model.vocabulary),
        elementwise=roofline_us(gpu, FP16_BYTES * tokens * (model.blocks * widths + 4 * model.hidden), 0),
        measured=sum(measured for _, measured in times),
        layers=len(times),
    )


def roofline_us(gpu: Gpu, moved: float, flops: float) -> float:
    """Microseconds of so many bytes and flops at the full bandwidth or peak, whichever takes longer."""
    return max(moved / gpu.bandwidth, flops / gpu.peak) * 1e6


def weight_bytes(model: Model, table: Table) -> int:
    """Of the whole model: embedding and head in 16 bits, norms left out."""
    embeddings = FP16_BYTES * model.vocabulary * model.hidden * (1 if model.tied else 2)
    shapes = [Shape(n, k, model.group_size) for n, k in model.layers().values()]
    each = (s.weight_bytes(table.symmetric) if table.kind == INT4 else FP16_BYTES * s.n * s.k for s in shapes)
    return embeddings + model.blocks * sum(each)
