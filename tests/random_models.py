"""Random models in memory, quantized, and the eager reference of each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers

from awq_trt.checkpoint.model import empty_model
from awq_trt.linear import QuantizedLinear, quantize_weight

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "initializer_range": 0.2}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(
        **SMALL, num_hidden_layers=2, num_key_value_heads=2, vocab_size=96, tie_word_embeddings=True
    ),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, num_hidden_layers=1, num_key_value_heads=2, vocab_size=96),
    "mistral": lambda: transformers.MistralConfig(
        **SMALL, num_hidden_layers=1, num_key_value_heads=2, vocab_size=96, sliding_window=4
    ),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=64, bos_token_id=0, eos_token_id=0,
        initializer_range=0.2,
    ),
    "bert": lambda: transformers.BertConfig(**SMALL, num_hidden_layers=1, vocab_size=96, max_position_embeddings=64),
    "vit": lambda: transformers.ViTConfig(**SMALL, num_hidden_layers=1, image_size=32, patch_size=8, num_labels=10),
}  # fmt: skip
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForMaskedLM",
    "vit": "ViTForImageClassification",
}
GROUPS = {"llama": 32, "qwen2": 64, "mistral": 32, "gpt2": None, "bert": 32, "vit": 64}


class Model:
    """A random model in memory, quantized; what export_quantized reads, and the eager reference."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.config = CONFIGS[kind]()
        self.config.architectures = [CLASSES[kind]]
        self.eager = empty_model(self.config, attn_implementation="eager")
        real: dict[int, torch.nn.Parameter] = {}
        for module in self.eager.modules():
            for name, empty in module._parameters.items():
                if empty is not None and id(empty) not in real:  # tied ones stay tied
                    value = torch.randn(empty.shape) * 0.2 + float(empty.dim() == 1 and name == "weight")
                    real[id(empty)] = torch.nn.Parameter(value.half().float(), requires_grad=False)
                module._parameters[name] = None if empty is None else real[id(empty)]
        self.left_in_float = {"lm_head": "reads the last hidden state"}
        self.generation: dict[str, Any] = {"eos_token_id": [0], "bos_token_id": None, "pad_token_id": None}
        self.linears: dict[str, QuantizedLinear] = {}
        for i, (name, layer) in enumerate(self._layers()):
            group = GROUPS[kind] or layer.in_features
            linear = quantize_weight(layer.weight.data, group, symmetric=i % 3 == 1, dtype=torch.float16)
            scale = (torch.rand(layer.in_features) + 0.5).half() if i % 4 == 3 else None
            self.linears[name] = QuantizedLinear(linear.q, linear.scales, linear.zeros, group, scale)
        self.unquantized = copy.deepcopy(self.eager)
        for name, linear in self.linears.items():
            layer = self.eager.get_submodule(name)
            layer.weight.data = linear.dequantize().float()
            if linear.pre_scale is not None:
                layer.register_forward_pre_hook(lambda _, x, s=linear.pre_scale: (x[0] * s.to(x[0].dtype),))
        self.state = {name: p.data.half() for name, p in self.unquantized.named_parameters()}
        self.asked: list[str] = []

    def _layers(self) -> Iterator[tuple[str, torch.nn.Linear]]:
        for name, module in self.eager.named_modules():
            if isinstance(module, torch.nn.Linear) and name not in ("lm_head", "classifier") and "decoder" not in name:
                yield name, module

    def tensor(self, name: str) -> torch.Tensor:
        self.asked.append(name)
        return self.state[name]

    def logits(self, dtype: torch.dtype = torch.float32, **inputs: torch.Tensor) -> torch.Tensor:
        model = self.eager if dtype == torch.float32 else copy.deepcopy(self.eager).to(dtype)
        with torch.no_grad():
            return model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}).logits.float()
