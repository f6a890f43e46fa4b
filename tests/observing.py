"""Hessians of a block that is called by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from awq_trt.awq.hessian import Group, Observer


def observe(block: nn.Module, runs: Iterable[Callable[[], object]], name: str = "") -> list[Group]:
    """The groups of the block's layers, from one run per calibration window."""
    with Observer(block, name) as observer:
        for run in runs:
            with observer.window():
                run()
    return observer.groups
