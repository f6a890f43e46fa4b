"""`out.trtexec.sh`, the script beside every plan that times it with NVIDIA's own tool.

What the flags do was read in trtexec's public source (NVIDIA/TensorRT v10.14 to v11.1, samples/common:
sampleOptions.cpp, sampleEngines.cpp, sampleInference.cpp, sampleUtils.cpp):

* `--versionCompatible` with `--loadEngine` calls setEngineHostCodeAllowed: it lets a plan bring its own host code, here
  the embedded plugin. A plugin outside the plan needs `--dynamicPlugins`, which calls the plugin registry's
  loadLibrary; `--staticPlugins` only opens the library and counts on it to register itself, which ours does not.
* Inputs that are not loaded are random: floats from -1 to 1, which any cache or image may be, but integers from -128
  to 127, which are no token ids and no lengths. So the script writes every integer input to a file.
* Outputs of KV_CACHE_UPDATE share the buffer of their input, from 10.15 on, the first version with that layer.
* CUDA graphs, no transfers, waiting in a loop, and a run of its own for the times of the layers: options in 10.x, in
  11.x the default, and the options deprecated.
* How much the name of a layer says was fixed when the plan was built; `--profilingVerbosity` changes nothing later.

`tensorrt_rtx` is the trtexec of TensorRT-RTX. The options it has alone are in its manual (Performance Benchmarking,
Working with Dynamic Shapes, Working with Runtime Cache); the others are trtexec's 11.x, whose help it prints.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from awq_trt.export.metadata import GraphFacts, Profile, fixed_cache_facts
from awq_trt.files import PACKAGE

if TYPE_CHECKING:
    from awq_trt.engine.build import EngineReport

Ranges = dict[str, tuple[int, int, int]]

BODY = PACKAGE / "data" / "trtexec.sh"
TOOLS = {"tensorrt": "trtexec", "tensorrt_rtx": "tensorrt_rtx"}
"""What times the plans of each runtime."""
PACKAGES = {"tensorrt": "TensorRT's tar and deb files and its containers", "tensorrt_rtx": "TensorRT-RTX's tar file"}

OPTIONS = {
    "10": ("--useCudaGraph", "--noDataTransfers", "--useSpinWait", "--separateProfileRun"),
    "11": (),
    "rtx": ("--rtxCudaGraphStrategy=wholeGraph", "--specializeStrategyDS=eager", "--runtimeCacheFile=runtime.cache"),
}
"""By major version. `eager`: the kernels for the shapes are compiled before the timing, not during it."""
ALWAYS = ("--dumpProfile", "--warmUp=1000", "--iterations=100", "--avgRuns=100", "--percentile=50,90,99")

NUMBERS = {
    "batch_size": ("batch", "sequences"),
    "sequence_length": ("tokens", "new tokens of each"),
    "past_sequence_length": ("past", "tokens of each in the cache"),
}
"""Dynamic dimension -> option of the script, which is a variable in it too, and what it is."""
SIZES = {dim: option for dim, (option, _) in NUMBERS.items()} | {"total_sequence_length": "past + tokens"}
"""Dynamic dimension -> its size, in the shell's arithmetic."""
WIDTHS = {"int64": 8, "int32": 4, "uint8": 1, "bool": 1}
"""Bytes of the types that cannot be left to chance."""
VALUES = {"input_ids": '"${ids[@]}"', "past_length": '"$past"', "input_length": '"$tokens"', "attention_mask": "1"}
"""What integer inputs hold. Any other holds zeros, which every index may be."""


def path_of(engine_path: Path) -> Path:
    """Where the script of a plan lies: out.plan -> out.trtexec.sh."""
    return engine_path.with_suffix(".trtexec.sh")


def command(engine_path: Path, profile: str) -> str:
    """The line for the shell that times one profile of a plan; it prints the whole command that it runs."""
    return shlex.join([str(path_of(engine_path.resolve())), profile])


def flags(report: EngineReport, plugin: Path | None) -> list[str]:
    """The options that are the same for every profile."""
    key = "rtx" if report.runtime == "tensorrt_rtx" else "10" if report.runtime_version.startswith("10.") else "11"
    host_code = ["--versionCompatible"] if plugin is not None and report.plugin_embedded else []
    return [*host_code, *OPTIONS[key], *ALWAYS]


def script(report: EngineReport, graph: GraphFacts, plugin: Path | None) -> str:
    """The text of the script: what is known of the plan, then awq_trt/data/trtexec.sh.

    Args:
        report: of the build. graph: the ONNX file it was built from; "kv_cache" and "vocab_size" in its metadata say
            which numbers and token ids are valid. plugin: the library the plan needs, or None.
    """
    tool, name = TOOLS[report.runtime], re.sub(r"[^ -~]", "?", report.engine.name)
    ranges = {profile.name: _ranges(graph, profile) for profile in report.profiles}
    library = "" if plugin is None or report.plugin_embedded else str(plugin.resolve())
    lines = [
        "#!/usr/bin/env bash",
        f"# Times {name} with {tool}; {report.runtime} {report.runtime_version} built it. --help says how to use this.",
        "set -euo pipefail",
        f"tool=${{TRTEXEC:-{tool}}} package={shlex.quote(PACKAGES[report.runtime])}",
        f"plan={shlex.quote(report.engine.name)}",
        f"output={shlex.quote(report.engine.stem + '.trtexec')}",
        f"plugin={shlex.quote(library)}",
        *(["plugin=${AWQ_TRT_PLUGIN:-$plugin}"] if library else []),
        f"flags=({' '.join(map(_double_quoted, flags(report, plugin)))})",
        "batch=1 tokens=1 past=0 ids=(0)",
        f"profiles=({' '.join(ranges)})",
        f"options='{' '.join(dict.fromkeys(option for found in ranges.values() for option in found))}'",
        f"numbers={shlex.quote(_help(ranges))}",
    ]
    for index, profile in enumerate(report.profiles):
        body = _profile(graph, index, profile, ranges[profile.name])
        lines += ["", f"profile_{profile.name}() {{", *(f"    {line}" for line in body), "}"]
    return "\n".join(lines) + "\n" + BODY.read_text()


def write(path: Path, text: str) -> None:
    """Write a script that can be executed."""
    path.write_text(text)
    path.chmod(0o755)


def _ranges(graph: GraphFacts, profile: Profile) -> Ranges:
    """Options of one profile: smallest, default, largest. The default is the shape that the plan was tuned for."""
    found: Ranges = {}
    for tensor in graph.inputs:
        low, best, high = profile.shapes[tensor.name]
        for i, dim in enumerate(tensor.shape):
            if dim in NUMBERS:
                found[NUMBERS[str(dim)][0]] = (low[i], best[i], high[i])
    if cache := fixed_cache_facts(graph.metadata):
        capacity, decodes = int(cache["capacity"]), found["tokens"][2] == 1
        found["past"] = (0, capacity // 2 if decodes else 0, capacity - 1)
    return found


def _help(profiles: Mapping[str, Ranges]) -> str:
    lines = []
    for option, meaning in NUMBERS.values():
        each = []
        for name, ranges in profiles.items():
            low, best, high = ranges.get(option, (0, 0, -1))
            if low <= high:
                each.append(f"{name} {low} to {high} ({best})" if low < high else f"{name} {low}")
        if each:
            lines.append(f"  {f'--{option} N':<12} {meaning}: {', '.join(each)}")
    return "\n".join(lines)


def _profile(graph: GraphFacts, index: int, profile: Profile, ranges: Ranges) -> Iterator[str]:
    """The lines that set `index`, the numbers, `shapes` and `inputs`."""
    yield f"index={index}"
    for option, (low, best, high) in ranges.items():
        yield f"number {option} {low} {high} {best}"
    if cache := fixed_cache_facts(graph.metadata):
        yield f"fits {cache['capacity']} {cache['prefill_chunk']}"
    tuned = profile.shapes
    sizes = {t.name: [_size(d, tuned[t.name][1][i]) for i, d in enumerate(t.shape)] for t in graph.inputs}
    shapes = (f"{_plain(name)}:{'x'.join(map(_value, dims)) or 'scalar'}" for name, dims in sizes.items())
    yield f'shapes="{",".join(shapes)}"'
    written = [t for t in graph.inputs if t.dtype in WIDTHS]
    vocabulary = graph.metadata.get("vocab_size")
    if any(t.name == "input_ids" for t in written):
        yield f"tokens_of {vocabulary or 1}"
    for tensor in written:
        count = _value(" * ".join(f"({x})" if " " in x else x for x in sizes[tensor.name]) or "1")
        value = VALUES.get(tensor.name, "1" if tensor.dtype == "bool" else "0")
        file = re.sub(r"[^\w.-]", "_", tensor.name, flags=re.ASCII)
        yield f"integers '{_plain(tensor.name)}' {file} {WIDTHS[tensor.dtype]} {count} {value}"


def _size(dim: int | str, tuned: int) -> str:
    return SIZES.get(dim, str(tuned)) if isinstance(dim, str) else str(dim)


def _double_quoted(option: str) -> str:
    return f'"{option}"'


def _value(expression: str) -> str:
    """A number, or an expression of the script's variables, for the shell."""
    if expression.isidentifier():
        return f"${{{expression}}}"
    return expression if expression.isdigit() else f"$(({expression}))"


def _plain(name: str) -> str:
    """A tensor's name for trtexec; what it or the shell cannot take becomes one wildcard, which trtexec knows."""
    odd = r"[^\w./:+-]"
    return re.sub(rf"{odd}.*{odd}|{odd}", "*", name, flags=re.ASCII)
