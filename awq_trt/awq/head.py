"""The head of a language model, quantized: one linear layer with a row for each token, outside the blocks.

Its weight may be larger than any block, so it is never in memory as floats. A sample of its rows stands in for it while
what is behind the blocks (final norm, head) is run: that is enough for H = X^T X, to prove where a scale can be folded,
and to search the scale. Then its rows are read, rounded and forgotten piece by piece.

A head that shares its weight with the embedding gets one of its own (`untied`); the embedding stays in float.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import transformers
from torch import nn

from awq_trt.awq.blocks import BlockStream
from awq_trt.awq.calls import Share
from awq_trt.awq.estimate import StageTimer
from awq_trt.awq.fold import find_fold
from awq_trt.awq.search import LayerReport, Settings, constrain, layer_report, search_and_keep
from awq_trt.awq.states import States
from awq_trt.awq.statistics import Group, observe_lanes, scaled_weight
from awq_trt.checkpoint.model import empty_model
from awq_trt.checkpoint.reader import Checkpoint
from awq_trt.errors import AwqTrtError
from awq_trt.linear import QuantizedLinear, quantize_weight, row_chunks

SAMPLE = 1 << 20
"""Weights of the head that are in memory as floats while the model's tail is run: whole rows, a multiple of 8."""


def head_of(model: transformers.PreTrainedModel) -> tuple[str, nn.Linear] | None:
    """Name and layer of what turns the last hidden states into logits over the vocabulary; None where there is none."""
    head = model.get_output_embeddings()
    name = next((n for n, m in model.named_modules() if m is head), None) if isinstance(head, nn.Linear) else None
    return None if name is None else (name, head)


def untied(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with a head of its own, where it shares its weight with the embedding: both are read from there.

    Raises:
        AwqTrtError: the architecture has no such form.
    """
    shared = empty_model(checkpoint.config)
    if not _is_tied(shared):
        return checkpoint
    config = copy.deepcopy(checkpoint.config)
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    model = empty_model(config)
    first = {id(p): n for n, p in shared.named_parameters()}
    names = {n: first[id(p)] for n, p in shared.named_parameters(remove_duplicate=False)}
    wanted = [n for n, _ in model.named_parameters() if n not in checkpoint.readers]
    if _is_tied(model) or not set(wanted) <= set(names):
        raise AwqTrtError(
            f"{checkpoint.source}: {type(shared).__name__} cannot have a head apart from its embedding; leave the head "
            "in float (--lm-head float)."
        )
    readers = {**checkpoint.readers, **{n: checkpoint.readers[names[n]] for n in wanted}}
    return replace(checkpoint, config=config, readers=readers)


def _is_tied(model: transformers.PreTrainedModel) -> bool:
    """Whether the weight of the head has another name, too."""
    found = head_of(model)
    weight = None if found is None else found[1].weight
    return sum(p is weight for _, p in model.named_parameters(remove_duplicate=False)) > 1


def norms_outside(model: nn.Module, prefix: str) -> list[str]:
    """Parameters of the norms outside the blocks `prefix`: small, and one of them may take the head's scale."""
    return [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear) and scaled_weight(module) is not None
        if not name.startswith(f"{prefix}.")
        for parameter, value in module._parameters.items()
        if value is not None
    ]


def round_rows(
    read: Callable[[torch.Tensor], torch.Tensor],
    shape: tuple[int, int],
    round: Callable[[torch.Tensor], QuantizedLinear],
) -> QuantizedLinear:
    """A layer whose weight is read and rounded piece by piece.

    Args:
        read: indices int64 [R] -> rows [R, K] of the weight. shape: (N, K) of the layer.
        round: fp32 [R, K], which it may change -> the layer of these rows, without pre-scale.
    """
    n, k = shape
    q = torch.empty(n, k, dtype=torch.uint8)
    parts = []
    for piece in row_chunks(n, k):
        part = round(read(torch.arange(piece.start, piece.stop)).float())
        q[piece] = part.q
        parts.append((part.scales.cpu(), None if part.zeros is None else part.zeros.cpu()))
    zeros = [z for _, z in parts if z is not None]
    scales = torch.cat([s for s, _ in parts])
    return QuantizedLinear(q, scales, torch.cat(zeros) if zeros else None, k // scales.shape[1])


def nearest_head(checkpoint: Checkpoint, name: str, shape: tuple[int, int], settings: Settings) -> QuantizedLinear:
    """The head `name`, [N, K], rounded to nearest."""
    group_size = settings.group(shape[1])
    return round_rows(
        lambda index: checkpoint.rows(f"{name}.weight", index),
        shape,
        lambda weight: quantize_weight(weight, group_size, settings.symmetric, settings.dtype),
    )


@dataclass(frozen=True)
class HeadResult:
    """The head, quantized. norms: what `norms_outside` names, the scale folded in. report: what the search found."""

    layer: QuantizedLinear
    norms: dict[str, torch.Tensor]
    report: LayerReport


class Tail:
    """What is behind the blocks of a model. A context manager; inside, a layer with a few of its rows is the head.

    Args:
        stream: the model; its blocks pass hidden states through. name: of the head. norms: see `norms_outside`.
    """

    def __init__(self, stream: BlockStream, checkpoint: Checkpoint, name: str, norms: Sequence[str]) -> None:
        self.stream, self.checkpoint, self.name, self.norms = stream, checkpoint, name, norms
        self._head: nn.Linear = stream.model.get_submodule(name)  # type: ignore[assignment]
        self.shape = (self._head.out_features, self._head.in_features)

    def __enter__(self) -> Tail:
        n, k = self.shape
        count = max(8, min(n, SAMPLE // k) // 8 * 8)
        rows = torch.arange(count) * n // count
        sample = nn.Linear(k, count, bias=self._head.bias is not None, device="meta")
        for kind in sample._parameters:
            if sample._parameters[kind] is not None:
                value = self.checkpoint.rows(f"{self.name}.{kind}", rows)
                sample._parameters[kind] = nn.Parameter(value.float(), requires_grad=False)
        self._put(sample)
        return self

    def __exit__(self, *_: object) -> None:
        self._put(self._head)
        self.stream.outside.empty()

    def _put(self, head: nn.Linear) -> None:
        parent, _, child = self.name.rpartition(".")
        setattr(self.stream.model.get_submodule(parent), child, head)

    def run(self, states: torch.Tensor, number: int) -> torch.Tensor:
        """Logits of the sampled rows, from what the last block made of the stream's input `number`."""
        return self.stream.head(states.to("cpu", torch.float32), number)

    def group(self, share: Share, states: States) -> Group | None:
        """HessianAccumulator of the head's input over all windows of all ranks; None on ranks other than 0."""
        model, ranks = self.stream.model, share.ranks
        runs = [partial(self._run_window, states, number, window) for number, window in enumerate(share.windows)]
        lanes = {lane: len(windows) for lane, windows in share.lanes.items()}
        with ranks.fail_together():
            seen = observe_lanes(model, runs, lanes, folder=share.folder, device=self.stream.device)
        mine = [observed for observed in seen if self.name in observed.names]
        for observed in mine:
            observed.names = [self.name]
            observed.before = [n for n in observed.before if f"{n}.weight" in self.norms]
        groups = ranks.sum_groups(model, mine, share.total)
        with ranks.fail_together():
            if ranks.rank == 0 and not groups:
                raise AwqTrtError(
                    f"{type(model).__name__} never calls its head {self.name}: leave it in float (--lm-head float)."
                )
        return groups[0] if groups else None

    def _run_window(self, states: States, number: int, window: int) -> torch.Tensor:
        return self.run(states[window], number)

    def quantize(
        self, group: Group, states: torch.Tensor, settings: Settings, clock: StageTimer, rows: int | None = None
    ) -> HeadResult:
        """Search and round; in a rehearsal only the first `rows` rows.

        Args:
            group: of the head's input; used up. states: behind the blocks, of input 0, to prove where a scale can go.
        """
        model, device = self.stream.model, self.stream.device
        with clock.stage("prove"):
            fold = find_fold(model, group, lambda: self.run(states, 0))
        with clock.stage("search"):
            group.linears[0].to(device)
            found, rounder = search_and_keep(group, settings, constrain(model, fold, settings))
        s = found.s
        with clock.stage("round"):
            layer = round_rows(
                lambda index: self.checkpoint.rows(f"{self.name}.weight", index).to(device),
                (rows or self.shape[0], self.shape[1]),
                lambda weight: rounder.round(weight.mul_(s))[0],
            )
        if found.scaled and fold is not None:
            fold.apply(model, s.cpu())
        elif found.scaled:
            layer = replace(layer, pre_scale=(1 / s).to(settings.dtype).cpu())
        return HeadResult(layer, self._norms(), layer_report("", self.name, group, found, fold, settings))

    def _norms(self) -> dict[str, torch.Tensor]:
        """The norms outside the blocks as they are now; those that were not run, from the checkpoint."""
        now = dict(self.stream.model.named_parameters())
        return {n: self.checkpoint.tensor(n) if now[n].is_meta else now[n].data for n in self.norms}
