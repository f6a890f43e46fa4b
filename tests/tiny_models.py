"""Checkpoints of a few hundred kilobytes with every part a real one has, made on the spot."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
import transformers

from awq_trt.awq.calibration import DEFAULT_TEXT

VOCABULARY = 384


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of 384 tokens, trained on the calibration text."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([DEFAULT_TEXT.read_text()], vocab_size=VOCABULARY, min_frequency=1, show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)


def content(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, by its path in it."""
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


def save(model: transformers.PreTrainedModel, directory: Path, *, with_tokenizer: bool = True) -> Path:
    """Save a model with uneven channels (a norm of random weights), which is what AWQ lives on."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("weight"):
            parameter.data = torch.rand(parameter.shape, generator=generator) * 2 + 0.05
            parameter.data[::16] *= 20
    model.save_pretrained(directory)
    if with_tokenizer:
        tokenizer().save_pretrained(directory)
    return directory


def llama(directory: Path, **changes: object) -> Path:
    """LlamaForCausalLM: grouped-query attention (4 heads read 2), tied embeddings."""
    options = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    }
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**options, **changes})  # type: ignore[arg-type]
    return save(transformers.LlamaForCausalLM(config), directory)


def gpt2(directory: Path) -> Path:
    """GPT2LMHeadModel: Conv1D layers, one qkv projection, LayerNorm, biases."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=512, bos_token_id=0, eos_token_id=0
    )
    return save(transformers.GPT2LMHeadModel(config), directory)


def bert(directory: Path) -> Path:
    """BertForMaskedLM: norms behind the residual, so that no scale of attention or MLP inputs folds into them."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
    )
    return save(transformers.BertForMaskedLM(config), directory)


def vit(directory: Path) -> Path:
    """ViTForImageClassification on 32 x 32 images, no tokenizer."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    return save(transformers.ViTForImageClassification(config), directory, with_tokenizer=False)
