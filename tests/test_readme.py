"""The README's lines do what they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_server

from awq_trt.checkpoint.quantized import open_quantized
from awq_trt.evaluate.accuracy import eager_outputs
from awq_trt.export.metadata import read_graph
from awq_trt.serve.generate import Prompt, encode, generate
from awq_trt.serve.sampling import Sampling
from awq_trt.serve.triton.repository import write_triton_repo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def code(language: str) -> str:
    """The README's first block of a language."""
    found = re.search(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def test_python_lines(models: Path, tmp_path: Path) -> None:
    script = code("python").replace("path/to/checkpoint", str(models / "llama"))
    assert str(models) in script
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "models" / "out" / "config.pbtxt").exists()


def test_options_exist() -> None:
    """Every option the README names is one of the command line's."""
    text = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "export.py"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    ours = set(re.findall(r"`(--[a-z-]+)", README)) | set(re.findall(r"tools/export\.py.* (--[a-z-]+)", README))
    foreign = {"--versionCompatible", "--dynamicPlugins", "--version", "--dynamic"}
    assert len(ours) > 10
    assert {option for option in ours - foreign if option not in text} == set()


def test_recorded_numbers_are_the_ones_printed() -> None:
    record = json.loads((ROOT / "tools" / "results" / "smollm2-135m-export.json").read_text())
    held_out = record["accuracy"]["held_out"]
    for name in ("float", "rounding", "awq"):
        assert f"{held_out[name]['perplexity']:.2f}" in README
    assert f"| {record['sizes']['plan'] / 1e6:.0f} MB" in README
    assert f"| {record['seconds']:.0f} s |" in README


@pytest.fixture(scope="module")
def first_line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the first line makes of SmolLM2, and what it prints, without its installation: these tests run in that."""
    folder = tmp_path_factory.mktemp("readme")
    steps = code("bash").splitlines()[0].split(" && ")
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
        assert tuple(logits[0, len(ids) - 1 : -1].argmax(-1).tolist()) == answer.token_ids, answer.text
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

        script = next(block for block in README.split("```\n") if "tritonclient" in block)
        script = script.replace("localhost:8001", server.grpc)
        client = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False
        )
        assert client.returncode == 0, client.stderr
        assert client.stdout == answers[PROMPTS.index("Once upon a time")].text
        for command in re.findall(r"^curl .*$", README, re.MULTILINE):
            shown = subprocess.run(
                ["bash", "-c", command.replace("localhost:8000", server.http)],
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
            assert "Paris" in shown.stdout or "Blue" in shown.stdout, shown.stdout + shown.stderr
