"""Tensors of a quantized checkpoint and parameters of its model, to each other; what does not belong is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantized_models import edited, rounded

from awq_trt.checkpoint.model import empty_model
from awq_trt.checkpoint.quantized import open_quantized
from awq_trt.errors import AwqTrtError


@pytest.fixture(scope="module")
def quantized(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rounded(models / "llama", tmp_path_factory.mktemp("awq") / "llama", group=32)


SELF_ATTN = "model.layers.0.self_attn"
Q_PROJ = f"{SELF_ATTN}.q_proj"


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in [n for n in tensors if n.startswith(old)]:
        tensors[new + name.removeprefix(old)] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.qzeros"), f"{Q_PROJ} .awq-gemm.: tensor qzeros is missing"),
        (lambda t: t.update({f"{Q_PROJ}.scales": t[f"{Q_PROJ}.scales"][:, :32]}), f"{Q_PROJ} .awq-gemm.: .*do not fit"),
        (lambda t: t.pop("model.norm.weight"), "the tensor model.norm.weight is missing"),
        (
            lambda t: rename(t, Q_PROJ, "model.layers.0.self_attn.qkv_proj"),
            "self_attn.qkv_proj is no linear layer of Llama",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.input_scale": torch.ones(1)}),
            f"{Q_PROJ}.input_scale has no meaning in awq",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.act_fn.scales": torch.ones(4)}),
            "act_fn.scales belongs to no",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.bias": torch.ones(64)}),
            f"{Q_PROJ}.bias is not zero, and Llama.* no bias",
        ),
        (
            lambda t: rename(t, Q_PROJ, "lm_head"),
            "lm_head.weight is quantized, .* same parameter as model.embed",
        ),
        (lambda t: [t.pop(n) for n in list(t) if n.endswith("qweight")], r"no tensor is called \*.qweight"),
    ],
)
def test_tensors_that_do_not_belong(
    quantized: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    other = edited(quantized, tmp_path / "other", change)
    with pytest.raises(AwqTrtError, match=message):
        dict(open_quantized(other).linears)


def test_biases_of_zeros_and_names_without_the_prefix(quantized: Path, tmp_path: Path) -> None:
    """AutoGPTQ writes a bias for every layer; base models are stored without "model."."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q_PROJ}.bias"] = torch.zeros(64)
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    other, ours = open_quantized(edited(quantized, tmp_path / "other", change)), open_quantized(quantized)
    assert set(other.linears) == set(ours.linears)
    for name, _ in empty_model(ours.config).named_parameters():
        assert torch.equal(other.tensor(name), ours.tensor(name))
