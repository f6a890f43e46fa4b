"""Every family of the table, from a checkpoint of random weights to a plan, and its ONNX file against transformers.

Decoders generate 64 tokens, greedy, four prompts of different lengths in one batch through the fixed cache. The
reference is transformers' own model, eager, in fp32, with the rounded weights; it reads each sequence alone and whole.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import tiny_models
import torch
import transformers as t
from commands import export

from awq_trt.checkpoint.model import main_output
from awq_trt.evaluate.verify import onnx_session
from awq_trt.serve.generator import Generator
from awq_trt.serve.open import open_decoder
from awq_trt.serve.sampling import Sampling

CAPACITY, TOKENS = 96, 64
LENGTHS = (3, 9, 17, 30)
"""Of the prompts: shorter than a window of 16, longer, in one call and in several."""

FAST = ("gemma2", "mixtral")
"""Families that plain pytest runs; the others take the same way."""
WINDOWS = {"qwen2": 1, "mistral": 2, "gemma2": 1, "gemma3": 2, "starcoder2": 2, "mixtral": 2}
"""Family -> how many of its layers have one."""
EXPERTS = ("mixtral", "qwen3-moe")


@dataclass(frozen=True)
class Exported:
    """What tools/export.py wrote. facts: its sidecar."""

    folder: Path
    facts: dict[str, Any]

    @property
    def onnx(self) -> Path:
        return self.folder / "out.onnx"


def some(names: Any, fast: tuple[str, ...]) -> list[Any]:
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def run_export(source: Path, folder: Path, *arguments: object) -> Exported:
    """The whole chain, with few calibration tokens; nothing stays in float inside the blocks but routers."""
    calibration = ("--calibration-samples", 2, "--calibration-length", 64)
    result = export("--model", source, "--engine", folder / "out.plan", *calibration, *arguments)
    assert result.returncode == 0, result.stderr
    facts = json.loads((folder / "out.plan.json").read_text())
    assert (folder / "out.plan").stat().st_size > 0
    left = facts["left_in_float"]
    assert {name for name, why in left.items() if not why.startswith("outside the repeated blocks")} == {
        name for name in left if name.endswith("mlp.gate")
    }
    assert "few calibration tokens" not in result.stderr
    return Exported(folder, facts)


@pytest.mark.parametrize("family", some(families.DECODERS, FAST))
def test_decoder(family: str, tmp_path: Path) -> None:
    source = families.checkpoint(families.DECODERS[family](), tmp_path / "m")
    exported = run_export(source, tmp_path, "--max-batch", 4, "--max-seq", CAPACITY)
    assert exported.facts["accuracy"]["onnx"]["relative"] < 0.01
    model = families.reference(tmp_path / "out.awq")
    generator_ = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 384, (n,), generator=generator_).tolist() for n in LENGTHS]
    with open_decoder(exported.onnx, max_batch=4, threads=1) as decoder:
        layers = decoder.facts["kv_cache"]["layers"]
        assert [x["window"] for x in layers].count(families.WINDOW) == WINDOWS.get(family, 0)
        assert all((x["slots"] < CAPACITY) == (x["window"] is not None) for x in layers)
        generated = greedy(Generator(decoder, tiny_models.tokenizer()), prompts)
    assert len({token for tokens in generated for token in tokens}) > 12
    for prompt, tokens in zip(prompts, generated, strict=True):
        assert len(tokens) == TOKENS
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (logits.amax(1) - chosen).max() < 1e-3 * logits.abs().max()
        assert (logits.argmax(1) == torch.tensor(tokens)).float().mean() > 0.95


def greedy(generator: Generator, prompts: list[list[int]]) -> list[list[int]]:
    """The tokens that follow each prompt, all of them in one batch."""
    ids = [generator.add(prompt, Sampling(max_tokens=TOKENS, ignore_eos=True)) for prompt in prompts]
    tokens: dict[int, list[int]] = {i: [] for i in ids}
    while generator.busy:
        for event in generator.step():
            assert event.error is None
            tokens[event.id] += event.token_ids
    return [tokens[i] for i in ids]


def test_windows_and_long_frequencies_would_be_noticed(tmp_path: Path) -> None:
    """The reference itself changes by more than a rounding error where a window is left out."""
    families.checkpoint(families.DECODERS["mistral"](), tmp_path)
    ids = torch.randint(2, 384, (1, 40))
    found = []
    for window in (families.WINDOW, None):
        model = t.AutoModelForCausalLM.from_pretrained(tmp_path, sliding_window=window, attn_implementation="eager")
        with torch.no_grad():
            found.append(model(ids).logits)
    assert (found[0] - found[1])[0, -1].abs().max() > 0.05 * found[0].abs().max()
    assert (found[0] - found[1])[0, : families.WINDOW].abs().max() < 1e-4 * found[0].abs().max()


@pytest.mark.slow
def test_longrope_beyond_the_original_positions(tmp_path: Path) -> None:
    """A cache of more than 128 tokens: the long frequencies from the first token on, as transformers has for 150."""
    source = families.checkpoint(families.DECODERS["phi3-longrope"](), tmp_path / "m")
    exported = run_export(source, tmp_path, "--max-seq", 160)
    assert exported.facts["accuracy"]["onnx"]["relative"] < 0.01
    ids = torch.randint(2, 384, (150,), generator=torch.Generator().manual_seed(0))
    with open_decoder(exported.onnx, max_batch=1, threads=1) as decoder, torch.no_grad():
        logits = decoder.run(0, ids[None].numpy(), np.array([0]), np.array([150]))
        expected = families.reference(tmp_path / "out.awq")(ids[None]).logits[0, -1].numpy()
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=1e-3 * float(np.abs(expected).max()))


INPUTS: dict[str, Callable[[int], torch.Tensor]] = {
    "input_ids": lambda n: torch.randint(2, 384, (n, 24)),
    "pixel_values": lambda n: torch.randn(n, 3, 32, 32),
    "input_features": lambda n: torch.randn(n, 16, 64),
}
PARTS = [(name, None) for name in families.ENCODERS if name != "clip"] + [("clip", "text"), ("clip", "vision")]
FAST_ENCODERS = ("whisper",)


@pytest.mark.parametrize(
    ("family", "part"), [pytest.param(*p, marks=[] if p[0] in FAST_ENCODERS else pytest.mark.slow) for p in PARTS]
)
def test_encoder(family: str, part: str | None, tmp_path: Path) -> None:
    """Every output against the eager model, with rows of different lengths where it reads text. The file computes in
    fp16, and so does the eager model to say how far off that may be."""
    name, config = families.ENCODERS[family]
    source = families.checkpoint(config(), tmp_path / "m", cls=getattr(t, name))
    main = "input_features" if family == "whisper" else getattr(t, name).main_input_name
    main = {"text": "input_ids", "vision": "pixel_values"}.get(part or "", main)
    arguments: list[object] = ["--part", part] if part else []
    torch.manual_seed(1)
    if main != "input_ids":
        np.savez(tmp_path / "inputs.npz", **{main: INPUTS[main](4).numpy()})
        arguments += ["--calibration", tmp_path / "inputs.npz"]
    exported = run_export(source, tmp_path, *arguments)
    assert exported.facts["accuracy"]["onnx"]["relative"] < 0.01
    model = families.reference(tmp_path / "out.awq")
    inputs = {main: INPUTS[main](3).half().float() if main != "input_ids" else INPUTS[main](3)}
    if main == "input_ids":
        mask = inputs["attention_mask"] = torch.ones(3, 24, dtype=torch.int64)
        mask[1, 9:] = mask[2, 20:] = 0
        inputs["input_ids"][mask == 0] = 1  # RoBERTa counts positions by it
    session = onnx_session(exported.onnx)
    types = {i.name: np.float16 if i.type == "tensor(float16)" else np.int64 for i in session.get_inputs()}
    (found,) = session.run(None, {n: x.numpy().astype(types[n]) for n, x in inputs.items()})
    with torch.no_grad():
        output = model(**inputs)
        half = copy.deepcopy(model).half()
        rough = half(**{n: x.half() if x.is_floating_point() else x for n, x in inputs.items()})
    (wanted,) = session.get_outputs()
    assert wanted.name == main_output(output)
    expected, limit = output[wanted.name], (rough[wanted.name].float() - output[wanted.name]).abs().max()
    assert 0 < limit < 0.01 * expected.abs().max()
    real = mask.bool() if main == "input_ids" and expected.dim() == 3 else torch.ones(expected.shape[:1]).bool()
    error = (torch.from_numpy(found).float() - expected)[real].abs().max()
    assert error <= 3 * limit
    if main == "input_ids" and family != "clip-text":  # which reads from left to right, so that padding is out of sight
        with torch.no_grad():
            ignoring = model(input_ids=inputs["input_ids"])[wanted.name]
        assert (ignoring - expected)[real].abs().max() > 5 * limit
