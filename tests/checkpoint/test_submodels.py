"""One model of a checkpoint that holds several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
import transformers as t
from quantized_models import edited, rounded
from safetensors.torch import load_file, save_file

from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.outside import fill
from awq_trt.awq.quantize import quantize
from awq_trt.checkpoint.model import empty_model
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.checkpoint.quantized import open_quantized
from awq_trt.checkpoint.submodels import choose
from awq_trt.errors import AwqTrtError


def gemma3() -> t.Gemma3Config:
    text = families.DECODERS["gemma3"]().to_dict()
    config = t.Gemma3Config(
        text_config=text, vision_config={**families.SHAPE, **families.IMAGES}, mm_tokens_per_image=4
    )
    config.architectures = ["Gemma3ForConditionalGeneration"]
    return config


@pytest.fixture(scope="module")
def vision_language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gemma3")
    return families.checkpoint(gemma3(), directory, cls=t.Gemma3ForConditionalGeneration)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cls, config = families.ENCODERS["clip"]
    return families.checkpoint(config(), tmp_path_factory.mktemp("clip"), cls=getattr(t, cls))


def filled(checkpoint: Any) -> t.PreTrainedModel:
    model = empty_model(checkpoint.config)
    fill(model, "", checkpoint)
    return model


@pytest.mark.parametrize("layout", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_a_vision_language_model(vision_language: Path, tmp_path: Path, layout: str) -> None:
    """The names that older and newer versions of transformers write; the logits of text alone."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("language_model.model.")]:
            tensors[name.replace("language_model.model.", layout)] = tensors.pop(name)

    directory = edited(vision_language, tmp_path / "m", rename)
    assert any(n.startswith(layout) for f in directory.glob("*.safetensors") for n in load_file(f))
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config.architectures == ["Gemma3ForCausalLM"]
    assert checkpoint.note.startswith("the text part of Gemma3ForConditionalGeneration, as Gemma3ForCausalLM")
    assert open_checkpoint(directory, part="text").config.to_dict() == checkpoint.config.to_dict()
    ids = torch.randint(2, 384, (1, 40))
    theirs = t.Gemma3ForConditionalGeneration.from_pretrained(vision_language, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(filled(checkpoint)(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-3)


def test_a_quantized_vision_language_model_of_another_tool(vision_language: Path, tmp_path: Path) -> None:
    """Its language model; what is quantized elsewhere is not asked for."""
    ours = rounded(vision_language, tmp_path / "ours", group=32)
    whole = gemma3()
    (tmp_path / "theirs").mkdir()
    quantization = json.loads((ours / "config.json").read_text())["quantization_config"]
    whole.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    tensors = {n: x for f in ours.glob("*.safetensors") for n, x in load_file(f).items()}
    tensors = {n.replace("model.", "language_model.model.", 1): x for n, x in tensors.items()}
    layer = next(n for n in tensors if n.endswith(".qweight")).removesuffix(".qweight")
    other = "vision_tower.encoder.layers.0.mlp.fc1"
    tensors |= {f"{other}.{part}": tensors[f"{layer}.{part}"].clone() for part in ("qweight", "qzeros", "scales")}
    save_file(tensors, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    a, b = open_quantized(ours), open_quantized(tmp_path / "theirs")
    assert b.config.architectures == ["Gemma3ForCausalLM"]
    assert set(a.linears) == set(b.linears)
    for name in a.readers:
        assert torch.equal(a.tensor(name), b.tensor(name)), name
    for name in a.linears:
        assert torch.equal(a.linears[name].dequantize(), b.linears[name].dequantize())


def test_a_quantized_part_is_a_checkpoint_of_its_own(vision_language: Path, tmp_path: Path) -> None:
    report = quantize(vision_language, tmp_path / "q", QuantizeConfig(calibration_samples=1, calibration_length=64))
    assert not any("vision" in name for name in (*report.quantized, *report.left_in_float))
    quantized = open_quantized(tmp_path / "q")
    assert (quantized.config.model_type, quantized.config.architectures) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert set(quantized.linears) == set(report.quantized)


def test_a_choice_is_asked_for(clip: Path) -> None:
    with pytest.raises(AwqTrtError, match="CLIPModel is several models, .* part=.text. or part=.vision."):
        open_checkpoint(clip)
    with pytest.raises(AwqTrtError, match="CLIPModel has no part 'encoder': it has text, vision"):
        open_checkpoint(clip, part="encoder")


def test_no_part_of_one_model(models: Path, tmp_path: Path) -> None:
    with pytest.raises(AwqTrtError, match="LlamaForCausalLM has no part 'text'"):
        open_checkpoint(models / "llama", part="text")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(AwqTrtError, match="a GGUF file is one model"):
        open_checkpoint(tmp_path / "m.gguf", part="text")


def test_a_model_whose_language_model_has_no_class_is_refused() -> None:
    config = t.Qwen2_5_VLConfig()
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    with pytest.raises(AwqTrtError, match="Qwen2_5_VLForConditionalGeneration is more than one model"):
        choose(config, "somewhere")


@pytest.mark.parametrize(
    ("part", "cls", "output"),
    [
        ("text", "CLIPTextModelWithProjection", "text_embeds"),
        ("vision", "CLIPVisionModelWithProjection", "image_embeds"),
    ],
)
def test_a_tower_gives_what_it_gives_in_clip(clip: Path, part: str, cls: str, output: str) -> None:
    """Up to the length of the embedding, which CLIPModel sets to 1. Its projection is as wide as the whole says."""
    checkpoint = open_checkpoint(clip, part=part)
    assert checkpoint.config.architectures == [cls]
    assert (checkpoint.tokenizer is None) == (part == "vision")
    ids, pixels = torch.randint(2, 384, (2, 12)), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        whole = t.CLIPModel.from_pretrained(clip, dtype=torch.float32)(ids, pixels)[output]
        found = filled(checkpoint)(ids if part == "text" else pixels)[output]
    torch.testing.assert_close(found / found.norm(dim=-1, keepdim=True), whole, rtol=1e-4, atol=1e-5)


def test_a_tower_of_its_own_class_in_a_file_of_both(clip: Path, tmp_path: Path) -> None:
    directory = edited(clip, tmp_path / "m", lambda tensors: None, architectures=["CLIPVisionModel"])
    checkpoint = open_checkpoint(directory)
    assert type(checkpoint.config) is t.CLIPVisionConfig
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        whole = t.CLIPVisionModel.from_pretrained(clip, dtype=torch.float32)(pixels).last_hidden_state
        torch.testing.assert_close(filled(checkpoint)(pixels).last_hidden_state, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", ["WhisperForConditionalGeneration", "WhisperModel"])
def test_the_encoder_of_whisper(tmp_path: Path, cls: str) -> None:
    _, config = families.ENCODERS["whisper"]
    families.checkpoint(config(), tmp_path / "m", cls=getattr(t, cls))
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.config.architectures == ["WhisperEncoder"]
    assert checkpoint.tokenizer is None
    assert f"the encoder part of {cls}" in checkpoint.note
    sounds = torch.randn(2, 16, 64)
    theirs = getattr(t, cls).from_pretrained(tmp_path / "m", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs.get_encoder()(sounds).last_hidden_state
        torch.testing.assert_close(filled(checkpoint)(sounds).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(AwqTrtError, match="this model has no tokenizer to read a text with"):
        quantize(checkpoint, tmp_path / "q", QuantizeConfig(calibration_samples=1, calibration_length=8))
    np.savez(tmp_path / "sounds.npz", input_features=sounds.numpy())
    report = quantize(checkpoint, tmp_path / "q", QuantizeConfig(calibration=tmp_path / "sounds.npz"))
    assert len(report.layers) == len(report.quantized) == 12
    assert open_quantized(tmp_path / "q").config.architectures == ["WhisperEncoder"]
