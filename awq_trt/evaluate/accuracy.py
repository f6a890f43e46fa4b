"""How well a model predicts a text: perplexity, and how often it chooses the token that the float model chooses.

Models run block by block (awq/blocks.py), so that measuring needs no more memory than quantizing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import transformers
from torch import nn

from awq_trt.awq.blocks import BlockStream, Inputs
from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.outside import Weights
from awq_trt.awq.ranges import Ranges
from awq_trt.awq.task import head_of, reasons_for_float, untied
from awq_trt.checkpoint.model import empty_model, quantizable_linears
from awq_trt.checkpoint.quantized import QuantizedCheckpoint
from awq_trt.checkpoint.reader import Checkpoint
from awq_trt.linear import quantize_weight, row_chunks


@dataclass(frozen=True)
class Accuracy:
    """One model on a text."""

    perplexity: float | None  # exp of the mean negative log-likelihood of the next token; None if it predicts none
    top1: float  # part of the positions where the arg max is that of the float model


@dataclass(frozen=True)
class Predictions:
    """What one model makes of a text, window by window."""

    losses: list[float] = field(default_factory=list)  # nats, mean over a window; [] if it predicts no next token
    chosen: list[torch.Tensor] = field(default_factory=list)  # arg max at every position of each window, int64 [1, S]

    def compared(self, reference: Predictions) -> Accuracy:
        """Perplexity, and agreement with the reference (the float model)."""
        same = torch.cat([(a == b).flatten() for a, b in zip(self.chosen, reference.chosen, strict=True)])
        perplexity = math.exp(sum(self.losses) / len(self.losses)) if self.losses else None
        return Accuracy(perplexity, float(same.float().mean()))


class RoundedWeights:
    """The weights of a checkpoint with the linear layers of its blocks rounded to nearest, as `quantize` would.

    Args:
        config: group_size and symmetric count.
        head: whether the layer that makes logits is rounded too, as `quantize` does with lm_head="int4".
    """

    def __init__(self, checkpoint: Checkpoint, config: QuantizeConfig, *, head: bool = False) -> None:
        checkpoint = untied(checkpoint) if head else checkpoint
        self.source, self.config = checkpoint.source, checkpoint.config
        self._checkpoint, self._quantize = checkpoint, config
        model = empty_model(checkpoint.config)
        left = reasons_for_float(model, config, checkpoint.dtype)
        rounded = [n for n in quantizable_linears(model) if n not in left]
        if head and (found := head_of(model)) is not None:
            rounded.append(found[0])
        self._rounded = {f"{name}.weight" for name in rounded}

    def rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """Some rows of an embedding, see `Checkpoint.rows`."""
        return self._checkpoint.rows(name, index)

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter; a rounded weight as its dequantized value."""
        weight = self._checkpoint.tensor(name)
        if name not in self._rounded:
            return weight
        config, dtype, (n, k) = self._quantize, self._checkpoint.dtype, weight.shape
        rounded = torch.empty(n, k, dtype=dtype)
        for rows in row_chunks(n, k):
            layer = quantize_weight(weight[rows], config.group(k), config.symmetric, dtype)
            rounded[rows] = layer.dequantize()
        return rounded


def rounded_like(quantized: QuantizedCheckpoint, original: Checkpoint) -> RoundedWeights:
    """The original weights rounded to nearest, with the group size, zero points and head of a quantized checkpoint."""
    linear = next(iter(quantized.linears.values()))
    group_size = quantized.scheme.group_size or linear.group_size
    config = QuantizeConfig(group_size=group_size, symmetric=linear.zeros is None)
    head = head_of(empty_model(quantized.config))
    quantized_head = head is not None and head[0] in quantized.linears
    return RoundedWeights(replace(original, dtype=quantized.dtype), config, head=quantized_head)


def is_causal_lm(config: transformers.PretrainedConfig) -> bool:
    """True where the architecture predicts the next token."""
    name = (config.architectures or [""])[0]
    return name.endswith(("ForCausalLM", "LMHeadModel"))


def predictions(outputs: Iterable[torch.Tensor], inputs: Sequence[Inputs], causal: bool) -> Predictions:
    """Reduce a model's outputs to what accuracy needs, one window at a time.

    Args:
        outputs: per window, logits [1, S, V] (or other outputs [..., V]). inputs: {"input_ids": [1, S]} per window.
        causal: whether logits predict the next token.
    """
    found = Predictions()
    for logits, sample in zip(outputs, inputs, strict=True):
        found.chosen.append(logits.argmax(-1))
        if causal:
            found.losses.append(float(nn.functional.cross_entropy(logits[0, :-1].float(), sample["input_ids"][0, 1:])))
    return found


def eager_predictions(weights: Weights, inputs: Sequence[Inputs]) -> Predictions:
    """`predictions` of a model with these weights, in fp32."""
    return predictions(eager_outputs(weights, inputs), inputs, is_causal_lm(weights.config))


def accuracy(models: Mapping[str, Weights | Predictions], inputs: Sequence[Inputs]) -> dict[str, Accuracy]:
    """Perplexity and top-1 agreement of several weights of one architecture; the first is the reference.

    Args:
        models: name -> weights, or what the model makes of the inputs.
        inputs: windows of held-out text ({"input_ids": [1, S]}), or other model inputs.
    """
    found = {n: m if isinstance(m, Predictions) else eager_predictions(m, inputs) for n, m in models.items()}
    reference = next(iter(found.values()))
    return {name: one.compared(reference) for name, one in found.items()}


def eager_outputs(weights: Weights, inputs: Sequence[Inputs], ranges: Ranges | None = None) -> Iterator[torch.Tensor]:
    """Logits (or last hidden states) of each input in turn, in fp32; one block's weights in memory at a time.

    Args:
        ranges: looks at the values on the way.
    """
    stream, ranges = BlockStream(weights, list(inputs)), ranges or Ranges()
    with ranges.watching(stream.model):
        states = list(stream.record())
        for i in range(len(stream.blocks)):
            stream.load(i, weights)
            states = [stream.run(i, state, j) for j, state in enumerate(states)]
            stream.unload(i)
        for j, state in enumerate(states):
            yield stream.head(state, j)
