"""Find the plugin library and check, without loading it, that it belongs to this version of the package."""

from __future__ import annotations

import mmap
import os
import re
from importlib import metadata
from pathlib import Path

from awq_trt.errors import AwqTrtError
from awq_trt.files import package_version

LIBRARY = "awq_trt/lib/libawq_trt_plugins.so"
ENVIRONMENT_VARIABLE = "AWQ_TRT_PLUGIN"
_MARKER = re.compile(rb"AWQ_TRT_PLUGIN_VERSION=([0-9A-Za-z.+-]{1,64});")


def library_path() -> Path:
    """Absolute path of libawq_trt_plugins.so: AWQ_TRT_PLUGIN, else the one installed with the package.

    Raises:
        AwqTrtError: the file is missing, unreadable, not a plugin library, or of another version than this package.
    """
    expected = package_version()
    override = os.environ.get(ENVIRONMENT_VARIABLE)
    path = Path(override or str(metadata.distribution("awq_trt").locate_file(LIBRARY))).expanduser().absolute()
    if not path.is_file():
        raise AwqTrtError(
            f"{ENVIRONMENT_VARIABLE} is {override}, which is not a file. Correct it, or unset it to use the library "
            "that was installed with the package."
            if override
            else f"{path} is missing from the installation of awq_trt {expected}. Install it again with "
            "`pip install --force-reinstall --no-deps .` in the source folder."
        )
    version = library_version(path)
    if version != expected:
        raise AwqTrtError(
            f"the plugin library {path} is version {version}, this is awq_trt {expected}. Install the package again "
            f"with `pip install .` in its source folder, or unset {ENVIRONMENT_VARIABLE} if it points to another one."
        )
    return path


def library_version(path: Path) -> str:
    """Version written into a plugin library, read from the file without loading it.

    Raises:
        AwqTrtError: the file cannot be read, or is not an awq_trt plugin library.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = _MARKER.search(data)
            version = found.group(1).decode() if found else ""
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise AwqTrtError(f"could not read the plugin library {path}: {error}. Install awq_trt again.") from error
    if not version:
        raise AwqTrtError(
            f"{path} is not an awq_trt plugin library: it carries no version mark. Install awq_trt again, or correct "
            f"{ENVIRONMENT_VARIABLE}."
        )
    return version
