"""Files appear whole or not at all: written under a temporary name beside the target, then renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from awq_trt.errors import AwqTrtError

PACKAGE = Path(__file__).resolve().parent
"""The folder of this package: its sources, and `data/`."""


def package_version() -> str:
    """Version of the installed package, as pyproject.toml says it."""
    try:
        return metadata.version("awq_trt")
    except metadata.PackageNotFoundError as error:
        raise AwqTrtError(
            "awq_trt is not installed, so its plugin library has not been built. Run `pip install .` in the source "
            "folder (`pip install -e .` to keep editing it)."
        ) from error


@contextmanager
def replacing(*targets: Path) -> Iterator[list[Path]]:
    """Yield one temporary path per target; rename all of them when the block succeeds, delete them when it does not.

    A target may be a file or a directory; an existing target is replaced only at the very end, so that a full disk,
    a crash or Ctrl-C leaves the old one intact.

    Raises:
        AwqTrtError: the disk is full, or the folder is not writable.
    """
    temporary = [t.with_name(f".{t.name}.{os.getpid()}.tmp") for t in targets]
    try:
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for source, target in zip(temporary, targets, strict=True):
            _swap(source, target)
    except OSError as error:
        names = ", ".join(str(t) for t in targets)
        raise AwqTrtError(
            f"could not write {names}: {error.strerror or error}. What was there before is unchanged; "
            "free some space or choose another place, then run again."
        ) from error
    finally:
        for path in temporary:
            remove(path)


def _swap(source: Path, target: Path) -> None:
    """Rename `source` to `target`; a directory in the way is moved aside first and deleted last."""
    if not target.is_dir():
        source.replace(target)
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(old)
    source.rename(target)
    remove(old)


def remove(path: Path) -> None:
    """Delete a file or a directory tree; a missing one is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def inside(folder: Path, name: object, source: str) -> Path:
    """Where the file is that another file names, as an ONNX file and an index of shards do: in the folder of that file.

    A link that lies there may lead anywhere: the hub's cache is made of links.

    Args:
        name: as it was read. source: for messages: the file that names it.

    Raises:
        AwqTrtError: no path, an absolute one, or one that leaves the folder.
    """
    if not isinstance(name, str) or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise AwqTrtError(
            f"{source}: names the file {name!r}, which is not in its folder. Such a file is not read, because it may "
            "be anything on this machine. Get the model from where it was made, all files in one folder."
        )
    if Path(name) == Path():
        raise AwqTrtError(
            f"{source}: names the file {name!r}, which is none. Get the file again from where it was made."
        )
    return folder / name
