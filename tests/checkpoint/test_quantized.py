"""Quantized directories: ours loaded by other tools, theirs read by us, and what is refused."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from quantized_models import (
    auto_gptq,
    autoawq_gemv,
    autoawq_gemv_fast,
    edited,
    gptq_v2,
    ids,
    our_logits,
    repacked,
    rounded,
)
from safetensors.torch import load_file, save_file

from awq_trt.checkpoint.formats import from_parts
from awq_trt.checkpoint.model import empty_model
from awq_trt.checkpoint.quantized import is_quantized, open_quantized
from awq_trt.checkpoint.schemes import Scheme
from awq_trt.errors import AwqTrtError
from awq_trt.evaluate.verify import agreement
from awq_trt.export.export import export_onnx
from awq_trt.linear import QuantizedLinear, quantize_weight

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}


GPTQMODEL = """
import json, os, sys
os.environ["TORCH_COMPILE_DISABLE"] = "1"  # it takes longer than all the rest, and was wrong with AVX2
import gptqmodel, torch, transformers
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from safetensors.torch import load_file, save_file
for directory in sys.argv[1:]:
    method = json.load(open(directory + "/config.json"))["quantization_config"]["quant_method"]
    config = {
        "awq": lambda: transformers.AwqConfig(backend="torch_awq"),
        "gptq": lambda: transformers.GPTQConfig(bits=4, backend="gptq_torch"),
    }[method]()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float16, device_map="cpu", quantization_config=config, output_loading_info=True
    )
    assert not info["missing_keys"], info
    found = {}
    with torch.inference_mode():
        for name, module in model.named_modules():
            if isinstance(module, BaseQuantLinear):
                found[name] = module(torch.eye(module.in_features, dtype=torch.float16)).t().contiguous()
        found["logits"] = model(load_file(sys.argv[1] + "/../ids.safetensors")["ids"]).logits
    save_file(found, directory + "/theirs.safetensors.result")
"""


@pytest.mark.slow
def test_transformers_and_gptqmodel_load_the_same_weights(quantized: Path, float_model: Path, tmp_path: Path) -> None:
    """AutoAWQ directories that we wrote and GPTQ directories packed by AutoGPTQ: every weight bit for bit."""
    directories = [
        shutil.copytree(quantized, tmp_path / "awq"),
        rounded(float_model, tmp_path / "symmetric", symmetric=True, group=128),
        rounded(float_model, tmp_path / "rows", group=-1),
        rounded(float_model, tmp_path / "some", skip=("0.mlp.gate_proj", "o_proj")),
        repacked(quantized, tmp_path / "gptq", auto_gptq, GPTQ),
        repacked(quantized, tmp_path / "gptq_v2", gptq_v2, GPTQ | {"checkpoint_format": "gptq_v2"}),
    ]
    save_file({"ids": ids()}, tmp_path / "ids.safetensors")
    peers.run("gptqmodel", GPTQMODEL, *directories)
    for directory in directories:
        theirs = load_file(directory / "theirs.safetensors.result")
        logits = theirs.pop("logits")
        ours = open_quantized(directory)
        assert theirs.keys() == set(ours.linears)
        for name, weight in theirs.items():
            assert torch.equal(weight, ours.linears[name].dequantize())
        expected = our_logits(directory, float_model)
        assert float((logits - expected).norm() / expected.norm()) < 2e-3


@pytest.mark.parametrize(
    ("pack", "quantization"),
    [
        (autoawq_gemv, AWQ | {"version": "GEMV"}),
        (autoawq_gemv_fast, AWQ | {"version": "gemv_fast"}),
        (auto_gptq, GPTQ),
        (gptq_v2, GPTQ | {"checkpoint_format": "gptq_v2", "lm_head": False}),
    ],
)
def test_the_same_model_in_another_layout(
    quantized: Path, tmp_path: Path, pack: Callable[[QuantizedLinear], Any], quantization: dict[str, Any]
) -> None:
    other = open_quantized(repacked(quantized, tmp_path / "other", pack, quantization))
    ours = open_quantized(quantized)
    assert set(other.linears) == set(ours.linears)
    assert other.left_in_float == {"lm_head": "not quantized in the checkpoint"}
    for name, _ in empty_model(ours.config).named_parameters():
        assert torch.equal(other.tensor(name), ours.tensor(name))


MODELOPT = """
import json, sys
import modelopt.torch.quantization as mtq
import torch, transformers
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.quant_utils import pack_int4_in_uint8
from safetensors.torch import load_file, save_file

source, output = sys.argv[1:]
torch.manual_seed(0)
q = torch.randint(-8, 8, (64, 256))
scale = torch.rand(64, 4) * 0.01 + 0.001
packed = pack_int4_in_uint8(q * scale.repeat_interleave(64, 1), scale, 64)
ids = load_file(output + ".ids")["ids"]
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
model = mtq.quantize(model, mtq.INT4_AWQ_CFG, forward_loop=lambda m: m(ids))
with torch.inference_mode():
    found = {}
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"):  # not smoothed again by the export
        layer = model.get_submodule(name)
        found[name] = layer(torch.eye(layer.in_features, dtype=torch.float16)).t().contiguous()
    export_hf_checkpoint(model, export_dir=output)
save_file({"q": q, "scale": scale, "packed": packed, **found}, output + ".theirs")
"""


@pytest.fixture(scope="module")
def modelopt(float_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that ModelOpt quantized and exported, <it>.theirs beside it."""
    output = tmp_path_factory.mktemp("modelopt") / "llama"
    save_file({"ids": ids()}, f"{output}.ids")
    peers.run("modelopt", MODELOPT, float_model, output)
    return output


def test_modelopt(modelopt: Path, float_model: Path) -> None:
    theirs = load_file(f"{modelopt}.theirs")
    layer = from_parts("modelopt", "a", {"weight": theirs["packed"], "weight_scale": theirs["scale"]})
    assert layer.zeros is None
    assert torch.equal(layer.q.int() - 8, theirs["q"].int())
    assert torch.equal(layer.scales, theirs["scale"])
    quantized = open_quantized(modelopt)
    assert quantized.dtype == torch.float16
    assert len(quantized.linears) == 14
    assert quantized.linears["model.layers.0.mlp.down_proj"].pre_scale is not None
    assert quantized.linears["model.layers.0.mlp.up_proj"].pre_scale is None
    stored = load_file(modelopt / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    nibbles = torch.stack([stored[f"{name}.weight"] & 15, stored[f"{name}.weight"] >> 4], 1).reshape(128, 128).int()
    integers = torch.where(nibbles > 7, nibbles - 16, nibbles)
    expected = integers * stored[f"{name}.weight_scale"].half()  # one group a row
    assert torch.equal(quantized.tensor(f"{name}.weight"), expected.float())
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
        # fake quantization with the pre-scale, before scales were rounded to 16 bits: a weight between two integers may
        # since have become the other one
        ours, expected = quantized.tensor(f"{name}.weight"), theirs[name].float()
        assert float(torch.isclose(ours, expected, rtol=2e-3, atol=1e-6).float().mean()) > 0.999
        assert float((ours - expected).norm() / expected.norm()) < 1e-2


def test_modelopt_with_its_own_file_alone(modelopt: Path, tmp_path: Path) -> None:
    """tools/export.py goes on to ONNX without a search."""
    other = Path(shutil.copytree(modelopt, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    del config["quantization_config"]
    (other / "config.json").write_text(json.dumps(config))
    assert is_quantized(other)
    assert open_quantized(other).scheme.group_size == 128
    export = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "export.py"))["main"]
    assert export(["--quiet", "--no-verify", "--model", str(other), "--onnx", str(tmp_path / "model.onnx")]) == 0
    assert agreement(tmp_path / "model.onnx", open_quantized(other), [{"input_ids": ids()}]).relative < 2e-3
    (other / "hf_quant_config.json").unlink()
    assert not is_quantized(other)


def test_a_hub_id_of_a_quantized_model(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is downloaded before it is asked whether it is quantized, and then exported without a search."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda model_id, **_: str(quantized))
    monkeypatch.chdir(tmp_path)
    assert is_quantized("someone/quantized-awq")
    export = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "export.py"))["main"]
    assert export(["--quiet", "--no-verify", "--model", "someone/quantized-awq", "--onnx", "model.onnx"]) == 0
    assert Path("model.onnx").exists()
    assert not Path("model.awq").exists()


@pytest.mark.slow
def test_a_quantized_head_outside_the_blocks(quantized: Path, tmp_path: Path) -> None:
    """Read where it is a parameter of its own, and exported; in a GPTQ checkpoint, as one that has it would be."""
    head = quantize_weight(torch.randn(384, 128), 64, True, torch.float16)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({f"lm_head.{part}": t for part, t in auto_gptq(head).items()})

    gptq = repacked(quantized, tmp_path / "gptq", auto_gptq, GPTQ | {"lm_head": True})
    other = edited(gptq, tmp_path / "other", change, tie_word_embeddings=False)
    source = open_quantized(other)
    assert torch.equal(source.tensor("lm_head.weight"), head.dequantize().float())
    report = export_onnx(other, tmp_path / "model.onnx")
    assert len(report.quantized) == 15
    assert agreement(tmp_path / "model.onnx", source, [{"input_ids": ids()}]).relative < 2e-3


def test_old_configuration_files(quantized: Path, tmp_path: Path) -> None:
    """AutoAWQ and AutoGPTQ before they wrote config.json, scales in fp16 beside a bfloat16 configuration."""
    config = json.loads((quantized / "config.json").read_text())
    del config["quantization_config"]
    awq = Path(shutil.copytree(quantized, tmp_path / "awq"))
    (awq / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert not is_quantized(awq)
    with pytest.raises(AwqTrtError, match="config.json does not say how it is quantized"):
        open_quantized(awq)
    (awq / "quant_config.json").write_text('{"zero_point": true, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}')
    assert open_quantized(awq).scheme == Scheme("awq", "awq-gemm", 64)
    assert open_quantized(awq).dtype == torch.float16
    gptq = repacked(quantized, tmp_path / "gptq", auto_gptq, GPTQ)
    (gptq / "config.json").write_text(json.dumps(config))
    (gptq / "quantize_config.json").write_text('{"bits": 4, "group_size": 64, "desc_act": false, "sym": false}')
    assert is_quantized(gptq)
    assert open_quantized(gptq).scheme == Scheme("gptq", "gptq", 64)


def test_damaged(quantized: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(quantized, tmp_path / "other"))
    shard = sorted(other.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(AwqTrtError, match=f"shard {re.escape(shard.name)} is truncated or damaged"):
        open_quantized(other)
    config = json.loads((quantized / "config.json").read_text()) | {"quantization_config": {"quant_method": "new"}}
    (other / "config.json").write_text(json.dumps(config))
    assert is_quantized(other)
    with pytest.raises(AwqTrtError, match=f"{re.escape(str(other))}: quant_method 'new' is not read"):
        open_quantized(other)


Q_PROJ = "model.layers.0.self_attn.q_proj"


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in [n for n in tensors if n.startswith(old)]:
        tensors[new + name.removeprefix(old)] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.qzeros"), f"{Q_PROJ} .awq-gemm.: tensor qzeros is missing"),
        (lambda t: t.update({f"{Q_PROJ}.scales": t[f"{Q_PROJ}.scales"][:, :32]}), f"{Q_PROJ} .awq-gemm.: .*do not fit"),
        (lambda t: t.pop("model.norm.weight"), "the tensor model.norm.weight is missing"),
        (
            lambda t: rename(t, Q_PROJ, "model.layers.0.self_attn.qkv_proj"),
            "self_attn.qkv_proj is no linear layer of Llama",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.input_scale": torch.ones(1)}),
            f"{Q_PROJ}.input_scale has no meaning in awq",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.act_fn.scales": torch.ones(4)}),
            "act_fn.scales belongs to no",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.bias": torch.ones(64)}),
            f"1 of the stored tensors .* Llama.* no place .*: {Q_PROJ}.bias",
        ),
        (
            lambda t: rename(t, Q_PROJ, "lm_head"),
            "lm_head.weight is quantized, .* same parameter as model.embed",
        ),
        (lambda t: [t.pop(n) for n in list(t) if n.endswith("qweight")], r"no tensor is called \*.qweight"),
    ],
)
def test_tensors_that_do_not_belong(
    quantized: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    other = edited(quantized, tmp_path / "other", change)
    with pytest.raises(AwqTrtError, match=message):
        dict(open_quantized(other).linears)


def test_biases_of_zeros_and_names_without_the_prefix(quantized: Path, tmp_path: Path) -> None:
    """AutoGPTQ writes a bias for every layer; base models are stored without "model."."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q_PROJ}.bias"] = torch.zeros(64)
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    other, ours = open_quantized(edited(quantized, tmp_path / "other", change)), open_quantized(quantized)
    assert set(other.linears) == set(ours.linears)
    for name, _ in empty_model(ours.config).named_parameters():
        assert torch.equal(other.tensor(name), ours.tensor(name))
