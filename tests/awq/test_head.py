"""The layer that makes logits, in INT4: found, untied, searched by a sample of its rows, rounded piece by piece."""

from __future__ import annotations

import dataclasses
import json
import re
from io import StringIO
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from rich.console import Console

from awq_trt import linear
from awq_trt.awq import head, pipeline, task
from awq_trt.awq.blocks import BlockStream
from awq_trt.awq.calibration import DEFAULT_TEXT, windows
from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.quantize import QuantizeReport, quantize
from awq_trt.awq.task import head_of, norms_outside, untied
from awq_trt.checkpoint.model import empty_model
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.checkpoint.quantized import QuantizedCheckpoint, open_quantized
from awq_trt.checkpoint.reader import Reader
from awq_trt.errors import AwqTrtError
from awq_trt.evaluate.accuracy import eager_outputs
from awq_trt.linear import quantize_weight

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"calibration_samples": 3, "calibration_length": 64, "lm_head": "int4"}
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def quantized(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizeReport, Path]:
    """The tiny llama with an INT4 head."""
    output = tmp_path_factory.mktemp("head") / "llama.awq"
    return quantize(models / "llama", output, QuantizeConfig(**OPTIONS)), output  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "layer", "norms"),
    [
        ("llama", "lm_head", ["model.norm.weight"]),
        ("gpt2", "lm_head", ["transformer.ln_f.weight", "transformer.ln_f.bias"]),
        ("bert", "cls.predictions.decoder", ["cls.predictions.transform.LayerNorm.weight"]),
        ("vit", None, []),
    ],
)
def test_heads_and_the_norms_before_them(models: Path, name: str, layer: str | None, norms: list[str]) -> None:
    checkpoint = open_checkpoint(models / name)
    model = empty_model(checkpoint.config)
    found = head_of(model)
    assert (found and found[0]) == layer
    if layer is None:
        return
    prefix = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer"}[name]
    outside = norms_outside(model, prefix)
    assert set(norms) <= set(outside)
    assert not any(n.startswith((prefix, layer)) or "embed_tokens" in n for n in outside)
    apart = untied(checkpoint)
    owned = head_of(empty_model(apart.config))
    assert owned is not None
    assert owned[1].weight is not empty_model(apart.config).get_input_embeddings().weight
    assert torch.equal(apart.tensor(f"{layer}.weight"), checkpoint.tensor(embedding_of(model)))
    assert checkpoint.config.tie_word_embeddings, "the original is unchanged"
    assert untied(apart) is apart


def embedding_of(model: transformers.PreTrainedModel) -> str:
    return next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)


def test_an_architecture_that_is_always_tied(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "_is_tied", lambda model: True)
    with pytest.raises(AwqTrtError, match="LlamaForCausalLM cannot have a head apart from its embedding"):
        untied(open_checkpoint(models / "llama"))


def test_report(quantized: tuple[QuantizeReport, Path]) -> None:
    report, output = quantized
    assert report.head == "lm_head"
    assert report.left_in_float == {}
    assert len(report.quantized) == len(report.layers) == 15
    layer = report.layers[-1]
    assert (layer.name, layer.tokens, layer.folded_into, layer.feedback) == ("lm_head", 3 * 64, "model.norm", True)
    assert layer.alpha > 0
    assert layer.error < 0.6 * layer.error_rounding
    written = json.loads((output / "awq_trt.json").read_text())
    assert written["lm_head"] == "int4"
    assert written["layers"][-1] == dataclasses.asdict(layer)


def test_checkpoint_has_an_embedding_in_float_and_a_head_of_its_own(
    quantized: tuple[QuantizeReport, Path], models: Path
) -> None:
    output, original = open_quantized(quantized[1]), open_checkpoint(models / "llama")
    assert not output.config.tie_word_embeddings
    assert "lm_head" in output.linears
    assert torch.equal(output.tensor(EMBEDDING), original.tensor(EMBEDDING).half())
    assert output.scheme.method == "awq_trt", "transformers' loader for AutoAWQ skips every head"
    assert all(f.name.startswith("awq_trt-") for f in quantized[1].glob("*.safetensors"))
    config = json.loads((quantized[1] / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] is None
    # folded: the norm is what it was, divided by the scale that the rows of the head are multiplied by
    scale = original.tensor("model.norm.weight") / output.tensor("model.norm.weight").float()
    assert scale.max() > 1.5 * scale.min()
    restored, weight = output.tensor("lm_head.weight") / scale, original.tensor(EMBEDDING).float()
    assert float((restored - weight).norm() / weight.norm()) < 0.4, "channels of small activations are rounded coarsely"


class Replaced:
    """Weights with some of them replaced."""

    def __init__(self, weights: QuantizedCheckpoint, tensors: dict[str, torch.Tensor]) -> None:
        self.source, self.config, self._weights, self._tensors = weights.source, weights.config, weights, tensors

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name] if name in self._tensors else self._weights.tensor(name)


def test_the_errors_are_those_of_the_logits(quantized: tuple[QuantizeReport, Path], models: Path) -> None:
    """The report tells of a sample of the rows; here are all of them, on the calibration text."""
    original, output = open_checkpoint(models / "llama"), open_quantized(quantized[1])
    inputs = windows(DEFAULT_TEXT, original.tokenizer, 3, 64)
    floats = {name: original.tensor(kept) for name, kept in (("lm_head.weight", EMBEDDING), (NORM, NORM))}
    expected = torch.cat(list(eager_outputs(Replaced(output, floats), inputs)), 1)
    got = torch.cat(list(eager_outputs(output, inputs)), 1)
    assert float((got - expected).norm() / expected.norm()) == pytest.approx(quantized[0].layers[-1].error, rel=0.1)


def test_only_rounded(models: Path, tmp_path: Path) -> None:
    report = quantize(models / "llama", tmp_path / "out", QuantizeConfig(method="rtn", lm_head="int4"))
    output, original = open_quantized(tmp_path / "out"), open_checkpoint(models / "llama")
    expected = quantize_weight(original.tensor(EMBEDDING), 64, False, torch.float16)
    assert torch.equal(output.linears["lm_head"].q, expected.q)
    assert torch.equal(output.tensor(NORM), original.tensor(NORM).half())
    assert report.layers == ()
    assert report.head == report.quantized[-1] == "lm_head"


@dataclasses.dataclass(frozen=True)
class RowsOnly:
    """A reader that notes how many rows it was asked for, and will not give all of them."""

    read: Reader
    asked: list[int]

    def __call__(self) -> torch.Tensor:
        raise AssertionError("the head was read as a whole")

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        self.asked.append(len(index))
        return self.read()[index]


@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_the_head_is_read_in_pieces(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    checkpoint = untied(open_checkpoint(models / "llama"))
    quantize(checkpoint, tmp_path / "whole", QuantizeConfig(method=method, **OPTIONS))  # type: ignore[arg-type]
    asked: list[int] = []
    readers = {**checkpoint.readers, "lm_head.weight": RowsOnly(checkpoint.readers["lm_head.weight"], asked)}
    monkeypatch.setattr(linear, "CHUNK", 100 * 64)
    monkeypatch.setattr(head, "SAMPLE", 100 * 64)
    quantize(
        dataclasses.replace(checkpoint, readers=readers), tmp_path / "pieces", QuantizeConfig(method=method, **OPTIONS)
    )  # type: ignore[arg-type]
    assert max(asked) == 100
    assert set(asked) == {96, 100, 84}, "a sample, and all rows in pieces"
    whole, pieces = (open_quantized(tmp_path / n).linears["lm_head"] for n in ("whole", "pieces"))
    if method == "rtn":
        assert torch.equal(whole.q, pieces.q)
    difference = (whole.dequantize().float() - pieces.dequantize().float()).norm() / whole.dequantize().float().norm()
    assert difference < 0.05, "another sample may find another scale, but the rows are the same"


def test_a_head_that_cannot_be_int4_stays_tied_and_is_listed(models: Path, tmp_path: Path) -> None:
    report = quantize(models / "llama", tmp_path / "out", QuantizeConfig(group_size=128, method="rtn", lm_head="int4"))
    assert report.left_in_float["lm_head"] == "in_features 64 is not a multiple of the group size 128"
    assert report.head is None
    output = open_quantized(tmp_path / "out")
    assert output.config.tie_word_embeddings
    assert output.report["lm_head"] == "float"
    assert output.scheme.method == "awq"
    default = quantize(models / "llama", tmp_path / "default", QuantizeConfig(method="rtn"))
    assert "lm_head" in default.left_in_float


def test_a_head_narrower_than_the_blocks(tmp_path: Path) -> None:
    """As OPT-350m has it: the group size has to suit it too, and a projection stands between the last norm and it."""
    config = transformers.OPTConfig(
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=384,
        word_embed_proj_dim=32,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    source = tiny_models.save(transformers.OPTForCausalLM(config), tmp_path / "opt")
    assert quantize(source, tmp_path / "float", QuantizeConfig(method="rtn")).group_size == 64
    report = quantize(source, tmp_path / "int4", QuantizeConfig(**OPTIONS))  # type: ignore[arg-type]
    assert report.group_size == 32
    assert set(report.left_in_float) == {"model.decoder.project_in", "model.decoder.project_out"}
    assert report.layers[-1].folded_into is None
    output = open_quantized(tmp_path / "int4")
    assert output.linears["lm_head"].q.shape == (384, 32)
    assert (output.linears["lm_head"].pre_scale is not None) == (report.layers[-1].alpha > 0)


def test_no_head(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AwqTrtError, match=r"ViTForImageClassification has no linear layer that makes logits"):
        quantize(models / "vit", tmp_path / "out", QuantizeConfig(method="rtn", lm_head="int4"))
    monkeypatch.setattr(BlockStream, "head", lambda *_: None)
    with pytest.raises(AwqTrtError, match="LlamaForCausalLM never calls its head lm_head: leave it in float"):
        quantize(models / "llama", tmp_path / "out", QuantizeConfig(**OPTIONS))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_nan_in_the_head_is_found_before_the_first_block(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = untied(open_checkpoint(models / "llama"))
    bad = checkpoint.tensor("lm_head.weight").clone()
    bad[383, 63] = torch.nan
    monkeypatch.setattr(pipeline, "process", lambda *_: pytest.fail("a block was quantized"))
    readers = {**checkpoint.readers, "lm_head.weight": RowsOnly(lambda: bad, [])}
    checkpoint = dataclasses.replace(checkpoint, readers=readers)
    with pytest.raises(AwqTrtError, match=r"tensor lm_head\.weight holds 1 NaN or Inf"):
        quantize(checkpoint, tmp_path / "out", QuantizeConfig(**OPTIONS))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_scale_that_folds_nowhere_is_a_pre_scale_or_none(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "find_fold", lambda *_: None)
    for allowed in (True, False):
        report = quantize(models / "llama", tmp_path / str(allowed), QuantizeConfig(pre_scale=allowed, **OPTIONS))  # type: ignore[arg-type]
        output, layer = open_quantized(tmp_path / str(allowed)), report.layers[-1]
        assert layer.folded_into is None
        assert (layer.alpha > 0) == (output.linears["lm_head"].pre_scale is not None) == allowed
        assert report.pre_scales == allowed
        assert torch.equal(output.tensor(NORM), open_checkpoint(models / "llama").tensor(NORM).half())
        weight = open_checkpoint(models / "llama").tensor(EMBEDDING)
        assert float((output.tensor("lm_head.weight") - weight).norm() / weight.norm()) < 0.4


class StopError(RuntimeError):
    """Stands for whatever may end a run."""


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_that_ends_before_the_head_goes_on_with_it(
    models: Path,
    quantized: tuple[QuantizeReport, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damaged: bool,
) -> None:
    """Or starts anew, where the states behind the last block are not whole."""
    process = pipeline.process_head

    def failing(*arguments: object) -> object:
        if "scratch" in str(arguments[3].directory):  # type: ignore[attr-defined]
            return process(*arguments)  # type: ignore[arg-type]
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "process_head", failing)
        with pytest.raises(StopError):
            quantize(models / "llama", tmp_path / "out", QuantizeConfig(**OPTIONS))  # type: ignore[arg-type]
    lines = StringIO()
    *_, states = sorted((tmp_path / ".out.partial" / "states").glob("*/*"))
    if damaged:
        states.write_bytes(states.read_bytes()[:1000])
    else:
        monkeypatch.setattr(pipeline, "process_block", lambda *_: pytest.fail("a finished block was quantized again"))
    quantize(models / "llama", tmp_path / "out", QuantizeConfig(**OPTIONS), console=Console(file=lines, width=200))  # type: ignore[arg-type]
    assert ("2 of 3 blocks are finished by an earlier run" in lines.getvalue()) == (not damaged)
    assert re.search(r"15 layers to INT4 .* 0 stay in float\..*Estimate: \d+ s, \d+ MiB", lines.getvalue())
    assert tiny_models.content(tmp_path / "out") == tiny_models.content(quantized[1])


def test_work_for_another_head_is_thrown_away(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> object:
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Writer, "finish", failing)
        with pytest.raises(StopError):
            quantize(models / "llama", tmp_path / "out", QuantizeConfig(method="rtn", lm_head="int4"))
    lines = StringIO()
    report = quantize(
        models / "llama", tmp_path / "out", QuantizeConfig(method="rtn"), console=Console(file=lines, width=200)
    )
    assert report.head is None
    assert "the work of an earlier run is thrown away (not the same: settings, report)" in lines.getvalue()
    assert open_quantized(tmp_path / "out").config.tie_word_embeddings


@pytest.mark.parametrize("symmetric", [False, True])
def test_transformers_loads_it_from_compressed_tensors(models: Path, tmp_path: Path, symmetric: bool) -> None:
    """Of any vocabulary; the head's weight bit for bit."""
    source = tiny_models.llama(tmp_path / "llama", vocab_size=389)
    quantize(source, tmp_path / "ct", QuantizeConfig(save_format="compressed-tensors", symmetric=symmetric, **OPTIONS))  # type: ignore[arg-type]
    ours = open_quantized(tmp_path / "ct")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ct", quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
    )
    assert theirs.lm_head.weight is not theirs.model.embed_tokens.weight
    assert torch.equal(theirs.lm_head.weight.float(), ours.tensor("lm_head.weight"))
    assert torch.equal(theirs.model.embed_tokens.weight, ours.tensor(EMBEDDING))
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == []
