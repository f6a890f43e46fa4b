"""The command lines that time a plan with NVIDIA's own tools, with the shapes of every input written out.

Flags as in trtexec's public source (NVIDIA/TensorRT, samples/common/sampleOptions.cpp and sampleEngines.cpp):
`--versionCompatible` with `--loadEngine` is what lets a plan bring its own host code, here the embedded plugin.
A plugin that is not embedded needs `--dynamicPlugins`, which loads through the plugin registry; `--staticPlugins`
only opens the library and counts on it to register itself, which ours does not. `tensorrt_rtx` is the trtexec of
TensorRT-RTX; its manual shows `--loadEngine` and `--shapes`, the other flags are taken from trtexec.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

TOOLS = {"tensorrt": "trtexec", "tensorrt_rtx": "tensorrt_rtx"}


def command(
    engine: Path,
    runtime: str,
    index: int,
    shapes: Mapping[str, Sequence[int]],
    plugin: Path | None = None,
    embedded: bool = True,
) -> str:
    """One line for the shell.

    Args:
        engine: the plan. runtime: "tensorrt" or "tensorrt_rtx". index: the optimization profile to run.
        shapes: of every input, within that profile. plugin: the library the plan needs, None where it needs none;
        embedded: whether the plan brings it.
    """
    words = [TOOLS[runtime], f"--loadEngine={engine.resolve()}"]
    if plugin is not None:
        words.append("--versionCompatible" if embedded else f"--dynamicPlugins={plugin.resolve()}")
    dims = ",".join(f"{name}:{'x'.join(str(d) for d in shape)}" for name, shape in shapes.items())
    words += [f"--useProfile={index}", f"--shapes={dims}"]
    return shlex.join(words)
