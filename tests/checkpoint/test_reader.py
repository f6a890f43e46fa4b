"""Reading checkpoints, and refusing bad ones in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from awq_trt.checkpoint.model import empty_model
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.errors import AwqTrtError


@pytest.fixture
def llama(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "llama", tmp_path / "llama"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_every_parameter_is_the_one_transformers_loads(models: Path, name: str) -> None:
    checkpoint = open_checkpoint(models / name)
    cls = getattr(transformers, checkpoint.config.architectures[0])
    expected = dict(cls.from_pretrained(models / name).named_parameters())
    names = [n for n, _ in empty_model(checkpoint.config).named_parameters()]
    assert names == list(expected)
    for n in names:
        value = expected[n].t() if n in checkpoint.transposed else expected[n]
        assert torch.equal(checkpoint.tensor(n), value), n
    assert bool(checkpoint.transposed) == (name == "gpt2")
    assert (checkpoint.tokenizer is None) == (name == "vit")


def test_empty_model_has_buffers_but_no_weights(models: Path) -> None:
    model = empty_model(open_checkpoint(models / "llama").config)
    assert all(p.is_meta for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert float(model.model.rotary_emb.inv_freq[0]) == 1.0
    assert isinstance(torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter)
    assert not torch.nn.Linear(2, 2).weight.is_meta  # nothing stays patched


def test_a_file_that_is_written_again_is_not_mixed_with_the_first(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    checkpoint.tensor("model.norm.weight").zero_()  # a map of its own: nobody else sees it
    tensors = load_file(llama / "model.safetensors")
    assert torch.equal(checkpoint.tensor("model.norm.weight"), tensors["model.norm.weight"])
    save_file(tensors, llama / "model.safetensors")
    with pytest.raises(AwqTrtError, match=r"model\.safetensors: was written again"):
        checkpoint.tensor("model.norm.weight")


def test_names_of_older_checkpoints(models: Path, tmp_path: Path) -> None:
    """BERT as saved years ago: no "bert." in front, LayerNorm.gamma and .beta."""
    old = Path(shutil.copytree(models / "bert", tmp_path / "bert"))
    tensors = load_file(old / "model.safetensors")
    renamed = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }
    save_file(renamed, old / "model.safetensors")
    name = "bert.encoder.layer.0.output.LayerNorm.weight"
    assert torch.equal(open_checkpoint(old).tensor(name), tensors[name])


def test_dtype_of_activations(llama: Path) -> None:
    assert open_checkpoint(llama).dtype == torch.float16  # the file is fp32
    tensors = {n: t.bfloat16() for n, t in load_file(llama / "model.safetensors").items()}
    save_file(tensors, llama / "model.safetensors")
    assert open_checkpoint(llama).dtype == torch.bfloat16


def shard(directory: Path) -> None:
    """Split model.safetensors into two shards with an index."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    weight_map = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, directory / file)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(llama: Path) -> None:
    before = open_checkpoint(llama).tensor("model.norm.weight")
    shard(llama)
    assert torch.equal(open_checkpoint(llama).tensor("model.norm.weight"), before)
    (llama / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(AwqTrtError, match=r"shard model-00002-of-00002\.safetensors is missing"):
        open_checkpoint(llama)


def without(directory: Path, name: str) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors[name]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def configure(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def cut(directory: Path, keep: int) -> None:
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:keep])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: cut(d, 0), r"model\.safetensors is truncated or damaged"),
        (lambda d: cut(d, 4), r"model\.safetensors is truncated or damaged"),
        (lambda d: cut(d, 100), r"model\.safetensors is truncated or damaged"),
        (lambda d: cut(d, -16), r"model\.safetensors is truncated or damaged"),
        (
            lambda d: without(d, "model.layers.1.mlp.up_proj.weight"),
            r"up_proj\.weight is not in the checkpoint",
        ),
        (lambda d: (d / "model.safetensors").unlink(), r"no \.safetensors file"),
        (lambda d: configure(d, model_type="zebra", architectures=["Zebra"]), "model_type 'zebra'"),
        (lambda d: configure(d, architectures=["ZebraForCausalLM"]), "architecture 'ZebraForCausalLM'"),
        (lambda d: configure(d, vocab_size=400), r"embed_tokens\.weight has shape \[384, 64\], .* \[400, 64\]"),
        (lambda d: (d / "config.json").write_text("{"), "not JSON"),
        (lambda d: configure(d, quantization_config={"quant_method": "gptq"}), "already quantized.*gptq"),
        (
            lambda d: (d / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "W4A16_AWQ"}}'),
            "already quantized.*modelopt",
        ),
    ],
)
def test_damaged_checkpoints(llama: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(llama)
    with pytest.raises(AwqTrtError, match=message):
        open_checkpoint(llama)


def test_remote_code_stays_off(llama: Path) -> None:
    configure(llama, model_type="zebra", auto_map={"AutoConfig": "code.Config"})
    (llama / "code.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(AwqTrtError, match="trust_remote_code=True"):
        open_checkpoint(llama)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_named(llama: Path, bad: float) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    save_file(tensors, llama / "model.safetensors")
    with pytest.raises(AwqTrtError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN or Inf"):
        open_checkpoint(llama).tensor("model.layers.1.mlp.up_proj.weight")


def test_pickles_are_refused_with_the_line_that_converts(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    marker = llama / "ran"
    (llama / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())
    with pytest.raises(AwqTrtError, match=r"pickled weights.*(?s:.)*save_pretrained"):
        open_checkpoint(llama)
    assert not marker.exists()


def test_what_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AwqTrtError, match="no config.json here"):
        open_checkpoint(tmp_path)
    with pytest.raises(AwqTrtError, match="no such file or directory"):
        open_checkpoint(tmp_path / "missing")
    (tmp_path / "model.txt").write_text("hello")
    with pytest.raises(AwqTrtError, match="not a .gguf"):
        open_checkpoint(tmp_path / "model.txt")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(AwqTrtError, match="not a GGUF file that"):
        open_checkpoint(tmp_path / "model.gguf")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AwqTrtError, match="the Hugging Face hub did not give it"):
        open_checkpoint("nobody/no-such-model")
