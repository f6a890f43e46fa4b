"""Tiny random models of many families: of families.py, and of whatever model type transformers has."""

from __future__ import annotations

from typing import Any

import families
import transformers as t
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_SIZES = {
    384: "vocab_size vocab_size_per_layer_input",
    64: "hidden_size d_model n_embd dim embedding_size moe_intermediate_size shared_expert_intermediate_size "
    "pooler_hidden_size attention_hidden_size lru_width embed_dim block_ff_dim expert_ffn_hidden_size",
    128: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff hidden_dim ffn_hidden_size d_inner dff "
    "intermediate_size_mlp shared_intermediate_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_experts_per_tok num_key_value_heads linear_num_key_heads moe_top_k",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts linear_num_value_heads mamba_dt_rank",
    1: "first_k_dense_replace mamba_n_groups n_groups n_group topk_group mamba_ngroups",
    16: "head_dim d_head d_kv sliding_window state_size mamba_d_state mamba_d_head linear_key_head_dim v_head_dim "
    "linear_value_head_dim qk_nope_head_dim qk_rope_head_dim attention_window_size local_attention "
    "hidden_size_per_layer_input conv_dim num_conv_pos_embeddings num_mel_bins mamba_headdim",
    32: "image_size kv_lora_rank q_lora_rank max_source_positions max_target_positions projection_dim context_length",
    8: "patch_size rotary_dim mamba_n_heads n_mamba_heads laurel_rank",
    256: "max_position_embeddings n_positions n_ctx max_seq_len",
}
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
"""Field of a configuration -> its size in a tiny model."""

CAUSAL = (
    "cohere cohere2 stablelm gpt_bigcode gemma deepseek_v2 deepseek_v3 glm glm4 exaone4 olmo olmo3 olmoe qwen2_moe "
    "persimmon nemotron phi phimoe ernie4_5 hunyuan_v1_dense arcee helium seed_oss dbrx minimax apertus granitemoe "
    "glm4_moe xglm biogpt openai-gpt ctrl xlnet zamba mamba mamba2 falcon_mamba jamba lfm2 qwen3_next gpt_oss bamba "
    "rwkv bloom mpt falcon_h1 recurrent_gemma llama4_text gptj codegen gemma3n_text qwen3_5_text granitemoehybrid"
)
OTHERS = (
    "deberta deberta-v2 albert electra distilbert mpnet modernbert xlm-roberta camembert t5 mt5 wavlm wav2vec2 hubert "
    "dinov2 swin beit deit siglip_vision_model convnext segformer resnet bart marian esm xlm-roberta longformer"
)
NAMES = [*families.DECODERS, *families.ENCODERS, *dict.fromkeys(f"{CAUSAL} {OTHERS}".split())]
"""The table: rows of families.py, and model types of transformers."""

CHANGES: dict[str, dict[str, Any]] = {
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"]},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"]},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "modernbert": {"layer_types": ["sliding_attention", "full_attention"]},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
                     "activation_sparsity_pattern": [0.5, 0.0]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "use_mamba_kernels": False},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"], "attention_hidden_size": 128,
              "attention_head_dim": 32, "num_key_value_heads": 4, "n_mamba_heads": 2, "use_mamba_kernels": False},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4},
    "gpt_bigcode": {"multi_query": True},
    "dbrx": {"attn_config": {"kv_n_heads": 2}, "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64,
             "moe_num_experts": 4, "moe_top_k": 2}},
    "glm4": {"num_key_value_heads": 2},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "deepseek_v3": {"num_key_value_heads": 4},
    "rwkv": {"context_length": 256},
    "xlm-roberta": {"max_position_embeddings": 514},
    "camembert": {"max_position_embeddings": 514},
    "longformer": {"attention_window": 16, "max_position_embeddings": 514},
    "swin": {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "patch_size": 2, "window_size": 4},
    "convnext": {"hidden_sizes": [32, 64], "depths": [2, 2], "patch_size": 2, "num_stages": 2},
    "resnet": {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [2, 2]},
    "segformer": {"hidden_sizes": [32, 64], "depths": [2, 2], "num_encoder_blocks": 2, "sr_ratios": [2, 1],
                  "num_attention_heads": [2, 4], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]},
    **{name: {"conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16,
              "num_feat_extract_layers": 2} for name in ("wavlm", "wav2vec2", "hubert")},
}  # fmt: skip
"""Model type -> what its tiny configuration has besides SMALL: one layer of each kind, and lists that must fit."""

CLASSES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "bart": "BartForConditionalGeneration",
           "marian": "MarianMTModel"}  # fmt: skip
HEADS = ("CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION", "CTC")


class UnknownFamilyError(Exception):
    """No such row, and transformers has no such model type."""


def tiny(name: str) -> tuple[t.PretrainedConfig, Any]:
    """A tiny configuration of a family, and the class of its checkpoint."""
    if name in families.DECODERS:
        config = families.DECODERS[name]()
        return config, t.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if name in families.ENCODERS:
        cls, make = families.ENCODERS[name]
        return make(), getattr(t, cls)
    if name not in CONFIG_MAPPING:
        raise UnknownFamilyError(f"{name}: not in the table, and transformers {t.__version__} has no such model type.")
    kind: Any = CONFIG_MAPPING[name]
    normal = kind()
    fields = normal.to_dict()
    sizes = {k: v for k, v in SMALL.items() if fields.get(k) is not None}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id"):
        value = fields.get(key)
        if isinstance(value, list) or (isinstance(value, int) and value >= SMALL["vocab_size"]):
            sizes[key] = 1
    config = kind(**{**sizes, **CHANGES.get(name, {})})
    if name in CLASSES:
        return config, getattr(t, CLASSES[name])
    mappings = [getattr(t, f"MODEL_FOR_{head}_MAPPING") for head in HEADS] + [t.MODEL_MAPPING]
    if name in OTHERS.split():
        mappings.pop(0)
    cls = next((m[kind] for m in mappings if kind in m), None)
    if cls is None:
        raise UnknownFamilyError(f"{name}: transformers {t.__version__} has no model class for it alone.")
    return config, cls
