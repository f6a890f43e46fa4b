"""Every tensor is accounted for: what is read is what transformers' from_pretrained loads, or it is refused."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import tiny_models
import torch
import transformers as t
from loaders import Tensors, assert_same_as_transformers, configure, load, rewrite, shard
from quantized_models import edited
from safetensors.torch import load_file, save_file

from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.checkpoint.quantized import open_quantized
from awq_trt.errors import AwqTrtError

VISION = {**families.SHAPE, **families.IMAGES}


def untied(directory: Path, **changes: Any) -> Path:
    return families.checkpoint(t.LlamaConfig(**{**families.GQA, **changes}), directory)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untied(tmp_path_factory.mktemp("untied") / "m")


@pytest.fixture
def llama(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "m"))


def test_two_tensors_for_a_tied_weight(llama: Path) -> None:
    """transformers does not tie what is stored with different values, whatever config.json says."""
    assert not assert_same_as_transformers(configure(llama, tie_word_embeddings=True)).config.tie_word_embeddings


def test_two_equal_tensors_for_a_tied_weight(llama: Path) -> None:
    rewrite(llama, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"]}))
    assert assert_same_as_transformers(configure(llama, tie_word_embeddings=True)).config.tie_word_embeddings


def test_a_tied_weight_stored_under_the_name_of_the_head(llama: Path) -> None:
    rewrite(llama, lambda w: w.pop("model.embed_tokens.weight"))
    checkpoint = assert_same_as_transformers(configure(llama, tie_word_embeddings=True))
    assert "model.embed_tokens.weight" in checkpoint.readers


def test_a_quantized_checkpoint_with_two_tensors_for_a_tied_weight(quantized: Path, tmp_path: Path) -> None:
    def change(w: Tensors) -> None:
        w["lm_head.weight"] = w["model.embed_tokens.weight"] * 2

    other = open_quantized(edited(quantized, tmp_path / "m", change))
    assert not other.config.tie_word_embeddings
    assert torch.equal(other.tensor("lm_head.weight"), other.tensor("model.embed_tokens.weight") * 2)
    same = open_quantized(
        edited(
            quantized, tmp_path / "n", lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()})
        )
    )
    assert same.config.tie_word_embeddings


VISION_LANGUAGE: dict[str, Callable[[], t.PretrainedConfig]] = {
    "SmolVLM": lambda: t.SmolVLMConfig(text_config=text(), vision_config=VISION, scale_factor=2, image_token_id=380),
    "Idefics3": lambda: t.Idefics3Config(text_config=text(), vision_config=VISION, scale_factor=2, image_token_id=380),
    "Llava": lambda: t.LlavaConfig(text_config=text(), vision_config=t.CLIPVisionConfig(**VISION), image_token_id=380),
    "PaliGemma": lambda: t.PaliGemmaConfig(
        text_config=t.GemmaConfig(**families.GQA, head_dim=16), vision_config=VISION, image_token_id=380
    ),
    "Mistral3": lambda: t.Mistral3Config(
        text_config=t.MixtralConfig(**families.EXPERTS, num_local_experts=4),
        vision_config=t.PixtralVisionConfig(**VISION), image_token_id=380,
    ),
}  # fmt: skip


def text() -> t.LlamaConfig:
    return t.LlamaConfig(**families.GQA)


@pytest.mark.parametrize("name", VISION_LANGUAGE)
def test_the_language_model_wherever_the_whole_has_it(tmp_path: Path, name: str) -> None:
    cls = getattr(t, f"{name}ForConditionalGeneration")
    directory = families.checkpoint(VISION_LANGUAGE[name](), tmp_path / "m", cls=cls)
    checkpoint = assert_same_as_transformers(directory)
    assert checkpoint.config.architectures[0].endswith("ForCausalLM")
    rewrite(directory, lambda w: w.update({"model.stray.weight": torch.ones(4)}))
    with pytest.raises(AwqTrtError, match=r"1 of the stored tensors would be left out, .*: model\.stray\.weight\."):
        open_checkpoint(directory)


UP = "model.layers.0.mlp.up_proj.weight"


def biases(w: Tensors) -> None:
    w.update(
        {f"model.layers.{i}.self_attn.{x}_proj.bias": torch.ones(64 if x == "q" else 32) for i in (0, 1) for x in "qkv"}
    )


def scales(w: Tensors) -> None:
    w.update({f"{name}_scale": torch.ones(1) for name in w if name.endswith("proj.weight")})


def layers(w: Tensors) -> None:
    w.update(
        {name.replace("layers.1.", f"layers.{i}."): w[name] for name in list(w) for i in (2, 3) if "layers.1." in name}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (biases, r"6 of the stored tensors .* has no place .*: model\.layers\.0\.self_attn\.k_proj\.bias"),
        (layers, r"18 of the stored tensors .*model\.layers\.2\.input_layernorm\.weight.* and 15 more"),
        (scales, r"14 of the stored tensors .*down_proj\.weight_scale.*quantization_config"),
        (lambda w: w.update({"model.embed_tokens.weight_scale_inv": torch.ones(1)}), "weight_scale_inv"),
        (lambda w: w.update({"embed_tokens.weight": torch.ones(384, 64)}), r"1 of the stored tensors .*embed_tokens"),
        (lambda w: w.update({"model.layers.0.self_attn.sinks": torch.ones(4)}), "sinks"),
        (
            lambda w: w.update({UP: w[UP].to(torch.int8)}),
            "up_proj.weight is int8: the weights are quantized, and config.json has no quantization_config",
        ),
        (
            lambda w: w.update({UP: w[UP].to(torch.float8_e4m3fn), f"{UP}_scale": torch.ones(1)}),
            "is float8_e4m3fn: the weights are quantized|tensors would be left out, .*quantization_config",
        ),
        (lambda w: w.update({"base_model.model.lm_head.weight": w.pop("lm_head.weight")}), "PEFT has wrapped"),
        (
            lambda w: w.update({UP.replace("weight", "base_layer.weight"): w.pop(UP)}),
            "PEFT has wrapped",
        ),
    ],
)  # fmt: skip
def test_what_nothing_would_read(llama: Path, change: Callable[[Tensors], object], message: str) -> None:
    rewrite(llama, change)
    with pytest.raises(AwqTrtError, match=message):
        open_checkpoint(llama)
    with pytest.raises(AwqTrtError, match=message):
        open_checkpoint(shard(llama))


def test_what_nothing_would_read_of_a_quantized_checkpoint(quantized: Path, tmp_path: Path) -> None:
    for name in ("model.layers.9.input_layernorm.weight", "model.layers.0.self_attn.k_scale", "model.extra"):
        other = edited(quantized, tmp_path / name, lambda w, n=name: w.update({n: torch.ones(128)}))  # type: ignore[misc]
        with pytest.raises(AwqTrtError, match=rf"1 of the stored tensors .*{name}"):
            open_quantized(other)


def test_old_buffers_are_no_parameters(llama: Path, models: Path, tmp_path: Path) -> None:
    """Rotary frequencies for each layer, position ids, causal masks: what versions of transformers have stored."""
    rewrite(
        llama, lambda w: w.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in (0, 1)})
    )
    assert_same_as_transformers(llama)
    gpt2 = Path(shutil.copytree(models / "gpt2", tmp_path / "gpt2"))
    mask = torch.ones(1, 1, 512, 512).tril()

    def as_in_2019(w: Tensors) -> None:
        for name in list(w):
            w[name.removeprefix("transformer.")] = w.pop(name)
        w.update(
            {f"h.{i}.attn.bias": mask for i in (0, 1)} | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in (0, 1)}
        )

    assert_same_as_transformers(rewrite(gpt2, as_in_2019))
    bert = Path(shutil.copytree(models / "bert", tmp_path / "bert"))
    rewrite(bert, lambda w: w.update({"bert.embeddings.position_ids": torch.arange(512)[None]}))
    assert_same_as_transformers(bert)


def test_heads_of_other_tasks_are_noted(tmp_path: Path) -> None:
    """As bert-base-uncased has them: a pooler and the head that says whether a sentence follows."""
    whole = families.checkpoint(families.ENCODERS["bert"][1](), tmp_path / "m", cls=t.BertForPreTraining)
    configure(whole, architectures=["BertForMaskedLM"])
    assert set(load(whole)[1]["unexpected_keys"]) == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "cls.seq_relationship.weight", "cls.seq_relationship.bias"
    }  # fmt: skip
    note = assert_same_as_transformers(whole).note
    assert note.startswith("bert.pooler.dense.bias, bert.pooler.dense.weight, cls.seq_relationship.bias and 1 more: of")
    rewrite(whole, lambda w: w.update({"bert.encoder.layer.0.adapter.weight": torch.ones(4)}))
    with pytest.raises(AwqTrtError, match=r"1 of the stored tensors .*layer\.0\.adapter\.weight"):
        open_checkpoint(whole)


ODDITIES: list[Callable[[Tensors, random.Random], object]] = [
    lambda w, r: [w.update({n.removeprefix("model."): w.pop(n)}) for n in list(w)],
    lambda w, r: w.update({"lm_head.weight": w[next(n for n in w if "embed" in n)].clone()}),
    lambda w, r: w.update({"lm_head.weight": torch.randn(384, 64)}),
    lambda w, r: w.pop("lm_head.weight", None),
    lambda w, r: w.update({n: w[n].to(r.choice([torch.float16, torch.bfloat16, torch.float64])) for n in list(w)}),
    lambda w, r: w.update({n: w[n].bfloat16() for n in r.sample(sorted(w), len(w) // 2)}),
    lambda w, r: w.update({f"model.layers.{r.randint(0, 3)}.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    lambda w, r: w.update({f"model.layers.{r.randint(0, 3)}.self_attn.{r.choice('qkvo')}_proj.bias": torch.ones(64)}),
    lambda w, r: w.update({f"{r.choice(sorted(w))}_scale": torch.ones(1)}),
    lambda w, r: w.update({r.choice(["model", "", "module"]) + ".norm.weight": torch.ones(64)}),
    lambda w, r: w.pop(r.choice(sorted(w))),
    lambda w, r: [w.update({n.replace("norm.weight", "norm.gamma"): w.pop(n)}) for n in list(w)],
]


@pytest.mark.parametrize("seed", range(12))
def test_odd_files(made: Path, tmp_path: Path, seed: int) -> None:
    """Opened with what transformers loads where it reports nothing; else refused."""
    for number in range(6):
        r = random.Random(f"{seed} {number}")
        directory = Path(shutil.copytree(made, tmp_path / str(number)))
        for change in r.sample(ODDITIES, r.randint(1, 4)):
            rewrite(directory, lambda w, change=change, r=r: change(w, r))  # type: ignore[misc]
        configure(directory, tie_word_embeddings=r.random() < 0.5)
        if r.random() < 0.3:
            shard(directory, r.randint(1, 4))
        if r.random() < 0.5:
            save_file(
                {"model.norm.weight": torch.zeros(64)}, directory / r.choice(["model_ema.safetensors", "a.safetensors"])
            )
        _, info = load(directory)
        if info["missing_keys"] or info["unexpected_keys"]:
            with pytest.raises(AwqTrtError, match="left out|not in the checkpoint"):
                open_checkpoint(directory)
        else:
            assert_same_as_transformers(directory)


def test_the_dtype_is_that_of_the_model_not_of_its_first_tensor(llama: Path) -> None:
    rewrite(llama, lambda w: w.update({n: v.bfloat16() for n, v in w.items() if "embed" not in n}))
    assert open_checkpoint(configure(llama, dtype="bfloat16")).dtype == torch.bfloat16
    assert open_checkpoint(configure(llama, dtype="float16")).dtype == torch.float16
    assert open_checkpoint(configure(llama, "dtype")).dtype == torch.bfloat16
    assert open_checkpoint(configure(llama, dtype="float32")).dtype == torch.bfloat16
    rewrite(llama, lambda w: w.update({n: v.float() for n, v in w.items() if "proj" in n}))
    assert open_checkpoint(llama).dtype == torch.float16


def test_tokens_without_an_embedding(tmp_path: Path) -> None:
    small = untied(tmp_path / "m", vocab_size=376)
    with pytest.raises(
        AwqTrtError, match=r"8 tokens that the model has no embedding for .* is number 376, .* 376 rows"
    ):
        open_checkpoint(small)
    large = untied(tmp_path / "l", vocab_size=512)
    assert open_checkpoint(large).tokenizer is not None
    exact = untied(tmp_path / "e")
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(exact)
    with pytest.raises(AwqTrtError, match=r"1 tokens that the model has no embedding for \(token '<\|im_start\|>'"):
        open_checkpoint(exact)
    image = t.PreTrainedTokenizerFast(
        tokenizer_object=tiny_models.tokenizer().backend_tokenizer, extra_special_tokens={"image_token": "<image>"}
    )
    assert len(image) == 385
    image.save_pretrained(exact)  # the tokenizer that a text model shares with its vision-language sibling
    assert len(open_checkpoint(exact).tokenizer) == 385
    padded = tiny_models.tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]", "unk_token": "<|endoftext|>"})
    assert len(padded) == 386
    padded.save_pretrained(exact)
    assert len(open_checkpoint(exact).tokenizer) == 386


def test_a_configuration_without_architectures(llama: Path, models: Path, tmp_path: Path) -> None:
    assert open_checkpoint(configure(llama, "architectures")).config.architectures == ["LlamaForCausalLM"]
    bert = Path(shutil.copytree(models / "bert", tmp_path / "bert"))
    with pytest.raises(AwqTrtError, match=r'add "architectures".*such as .*BertForMaskedLM'):
        open_checkpoint(configure(bert, "architectures"))
    assert load_file(bert / "model.safetensors")
