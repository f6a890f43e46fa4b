"""GGUF files of a small llama, written by gguf-py as llama.cpp's converter writes them: q and k permuted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny_models
import torch
import transformers as t


def tensors_of(model: t.PreTrainedModel) -> dict[str, np.ndarray]:
    """The tensors of a llama under the names of llama.cpp."""
    config: Any = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    found = {}
    for name, parameter in model.named_parameters():
        stem, suffix = name.rsplit(".", 1)
        value = parameter.detach().float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(stem.split(".")[-1])
        if heads:
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        found[f"{names.get_name(stem)}.{suffix}"] = value.copy()
    return found


def keys_of(model: t.PreTrainedModel) -> dict[str, Any]:
    """What llama.cpp says of a llama, without "llama." before it."""
    config: Any = model.config
    width = config.hidden_size // config.num_attention_heads
    return {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": config.rope_parameters["rope_theta"],
        "vocab_size": config.vocab_size, "rope.dimension_count": width, "attention.key_length": width,
    }  # fmt: skip


def write(
    path: Path, keys: Mapping[str, Any], tensors: Mapping[str, np.ndarray], kind: Any = None, general: Any = None
) -> Path:
    """A file of these keys (of "llama.") and tensors; matrices are stored as `kind` (a gguf.GGMLQuantizationType)."""
    writer = gguf.GGUFWriter(path, "llama")
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
    for key, value in ({f"llama.{key}": value for key, value in keys.items()} | (general or {})).items():
        add[type(value)](key, value)
    vocabulary = tiny_models.tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    merges = json.loads(tiny_models.tokenizer().backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    add_tensors(writer, tensors, kind)
    return path


def add_tensors(writer: gguf.GGUFWriter, tensors: Mapping[str, np.ndarray], kind: Any = None) -> None:
    """The tensors, and the end of the file."""
    for name, value in tensors.items():
        if kind is not None and value.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama(directory: Path, **changes: Any) -> Any:
    """A llama in fp32."""
    return t.LlamaForCausalLM.from_pretrained(tiny_models.llama(directory, **changes), dtype=torch.float32)
