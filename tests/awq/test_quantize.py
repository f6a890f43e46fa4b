"""Checkpoint in, AWQ checkpoint out."""

from __future__ import annotations

import dataclasses
import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from rich.console import Console
from torch import nn

from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.quantize import quantize
from awq_trt.awq.task import default_group_size
from awq_trt.checkpoint.model import empty_model
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.checkpoint.quantized import open_quantized
from awq_trt.errors import AwqTrtError
from awq_trt.evaluate.accuracy import eager_outputs
from awq_trt.linear import quantize_weight

SHORT = {"calibration_samples": 2, "calibration_length": 128}


def test_report_and_folds_of_a_decoder(models: Path, tmp_path: Path) -> None:
    report = quantize(models / "llama", tmp_path / "out", QuantizeConfig(**SHORT))
    assert report.group_size == 64
    assert len(report.quantized) == len(report.layers) == 14
    assert report.left_in_float == {"lm_head": "outside the repeated blocks (embeddings and heads stay in float)"}
    assert report.pre_scales == 0
    folded = {layer.name.split(".", 3)[3]: layer.folded_into for layer in report.layers if "layers.1." in layer.name}
    assert {k: v and v.split(".", 3)[3] for k, v in folded.items()} == {
        "self_attn.q_proj": "input_layernorm",
        "self_attn.k_proj": "input_layernorm",
        "self_attn.v_proj": "input_layernorm",
        "self_attn.o_proj": "self_attn.v_proj",
        "mlp.gate_proj": "post_attention_layernorm",
        "mlp.up_proj": "post_attention_layernorm",
        "mlp.down_proj": "mlp.up_proj",
    }
    assert all(layer.error <= layer.error_rounding for layer in report.layers)
    assert all(layer.tokens == 256 for layer in report.layers)
    assert json.loads((tmp_path / "out" / "awq_trt.json").read_text())["layers"][0]["name"] == report.layers[0].name


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_other_architectures(models: Path, tmp_path: Path, name: str) -> None:
    report = quantize(models / name, tmp_path / "out", QuantizeConfig(**SHORT))
    assert report.layers
    awq = open_quantized(tmp_path / "out")
    assert set(awq.linears) == set(report.quantized)
    for n, _ in empty_model(awq.config).named_parameters():
        assert torch.isfinite(awq.tensor(n)).all()


def test_vision_model_calibrates_on_arrays(models: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 32), np.float32)
    np.savez(tmp_path / "images.npz", pixel_values=images)
    report = quantize(models / "vit", tmp_path / "out", QuantizeConfig(calibration=tmp_path / "images.npz"))
    assert len(report.layers) == 12
    assert report.layers[0].tokens == 4 * 17
    with pytest.raises(AwqTrtError, match="no tokenizer"):
        quantize(models / "vit", tmp_path / "none")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_rounding_only(models: Path, tmp_path: Path, group_size: int, symmetric: bool) -> None:
    report = quantize(
        models / "vit", tmp_path / "out", QuantizeConfig(method="rtn", group_size=group_size, symmetric=symmetric)
    )
    assert report.layers == ()
    assert len(report.quantized) == 12
    awq, original = open_quantized(tmp_path / "out"), open_checkpoint(models / "vit")
    name = "vit.layers.0.mlp.fc2" if "vit.layers.0.mlp.fc2" in awq.linears else sorted(awq.linears)[0]
    layer = awq.linears[name]
    weight = original.tensor(f"{name}.weight")
    expected = quantize_weight(weight, weight.shape[1] if group_size == -1 else group_size, symmetric, torch.float16)
    assert torch.equal(layer.q, expected.q)
    assert (layer.zeros is None) == symmetric


def test_layers_a_group_does_not_divide_stay_in_float_and_are_listed(models: Path, tmp_path: Path) -> None:
    report = quantize(models / "llama", tmp_path / "out", QuantizeConfig(group_size=128, **SHORT))
    assert {n.split(".")[-1] for n in report.quantized} == {"down_proj"}
    reason = report.left_in_float["model.layers.0.self_attn.q_proj"]
    assert reason == "in_features 64 is not a multiple of the group size 128"
    awq = open_quantized(tmp_path / "out")
    assert awq.left_in_float == report.left_in_float
    assert awq.tensor("model.layers.0.self_attn.q_proj.weight").dtype == torch.float16


def test_nothing_to_quantize(models: Path, tmp_path: Path) -> None:
    reason = "in_features 64 is not a multiple of the group size 128"
    checkpoint = tiny_models.llama(tmp_path / "llama", intermediate_size=192)
    with pytest.raises(AwqTrtError, match=f"no layer can be quantized with these settings: .*{reason}"):
        quantize(checkpoint, tmp_path / "out", QuantizeConfig(group_size=128, **SHORT))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("method", "gptq", "method='gptq' is not one of 'awq', 'rtn'"),
        ("effort", "x", "effort='x' is not one of 'fast', 'default', 'best'"),
        ("group_size", 48, "group_size=48 is not one of None, -1, 32, 64, 128"),
        ("lm_head", "int8", "lm_head='int8' is not one of 'float', 'int4'"),
        ("save_format", "gguf", "save_format='gguf' is not one of 'awq', 'compressed-tensors'"),
        ("compute_dtype", torch.float16, "compute_dtype=torch.float16 is not one of torch.float32, torch.bfloat16"),
        ("calibration_samples", 0, "calibration_samples=0: at least 1"),
        ("calibration_length", 0, "calibration_length=0: at least 1"),
        ("device", "tpu", "device='tpu' is not"),
    ],
)
def test_bad_values_are_refused_before_anything_is_read(tmp_path: Path, field: str, value: Any, words: str) -> None:
    with pytest.raises(AwqTrtError, match=words):
        quantize(tmp_path / "nothing here", tmp_path / "out", QuantizeConfig(**{field: value}))


def test_what_the_effort_decides_and_what_the_format_carries() -> None:
    config = QuantizeConfig(effort="fast", clip=False, save_format="compressed-tensors").resolved()
    assert (config.clip, config.error_compensation, config.calibration_samples) == (False, False, 8)
    assert not config.pre_scale
    assert config.resolved() == config


def test_an_error_in_the_middle_leaves_nothing(models: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(models / "llama")
    bad = "model.layers.1.mlp.down_proj.weight"
    readers = {**checkpoint.readers, bad: lambda: torch.full((64, 128), float("nan"))}
    with pytest.raises(AwqTrtError, match=re.escape(bad)):
        quantize(dataclasses.replace(checkpoint, readers=readers), tmp_path / "out", QuantizeConfig(**SHORT))
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_fp16_are_named(models: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(models / "llama")
    huge = {"model.norm.weight": lambda: torch.full((64,), 1e6)}
    checkpoint = dataclasses.replace(checkpoint, readers={**checkpoint.readers, **huge})
    with pytest.raises(AwqTrtError, match=r"model\.norm\.weight overflows float16 .*dtype=.bfloat16"):
        quantize(checkpoint, tmp_path / "out", QuantizeConfig(method="rtn"))
    quantize(dataclasses.replace(checkpoint, dtype=torch.bfloat16), tmp_path / "out", QuantizeConfig(method="rtn"))
    assert open_quantized(tmp_path / "out").dtype == torch.bfloat16


def test_estimate_and_progress_are_printed(models: Path, tmp_path: Path) -> None:
    text = StringIO()
    quantize(models / "llama", tmp_path / "out", QuantizeConfig(**SHORT), console=Console(file=text, width=200))
    assert re.search(
        r"14 layers to INT4 \(asymmetric, group 64\) by AWQ on 2 calibration inputs in float32 on cpu, 1 stay",
        text.getvalue(),
    )
    assert re.search(r"Estimate: \d+ s, \d+ MiB", text.getvalue())
    assert "2/2" in text.getvalue()


def test_same_input_same_bits(models: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize(models / "llama", tmp_path / name, QuantizeConfig(**SHORT))
    for file in sorted((tmp_path / "a").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "group_size", "left"),
    [
        ({"intermediate_size": 200}, None, {"mlp.down_proj": "in_features 200 is not a multiple of 32"}),
        (
            {"hidden_size": 288, "head_dim": 64, "intermediate_size": 256},
            128,
            dict.fromkeys(
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
                "in_features 288 is not a multiple of the group size 128",
            ),
        ),
        (  # two of three layers that read the same tensor
            {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 12},
            None,
            dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), "out_features 12 is not a multiple of 8"),
        ),
    ],
)
def test_what_cannot_be_int4_stays_in_float(
    tmp_path: Path, changes: dict[str, int], group_size: int | None, left: dict[str, str]
) -> None:
    """Layers of the same block are searched as ever; the float ones are the checkpoint's, but for a folded scale."""
    tiny_models.llama(tmp_path / "m", **changes)
    report = quantize(tmp_path / "m", tmp_path / "out", QuantizeConfig(group_size=group_size, **SHORT))  # type: ignore[arg-type]
    found = {n.removeprefix("model.layers.1."): why for n, why in report.left_in_float.items() if ".layers.1." in n}
    assert found.keys() == left.keys()
    assert all(found[name].startswith(why) for name, why in left.items())
    assert len(report.layers) == len(report.quantized) == 14 - 2 * len(left)
    assert report.group_size == (group_size or (64 if "intermediate_size" in changes else 32))
    model, rounded = open_checkpoint(tmp_path / "m"), open_quantized(tmp_path / "out")
    ids = {"input_ids": torch.randint(0, 384, (1, 64), generator=torch.Generator().manual_seed(0))}
    (exact,), (near,) = eager_outputs(model, [ids]), eager_outputs(rounded, [ids])
    assert float((near - exact).norm() / exact.norm()) < 0.35


@pytest.mark.parametrize(
    ("widths", "expected"),
    [((576, 1536), 64), ((4096, 14336), 128), ((96,), 32), ((100,), 32), ((4096, 200), 128)],
)
def test_default_group_size(widths: tuple[int, ...], expected: int) -> None:
    assert default_group_size([nn.Linear(k, 8, device="meta") for k in widths]) == expected
