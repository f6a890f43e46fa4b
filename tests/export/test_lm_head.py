"""The head in INT4, exported: a node of its own, and a tied matrix stored once."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import tiny_models
import torch
import transformers

from awq_trt.awq.calibration import HELD_OUT_TEXT, windows
from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.quantize import quantize
from awq_trt.checkpoint.quantized import open_quantized
from awq_trt.engine.build import build_engine
from awq_trt.evaluate.verify import agreement
from awq_trt.export.export import export_onnx

OPTIONS = {"calibration_samples": 3, "calibration_length": 64, "lm_head": "int4"}
EMBEDDING = "model.embed_tokens.weight"


def gpt2(directory: Path, vocabulary: int) -> Path:
    """With a vocabulary that 8 does not divide, as the real one."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=64, n_layer=1, n_head=4, vocab_size=vocabulary, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    return tiny_models.save(transformers.GPT2LMHeadModel(config), directory)


@pytest.mark.parametrize("format", ["plugin", pytest.param("qdq", marks=pytest.mark.slow)])
def test_exported_with_a_vocabulary_that_8_does_not_divide(tmp_path: Path, format: str) -> None:
    quantize(gpt2(tmp_path / "gpt2", 389), tmp_path / "awq", QuantizeConfig(**OPTIONS))  # type: ignore[arg-type]
    output = open_quantized(tmp_path / "awq")
    assert output.linears["lm_head"].q.shape == (389, 64)
    report = export_onnx(tmp_path / "awq", tmp_path / "model.onnx", format=format)
    assert report.quantized[-1].name == "lm_head"
    assert report.quantized[-1].n == 389
    window = windows(HELD_OUT_TEXT, output.tokenizer, 1, 64)
    found = agreement(tmp_path / "model.onnx", output, window, output.tokenizer, tokens=8)
    assert found.relative < 2e-3
    assert found.tokens_equal == 8


def test_a_tied_matrix_is_in_the_onnx_file_once(models: Path, exported: Path, tmp_path: Path) -> None:
    """In float; an INT4 head leaves the embedding alone."""
    quantize(models / "llama", tmp_path / "awq", QuantizeConfig(method="rtn", lm_head="int4"))
    report = export_onnx(tmp_path / "awq", tmp_path / "llama.onnx")
    assert report.quantized[-1].name == "lm_head"
    for path, heads in ((exported / "llama.onnx", 0), (tmp_path / "llama.onnx", 1)):
        graph = onnx.load(str(path), load_external_data=False).graph
        assert [t.name for t in graph.initializer if list(t.dims) in ([384, 64], [64, 384])] == [EMBEDDING]
        readers = sorted({node.op_type for node in graph.node if EMBEDDING in node.input})
        assert readers == (["Gather"] if heads else ["Gather", "Transpose"])
        assert [node.op_type for node in graph.node if node.name == "/lm_head"] == ["W4A16Gemm"] * heads


@pytest.mark.slow
def test_a_tied_matrix_is_in_the_plan_once(tmp_path: Path) -> None:
    """Bytes of plans: what a large vocabulary adds."""
    pytest.importorskip("tensorrt_rtx_libs")
    sizes = {}
    vocabulary, width = 32768, 256
    for name, options in (("small", {"vocab_size": 384}), ("tied", {}), ("int4", {}), ("untied", {})):
        shape = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": 1}
        tied = {"tie_word_embeddings": name != "untied"}
        source = tiny_models.llama(tmp_path / name, **shape | tied | options)
        quantize(source, tmp_path / "awq", QuantizeConfig(method="rtn", lm_head="int4" if name == "int4" else "float"))
        export_onnx(tmp_path / "awq", tmp_path / "model.onnx")
        report = build_engine(tmp_path / "model.onnx", tmp_path / "model.plan", runtime="tensorrt_rtx", quiet=True)
        sizes[name] = report.plan_bytes
    matrix = 2 * vocabulary * width
    added = {name: (size - sizes["small"]) / matrix for name, size in sizes.items()}
    assert added["tied"] == pytest.approx(1, abs=0.05)
    assert added["untied"] == pytest.approx(2, abs=0.05)
    assert added["int4"] == pytest.approx(1 + (4 + (16 + 4) / 64) / 16, abs=0.05)
