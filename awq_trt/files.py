"""The package's own files and version, and digests of files."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from awq_trt.errors import AwqTrtError

PACKAGE = Path(__file__).resolve().parent
"""The folder of this package: its sources, and `data/`."""


DIGESTS = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "awq_trt", "sha256")  # noqa: PTH111
"""Digests of large files that were read, a small file for each."""
LONGEST_NAME = 255
"""Bytes of a file's path in a folder; file systems take as many for each of its parts."""
LARGE = 256 << 20
"""Bytes from which on reading a file again is worth remembering that."""
SETTLED = 2.0
"""Seconds after which a file that is written again gets another time, on any file system."""
KEPT = 30 * 24 * 3600
"""Seconds that a digest is remembered on disk."""

_known: dict[str, str] = {}


def package_version() -> str:
    """Version of the installed package, as pyproject.toml says it."""
    try:
        return metadata.version("awq_trt")
    except metadata.PackageNotFoundError as error:
        raise AwqTrtError(
            "awq_trt is not installed, so its plugin library has not been built. Run `pip install .` in the source "
            "folder (`pip install -e .` to keep editing it)."
        ) from error


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
        AwqTrtError: no path, one that no file can have, an absolute one, or one that leaves the folder.
    """
    if not isinstance(name, str) or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise AwqTrtError(
            f"{source}: names the file {str(name)[:100]!r}, which is not in its folder. Such a file is not read, "
            "because it may be anything on this machine. Get the model from where it was made, all files in one folder."
        )
    half = any("\ud800" <= character <= "\udfff" for character in name)  # of a pair: no file system has such a name
    if Path(name) == Path() or half or len(name.encode()) > LONGEST_NAME:
        raise AwqTrtError(
            f"{source}: names the file {name[:100]!r}, which is none. Get the file again from where it was made."
        )
    return folder / name


def verify(path: Path, expected: str, owner: Path) -> None:
    """Compare a file with the SHA-256 that another one, its owner, says it has.

    Raises:
        AwqTrtError: they do not belong together, or the file cannot be read.
    """
    try:
        found = known_sha256(path)
    except OSError as error:
        raise AwqTrtError(f"{path}: cannot be read ({error.strerror or error}); {owner} needs it.") from error
    if found != expected:
        raise AwqTrtError(
            f"{path}: is not the file that {owner} was written with (another SHA-256), so the two do not belong "
            "together. Copy both from the same place again, or make both again."
        )


def known_sha256(path: Path) -> str:
    """`sha256`, but a file is read once as long as its size, times and inode are the same; a large one, by all runs."""
    begin, state, identity = time.time(), path.stat(), _identity(path)
    entry = DIGESTS / hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()
    if identity not in _known and state.st_size >= LARGE:
        with suppress(OSError, ValueError):
            if len(text := entry.read_text()) == len(entry.name):
                _known[identity] = text
    if identity in _known:
        return _known[identity]
    digest = sha256(path)
    if begin - max(state.st_mtime, state.st_ctime) < SETTLED or _identity(path) != identity:
        return digest
    _known[identity] = digest
    if state.st_size >= LARGE:
        with suppress(OSError):
            DIGESTS.mkdir(parents=True, exist_ok=True)
            for old in DIGESTS.iterdir():
                if begin - old.stat().st_mtime > KEPT:
                    old.unlink()
            partial = entry.with_name(f"{entry.name}.{os.getpid()}")
            partial.write_text(digest)
            partial.replace(entry)
    return digest


def _identity(path: Path) -> str:
    state = path.stat()
    times = f"{state.st_mtime_ns} {state.st_ctime_ns}"  # the second cannot be set at will
    return f"{path.resolve()} {state.st_dev} {state.st_ino} {state.st_size} {times}"
