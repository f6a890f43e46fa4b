"""`out.trtexec.sh`, the script beside every plan that times it with NVIDIA's tool; `out.trtexec.bin` holds its inputs.

What the flags do was read in trtexec's public source (NVIDIA/TensorRT v10.14 to v11.1, samples/common); README.md
says what was found. `tensorrt_rtx` is the trtexec of TensorRT-RTX; the options it has alone are in its manual.
"""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import numpy as np

from awq_trt.engine.sidecar import EngineReport
from awq_trt.export.metadata import GraphFacts, Profile, Tensor, fixed_cache_facts
from awq_trt.files import PACKAGE

Ranges = dict[str, tuple[int, int, int]]
"""Option of the script -> smallest, default, largest value."""

TOOLS = {"tensorrt": "trtexec", "tensorrt_rtx": "tensorrt_rtx"}
"""What times the plans of each runtime."""
PACKAGES = {"tensorrt": "TensorRT's tar and deb files and its containers", "tensorrt_rtx": "TensorRT-RTX's tar file"}

FLAGS = {
    "10": ("--useCudaGraph", "--noDataTransfers", "--useSpinWait", "--separateProfileRun"),
    "11": (),
    "rtx": ("--rtxCudaGraphStrategy=wholeGraph", "--specializeStrategyDS=eager", "--runtimeCacheFile=runtime.cache"),
}
"""By major version. `eager`: the kernels for the shapes are compiled before the timing, not during it."""
ALWAYS = ("--dumpProfile", "--warmUp=1000", "--iterations=100", "--avgRuns=100", "--percentile=50,90,99")

OPTIONS = {
    "batch_size": ("batch", "sequences"),
    "sequence_length": ("tokens", "new tokens of each"),
    "past_sequence_length": ("past", "tokens of each in the cache"),
}
"""Dynamic dimension -> option of the script, which is a variable in it too, and what it is."""
SIZES = {dim: option for dim, (option, _) in OPTIONS.items()} | {"total_sequence_length": "past + tokens"}
"""Dynamic dimension -> its size, in the shell's arithmetic."""
LENGTHS = {"past_length": "past", "input_length": "tokens"}
"""Inputs that hold an option's value for every sequence."""
INTEGERS = ("int64", "int32", "uint8", "bool")
"""Types that cannot be left to chance."""


def path_of(engine_path: Path, kind: str = "sh") -> Path:
    """Where the script of a plan lies, and the values of its inputs (kind "bin"): out.plan -> out.trtexec.sh."""
    return engine_path.with_suffix(f".trtexec.{kind}")


def command(engine_path: Path, profile: str) -> str:
    """The line for the shell that times one profile of a plan; it prints the whole command that it runs."""
    return shlex.join([str(path_of(engine_path.resolve())), profile])


def write(script_file: Path, values_file: Path, report: EngineReport, graph: GraphFacts, plugin: Path | None) -> None:
    """Write the script, what is known of the plan and then awq_trt/data/trtexec.sh, and the values of its inputs.

    Args:
        report: of the build. graph: the ONNX file it was built from; "kv_cache" and "vocab_size" in its metadata say
            which numbers and token ids are valid. plugin: the library the plan needs, or None.
    """
    ranges = {profile.name: _ranges(graph, profile) for profile in report.profiles}
    tool, name = TOOLS[report.runtime], re.sub(r"[^ -~]", "?", report.engine.name)
    key = "rtx" if report.runtime == "tensorrt_rtx" else "10" if report.runtime_version.startswith("10.") else "11"
    host_code = ["--versionCompatible"] if plugin is not None and report.plugin_embedded else []
    flags = [f"'{flag}'" for flag in (*host_code, *FLAGS[key], *ALWAYS)]
    table = [f"[{n}.{option}]='{r[0]} {r[1]} {r[2]}'" for n, found in ranges.items() for option, r in found.items()]
    library = "" if plugin is None or report.plugin_embedded else shlex.quote(str(plugin.resolve()))
    lines = [
        "#!/usr/bin/env bash",
        f"# Times {name} with {tool}; {report.runtime} {report.runtime_version} built it. --help says how to use this.",
        "set -euo pipefail",
        f"tool=${{TRTEXEC:-{tool}}} package={shlex.quote(PACKAGES[report.runtime])}",
        f"plan={shlex.quote(report.engine.name)} values={shlex.quote(path_of(report.engine, 'bin').name)}",
        f"output={shlex.quote(report.engine.stem + '.trtexec')}",
        f"plugin={f'${{AWQ_TRT_PLUGIN:-{library}}}' if library else ''}",
        f"flags=({' '.join(flags)})",
        f"profiles=({' '.join(ranges)})",
        f"declare -A ranges=({' '.join(table)}) # smallest, default, largest",
        f"numbers={shlex.quote(_help(ranges))}",
        "",
        "# the shapes and the inputs of a call of batch, tokens and past",
        "set_inputs() {",
        *_write_inputs(values_file, graph, report, ranges),
        "}",
    ]
    script_file.write_text("\n".join(lines) + "\n" + (PACKAGE / "data" / "trtexec.sh").read_text())
    script_file.chmod(0o755)


def _ranges(graph: GraphFacts, profile: Profile) -> Ranges:
    """Options of one profile: smallest, default, largest. The default is the shape that the plan was tuned for."""
    found: Ranges = {}
    for tensor in graph.inputs:
        for dim, *sizes in zip(tensor.shape, *profile.shapes[tensor.name], strict=True):
            if dim in OPTIONS:
                found[OPTIONS[str(dim)][0]] = (sizes[0], sizes[1], sizes[2])
    if cache := fixed_cache_facts(graph.metadata):
        capacity, decodes = int(cache["capacity"]), found["tokens"][2] == 1
        found["past"] = (0, capacity // 2 if decodes else 0, capacity - 1)
    return found


def _help(ranges: dict[str, Ranges]) -> str:
    lines = []
    for option, meaning in OPTIONS.values():
        each = []
        for name, found in ranges.items():
            if option in found:
                low, best, high = found[option]
                each.append(f"{name} {low} to {high} ({best})" if low < high else f"{name} {low}")
        if each:
            lines.append(f"  {f'--{option} N':<12} {meaning}: {', '.join(each)}")
    return "\n".join(lines)


def _write_inputs(values_file: Path, graph: GraphFacts, report: EngineReport, ranges: dict[str, Ranges]) -> list[str]:
    """Write the values of all integer inputs. Returns the script's lines that set `shapes` and cut the values out."""
    lines, shapes = [], []
    if cache := fixed_cache_facts(graph.metadata):
        lines.append(f"    fits {cache['capacity']} {cache['prefill_chunk']}")
    with values_file.open("wb") as file:
        for tensor in graph.inputs:
            dims = [SIZES.get(str(dim), str(dim)) for dim in tensor.shape]
            shapes.append(
                f"{_plain(tensor.name)}:{'x'.join(d if d.isdigit() else f'$(({d}))' for d in dims) or 'scalar'}"
            )
            if tensor.dtype not in INTEGERS:
                continue
            largest = max(math.prod(profile.shapes[tensor.name][2]) for profile in report.profiles)
            start = str(file.tell())
            values = _values(tensor, largest, graph, ranges)
            file.write(values.tobytes())
            if tensor.name in LENGTHS:
                start = f"$(({start} + {LENGTHS[tensor.name]} * {largest * values.itemsize}))"
            size = " * ".join([str(values.itemsize), *(f"({dim})" for dim in dims)])
            copy = re.sub(r"[^\w.-]", "_", tensor.name, flags=re.ASCII)
            lines.append(f"    input '{_plain(tensor.name)}' {copy} {start} $(({size}))")
    return [*lines, f'    shapes="{",".join(shapes)}"']


def _values(tensor: Tensor, size: int, graph: GraphFacts, ranges: dict[str, Ranges]) -> np.ndarray:
    """Values of the largest input there may be; of one that holds a length, that for each length in turn."""
    if tensor.name in LENGTHS:
        longest = max(found.get(LENGTHS[tensor.name], (0, 0, 1))[2] for found in ranges.values())
        values = np.arange(longest + 1).repeat(size)
    elif tensor.name == "input_ids":  # from all over the vocabulary
        values = np.resize(np.arange(1024) * 7919 % (graph.metadata.get("vocab_size") or 1), size)
    else:  # 0 may be an index of anything
        values = np.full(size, tensor.name == "attention_mask" or tensor.dtype == "bool")
    return values.astype(tensor.dtype)


def _plain(name: str) -> str:
    """A tensor's name for trtexec; what it or the shell cannot take becomes one wildcard, which trtexec knows."""
    odd = r"[^\w./:+-]"
    return re.sub(rf"{odd}.*{odd}|{odd}", "*", name, flags=re.ASCII)
