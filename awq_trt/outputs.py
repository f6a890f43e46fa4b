"""Where a stage writes, and whether something would be lost there: files that awq_trt did not write, or its source.

How the files get there is in publishing.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from awq_trt.errors import AwqTrtError

MANIFEST = "awq_trt.json"
"""In a directory that awq_trt wrote: a JSON object whose "files" are all that it wrote there."""

MARK_BYTES = 16 << 10
"""A mark is looked for in that many bytes at both ends of a file."""


@dataclass(frozen=True)
class Output:
    """Where a stage writes; see the head of this file."""

    path: Path  # a directory, or the one file that names the others
    others: tuple[Path, ...] = ()  # files beside it
    mark: bytes = b""  # in every file of this kind that awq_trt wrote; b"": whoever reads the old one recognizes it
    directory: bool = False

    @property
    def real(self) -> Output:
        """With absolute paths. A symlink to a directory is followed; one to a file is replaced, not what it names."""

        def real(path: Path) -> Path:
            return Path(os.path.realpath(path) if self.directory else os.path.realpath(path.parent) + f"/{path.name}")

        return Output(real(self.path), tuple(map(real, self.others)), self.mark, self.directory)

    @property
    def work(self) -> Path:
        """The folder of a run that writes it."""
        path = self.real.path
        return path.parent / f".{path.name}.partial"


def file_name(path: Path) -> Path:
    """The path of a file to write, whose name others are made from.

    Raises:
        AwqTrtError: it is a directory.
    """
    if path.is_dir():
        raise AwqTrtError(f"{path}: a file is to be written, and this is a directory. Name a file.")
    return path


def check(outputs: Sequence[Output], sources: Iterable[Path] = ()) -> None:
    """Refuse places where something would be lost.

    Args:
        outputs: of one command. sources: files and directories that it reads; missing ones count for nothing.

    Raises:
        AwqTrtError: an output is a file instead of a directory or the other way round, a source, a directory around or
            inside one, or the place of another output; or something that awq_trt did not write is there; or it
            cannot be replaced (a mount point, the current directory).
    """
    real = [output.real for output in outputs]
    read = [Path(os.path.realpath(source)) for source in sources]
    for i, output in enumerate(real):
        with could_not_write(output):
            for other in real[:i]:
                _check_two(output, other)
            for source in read:
                if source.exists():
                    _check_source(output, source)
            if output.directory:
                _check_directory(output.path)
            else:
                _check_files(output)


def _check_two(one: Output, other: Output) -> None:
    for path in (one.path, *one.others):
        for taken in (other.path, *other.others):
            if path == taken:
                raise AwqTrtError(f"{path}: two outputs would be written here. Name another place for one of them.")
            for inner, outer, owner in ((path, taken, other), (taken, path, one)):
                if owner.directory and outer in inner.parents:
                    raise AwqTrtError(
                        f"{inner}: lies inside {outer}, which is replaced as a whole. Name another place."
                    )


def _check_source(output: Output, source: Path) -> None:
    for path in (output.path, *output.others):
        same = path.exists() and path.samefile(source)
        if same or (output.directory and path in source.parents):
            what = "is what is read" if same else f"holds {source}, which is read"
            raise AwqTrtError(f"{path}: {what}, and would be replaced. Name another place for the output.")
        if output.directory and source.is_dir() and source in path.parents:
            raise AwqTrtError(f"{path}: lies inside {source}, which is read. Name another place for the output.")


def _check_directory(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise AwqTrtError(f"{path}: a directory is to be written, and this is a file. Name another place.")
    here = Path.cwd()
    if path == here or path in here.parents:
        raise AwqTrtError(f"{path}: the current directory cannot be replaced. Name a directory in it.")
    if os.path.ismount(path):
        raise AwqTrtError(f"{path}: a mount point cannot be replaced. Name a directory in it.")
    if not os.access(path, os.W_OK):
        raise AwqTrtError(f"{path}: not writable, so it cannot be replaced. Name another place.")
    if (found := next(foreign(path), None)) is not None:
        raise AwqTrtError(
            f"{path}: holds {found}, which awq_trt did not write, and all of it would be replaced. Name another place, "
            "or move away what is there."
        )


def foreign(directory: Path) -> Iterator[Path]:
    """What lies in a directory and is not in its MANIFEST, by its path in it; but for bytecode of Python."""
    written: set[str] = set()
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        written = set(json.loads((directory / MANIFEST).read_text())["files"])
    for folder, folders, files in os.walk(directory):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in sorted(files + links):
            path = Path(folder, name).relative_to(directory)
            if str(path) not in written and "__pycache__" not in path.parts:
                yield path


def sign(directory: Path) -> None:
    """Write the MANIFEST of a directory that is complete, or add the files to the one that it holds."""
    manifest = directory / MANIFEST
    content = json.loads(manifest.read_text()) if manifest.exists() else {}
    files = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()} | {MANIFEST}
    manifest.write_text(json.dumps(content | {"files": sorted(files)}, indent=1))


def _check_files(output: Output) -> None:
    ours = False
    for path in (output.path, *output.others):
        if not os.path.lexists(path):
            continue
        if not file_name(path).is_file():
            raise AwqTrtError(f"{path}: a file is to be written, and this is something else. Name a file.")
        if path == output.path:
            ours = _has_mark(path, output.mark)
        if path.stat().st_size and not ours:
            beside = f" of {output.path.name}" if path != output.path else ""
            raise AwqTrtError(
                f"{path}: holds something that awq_trt did not write{beside}, and would be replaced. Name another "
                "place, or move it away."
            )


def _has_mark(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file:
        head = file.read(MARK_BYTES)
        file.seek(max(0, path.stat().st_size - MARK_BYTES))
        return mark in head or mark in file.read()


@contextmanager
def could_not_write(output: Output) -> Iterator[None]:
    """An error of the operating system becomes one for people."""
    try:
        yield
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise AwqTrtError(
            f"{output.path}: could not be written: {error.strerror or error}{place}. What was there before is "
            "unchanged; free some space or choose another place, then run again."
        ) from error
