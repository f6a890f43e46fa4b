"""What a run will take, and memory that is given back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from awq_trt.awq import pipeline
from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.estimate import Budget, StageTimer, resident_bytes, trim_heap
from awq_trt.awq.quantize import quantize

MIB = 1 << 20


def test_freed_memory_is_given_back() -> None:
    """glibc keeps what lies below the last piece that is in use, however much it is."""
    pieces = [np.ones(100_000, np.uint8) for _ in range(2000)]  # 191 MiB, each too small for pages of its own
    last = pieces.pop()
    full = resident_bytes("VmRSS")
    del pieces
    trim_heap()
    assert full - resident_bytes("VmRSS") > 150 * MIB
    assert last.all()


def test_after_every_block(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(pipeline, "trim_heap", lambda: calls.append(1))
    quantize(models / "llama", tmp_path / "out", QuantizeConfig(calibration_samples=2, calibration_length=64))
    assert len(calls) == 3, "the dry run and two blocks"


def test_states_are_kept_only_where_a_limit_has_room_for_them() -> None:
    assert not Budget(None, 0).spare(0, 0)
    budget = Budget(100 * MIB, 0)
    assert budget.spare(60 * MIB, 40 * MIB)
    assert not budget.spare(60 * MIB, 41 * MIB)


def test_stages_are_summed_and_multiplied_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 5.0, 12.0, 20.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    timer = StageTimer()
    with timer.stage("search"), timer.stage("prove"):
        pass
    assert timer.seconds == {"search": 20.0, "prove": 7.0}
    assert timer.total(search=2, prove=-1) == 2 * 20.0 - 7.0
