"""Quantized directories as we write them: what is in them, and that transformers loads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import gguf_files
import pytest
import torch
import transformers
from quantized_models import ids, our_logits, rounded
from safetensors import safe_open
from safetensors.torch import load_file

from awq_trt.checkpoint.directory import stored_tensors
from awq_trt.checkpoint.model import empty_model, quantizable_linears
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.checkpoint.quantized import open_quantized
from awq_trt.checkpoint.transformers4 import with_old_fields
from awq_trt.checkpoint.writer import Writer
from awq_trt.errors import AwqTrtError
from awq_trt.linear import QuantizedLinear, quantize_weight


def test_directory_is_hugging_face(quantized: Path, float_model: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(quantized)
    assert config.quantization_config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    assert config.dtype == torch.float16
    assert transformers.AutoTokenizer.from_pretrained(quantized)("hello")["input_ids"]
    index = json.loads((quantized / "model.safetensors.index.json").read_text())
    names = set(index["weight_map"])
    on_disk, size = set(), 0
    for file in sorted(quantized.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as handle:
            on_disk |= set(handle.keys())
            assert handle.metadata() == {"format": "pt"}
        size += sum(t.numel() * t.element_size() for t in load_file(file).values())
    assert names == on_disk
    assert index["metadata"] == {"total_size": size}
    linears = quantizable_linears(empty_model(open_checkpoint(float_model).config))
    assert not {f"{n}.weight" for n in linears} & names
    assert {f"{n}.qweight" for n in linears} <= names


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
    (resumed / "block-00000.safetensors").rename(resumed / "model-block-00000.safetensors")
    for _ in range(2):
        write(resumed, list(blocks)).finish(32, False, report)
        assert sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in resumed.iterdir())
        for file in whole.iterdir():
            assert file.read_bytes() == (resumed / file.name).read_bytes()
    assert {p.name for p in whole.glob("*.safetensors")} == {f"model-{label}.safetensors" for label in blocks}
    assert set(stored_tensors(whole, "")) == {
        f"model.layers.{i}.{n}" for i in range(3) for n in ("norm.weight", "a.qweight", "a.qzeros", "a.scales")
    }


def test_conv1d_models_are_not_called_awq(models: Path, tmp_path: Path) -> None:
    """transformers would not find the Conv1D layers of a GPT-2, and run it with random weights."""
    rounded(models / "gpt2", tmp_path / "gpt2")
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    quantized = open_quantized(tmp_path / "gpt2")
    assert quantized.scheme.method == "awq_trt"
    weight = open_checkpoint(models / "gpt2").tensor("transformer.h.1.attn.c_attn.weight")
    assert torch.equal(
        quantized.linears["transformer.h.1.attn.c_attn"].q, quantize_weight(weight, 64, False, torch.float16).q
    )
    embedding = open_checkpoint(models / "gpt2").tensor("transformer.wpe.weight")
    assert torch.equal(quantized.tensor("transformer.wpe.weight"), embedding.half())
    with pytest.raises(AwqTrtError, match="Conv1D layers.*save_format=.awq."):
        rounded(models / "gpt2", tmp_path / "ct", save_format="compressed-tensors")


def test_a_pre_scale_needs_a_format_that_carries_it(float_model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(float_model)
    layer = QuantizedLinear(
        **{**vars(quantize_weight(torch.randn(16, 64), 32, False, torch.float16)), "pre_scale": torch.rand(64).half()}
    )
    writer = Writer(tmp_path / "awq", checkpoint)
    writer.add_block("block-00000", "model.layers.0", {}, {"a": layer})
    writer.finish(32, False, {"left_in_float": {}})
    config = json.loads((tmp_path / "awq" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "awq_trt"
    assert [f.name for f in (tmp_path / "awq").glob("*.safetensors")] == ["awq_trt-block-00000.safetensors"]
    with pytest.raises(AwqTrtError, match="compressed-tensors cannot carry a pre-scale"):
        Writer(tmp_path / "ct", checkpoint, "compressed-tensors").add_block("block-00000", "b", {}, {"a": layer})
    with pytest.raises(AwqTrtError, match="save format 'gguf' is not one of awq, compressed-tensors"):
        Writer(tmp_path / "ct", checkpoint, "gguf")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("group", "skip"), [(64, ()), (-1, ()), (128, ("o_proj", "v_proj"))])
def test_transformers_loads_our_compressed_tensors(
    float_model: Path, tmp_path: Path, group: int, skip: tuple[str, ...], symmetric: bool, dtype: str
) -> None:
    """Logits bit for bit; layers in float by way of `ignore`.

    Zero points need `dequantize=True`: compressed-tensors 0.20 cannot otherwise load what it saved itself, because its
    empty model has them unpacked.
    """
    source = tmp_path / "llama"
    transformers.AutoModelForCausalLM.from_pretrained(float_model, dtype=getattr(torch, dtype)).save_pretrained(source)
    output = rounded(
        source, tmp_path / "ct", save_format="compressed-tensors", symmetric=symmetric, group=group, skip=skip
    )
    quantized = open_quantized(output)
    assert len(quantized.linears) == 14 - 2 * len(skip)
    assert quantized.dtype == getattr(torch, dtype)
    assert all((layer.zeros is None) == symmetric for layer in quantized.linears.values())
    expected = our_logits(output, source)
    for dequantize in (True, False)[: 1 + symmetric]:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            output, quantization_config=transformers.CompressedTensorsConfig(dequantize=dequantize)
        )
        with torch.inference_mode():
            assert torch.equal(theirs(ids()).logits, expected)


LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
LOCAL = {"rope_type": "default", "rope_theta": 5e3}
ROPES: dict[str, tuple[Callable[[], transformers.PretrainedConfig], dict[str, Any]]] = {
    "llama": (lambda: transformers.LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
              {"rope_theta": 5e5, "rope_scaling": None}),
    "llama3": (families.DECODERS["llama3"],
               {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    "qwen2": (lambda: transformers.Qwen2Config(rope_parameters=YARN),
              {"rope_theta": 1e6, "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}}),
    "gemma3": (lambda: transformers.Gemma3TextConfig(
                   rope_parameters={"full_attention": LINEAR, "sliding_attention": LOCAL}),
               {"rope_theta": 1e6, "rope_local_base_freq": 5e3,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "phi": (lambda: transformers.PhiConfig(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.4}),
            {"rope_theta": 1e4, "partial_rotary_factor": 0.4, "rope_scaling": None}),
    "gpt_neox": (lambda: transformers.GPTNeoXConfig(
                     rope_parameters={"rope_theta": 2e4, "partial_rotary_factor": 0.5}),
                 {"rotary_emb_base": 2e4, "rotary_pct": 0.5, "rope_scaling": None}),
    "phi3": (lambda: transformers.Phi3Config(rope_parameters=LONG_ROPE, original_max_position_embeddings=64,
                                             pad_token_id=0, hidden_size=64, num_attention_heads=4),
             {"rope_theta": 1e4, "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8,
                                                  "long_factor": [2.0] * 8}}),
}  # fmt: skip
"""Family -> configuration, and what version 4 of transformers wants to find."""


@pytest.mark.parametrize("name", ROPES)
def test_fields_of_older_versions(name: str) -> None:
    """Both versions read the same model: the old one by its own fields, and this one no other because of them."""
    config, fields = ROPES[name][0](), ROPES[name][1]
    config.dtype = torch.bfloat16
    values = json.loads(config.to_json_string(use_diff=False))
    both = with_old_fields(config, values)
    assert {key: both.get(key) for key in fields} == fields
    assert both["torch_dtype"] == "bfloat16"
    new = type(config).from_dict(both)
    assert new.rope_parameters == config.rope_parameters | {k: v for k, v in new.rope_parameters.items() if k == "type"}
    assert new.dtype == config.dtype


def test_fields_that_would_make_another_model_are_left_out() -> None:
    """longrope with an attention factor of its own, for which version 4's Phi-3 has no field."""
    config = transformers.Phi3Config(
        rope_parameters={**LONG_ROPE, "attention_factor": 3.0}, original_max_position_embeddings=64, pad_token_id=0,
        hidden_size=64, num_attention_heads=4,
    )  # fmt: skip
    both = with_old_fields(config, json.loads(config.to_json_string(use_diff=False)))
    assert "rope_scaling" not in both
    assert type(config).from_dict(both).rope_parameters["attention_factor"] == 3.0


def test_the_tokenizer_is_the_sources_own(models: Path, tmp_path: Path) -> None:
    """Byte for byte, whatever version of transformers wrote it; nothing else is copied."""
    source = Path(shutil.copytree(models / "llama", tmp_path / "m"))
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    (source / "special_tokens_map.json").write_text('{"eos_token": "!"}')
    (source / "notes.json").write_text("{}")
    (source / "setup.py").write_text("raise SystemExit")
    out = rounded(source, tmp_path / "out", group=32)
    copied = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
    for name in (*copied, "additional_chat_templates/tool.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not {"notes.json", "setup.py", "adapter_config.json"} & {file.name for file in out.iterdir()}
    assert transformers.AutoTokenizer.from_pretrained(out).get_chat_template() == "{{ messages[0].content }}"


def test_a_tokenizer_file_without_end_is_not_copied(models: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(models / "llama", tmp_path / "m"))
    (source / "merges.txt").symlink_to("/dev/zero")
    with pytest.raises(AwqTrtError, match=r"merges\.txt is a device"):
        rounded(source, tmp_path / "out", group=32)
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_of_a_gguf_file(tmp_path: Path) -> None:
    model = gguf_files.llama(tmp_path / "hf")
    path = gguf_files.write(tmp_path / "m.gguf", gguf_files.keys_of(model), gguf_files.tensors_of(model))
    out = rounded(path, tmp_path / "out", group=32)
    written = json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert written != "TokenizersBackend"
    text = "what the field does to it <|endoftext|>"
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer(text) == open_checkpoint(path).tokenizer(text)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == len(open_quantized(out).tokenizer) == model.config.vocab_size
