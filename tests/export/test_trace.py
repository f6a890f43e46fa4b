"""What cannot be traced is refused, with the operator, the line or the kind of model in the message."""

from __future__ import annotations

import pytest
import torch
import transformers
from random_models import Model

from awq_trt.checkpoint.model import empty_model
from awq_trt.errors import AwqTrtError
from awq_trt.export.trace import trace


def test_operator_that_cannot_be_exported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def bessel(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)

    monkeypatch.setattr("transformers.activations.GELUActivation.forward", bessel)
    with pytest.raises(
        AwqTrtError, match=r"ViTForImageClassification could not be turned into an ONNX graph: .*bessel_j0"
    ):
        trace(Model("vit").eager, torch.float16)


def test_line_that_cannot_be_traced_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", fail)
    with pytest.raises(AwqTrtError, match=r"in llama/modeling_llama\.py, line \d+: hidden_states = self"):
        trace(Model("llama").eager, torch.float16)


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        (
            transformers.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=64),
            "T5ForConditionalGeneration",
            "is an encoder-decoder",
        ),
        (
            transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4),
            "MambaForCausalLM",
            "MambaForCausalLM takes no past_key_values",
        ),
    ],
)
def test_models_of_another_kind_are_refused(config: transformers.PretrainedConfig, name: str, message: str) -> None:
    config.architectures = [name]
    with pytest.raises(AwqTrtError, match=message):
        trace(empty_model(config), torch.float16)
