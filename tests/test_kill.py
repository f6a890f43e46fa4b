"""Killed at any instant, the chain ends right the next time: nothing half-written loads, the bits are the same, and no
process and no file is left. A full disk, a disk that is read-only and a second run are one message, and cost nothing.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import stages
import tiny_models
from stages import STAGES, at_rename, command, content, copied, everything, kill_self, orphans, start

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.usefixtures("one_thread", "traced")

KILLS = int(os.environ.get("AWQ_TRT_KILLS", "10"))
"""Of the long test; 100 are what a change of the publishing is tried with."""


@pytest.fixture(scope="module")
def traced() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        stages.trace_once(patch.setattr)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, one_thread: None, traced: None) -> Path:
    """model/, new/ with all that the chain writes, and old/ with the same of other settings."""
    folder = tmp_path_factory.mktemp("made")
    tiny_models.llama(folder / "model", num_hidden_layers=2)
    for which in ("old", "new"):
        (folder / which).mkdir()
        (folder / which / "model").symlink_to(folder / "model")
        for stage in STAGES:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder / which)
                assert stages.main(command(stage, which == "old")) == 0
    return folder


def before(stage: str) -> dict[str, str]:
    """The stages before this one are done; what it wrote the last time is of other settings."""
    return dict.fromkeys(STAGES[: STAGES.index(stage)], "new") | {stage: "old"}


def killed_at(stage: str, k: int, made: Path, folder: Path) -> bool:
    """Kill a stage at its k-th rename, look, run it again, look; False where it has fewer renames."""
    copied(made, folder, before(stage))
    status = start(command(stage, False), folder, at_rename(k, kill_self)).wait()
    old, new = content(made / "old", stage), content(made / "new", stage)
    assert status in (0, -signal.SIGKILL)
    assert content(folder, stage) in (None, old, new), f"{stage} was killed at rename {k}"
    assert orphans(folder) == []
    assert start(command(stage, False), folder).wait() == 0
    assert content(folder, stage) == new, f"{stage} was killed at rename {k}"
    assert [name for name in everything(folder) if "/." in f"/{name}" or "tmp/" in name] == []
    return status != 0


@pytest.mark.parametrize(
    ("stage", "renames"), [("quantize", (1, 17, 19)), ("onnx", (1, 2, 3, 4, 5)), ("engine", (6,)), ("triton", (1, 2))]
)
def test_killed_at_some_renames(stage: str, renames: tuple[int, ...], made: Path, tmp_path: Path) -> None:
    for k in renames:
        assert killed_at(stage, k, made, tmp_path / str(k))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_every_rename(stage: str, made: Path, tmp_path: Path) -> None:
    k = 1
    while killed_at(stage, k, made, tmp_path / str(k)):
        k += 1
    assert k > 2


def inode(stage: str, folder: Path) -> int | None:
    """Which file or folder a stage's is now; None for none."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / stages.WRITTEN[stage][0]).stat().st_ino
    return None


def wait_for(stage: str, before: int | None, child: stages.Child, folder: Path) -> None:
    """Wait until what a stage writes is no longer what was there before the chain began, or the chain has ended."""
    while child.running and inode(stage, folder) == before:
        time.sleep(0.002)


def seconds_of_stages(made: Path, folder: Path) -> dict[str, float]:
    """What each stage of the whole chain takes."""
    found, began = {}, time.monotonic()
    child = start(stages.WHOLE, copied(made, folder, {}))
    for stage in STAGES:
        wait_for(stage, None, child, folder)
        found[stage] = time.monotonic() - began - sum(found.values())
    assert child.wait() == 0, child.said
    return found


def killed_in(stage: str, seconds: float, made: Path, folder: Path) -> str | None:
    """Kill the whole chain some time after a stage began, look, run it again, look. Returns the stage it was in, None
    for none."""
    copied(made, folder, dict.fromkeys(STAGES, "old"))
    old = {earlier: inode(earlier, folder) for earlier in STAGES[: STAGES.index(stage)]}
    child = start(stages.WHOLE, folder)
    for earlier, before in old.items():
        wait_for(earlier, before, child, folder)
    time.sleep(seconds)
    if child.running:
        os.kill(child.pid, signal.SIGKILL)
    ended = child.wait() == 0
    done = [stage for stage in STAGES if content(folder, stage) == content(made / "new", stage)]
    for stage in STAGES:
        assert content(folder, stage) in (None, content(made / "old", stage), content(made / "new", stage))
    assert orphans(folder) == []
    again = start(stages.WHOLE, folder)
    assert again.wait() == 0, again.said
    assert [content(folder, stage) for stage in STAGES] == [content(made / "new", stage) for stage in STAGES]
    assert [name for name in everything(folder) if "/." in f"/{name}" or "tmp/" in name] == []
    return None if ended else STAGES[min(len(done), len(STAGES) - 1)]


@pytest.mark.timeout(60 * KILLS + 600)
@pytest.mark.parametrize("kills", [1, pytest.param(KILLS, marks=pytest.mark.slow)])
def test_killed_at_random_instants(kills: int, made: Path, tmp_path: Path) -> None:
    generator, found = random.Random(int(os.environ.get("AWQ_TRT_SEED", "0"))), set()
    seconds = seconds_of_stages(made, tmp_path / "timed")
    for i in range(kills):
        stage = STAGES[i % len(STAGES)]
        found.add(killed_in(stage, generator.uniform(0, seconds[stage]), made, tmp_path / str(i)))
    assert kills < 40 or found >= set(STAGES)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    (place := tmp_path / "disk").mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", place], check=False).returncode
    ):
        pytest.skip("needs root to mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_cannot_be_written(stage: str, fault: str, made: Path, small_disk: Path, tmp_path: Path) -> None:
    folder = copied(made, small_disk / "work", before(stage))
    names = everything(folder)
    if fault == "full":
        stages.fill(small_disk, leave=32 << 10)
    else:
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    child = start(command(stage, False), folder, tmp=tmp_path)
    assert child.wait() == 2
    words = ("No space left on device",) if fault == "full" else ("Read-only file system", "not writable")
    assert any(word in child.said for word in words)
    assert child.said.count("error:") == 1
    assert content(folder, stage) == content(made / "old", stage)
    assert everything(folder) == names


@pytest.mark.parametrize("stage", ["quantize", "triton"])
def test_of_two_runs_at_once_one_wins(stage: str, made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "work", before(stage))
    first = start(command(stage, False), folder, at_rename(1, lambda: os.kill(os.getpid(), signal.SIGSTOP)))
    os.waitpid(first.pid, os.WUNTRACED)
    second = start(command(stage, False), folder)
    assert second.wait() == 2
    assert "another run is writing to it right now" in second.said
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait() == 0
    assert content(folder, stage) == content(made / "new", stage)
    assert [name for name in everything(folder) if "/." in f"/{name}" or "tmp/" in name] == []
