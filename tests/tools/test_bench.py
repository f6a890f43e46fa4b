"""The benchmark: the procedure it compares with, its arithmetic, and one method from start to score."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import bench_awq
import numpy as np
import pytest
import torch
import transformers
from bench import llm_awq, methods, prepare, runner, texts
from bench.llm_awq import Rounding
from bench.machine import CommandError

from awq_trt.awq.calibration import DEFAULT_TEXT, HELD_OUT_TEXT, windows
from awq_trt.awq.config import QuantizeConfig
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.evaluate.accuracy import RoundedWeights, accuracy, eager_predictions


def test_prose_has_one_line_per_paragraph() -> None:
    first = "It was a long line of text that ended where the page ended, not\nthe sentence.  It   had spaces."
    raw = f"Licence\n*** START\r\nCHAPTER I\n\n{first}\n\n   A verse\n   of two lines\nTHE END\nLicence"
    assert texts.prose(raw, "*** START", "THE END").splitlines() == [
        "CHAPTER I",
        "It was a long line of text that ended where the page ended, not the sentence. It had spaces.",
        "A verse",
        "of two lines",
    ]


def test_another_text_than_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = texts.HELD_OUT
    monkeypatch.setattr(texts, "read_member", lambda text, folder: f"{work.begin}\nanother\n{work.end}")
    with pytest.raises(SystemExit, match="expected 3898c6ad"):
        texts.fetch(work, tmp_path / "text.txt")


def test_rounding_stays_on_sixteen_values_within_half_a_step() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for symmetric in (False, True):
        grouped, rounded = (t.reshape(-1, 32) for t in (weight, Rounding(32, symmetric)(weight)))
        assert max(len(row.unique()) for row in rounded) <= 16
        step = grouped.abs().amax(1) / 7 if symmetric else (grouped.amax(1) - grouped.amin(1)) / 15
        assert ((rounded - grouped).abs() <= 0.501 * step[:, None] + 1e-6).all()


@torch.inference_mode()
def test_llm_awq_leaves_the_function_alone_and_rounds_better(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> transformers.PreTrainedModel:
        return transformers.LlamaForCausalLM.from_pretrained(models / "llama").eval()

    tokenizer = open_checkpoint(models / "llama").tokenizer
    ids = torch.cat([w["input_ids"] for w in windows(DEFAULT_TEXT, tokenizer, 4, 128)])
    expected = model()(ids).logits

    scaled, seen, apply_scale = model(), [], llm_awq.apply_scale

    def apply_another(block: object, part: llm_awq.Part, scale: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
        seen.append(part.linears)
        apply_scale(block, part, torch.linspace(0.5, 2, len(scale)), inputs)

    with monkeypatch.context() as patch:
        patch.setattr(llm_awq, "apply_scale", apply_another)
        llm_awq.quantize_blocks(scaled, ids, Exact(32, False))
    torch.testing.assert_close(scaled(ids).logits, expected, rtol=1e-3, atol=1e-4)
    assert ["self_attn.o_proj"] not in seen, "grouped queries: the published code leaves it alone"
    assert len(seen) == 2 * 3

    def error(rounded: transformers.PreTrainedModel) -> float:
        return float((rounded(ids).logits - expected).norm())

    for symmetric in (False, True):
        rounding = Rounding(32, symmetric)
        plain, searched = model(), model()
        for module in plain.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(rounding(module.weight))
        llm_awq.quantize_blocks(searched, ids, rounding)
        assert error(searched) < 0.9 * error(plain)


@torch.inference_mode()
def test_scales_are_the_best_of_twenty_and_inputs_follow(models: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(models / "llama").eval()
    hidden, arguments = llm_awq.first_block_inputs(model, torch.arange(128).reshape(2, 64))
    block, rounding = model.model.layers[0], Rounding(32, False)
    inputs, attention, output = llm_awq.record(block, hidden, arguments)
    for part in llm_awq.parts(block):
        x = inputs[part.linears[0]]
        found = llm_awq.search_scale(block, part, x, attention if part.inspect == "self_attn" else {}, rounding)
        if part.inspect == "mlp.down_proj":
            mean = x.flatten(0, 1).abs().mean(0)
            scales = [(s / (s.max() * s.min()).sqrt()) for s in (mean.pow(i / 20).clamp(min=1e-4) for i in range(20))]
            weight = block.mlp.down_proj.weight
            errors = [float((x @ (rounding(weight * s) / s - weight).t()).square().mean()) for s in scales]
            torch.testing.assert_close(found, scales[int(np.argmin(errors))])
        llm_awq.apply_scale(block, part, found, inputs)
    again, _, same = llm_awq.record(block, hidden, arguments)
    torch.testing.assert_close(same, output, rtol=1e-4, atol=1e-4)
    for name, x in inputs.items():
        torch.testing.assert_close(again[name], x, rtol=1e-3, atol=1e-4)


class Exact(Rounding):
    """Rounds nothing."""

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.clone()


@torch.inference_mode()
def test_clipping_takes_the_best_of_its_ratios() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(5, 64, generator=generator), torch.randn(100, 64, generator=generator)
    weight[:, ::32] *= 4
    rounding = Rounding(32, False)
    clipped = llm_awq.clip(weight, x, rounding).reshape(5, 2, 32)
    for row, group in np.ndindex(5, 2):
        w, inputs = weight.reshape(5, 2, 32)[row, group], x.reshape(100, 2, 32)[:, group]
        tried = [w.clamp(-b, b) for b in (w.abs().max() * (1 - i / 20) for i in range(10))]
        errors = [float((inputs @ (rounding(t) - w)).square().mean()) for t in tried]
        torch.testing.assert_close(clipped[row, group], tried[int(np.argmin(errors))])


def test_targets_are_ratios_of_rows_that_are_there() -> None:
    rows = {
        "llm-awq": {"increase": 3.0, "seconds": 200.0},
        "default": {"increase": 2.7, "seconds": 60.0},
        "best": {"error": "failed"},
    }
    found = {str(t["what"]): (t["ratio"], t["met"]) for t in methods.targets(rows)}
    assert found == {
        "increase of default / llm-awq": (0.9, True),
        "seconds of default / llm-awq": (0.3, False),
    }


def test_names_of_methods_and_groups() -> None:
    assert [m.name for m in methods.chosen(["best", "cheap"])] == [
        "float", "rounding", "rounding-symmetric", "fast", "default", "best"
    ]  # fmt: skip
    assert set(methods.GROUPS["all"]) >= {n for t in methods.TARGETS for n in t[:2]}
    with pytest.raises(KeyError, match="no method or group nonsense"):
        methods.chosen(["nonsense", "float"])


def test_rows_of_an_earlier_record(tmp_path: Path) -> None:
    """Those run now are left out with what they exported, and so are rows whose method is no more."""
    names = ("best", "modelopt-awq-lite", "modelopt-awq-lite-exported", "llm-awq", "given-up")
    record = {"date": "then", "settings": {"length": 512}, "rows": {name: {"perplexity": 1.0} for name in names}}
    (tmp_path / "earlier.json").write_text(json.dumps(record))
    rows = bench_awq.earlier(tmp_path / "earlier.json", {"length": 512}, ["best"])
    assert sorted(rows) == ["llm-awq", "modelopt-awq-lite", "modelopt-awq-lite-exported"]
    assert rows["llm-awq"] == {"perplexity": 1.0, "measured": "then"}
    with pytest.raises(SystemExit, match="other settings"):
        bench_awq.earlier(tmp_path / "earlier.json", {"length": 256}, [])


@pytest.fixture(scope="module")
def bench(models: Path, tmp_path_factory: pytest.TempPathFactory) -> runner.Bench:
    """The tiny llama, cut to one block, with two windows for each purpose."""
    cache = tmp_path_factory.mktemp("bench")
    model = prepare.float_directory(str(models / "llama"), cache, blocks=1)
    tokenizer = open_checkpoint(model).tokenizer
    held_out = windows(HELD_OUT_TEXT, tokenizer, 2, 64)
    return runner.Bench(
        model, cache, 1, 32, DEFAULT_TEXT, lambda n: windows(DEFAULT_TEXT, tokenizer, n, 64), 2, held_out,
        eager_predictions(open_checkpoint(model), held_out),
    )  # fmt: skip


def test_one_method_from_start_to_score(bench: runner.Bench) -> None:
    assert json.loads((bench.model / "config.json").read_text())["num_hidden_layers"] == 1
    assert prepare.linear_shapes(bench.model) == {"64 x 64": 2, "32 x 64": 2, "128 x 64": 2, "64 x 128": 1}
    rows = runner.run_method(bench, methods.chosen(["float"])[0])
    assert rows["float"]["increase"] == 0
    rows |= runner.run_method(bench, methods.chosen(["rounding"])[0])
    row = rows["rounding"]
    checkpoint = open_checkpoint(bench.model)
    expected = accuracy(
        {"float": checkpoint, "rounding": RoundedWeights(checkpoint, QuantizeConfig(group_size=32))}, bench.held_out
    )
    assert row["perplexity"] == pytest.approx(expected["rounding"].perplexity, rel=1e-3)
    increase = row["perplexity"] - math.exp(sum(bench.reference.losses) / 2)
    assert row["increase"] == pytest.approx(increase, abs=1e-3)
    assert row["seconds"] > 0
    assert row["calibration_windows"] == 2
    assert row["peak_mb"] >= row["imports_mb"] > 100
    assert not (bench.cache / "work" / "rounding").exists()


def test_a_method_that_fails_is_a_row(bench: runner.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    (peer,) = methods.chosen(["modelopt-awq-lite"])
    monkeypatch.setattr(runner, "interpreter", lambda name, cache: sys.executable)
    assert "No module named 'modelopt'" in runner.run_method(bench, peer)[peer.name]["error"]

    def fails(name: str | None, cache: Path) -> str:
        raise CommandError("pip: no such version")

    monkeypatch.setattr(runner, "interpreter", fails)
    assert runner.run_method(bench, peer) == {peer.name: {"error": "pip: no such version"}}
