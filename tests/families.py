"""One tiny model per family: what makes the family different is on, windows are short enough to matter in 64 tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers as t

from awq_trt.checkpoint.experts import Part, parts_of
from awq_trt.checkpoint.model import empty_model, model_class, persistent_buffers
from awq_trt.checkpoint.quantized import open_quantized

WINDOW = 16
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
TEXT: dict[str, Any] = {"vocab_size": tiny_models.VOCABULARY, "max_position_embeddings": 256}
ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
GQA: dict[str, Any] = {**SHAPE, **TEXT, **ENDS, "num_key_value_heads": 2}
EXPERTS: dict[str, Any] = {**GQA, "num_experts_per_tok": 2}
ROBERTA: dict[str, Any] = {**SHAPE, **TEXT, "max_position_embeddings": 514, "pad_token_id": 1}
IMAGES: dict[str, Any] = {"image_size": 32, "patch_size": 8}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + i / 8 for i in range(6)],
             "long_factor": [2.0 + i for i in range(6)], "original_max_position_embeddings": 128}  # fmt: skip

DECODERS: dict[str, Callable[[], t.PretrainedConfig]] = {
    "llama2": lambda: t.LlamaConfig(**SHAPE, **TEXT, **ENDS),
    "llama3": lambda: t.LlamaConfig(
        **GQA, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                                "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "smollm2": lambda: t.LlamaConfig(**GQA, tie_word_embeddings=True),
    "smollm3": lambda: t.SmolLM3Config(**GQA, no_rope_layer_interval=2),
    "qwen2": lambda: t.Qwen2Config(  # its tokenizer adds <|endoftext|>
        **GQA | {"vocab_size": 392}, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": lambda: t.Qwen3Config(**GQA, head_dim=32),
    "mistral": lambda: t.MistralConfig(**GQA, sliding_window=WINDOW),
    "phi3": lambda: t.Phi3Config(**GQA),
    "phi4": lambda: t.Phi3Config(
        **GQA, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
    ),
    "phi3-longrope": lambda: t.Phi3Config(
        **GQA, original_max_position_embeddings=128, rope_parameters={**LONG_ROPE, "partial_rotary_factor": 0.75},
    ),
    "gemma2": lambda: t.Gemma2Config(
        **GQA, head_dim=32, query_pre_attn_scalar=24, sliding_window=WINDOW, attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: t.Gemma3TextConfig(
        **{**GQA, "num_hidden_layers": 3}, head_dim=32, query_pre_attn_scalar=24, sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "gpt2": lambda: t.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=256, vocab_size=tiny_models.VOCABULARY, bos_token_id=0,
        eos_token_id=1,
    ),
    "opt": lambda: t.OPTConfig(
        hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, **TEXT, **ENDS, word_embed_proj_dim=64,
    ),
    "opt-350m": lambda: t.OPTConfig(
        hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, **TEXT, **ENDS, word_embed_proj_dim=32,
        do_layer_norm_before=False,
    ),
    "falcon-7b": lambda: t.FalconConfig(**falcon(), multi_query=True, parallel_attn=True),
    "falcon-40b": lambda: t.FalconConfig(**falcon(), new_decoder_architecture=True, num_kv_heads=2),
    "falcon-rw": lambda: t.FalconConfig(**falcon(), alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "gpt-neo": lambda: t.GPTNeoConfig(
        hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=WINDOW,
        max_position_embeddings=256, vocab_size=tiny_models.VOCABULARY, bos_token_id=0, eos_token_id=1,
    ),
    "gpt-neox": lambda: t.GPTNeoXConfig(**SHAPE, **TEXT, **ENDS),
    "starcoder2": lambda: t.Starcoder2Config(**GQA, sliding_window=WINDOW),
    "olmo2": lambda: t.Olmo2Config(**GQA),
    "granite": lambda: t.GraniteConfig(
        **GQA, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.1, logits_scaling=2.0
    ),
    "mixtral": lambda: t.MixtralConfig(**EXPERTS, num_local_experts=4, sliding_window=WINDOW),
    "qwen3-moe": lambda: t.Qwen3MoeConfig(**EXPERTS, num_experts=4, moe_intermediate_size=64, norm_topk_prob=True),
}  # fmt: skip
"""Family -> configuration. All have a vocabulary of 384, that of the tiny tokenizer."""


ENCODERS: dict[str, tuple[str, Callable[[], t.PretrainedConfig]]] = {
    "bert": ("BertForMaskedLM", lambda: t.BertConfig(**SHAPE, **TEXT)),
    "bert-base": ("BertModel", lambda: t.BertConfig(**SHAPE, **TEXT)),
    "roberta": ("RobertaForMaskedLM", lambda: t.RobertaConfig(**ROBERTA)),
    "roberta-classifier": ("RobertaForSequenceClassification", lambda: t.RobertaConfig(**ROBERTA, num_labels=3)),
    "vit": ("ViTForImageClassification", lambda: t.ViTConfig(**SHAPE, **IMAGES, num_labels=10)),
    "clip": ("CLIPModel", lambda: t.CLIPConfig(
        text_config={**SHAPE, **TEXT, "max_position_embeddings": 48, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**SHAPE, **IMAGES}, projection_dim=32,
    )),
    "clip-text": (
        "CLIPTextModel", lambda: t.CLIPTextConfig(**SHAPE, **TEXT, bos_token_id=0, eos_token_id=1),
    ),
    "clip-vision": ("CLIPVisionModel", lambda: t.CLIPVisionConfig(**SHAPE, **IMAGES)),
    "whisper": ("WhisperForConditionalGeneration", lambda: t.WhisperConfig(
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, vocab_size=tiny_models.VOCABULARY, num_mel_bins=16,
        max_source_positions=32, max_target_positions=32, pad_token_id=0, bos_token_id=0, eos_token_id=1,
        decoder_start_token_id=1,
    )),
}  # fmt: skip
"""Family -> class and configuration of what lies on disk."""


def falcon() -> dict[str, Any]:
    """What FalconConfig calls the usual numbers."""
    return {
        "hidden_size": 64, "ffn_hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, **TEXT, **ENDS
    }  # fmt: skip


def checkpoint(config: t.PretrainedConfig, directory: Path, *, cls: Any = None) -> Path:
    """A checkpoint of random weights that keep the size of what they read, so that rounding errors stay small. Small
    embeddings, else tied ones make a model repeat its last token; norms are not 1 and biases are not 0."""
    torch.manual_seed(0)
    if isinstance(config, t.CLIPConfig):
        config.text_config.projection_dim = config.vision_config.projection_dim = config.projection_dim
    cls = cls or t.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = cls(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.data += (torch.rand(parameter.shape) - 0.5) * (0.1 if name.endswith("bias") else 1.0)
        else:
            gain = 0.3 if "embed" in name or "wte" in name else 1.5
            parameter.data = torch.randn(parameter.shape) * gain / parameter.shape[-1] ** 0.5
    model.save_pretrained(directory)
    tiny_models.tokenizer().save_pretrained(directory)
    return directory


def reference(directory: Path) -> t.PreTrainedModel:
    """transformers' own model of a quantized checkpoint: eager, in fp32, with the weights (q - zero) * scale."""
    quantized = open_quantized(directory)
    config = copy.deepcopy(quantized.config)
    config._attn_implementation = config._experts_implementation = "eager"
    if getattr(config, "alibi", False):  # Falcon's eager attention adds the bias twice, to the mask and to the scores
        config._attn_implementation = "sdpa"
    ours, theirs = empty_model(config), model_class(config)(config).eval()
    stacked: dict[str, list[tuple[str, Part]]] = {}
    for name, part in parts_of(ours).items():
        stacked.setdefault(part.fused, []).append((name, part))

    def value(name: str) -> torch.Tensor:
        layer = quantized.linears.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if layer is None:
            return quantized.tensor(name).float()
        weight = replace(layer, scales=layer.scales.float()).dequantize()
        return weight if layer.pre_scale is None else weight * layer.pre_scale.float()

    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(False)
        for layer, part in stacked.get(name, ()):
            expert = parameter.data[part.expert]
            (expert.t() if part.transposed and expert.dim() == 2 else expert)[part.rows] = value(layer)
        if name not in stacked:
            parameter.data = value(name).t().clone() if name in quantized.transposed else value(name)
    for name in persistent_buffers(theirs):
        theirs.get_buffer(name).copy_(quantized.tensor(name))
    return theirs
