"""The README's lines do what they say."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_server

from awq_trt.checkpoint.quantized import open_quantized
from awq_trt.cli.main import COMMANDS, parser
from awq_trt.engine.runtimes import has_gpu
from awq_trt.evaluate.accuracy import eager_outputs
from awq_trt.export.metadata import read_graph
from awq_trt.serve.generate import Prompt, encode, generate
from awq_trt.serve.sampling import Sampling
from awq_trt.serve.triton.repository import write_triton_repo

ROOT = Path(__file__).parents[1]
FOLDERS = ("", "awq_trt/*/", "plugins/", "tests/", "tools/")
READMES = sorted(file for folder in FOLDERS for file in ROOT.glob(f"{folder}README.md"))
README = (ROOT / "README.md").read_text()
SERVE = (ROOT / "awq_trt" / "serve" / "README.md").read_text()


def blocks(text: str, language: str = r"\w*") -> list[str]:
    """The fenced blocks of a language, of any by default."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands() -> list[tuple[str, list[str]]]:
    """Every line of a README that calls this project: (file, words), without comments, `$ ` and what comes before."""
    found = []
    for file in READMES:
        for line in re.findall(r"^\S.*$", "".join(blocks(file.read_text())), re.MULTILINE):
            for step in line.removeprefix("$ ").split(" && "):
                words = shlex.split(step, comments=True) if "awq" in step or "tools/" in step else []
                start = next(
                    (i for i, w in enumerate(words) if w in ("awq-trt", "awq_trt") or w.startswith("tools/")), None
                )
                if start is not None and words[0] in ("awq-trt", "python", "torchrun"):
                    found.append((str(file.relative_to(ROOT)), words[start:]))
    return found


PYTHON = [(str(file.relative_to(ROOT)), i) for file in READMES for i in range(len(blocks(file.read_text(), "python")))]


@pytest.mark.parametrize(("file", "number"), PYTHON)
def test_python_lines(models: Path, exported: Path, tmp_path: Path, file: str, number: int) -> None:
    script = blocks((ROOT / file).read_text(), "python")[number].replace("path/to/checkpoint", str(models / "llama"))
    if file != "README.md":  # it makes its own
        shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
        (tmp_path / "out.awq").symlink_to("llama.awq")
        script = script.replace("out.onnx", "llama.onnx")
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    if file == "README.md":
        assert (tmp_path / "models" / "out" / "config.pbtxt").exists()


def test_every_command_of_every_readme_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Its subcommand or tool is there, and takes its options. What can run without a GPU is run below."""
    found = commands()
    assert len(READMES) == 10
    assert len(found) >= 12
    for file, (program, *words) in found:
        if program in ("awq-trt", "awq_trt"):
            with contextlib.suppress(SystemExit):
                assert parser(words[0]).parse_args(words).run, (file, words)
                continue
            assert words[-1] == "--help", (file, words, capsys.readouterr().err)
        else:
            options = set(re.findall(r"--[a-z-]+", help_of(program)))
            assert {word for word in words if word.startswith("--")} <= options, (file, words)


@cache
def help_of(tool: str) -> str:
    """What a tool says of itself."""
    return subprocess.run([sys.executable, ROOT / tool, "--help"], capture_output=True, text=True, check=True).stdout


def test_options_exist() -> None:
    """Every option that a README names in its text is one of the commands'."""
    ours = {option for file in READMES for option in re.findall(r"`(--[a-z-]+)", file.read_text())}
    known = set(re.findall(r"--[a-z-]+", "".join(parser(name).format_help() + sub_help(name) for name in COMMANDS)))
    foreign = {"--versionCompatible", "--dynamicPlugins", "--backend-config", "--version", "--dynamic"}  # of NVIDIA's
    tools = "".join(help_of(f"tools/{tool.name}") for tool in sorted((ROOT / "tools").glob("*.py")))
    tools += help_of("tests/fuzz/run.py")
    assert len(ours) > 5
    assert ours - foreign - known - set(re.findall(r"--[a-z-]+", tools)) == set()


def sub_help(name: str) -> str:
    """The help of a subcommand."""
    return str(vars(parser(name)._subparsers._group_actions[0])["choices"][name].format_help())  # type: ignore[union-attr]


def test_links_lead_somewhere() -> None:
    for file in READMES:
        for target in re.findall(r"\]\(([^)#]+)\)", file.read_text()):
            assert target.startswith("http") or (file.parent / target).exists(), (file, target)


def test_the_top_readme_fits_on_two_screens() -> None:
    assert len(README.splitlines()) <= 110


def test_recorded_numbers_are_the_ones_printed() -> None:
    rows = json.loads((ROOT / "tools" / "results" / "awq-smollm2-135m.json").read_text())["rows"]
    assert f"(float: {rows['float']['perplexity']:.2f})" in README
    for name in ("rounding", "llm-awq", "fast", "default", "best-48", "best-symmetric", "llm-compressor-gptq"):
        cells = f"+{rows[name]['increase']:.2f}", f"{rows[name]['top1']:.1%}".replace("%", " %")
        assert re.search(r"\|[ *]+".join(re.escape(cell) + r"[ *]+" for cell in cells), README), (name, cells)


@pytest.fixture(scope="module")
def first_line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the first line makes of SmolLM2, and what it prints, without its installation: these tests run in that."""
    folder = tmp_path_factory.mktemp("readme")
    steps = blocks(README, "bash")[0].splitlines()[0].split(" && ")
    assert steps[2].startswith("pip install -c tools/constraints.txt")
    (folder / "tools").symlink_to(ROOT / "tools")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-c", " && ".join(steps[3:])],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stderr


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_first_line_on_a_real_model(first_line: tuple[Path, str]) -> None:
    folder, printed = first_line
    sidecar = json.loads((folder / "out.plan.json").read_text())
    assert len(sidecar["quantized"]) == 210
    assert sidecar["plugin"]["layers"] == 120  # Q, K, V are one node; gate and up are one
    assert set(sidecar["left_in_float"]) == {"lm_head"}
    assert re.search("3[0-2] of 32 greedy tokens equal", " ".join(printed.split()))
    assert sidecar["accuracy"]["onnx"]["gap"] < 0.02  # no more than a tie, which rounding decides
    held_out = sidecar["accuracy"]["held_out"]
    assert held_out["float"]["perplexity"] < held_out["awq"]["perplexity"] < held_out["rounding"]["perplexity"]
    assert held_out["awq"]["top1"] > held_out["rounding"]["top1"]
    assert sidecar["accuracy"]["onnx"]["relative"] < 2e-3
    sizes = sidecar["sizes"]
    weights = sizes["quantized_weights"] + sizes["other_weights"]
    assert sizes["onnx"] + sizes["onnx_data"] <= 1.05 * weights
    # packed INT4, fp16 scales and 4-bit zeros of 106 million weights, and everything else in fp16, stored once
    assert weights <= 1.01 * (106_168_320 * (4 + 20 / 64) / 8 + 2 * (134_515_008 - 106_168_320))
    check = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--output", "gpu.json", "--engine", "out.plan"],
        cwd=folder,
        check=False,
    )
    assert check.returncode == 0
    assert json.loads((folder / "gpu.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_commands_of_the_readme_print_what_it_shows(first_line: tuple[Path, str]) -> None:
    """Shown lines are in the output, in their order; numbers are any numbers, and … is anything."""
    folder, printed = first_line
    number = r"[\d.]+(?:e-\d+)?"
    shown = "\n".join(blocks(README, "console"))
    (first, *others) = re.split(r"^\$ ", shown, flags=re.MULTILINE)[1:]
    outputs = [(first, printed)]
    for text in others:
        line = text.splitlines()[0]
        if line.startswith("awq-trt check") and has_gpu():  # what is shown is of a machine without one
            continue
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=folder,
            env={**os.environ, "PATH": path, "COLUMNS": "160"},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode in (0, 1), done.stderr
        outputs.append((text, done.stdout + done.stderr))
    assert len(outputs) == 5 - has_gpu()
    for text, output in outputs:
        command, *lines = text.splitlines()
        words = " ".join(" ".join(lines).split())
        pattern = re.escape(words).replace("…", ".*?")
        pattern = re.sub(r"\d+(?:\\\.\d+)?(?:e\\-\d+)?", lambda _: number, pattern)
        assert re.search(pattern, " ".join(output.split())), (command, words, output)


PROMPTS: list[Prompt] = [
    "Water",
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):\n",
    "1, 2, 3, 4, 5,",
    "In 1969, the first people to walk on the Moon were Neil Armstrong and Buzz Aldrin. Their ship was",
    "The theory of evolution by natural selection, which Darwin described in 1859, says that",
    [{"role": "user", "content": "Name three colours."}],
]
ANSWER_TOKENS = 64


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_real_model_says_the_same_everywhere(first_line: tuple[Path, str], tmp_path: Path) -> None:
    """Greedy tokens of 8 prompts in one ragged batch: the eager rounded model, ONNX Runtime, and Triton."""
    folder, _ = first_line
    facts = read_graph(folder / "out.onnx").metadata
    assert facts["kv_cache"]["capacity"] == 2048
    answers = generate(folder / "out.onnx", PROMPTS, Sampling(max_tokens=ANSWER_TOKENS), max_batch=len(PROMPTS))
    checkpoint = open_quantized(folder / "out.awq")
    prompts = [encode(checkpoint.tokenizer, prompt) for prompt in PROMPTS]
    assert len({len(ids) for ids in prompts}) >= 6
    whole = [{"input_ids": torch.tensor([[*p, *a.token_ids]])} for p, a in zip(prompts, answers, strict=True)]
    for ids, answer, logits in zip(prompts, answers, eager_outputs(checkpoint, whole), strict=True):
        rows, chosen = logits[0, len(ids) - 1 : -1], torch.tensor(answer.token_ids)
        gap = rows.amax(-1) - rows.gather(-1, chosen[:, None])[:, 0]
        assert float(gap.max()) < 0.02, answer.text  # the arg max, or a tie, which rounding decides
        ended = answer.token_ids[-1] in facts["generation"]["eos_token_id"]
        assert answer.finish_reason == ("stop" if ended else "length")
        assert ended or len(answer.token_ids) == ANSWER_TOKENS
    assert answers[1].text.startswith(" Paris")

    settings = {"python": sys.executable, "max_batch": str(len(PROMPTS))}
    write_triton_repo(folder / "out.onnx", tmp_path / "models", parameters=settings)
    with triton_server.running(tmp_path / "models", tmp_path / "server") as server, ThreadPoolExecutor() as pool:

        def ask(prompt: Prompt) -> dict[str, Any]:
            text = {"text_input": prompt} if isinstance(prompt, str) else {"messages": json.dumps(prompt)}
            status, answer = server.request(
                "/v2/models/out/generate", text | {"max_tokens": ANSWER_TOKENS}, timeout=600
            )
            assert status == 200, answer
            return json.loads(answer)

        for served, answer in zip(pool.map(ask, PROMPTS), answers, strict=True):
            assert served["text_output"] == answer.text
            assert served["num_output_tokens"] == len(answer.token_ids)

        script = next(block for block in blocks(SERVE) if "tritonclient" in block)
        script = script.replace("localhost:8001", server.grpc)
        client = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False
        )
        assert client.returncode == 0, client.stderr
        assert client.stdout == answers[PROMPTS.index("Once upon a time")].text
        lines = re.findall(r"^curl .*$", SERVE, re.MULTILINE)
        assert len(lines) == 2
        for command in lines:
            shown = subprocess.run(
                ["bash", "-c", command.replace("localhost:8000", server.http)],
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
            assert "Paris" in shown.stdout or "Blue" in shown.stdout, shown.stdout + shown.stderr
