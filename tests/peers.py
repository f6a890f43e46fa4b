"""Other tools' own code, to compare with: pinned, from the package index, beside the environment and never in it.

compressed-tensors is an ordinary package of the test extra. The others need versions of torch or transformers that they
pin, or a GPU, or a compiler, so only what is asked for is imported. The first use downloads them to build/peers.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import types
import zipfile
from pathlib import Path

from filelock import FileLock

CACHE = Path(__file__).parents[1] / "build" / "peers"

SOURCES = {  # unpacked, not installed: their setup wants a GPU or a compiler
    "autoawq": ["autoawq==0.2.9", "--no-binary=:all:", "--no-build-isolation"],
    "auto-gptq": ["auto-gptq==0.7.1", "--only-binary=:all:", "--platform=manylinux2014_x86_64", "--python-version=311"],
    "gptqmodel": ["gptqmodel==7.7.0", "--no-binary=:all:", "--no-build-isolation"],
}
PACKAGES = {  # installed without what they depend on: the environment has the rest
    "gptqmodel": [
        "accelerate==1.15.0",
        "defuser==0.0.28",
        "device-smi==0.5.7",
        "logbar==0.4.15",
        "optimum==2.3.0",
        "pillow==13.0.0",
        "pypcre==0.6.4",
        "threadpoolctl==3.8.0",
        "tokenicer==0.0.14",
    ],
    "modelopt": [
        "nvidia-modelopt==0.47.0",
        "antlr4-python3-runtime==4.9.3",
        "ninja==1.13.2",
        "nvidia-ml-py==13.615.71",
        "omegaconf==2.4.0",
        "pulp==3.3.2",
        "scipy==1.17.1",
        "setuptools==84.2.1",
    ],
    "pytriton": ["nvidia-pytriton==0.7.0"],
    "numpy-1": ["numpy==1.26.4", "--only-binary=:all:"],
}


def folder(name: str) -> Path:
    """Where the sources and packages of a tool lie, for PYTHONPATH; downloaded once."""
    wanted = [SOURCES.get(name, []), PACKAGES.get(name, [])]
    place = CACHE / f"{name}-{hashlib.sha256(repr((wanted, sys.version_info[:2])).encode()).hexdigest()[:12]}"
    if place.exists():
        return place
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"), tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        if not place.exists():  # else another test process was first
            target = Path(temporary) / "target"
            target.mkdir()
            if wanted[0]:
                _pip("download", "--no-deps", "--dest", temporary, *wanted[0])
                _unpack(Path(temporary), target)
            if wanted[1]:
                _pip("install", "--no-deps", "--target", str(target), *wanted[1])
            target.rename(place)
    return place


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def _unpack(archives: Path, target: Path) -> None:
    """Wheels as they are, source packages without their top folder."""
    for wheel in archives.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target, [n for n in archive.namelist() if n.endswith(".py")])
    for source in archives.glob("*.tar.gz"):
        with tarfile.open(source) as archive:
            archive.extractall(archives / "sources", filter="data")
        for path in (archives / "sources" / source.name.removesuffix(".tar.gz")).iterdir():
            path.rename(target / path.name)


def module(name: str, dotted: str) -> types.ModuleType:
    """One module of a tool, without running the `__init__` of the packages around it, which import all the rest."""
    if dotted in sys.modules:
        return sys.modules[dotted]
    packages = dotted.split(".")[:-1]
    for i in range(len(packages)):
        package = types.ModuleType(".".join(packages[: i + 1]))
        package.__path__ = [str(folder(name).joinpath(*packages[: i + 1]))]
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(dotted)


def run(name: str, script: str, *arguments: object) -> str:
    """Run Python code with a tool on its path, in a process of its own; returns what it printed."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {"PYTHONPATH": str(folder(name)), "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
