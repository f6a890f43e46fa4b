"""The command `awq-trt`: its subcommands, its exit codes, and messages in its own options."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from commands import command

from awq_trt.awq.config import QuantizeConfig
from awq_trt.cli import main as main_module
from awq_trt.cli.main import COMMANDS, parser
from awq_trt.cli.messages import with_flags
from awq_trt.errors import AwqTrtError, TerminatedError
from awq_trt.files import package_version

ROOT = Path(__file__).parents[2]


def options_of(name: str) -> set[str]:
    """The keywords that a subcommand sets."""
    return set(vars(parser(name).parse_args([name, *REQUIRED.get(name, ["x"])]))) - {"run", "options", "command"}


REQUIRED = {"export": ["--model", "x"]} | {
    name: ["x", "--output", "y"] for name in ("quantize", "onnx", "engine", "triton")
}


def test_help_names_every_subcommand_and_loads_no_torch() -> None:
    code = "import sys; from awq_trt.cli.main import parser; parser().format_help(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    done = command("--help")
    assert done.returncode == 0
    assert all(f"    {name} " in done.stdout and about in done.stdout for name, about in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_subcommand_shows_a_line_to_paste(name: str) -> None:
    done = command(name, "--help")
    assert done.returncode == 0
    assert f"awq-trt {name} " in done.stdout


def test_version_and_console_script() -> None:
    assert command("--version").stdout == f"awq_trt {package_version()}\n"
    assert '[project.scripts]\nawq-trt = "awq_trt.cli.main:main"\n' in (ROOT / "pyproject.toml").read_text()
    done = subprocess.run([sys.executable, "-m", "awq_trt", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"awq_trt {package_version()}\n"


def test_every_field_of_the_configuration_is_an_option() -> None:
    fields = set(QuantizeConfig.__dataclass_fields__)
    assert fields <= options_of("quantize") <= options_of("export") | {"output"}


@pytest.mark.parametrize("tool", ["export", "check", "report", "eval", "generate"])
def test_the_tools_are_the_same_commands(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    shim = runpy.run_path(str(ROOT / "tools" / f"{tool}.py"))["main"]
    with pytest.raises(SystemExit):
        shim(["--help"])
    assert capsys.readouterr().out == command(tool, "--help").stdout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("use shorter windows (calibration_length)", "use shorter windows (--calibration-length)"),
        ('exported with kv_cache="fixed", the default', "exported with --kv-cache fixed, the default"),
        ("search with pre_scale=False.", "search with --no-pre-scale."),
        ("set error_compensation=False", "set --no-error-compensation"),
        ("or error_compensation=True, symmetric=False, symmetric=True",
         "or --error-compensation, symmetric=False, --symmetric"),
        ("pass trust_remote_code=True", "pass --trust-remote-code"),
        ("but `memory` allows 3 MiB of memory", "but --memory allows 3 MiB of memory"),
        ("try compute_dtype=torch.float32", "try --compute-dtype torch.float32"),
        ('head lm_head: leave it in float (lm_head="float")', "head lm_head: leave it in float (--lm-head float)"),
        ("tensor model.max_seq.weight of max_seq_len", "tensor model.max_seq.weight of max_seq_len"),
        ("no_such=3 stays, and so does in_features 64", "no_such=3 stays, and so does in_features 64"),
    ],
)  # fmt: skip
def test_keywords_become_options(text: str, expected: str) -> None:
    args = parser("export").parse_args(["export", "--model", "x"])
    assert with_flags(text, args.options) == expected


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (AwqTrtError("x: too short; see calibration_length."), 2, "error: x: too short; see --calibration-length.\n"),
        (KeyboardInterrupt(), 130, "interrupted; nothing half-written is left\n"),
        (KeyboardInterrupt("interrupted; 3 blocks are kept"), 130, "interrupted; 3 blocks are kept\n"),
        (TerminatedError(143), 143, "terminated; nothing half-written is left\n"),
        (TerminatedError(129, "terminated; 3 blocks are kept"), 129, "terminated; 3 blocks are kept\n"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("awq_trt.cli.quantize.run", fail)
    assert main_module.main(["quantize", "x", "--output", "y"]) == code
    assert capsys.readouterr().err == message


def test_stage_by_stage(models: Path, tmp_path: Path) -> None:
    """quantize, onnx, engine, triton: each takes what the one before it wrote, and `check` reads the last."""
    few = ("--calibration-samples", 2, "--calibration-length", 64)
    awq, onnx, plan = tmp_path / "m.awq", tmp_path / "m.onnx", tmp_path / "m.plan"
    for line in (
        ("quantize", models / "llama", "--output", awq, *few),
        ("onnx", awq, "--output", onnx, "--max-seq", 64, "--no-verify"),
        ("engine", onnx, "--output", plan),
        ("triton", plan, "--output", tmp_path / "models", "--name", "tiny", "--parameter", "max_queue=7"),
    ):
        done = command(*line)
        assert done.returncode == 0, (line, done.stderr)
    assert 'key: "max_queue" value { string_value: "7"' in (tmp_path / "models" / "tiny" / "config.pbtxt").read_text()
    checks = json.loads(command("check", plan, "--json").stdout)["checks"]
    assert [c["status"] for c in checks if c["check"] == "Triton"] == ["ok"]
    assert command("quantize", awq, "--output", tmp_path / "again").stderr.endswith("`awq-trt onnx` takes it.")
    assert "write NAME=VALUE" in command("triton", plan, "--output", tmp_path / "models", "--parameter", "x").stderr
