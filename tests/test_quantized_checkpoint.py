"""AutoAWQ's GEMM layout, against a second implementation of it written from its definition."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from awq_trt.blocks import quantizable_linears
from awq_trt.checkpoint import empty_model, open_checkpoint, safetensors_index
from awq_trt.errors import AwqTrtError
from awq_trt.linear import quantize_weight
from awq_trt.quantization import quantize
from awq_trt.quantized_checkpoint import (
    Writer,
    from_tensors,
    is_quantized,
    open_quantized,
    pack_nibbles,
    to_tensors,
    unpack_nibbles,
)


def autoawq_weight(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    """W^T [K, N] as AutoAWQ's loaders compute it: shift out 8 nibbles a word, then undo the order 0 2 4 6 1 3 5 7."""
    shifts = torch.arange(0, 32, 4)
    undo = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])

    def unpack(words: torch.Tensor) -> torch.Tensor:
        nibbles = (words.unsqueeze(-1) >> shifts) & 15
        return nibbles[..., undo].reshape(words.shape[0], -1)

    weight, zeros = unpack(qweight), unpack(qzeros)
    return (weight - zeros.repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 192])
def test_other_loaders_read_the_same_weight(symmetric: bool, group: int) -> None:
    layer = quantize_weight(torch.randn(40, 192), group, symmetric, torch.float16)
    t = to_tensors("a.b", layer)
    expected = layer.dequantize()
    assert torch.equal(autoawq_weight(t["a.b.qweight"], t["a.b.qzeros"], t["a.b.scales"], group).t(), expected)
    back = from_tensors("a.b", t)
    assert torch.equal(back.dequantize(), expected)
    assert (back.zeros is None) == symmetric
    assert back.group_size == group


def test_nibbles_round_trip() -> None:
    values = np.random.default_rng(0).integers(0, 16, (5, 48), dtype=np.uint8)
    np.testing.assert_array_equal(unpack_nibbles(pack_nibbles(values)), values)


def test_shapes_that_do_not_fit() -> None:
    t = to_tensors("a", quantize_weight(torch.randn(16, 64), 32, False, torch.float16))
    t["a.scales"] = t["a.scales"][:, :8]
    with pytest.raises(AwqTrtError, match=r"a: qweight \[64, 2\].*do not fit"):
        from_tensors("a", t)


@pytest.fixture(scope="module")
def quantized(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("awq") / "llama"
    quantize(models / "llama", output, samples=2, length=128)
    return output


def test_directory_is_hugging_face(quantized: Path, models: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(quantized)
    assert config.quantization_config["quant_method"] == "awq"
    assert config.quantization_config["bits"] == 4
    assert config.quantization_config["group_size"] == 64
    assert config.quantization_config["modules_to_not_convert"] == ["lm_head"]
    assert config.dtype == torch.float16
    assert transformers.AutoTokenizer.from_pretrained(quantized)("hello")["input_ids"]
    index = json.loads((quantized / "model.safetensors.index.json").read_text())
    names = set(index["weight_map"])
    on_disk = set()
    for file in sorted(quantized.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as handle:
            on_disk |= set(handle.keys())
            assert handle.metadata() == {"format": "pt"}
    assert names == on_disk
    linears = quantizable_linears(empty_model(open_checkpoint(models / "llama").config))
    assert not {f"{n}.weight" for n in linears} & names
    assert {f"{n}.qweight" for n in linears} <= names


@torch.inference_mode()
def test_an_ordinary_model_with_the_dequantized_weights_is_the_model(quantized: Path, models: Path) -> None:
    """Load everything into plain transformers as another tool would: its logits follow the float model's."""
    awq = open_quantized(quantized)
    model = transformers.LlamaForCausalLM.from_pretrained(models / "llama")
    ids = torch.randint(0, 384, (1, 64), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    stored: dict[str, torch.Tensor] = {}
    for file in quantized.glob("*.safetensors"):
        stored |= load_file(file)
    state = {n: t.float() for n, t in stored.items() if n.endswith("weight")}
    for name in awq.linears:
        w = autoawq_weight(*(stored[f"{name}.{p}"] for p in ("qweight", "qzeros", "scales")), 64)
        state[f"{name}.weight"] = w.t().float()
        assert torch.equal(awq.tensor(f"{name}.weight"), state[f"{name}.weight"])
    model.load_state_dict(state, strict=False)
    got = model(ids).logits
    assert float((got - expected).norm() / expected.norm()) < 0.35  # random weights forgive little
    rounded = transformers.LlamaForCausalLM.from_pretrained(models / "llama")
    for name in awq.linears:
        linear = rounded.get_submodule(name)
        linear.weight.data = quantize_weight(linear.weight.data, 64, False, torch.float16).dequantize().float()
    assert float((got - expected).norm()) < float((rounded(ids).logits - expected).norm())


def test_pre_scales_make_other_loaders_refuse(models: Path, tmp_path: Path) -> None:
    report = quantize(models / "bert", tmp_path / "bert", samples=2, length=128)
    assert report.pre_scales > 0
    assert transformers.AutoConfig.from_pretrained(tmp_path / "bert").quantization_config["quant_method"] == "awq_trt"
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "bert")
    awq = open_quantized(tmp_path / "bert")
    scaled = [n for n, layer in awq.linears.items() if layer.pre_scale is not None]
    assert len(scaled) == report.pre_scales
    layer = awq.linears[scaled[0]]
    assert layer.pre_scale is not None
    effective = layer.dequantize().float() * layer.pre_scale.float()
    assert torch.equal(awq.tensor(f"{scaled[0]}.weight"), effective)
    report = quantize(models / "bert", tmp_path / "plain", samples=2, length=128, pre_scale=False)
    assert report.pre_scales == 0
    assert transformers.AutoConfig.from_pretrained(tmp_path / "plain").quantization_config["quant_method"] == "awq"


@pytest.mark.parametrize("change", [{"quant_method": "gptq"}, {"bits": 8}, {"version": "gemv"}])
def test_other_quantizations_are_an_error(quantized: Path, tmp_path: Path, change: dict) -> None:
    other = Path(shutil.copytree(quantized, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] |= change
    (other / "config.json").write_text(json.dumps(config))
    assert is_quantized(other)
    with pytest.raises(AwqTrtError, match="only AWQ with 4 bits"):
        open_quantized(other)


def test_truncated(quantized: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(quantized, tmp_path / "other"))
    shard = sorted(other.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(AwqTrtError, match="truncated or damaged"):
        open_quantized(other)


def test_a_second_run_writes_what_is_missing(models: Path, tmp_path: Path) -> None:
    """Killed at any point, also while `finish` renames: the directory comes out the same."""
    checkpoint = open_checkpoint(models / "llama")
    layer = quantize_weight(torch.randn(16, 64), 32, False, torch.float16)
    blocks = {f"block-{i:05}": (f"model.layers.{i}", {"norm.weight": torch.rand(64)}) for i in range(3)}

    def write(directory: Path, labels: list[str]) -> Writer:
        writer = Writer(directory, checkpoint)
        for label in labels:
            if not writer.has(label):
                writer.add_block(label, *blocks[label], {"a": layer})
        return writer

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    report = {"left_in_float": {}}
    write(whole, list(blocks)).finish(32, False, report)
    write(resumed, ["block-00002"])
    (resumed / ".block-00000.safetensors.tmp").write_bytes(b"half a shard")
    write(resumed, ["block-00000"])
    (resumed / "block-00002.safetensors").rename(resumed / "model-block-00002.safetensors")
    write(resumed, list(blocks)).finish(32, False, report)
    write(resumed, list(blocks)).finish(32, False, report)
    assert sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in resumed.iterdir())
    for file in whole.iterdir():
        assert file.read_bytes() == (resumed / file.name).read_bytes()
    assert {p.name for p in whole.glob("*.safetensors")} == {f"model-{label}.safetensors" for label in blocks}
    assert set(safetensors_index(whole, "")) == {
        f"model.layers.{i}.{n}" for i in range(3) for n in ("norm.weight", "a.qweight", "a.qzeros", "a.scales")
    }
