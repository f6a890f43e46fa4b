"""The work directory of a quantization: whatever instant a run is killed at, the next one goes on from there.

    .NAME.partial/                 beside the output NAME; locked while a run works in it (../publishing.py)
        key.json                   what the result depends on; another key makes the directory worthless
        new/NAME/                  the shards that are finished
        states/00007/00012.safetensors    hidden states, and what is carried with them, of calibration window 12 that
                                          go into block 7
        blocks/00006.json          report of block 6, written last: block 6 is finished
        dry_run.json               what the dry run measured
        finished.json              key and report of a result that is complete, and replaces the output; deleted last
        scratch/                   what the dry run writes

Every file is written under a temporary name and renamed, in the order states, shard, report.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from awq_trt.errors import AwqTrtError, TerminatedError
from awq_trt.files import PACKAGE, package_version, sha256
from awq_trt.outputs import Output, sign
from awq_trt.publishing import check_outputs, clear, lock, locked, publish, remove

Key = dict[str, Any]


def content_digest(files: Iterable[Path]) -> str:
    """One digest of the whole content of several files, read side by side."""
    with ThreadPoolExecutor(max(2, torch.get_num_threads())) as pool:
        return hashlib.sha256(" ".join(pool.map(sha256, files)).encode()).hexdigest()


def inputs_digest(inputs: list[dict[str, torch.Tensor]]) -> str:
    """One digest of calibration inputs: token ids, pixels."""
    digest = hashlib.sha256()
    for sample in inputs:
        for name, value in sample.items():
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


def environment() -> Key:
    """What the bits of a result depend on besides checkpoint, configuration and calibration inputs."""
    return {
        "awq_trt": package_version(),
        "program": content_digest(sorted(PACKAGE.rglob("*.py"))),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1))
    temporary.replace(path)


def read_json_or_none(path: Path) -> Any:
    """A JSON file's value; None where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


class States:
    """What goes into a block (`blocks.State`), a file for each calibration window; with `keep`, in memory too."""

    def __init__(self, folder: Path, *, keep: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._keep = folder, keep
        self._kept: dict[int, tuple[torch.Tensor, ...]] = {}

    def put(self, window: int, state: tuple[torch.Tensor, ...]) -> None:
        """Write the state of one window: tensors of any shape."""
        values, file = tuple(part.detach().contiguous() for part in state), self._file(window)
        temporary = file.with_suffix(".tmp")
        temporary.write_bytes(save({f"{i:05}": value.cpu() for i, value in enumerate(values)}))
        temporary.replace(file)
        if self._keep:
            self._kept[window] = values

    def __contains__(self, window: int) -> bool:
        try:
            with safe_open(str(self._file(window)), framework="pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def __getitem__(self, window: int) -> tuple[torch.Tensor, ...]:
        """The state of one window, in memory of its own (the bits of a product may depend on alignment)."""
        if window in self._kept:
            return self._kept[window]
        with safe_open(str(self._file(window)), framework="pt") as handle:
            return tuple(handle.get_tensor(name).clone() for name in sorted(handle.keys()))

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.stat().st_size for file in self._folder.iterdir())

    def _file(self, window: int) -> Path:
        return self._folder / f"{window:05}.safetensors"


class KeepError(AwqTrtError):
    """An error that may be mended without changing the key: what is finished is kept. Others would come again."""


class WorkDirectory:
    """A context manager for the one process that writes; see the head of this file.

    Args:
        output: the directory to replace. sources: what must not be lost with it.
    """

    def __init__(
        self,
        output: Path,
        key: Key,
        *,
        sources: Sequence[Path] = (),
        resume: bool = True,
        console: Console | None = None,
    ) -> None:
        self.output, self._target, self._sources = output, Output(output, directory=True), sources
        self.path = self._target.work
        self.result, self.scratch = self.path / "new" / self._target.real.path.name, self.path / "scratch"
        self._blocks, self._finished = self.path / "blocks", self.path / "finished.json"
        self._key, self._resume, self._console = key, resume, console
        self._lock = ExitStack()

    def __enter__(self) -> WorkDirectory:
        check_outputs([self._target], self._sources)
        self._lock.enter_context(locked(self._target))
        try:
            self._open()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _open(self) -> None:
        finished = read_json_or_none(self._finished)
        known = finished["key"] if finished else read_json_or_none(self.path / "key.json")
        if known == self._key and self._resume:
            for leftover in (self.scratch, self.path / "old", *self.path.rglob("*.tmp")):
                remove(leftover)
        else:
            if known is not None and self._console:
                changed = ", ".join(k for k in self._key if not isinstance(known, dict) or known.get(k) != self._key[k])
                why = f"not the same: {changed}" if self._resume and changed else "as asked"
                self._console.print(f"{self.path}: the work of an earlier run is thrown away ({why}).", highlight=False)
            self.restart()
        self.make_folders()

    def restart(self) -> None:
        """Throw away what is finished, the key first, so that no instant leaves a wrong one."""
        for file in (self._finished, self.path / "key.json"):
            file.unlink(missing_ok=True)
        clear(self.path)
        write_json(self.path / "key.json", self._key)
        self.make_folders()

    def make_folders(self) -> None:
        """Folders for whatever this process writes; on ranks other than 0 there may be none yet."""
        for folder in (self._blocks, *([] if self.report() else [self.result])):
            folder.mkdir(parents=True, exist_ok=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Keep what is worth keeping, and say so."""
        try:
            if error is None:
                return
            kept = self.finished
            same_again = isinstance(error, AwqTrtError) and not isinstance(error, KeepError)
            if (not kept or same_again) and self.report() is None:
                clear(self.path)
                note = "nothing half-written is left"
            else:
                note = f"{kept} finished blocks are kept in {self.path}: the same command goes on from there"
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"interrupted; {note}") from None
            if isinstance(error, TerminatedError):
                raise TerminatedError(error.status, f"terminated; {note}") from None
            if isinstance(error, OSError):
                raise AwqTrtError(
                    f"could not write {self.output}: {error.strerror or error}. What was there before is unchanged; "
                    f"free some space or choose another place, then run again ({note})."
                ) from error
        finally:
            self._lock.close()

    def states(self, block: int, *, keep: bool = False) -> States:
        """What goes into a block."""
        return States(self.path / "states" / f"{block:05}", keep=keep)

    @property
    def finished(self) -> int:
        """How many blocks are finished, from the first on without a gap."""
        return len(self.block_reports())

    def block_reports(self) -> list[dict[str, Any]]:
        """The reports of the finished blocks."""
        found: list[dict[str, Any]] = []
        while (file := self._blocks / f"{len(found):05}.json").exists():
            found.append(json.loads(file.read_text()))
        return found

    def finish_block(self, i: int, report: dict[str, Any]) -> None:
        """Block i is finished: its shard and the states behind it are in their places."""
        write_json(self._blocks / f"{i:05}.json", report)

    def forget_states(self, before: int) -> None:
        """Delete the states that go into the blocks before this one."""
        for folder in (self.path / "states").glob("*"):
            if int(folder.name) < before:
                remove(folder)

    def report(self) -> dict[str, Any] | None:
        """What an earlier run that was killed while it replaced the output has to say; None where there is none."""
        finished: dict[str, Any] = read_json_or_none(self._finished) or {}
        return finished.get("report")

    def publish(self, report: dict[str, Any]) -> None:
        """Replace the output as a whole by the result, then empty the directory. Goes on where a killed run ended.

        Raises:
            AwqTrtError: the output holds what awq_trt did not write: it came while the run was at work.
        """
        write_json(self._finished, {"key": self._key, "report": report})
        if self.result.exists():
            check_outputs([self._target], self._sources)
            sign(self.result)
            publish(self._target)
        for entry in self.path.iterdir():
            if entry != self._finished:
                remove(entry)
        self._finished.unlink()

    def leave(self) -> None:
        """Delete what is left on the disk of a rank that rank 0 does not see; on one that it sees it holds the lock."""
        with suppress(OSError):
            if (handle := lock(self.path)) is not None:
                remove(self.path)
                os.close(handle)
