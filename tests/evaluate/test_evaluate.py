"""tools/eval.py: the same numbers whatever stage they are measured from."""

from __future__ import annotations

import json
import math
import re
import runpy
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from awq_trt.awq.calibration import HELD_OUT_TEXT, windows
from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.outside import fill
from awq_trt.awq.quantize import quantize
from awq_trt.checkpoint.model import empty_model
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.errors import AwqTrtError
from awq_trt.evaluate.evaluate import evaluate, open_weights

Run = Callable[..., int]


@pytest.fixture
def tool() -> Run:
    """main() of tools/eval.py."""
    main: Run = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "eval.py"))["main"]
    return main


@torch.inference_mode()
def test_every_stage_of_one_model(exported: Path, models: Path, tool: Run, tmp_path: Path) -> None:
    stages = [exported / "llama.awq", exported / "llama.onnx"]
    options = ["--float", models / "llama", "--windows", 3, "--length", 96, "--output", tmp_path / "eval.json"]
    assert tool([str(a) for a in [*stages, *options]]) == 0
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert list(rows) == ["float", "rounding", *map(str, stages)]

    model = transformers.LlamaForCausalLM.from_pretrained(models / "llama").eval()
    samples = windows(HELD_OUT_TEXT, open_checkpoint(models / "llama").tokenizer, 3, 96)
    losses = [float(model(s["input_ids"], labels=s["input_ids"]).loss) for s in samples]
    assert rows["float"]["perplexity"] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-4)
    assert rows["float"]["top1"] == 1

    awq, exported_to_onnx = (rows[str(stage)] for stage in stages)
    assert awq["top1"] < 1
    assert exported_to_onnx["perplexity"] == pytest.approx(awq["perplexity"], rel=2e-4), "float16 activations differ"
    assert exported_to_onnx["top1"] == pytest.approx(awq["top1"], abs=0.02)
    assert abs(rows["rounding"]["perplexity"] / awq["perplexity"] - 1) > 2e-4, "or the comparison above says nothing"


@pytest.mark.parametrize(("group_size", "symmetric"), [(64, True), (-1, False)])
def test_settings_of_rounding_are_those_of_the_directory(
    models: Path, tmp_path: Path, group_size: int, symmetric: bool
) -> None:
    quantize(models / "llama", tmp_path / "a", QuantizeConfig(method="rtn", group_size=group_size, symmetric=symmetric))
    rows = evaluate([tmp_path / "a"], float_model=models / "llama", samples=1, length=64)
    in_16_bits = rows[str(tmp_path / "a")]["perplexity"]  # its embeddings and norms are
    assert rows["rounding"]["perplexity"] == pytest.approx(in_16_bits, rel=5e-4)
    assert rows["float"]["perplexity"] != pytest.approx(in_16_bits, rel=5e-4)


def test_encoders_have_agreement_only(models: Path) -> None:
    rows = evaluate([models / "bert"], samples=1, length=32)
    assert rows[str(models / "bert")] == {"perplexity": None, "top1": 1.0, "seconds": pytest.approx(0, abs=60)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{onnx}"], "has no tokenizer; give the model it came from as --float"),
        (["nowhere"], "nowhere"),
        (["{awq}", "--text", "nothing.txt"], "nothing.txt: no such file"),
        (["{awq}", "--windows", "0"], "--windows 0"),
        (["{awq}", "--length", "1000000"], "one calibration window needs 1000000"),
    ],
)
def test_bad_input(
    exported: Path, tool: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = {"onnx": exported / "llama.onnx", "awq": exported / "llama.awq"}
    assert tool([a.format(**places) for a in arguments]) == 2
    assert message in capsys.readouterr().err


def test_tasks_without_lm_eval(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(AwqTrtError, match="pip install lm_eval"):
        evaluate([exported / "llama.awq"], samples=1, length=32, tasks=["piqa"])


@torch.inference_mode()
def test_tasks_get_the_quantized_model(exported: Path, tool: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A stand-in of lm_eval's interface keeps what it was called with; the real package is too large for the tests."""
    seen = {}

    def simple_evaluate(**arguments: object) -> dict[str, object]:
        seen.update(arguments)
        return {"results": {"piqa": {"alias": "piqa", "acc,none": 0.625}}}

    def module(name: str, **members: object) -> None:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        vars(sys.modules[name]).update(members)

    module("lm_eval", simple_evaluate=simple_evaluate)
    module("lm_eval.models")
    module("lm_eval.models.huggingface", HFLM=lambda **arguments: arguments)
    module("lm_eval.tasks", TaskManager=lambda include_path: include_path)
    options = ["--lm-eval", "piqa, boolq", "--lm-eval-limit", "3", "--lm-eval-include", str(tmp_path)]
    assert tool([str(exported / "llama.awq"), "--windows", "1", "--length", "32", *options]) == 0
    assert re.search("piqa: acc,none 0.6250", capsys.readouterr().out)
    assert (seen["tasks"], seen["limit"], seen["task_manager"]) == (["piqa", "boolq"], 3, str(tmp_path))
    weights = open_weights(str(exported / "llama.awq"))
    expected = empty_model(weights.config)
    fill(expected, "", weights)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(seen["model"]["pretrained"](ids).logits, expected(ids).logits)  # type: ignore[index]
    assert len(seen["model"]["tokenizer"]) == 384  # type: ignore[index]


def test_tasks_of_the_real_lm_eval(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "The sea is"}))
    (tmp_path / "sea.yaml").write_text(
        f"""task: sea
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_target: 0
doc_to_choice: [" wide", " a white rabbit"]
metric_list: [{{metric: acc}}]
"""
    )
    shutil.copytree(exported / "llama.awq", tmp_path / "llama.awq")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama.awq")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)  # which lm_eval asks for
    tokenizer.save_pretrained(tmp_path / "llama.awq")
    rows = evaluate(
        [tmp_path / "llama.awq"], samples=1, length=32, tasks=["sea"], task_options={"include": tmp_path, "limit": 2}
    )
    assert rows[str(tmp_path / "llama.awq")]["tasks"]["sea"]["acc,none"] in (0, 1)
