"""Outputs appear whole or not at all, whatever goes wrong."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from awq_trt import publishing as module
from awq_trt.errors import AwqTrtError
from awq_trt.outputs import Output, sign
from awq_trt.publishing import claimed, publishing, scratch

MARK = b"ours "


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def pair(folder: Path) -> Output:
    return Output(folder / "a", (folder / "b", folder / "c"), MARK)


def write(output: Output, text: str) -> None:
    """Publish a text, as a file, several, or a directory."""
    with publishing(output) as places:
        for place in places:
            if output.directory:
                place.mkdir()
                (place / "file").write_text(text)
                sign(place)
            else:
                place.write_bytes(MARK + text.encode())


def content(output: Output) -> list[str | None]:
    """What lies in each place."""
    places = [output.path / "file"] if output.directory else [output.path, *output.others]
    return [p.read_text().removeprefix(MARK.decode()) if p.exists() else None for p in places]


KINDS: dict[str, Callable[[Path], Output]] = {
    "file": lambda folder: Output(folder / "a", (), MARK),
    "files": pair,
    "directory": lambda folder: Output(folder / "a", directory=True),
}


@pytest.fixture(params=[True, False], ids=["exchange", "rename"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without renameat2."""
    if not request.param:
        monkeypatch.setattr(module, "_exchange", lambda one, other: False)


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize("kind", KINDS)
def test_the_old_is_replaced_and_nothing_else_is_left(tmp_path: Path, kind: str) -> None:
    output = KINDS[kind](tmp_path / "new" / "folder")
    for text in ("1", "2"):
        write(output, text)
        assert set(content(output)) == {text}
        assert names(tmp_path / "new" / "folder") == sorted(p.name for p in (output.path, *output.others))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("x"), OSError(errno.ENOSPC, "full")])
def test_any_exception_leaves_the_old(tmp_path: Path, kind: str, error: BaseException) -> None:
    output = KINDS[kind](tmp_path)

    def fail() -> None:
        with publishing(output) as places:
            if not output.directory:
                places[-1].write_text("half")
            raise error

    raised = AwqTrtError if isinstance(error, OSError) else type(error)
    with pytest.raises(raised):
        fail()
    assert names(tmp_path) == []
    write(output, "old")
    with pytest.raises(raised):
        fail()
    assert set(content(output)) == {"old"}
    assert names(tmp_path) == sorted(p.name for p in (output.path, *output.others))


class Killed(BaseException):
    """Stands for SIGKILL: nothing is done after it."""


def stop_at(monkeypatch: pytest.MonkeyPatch, k: int, error: BaseException) -> list[int]:
    """Let the k-th rename or exchange from now on raise. Returns how many there were, which grows."""
    calls = [0]

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*arguments: object) -> object:
            calls[0] += 1
            if calls[0] == k:
                raise error
            return call(*arguments)

        return wrapper

    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(module, "_exchange", counted(module._exchange))
    return calls


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [True, False], ids=["replaced", "new"])
def test_killed_at_every_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, before: bool) -> None:
    """Old whole, new whole, or the first file missing; and the next run ends what was begun before it checks."""
    for k in range(1, 20):
        output = KINDS[kind](tmp_path / str(k))
        if before:
            write(output, "old")
        with monkeypatch.context() as patch:
            patch.setattr(module, "_undo", lambda output: None)
            patch.setattr(module, "clear", lambda folder: None)
            calls = stop_at(patch, k, Killed())
            with contextlib.suppress(Killed):
                write(output, "new")
            found = content(output)
        assert found[0] is None or len(set(found)) == 1, (k, found)
        if calls[0] < k:
            break
        write(output, "next")
        assert set(content(output)) == {"next"}
        assert names(tmp_path / str(k)) == sorted(p.name for p in (output.path, *output.others))
    assert k > (4 if output.others else 2)


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize("kind", KINDS)
def test_a_rename_that_fails_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A read-only disk, say, in the middle of the renames."""
    for k in range(1, 20):
        output = KINDS[kind](tmp_path / str(k))
        write(output, "old")
        with monkeypatch.context() as patch:
            calls = stop_at(patch, k, OSError(errno.EROFS, "Read-only file system"))
            try:
                write(output, "new")
            except AwqTrtError as error:
                assert "could not be written: Read-only file system" in str(error)  # noqa: PT017
                assert set(content(output)) == {"old"}
            else:
                assert set(content(output)) == {"new"}
        assert names(tmp_path / str(k)) == sorted(p.name for p in (output.path, *output.others))
        if calls[0] < k:
            break


def test_what_came_while_the_run_was_at_work_is_not_replaced(tmp_path: Path) -> None:
    def late() -> None:
        with publishing(Output(tmp_path / "a", (), MARK)) as (place,):
            place.write_text("new")
            (tmp_path / "a").write_text("mine")

    with pytest.raises(AwqTrtError, match="awq_trt did not write"):
        late()
    assert (tmp_path / "a").read_text() == "mine"
    assert names(tmp_path) == ["a"]


def test_of_two_runs_one_wins_and_the_other_says_so(tmp_path: Path) -> None:
    output = pair(tmp_path)
    with claimed([output, Output(tmp_path / "d", directory=True)]):
        for held in (output, Output(tmp_path / "d", directory=True)):
            code = f"from pathlib import Path; from awq_trt.publishing import *; claimed([{held!r}]).__enter__()"
            code = code.replace("PosixPath", "Path").replace("*;", "*; from awq_trt.outputs import Output;")
            other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
            assert "another run is writing to it right now" in other.stderr
        write(output, "by a stage of the first run")
        with publishing(output), pytest.raises(AwqTrtError, match="another run"):
            write(output, "by another thread of it")
    assert names(tmp_path) == ["a", "b", "c"]
    write(output, "after it")


def test_what_cannot_be_written_is_known_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(AwqTrtError, match="could not be written: Permission denied"), claimed([pair(tmp_path)]):
        raise AssertionError("the work began")


def test_scratch_of_a_dead_run_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, signal; from awq_trt.publishing import scratch\n"
        "with scratch() as folder:\n    (folder / 'x').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert len(names(tmp_path)) == 1
    with scratch() as one, scratch() as two:  # that of a living run is not touched
        assert names(tmp_path) == sorted([one.name, two.name])
    assert names(tmp_path) == []
