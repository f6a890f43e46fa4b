"""A run that was ended goes on: nothing is repeated but the block in progress, and the bits are the same."""

from __future__ import annotations

import contextlib
import dataclasses
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import tiny_models
import torch
from rich.console import Console

from awq_trt.awq import pipeline, resume
from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.quantize import quantize
from awq_trt.awq.resume import States, WorkDirectory, content_digest
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.errors import AwqTrtError

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS = 4
OPTIONS = {"calibration_samples": 3, "calibration_length": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def uninterrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("whole") / "out"
    quantize(model, output, QuantizeConfig(**OPTIONS))
    return tiny_models.content(output)


class StopError(RuntimeError):
    """Stands for whatever may end a run."""


def stopped_before(block: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next run fail when it comes to a block; dry runs do not count."""
    process = pipeline.process

    def failing(task: Any, calibrator: Any, writer: Any, *rest: Any) -> Any:
        if calibrator.i == block and "scratch" not in str(writer.directory):
            raise error
        return process(task, calibrator, writer, *rest)

    monkeypatch.setattr(pipeline, "process", failing)


def test_what_is_kept_is_said_and_used(
    model: Path, uninterrupted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, partial = tmp_path / "out", tmp_path / ".out.partial"
    for error, raised, words in (
        (
            KeyboardInterrupt(),
            KeyboardInterrupt,
            "interrupted; 3 finished blocks are kept in .* the same",
        ),
        (OSError(28, "No space left on device"), AwqTrtError, "No space left on device.*3 finished blocks are kept"),
        (StopError("out of memory"), StopError, "out of memory"),
    ):
        with monkeypatch.context() as patch:
            stopped_before(3, error, patch)
            with pytest.raises(raised, match=words):
                quantize(model, output, QuantizeConfig(**OPTIONS))
        assert partial.is_dir()
        assert not output.exists()
    text = StringIO()
    quantize(model, output, QuantizeConfig(**OPTIONS), console=Console(file=text, width=200))
    assert "3 of 4 blocks are finished by an earlier run" in text.getvalue()
    assert tiny_models.content(output) == uninterrupted
    assert not partial.exists()


@pytest.mark.parametrize(
    ("error", "block"), [(KeyboardInterrupt(), 0), (OSError(28, "full"), 0), (AwqTrtError("bad tensor"), 3)]
)
def test_nothing_is_left_where_nothing_is_worth_keeping(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, block: int
) -> None:
    stopped_before(block, error, monkeypatch)
    with pytest.raises((KeyboardInterrupt, AwqTrtError)):
        quantize(model, tmp_path / "out", QuantizeConfig(**OPTIONS))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"symmetric": True}, "not the same: settings"),
        ({"calibration_length": 65}, "not the same: calibration"),
        ({"resume": False}, "as asked"),
        ({"checkpoint": "another"}, "not the same: checkpoint"),
    ],
)
def test_another_key_starts_anew_and_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], words: str
) -> None:
    with monkeypatch.context() as patch:
        stopped_before(2, StopError(), patch)
        with pytest.raises(StopError):
            quantize(model, tmp_path / "out", QuantizeConfig(**OPTIONS))
    checkpoint = open_checkpoint(model)
    if change.pop("checkpoint", None):
        extra = tmp_path / "extra"
        extra.write_text("one more file")
        checkpoint = dataclasses.replace(checkpoint, files=(*checkpoint.files, extra))
    text, resume = StringIO(), bool(change.pop("resume", True))
    config, console = QuantizeConfig(**{**OPTIONS, **change}), Console(file=text, width=200)  # type: ignore[arg-type]
    quantize(checkpoint, tmp_path / "out", config, resume=resume, console=console)
    assert "thrown away" in text.getvalue()
    assert words in text.getvalue()
    assert "finished by an earlier run" not in text.getvalue()


def test_one_byte_changes_the_digest(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(bytes(9 << 20))
    before = content_digest(files)
    files[1].write_bytes(bytes((9 << 20) - 1) + b"x")
    assert content_digest(files) != before


def test_states_that_are_damaged_or_missing_start_anew(
    model: Path, uninterrupted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stopped_before(2, StopError(), patch)
        with pytest.raises(StopError):
            quantize(model, tmp_path / "out", QuantizeConfig(**OPTIONS))
    *_, states = sorted((tmp_path / ".out.partial" / "states").glob("*/*"))
    states.write_bytes(states.read_bytes()[:1000])
    quantize(model, tmp_path / "out", QuantizeConfig(**OPTIONS))
    assert tiny_models.content(tmp_path / "out") == uninterrupted


def test_states_in_memory_give_the_same_bits(model: Path, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    quantize(model, tmp_path / "out", QuantizeConfig(**OPTIONS), memory=1 << 40)
    assert tiny_models.content(tmp_path / "out") == uninterrupted


def test_too_little_memory_is_refused_before_the_first_block(model: Path, tmp_path: Path) -> None:
    with pytest.raises(AwqTrtError, match=r"this run needs \d+ MiB of memory, but memory=64 MiB"):
        quantize(model, tmp_path / "out", QuantizeConfig(**OPTIONS), memory=64 << 20)
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_at_the_same_time_is_refused(tmp_path: Path) -> None:
    with (
        WorkDirectory(tmp_path / "out", {"a": 1}),
        pytest.raises(AwqTrtError, match="out: another run is writing to it right now"),
        WorkDirectory(tmp_path / "out", {"a": 1}),
    ):
        pass


@pytest.mark.parametrize("at", ["before", "replaced", "cleaned"])
def test_killed_while_the_output_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """A result that is complete is not made again: the next run ends from every state that `publish` goes through."""
    output = tmp_path / "out"
    work = WorkDirectory(output, {"a": 1})
    with contextlib.suppress(StopError), work, monkeypatch.context() as patch:
        (work.result / "new").touch()
        stops = {"before": (resume, "publish"), "replaced": (resume, "remove"), "cleaned": (Path, "unlink")}
        patch.setattr(*stops[at], Mock(side_effect=StopError))
        work.publish({"layers": []})
    assert work.path.exists()
    assert output.exists() == (at != "before")
    with WorkDirectory(output, {"a": 1}) as again:
        assert again.report() == {"layers": []}
        again.publish(again.report() or {})
    assert sorted(p.name for p in output.iterdir()) == ["awq_trt.json", "new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_come_back_whole_or_not_at_all(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {3: torch.randn(1, 5, 8).to(dtype), 7: torch.randn(1, 9, 8).to(dtype)}
    states = States(tmp_path)
    for window, value in values.items():
        states.put(window, (value, value[:, :2] + 1))
    assert 3 in states
    assert 4 not in states
    for window, value in values.items():
        hidden, carried = states[window]
        assert torch.equal(hidden, value)
        assert torch.equal(carried, value[:, :2] + 1)
    (tmp_path / "00003.safetensors").write_bytes(b"\x10")
    assert 3 not in States(tmp_path)
