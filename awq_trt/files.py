"""The package's own files and version, and digests of files."""

from __future__ import annotations

import hashlib
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
