"""Finding the plugin library and refusing one of another version."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from awq_trt.engine import plugin
from awq_trt.errors import AwqTrtError
from awq_trt.files import PACKAGE


def test_the_installed_library_is_found_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(plugin.ENVIRONMENT_VARIABLE, raising=False)
    path = plugin.library_path()
    assert path.is_absolute()
    assert path.name == "libawq_trt_plugins.so"
    assert plugin.library_version(path) == plugin.package_version()


def test_environment_variable_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "other.so"
    copy.write_bytes(plugin.library_path().read_bytes())
    monkeypatch.setenv(plugin.ENVIRONMENT_VARIABLE, str(copy))
    assert plugin.library_path() == copy
    monkeypatch.setenv(plugin.ENVIRONMENT_VARIABLE, str(tmp_path / "missing.so"))
    with pytest.raises(AwqTrtError, match=r"AWQ_TRT_PLUGIN is .*missing\.so, which is not a file"):
        plugin.library_path()


def test_library_of_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    version = plugin.package_version()
    mark = f"AWQ_TRT_PLUGIN_VERSION={version};".encode()
    data = plugin.library_path().read_bytes()
    assert data.count(mark) == 1
    other = tmp_path / "old.so"
    other.write_bytes(data.replace(mark, b"AWQ_TRT_PLUGIN_VERSION=" + b"9" * len(version) + b";"))
    monkeypatch.setenv(plugin.ENVIRONMENT_VARIABLE, str(other))
    with pytest.raises(AwqTrtError) as caught:
        plugin.library_path()
    message = str(caught.value)
    assert str(other) in message
    assert f"is version {'9' * len(version)}, this is awq_trt {version}" in message
    assert "pip install ." in message


@pytest.mark.parametrize("content", [b"", b"\x7fELF something else", b"AWQ_TRT_PLUGIN_VERSION=;"])
def test_not_a_plugin_library(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "wrong.so"
    path.write_bytes(content)
    with pytest.raises(AwqTrtError, match=r"wrong\.so.*[Ii]nstall awq_trt again"):
        plugin.library_version(path)


def test_missing_from_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(plugin.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(plugin, "LIBRARY", "awq_trt/lib/nothing.so")
    with pytest.raises(AwqTrtError, match=r"lib/nothing\.so is missing .* --force-reinstall"):
        plugin.library_path()


def test_package_not_installed(tmp_path: Path) -> None:
    """The source tree alone, without the metadata that an installation leaves."""
    (tmp_path / "awq_trt" / "engine").mkdir(parents=True)
    for name in ("__init__.py", "errors.py", "files.py", "engine/__init__.py", "engine/plugin.py"):
        (tmp_path / "awq_trt" / name).write_bytes((PACKAGE / name).read_bytes())
    code = """
from awq_trt import errors
from awq_trt.engine import plugin
try:
    plugin.library_path()
except errors.AwqTrtError as error:
    print(error)
"""
    environment = {k: v for k, v in os.environ.items() if k != plugin.ENVIRONMENT_VARIABLE}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    assert "awq_trt is not installed" in done.stdout
    assert "pip install ." in done.stdout
