"""Mixtures of experts: the same function as transformers', read lazily, calibrated on the tokens routed to each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import tiny_models
import torch
import transformers as t
from observing import observe
from quantized_models import edited
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from awq_trt.awq.blocks import BlockStream
from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.outside import fill
from awq_trt.awq.quantize import quantize
from awq_trt.awq.report import warnings
from awq_trt.checkpoint import match
from awq_trt.checkpoint.experts import ROUTER, UNSPLITTABLE, Expert, SplitExperts, left_alone, split_experts
from awq_trt.checkpoint.model import empty_model, find_blocks
from awq_trt.checkpoint.names import StoredNames
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.checkpoint.quantized import open_quantized
from awq_trt.errors import AwqTrtError

CALIBRATED = QuantizeConfig(calibration_samples=2, calibration_length=64, calibration=__file__)
SMALL: dict[str, Any] = {**families.EXPERTS, "num_hidden_layers": 1}
MODELS: dict[str, Callable[[], t.PretrainedConfig]] = {
    "mixtral": lambda: t.MixtralConfig(**SMALL, num_local_experts=4),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=32),
    "qwen2_moe": lambda: t.Qwen2MoeConfig(
        **SMALL, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=64
    ),
    "granitemoe": lambda: t.GraniteMoeConfig(**SMALL, num_local_experts=4),  # stacked in the file, under other names
    "gpt_oss": lambda: t.GptOssConfig(**SMALL, num_local_experts=4, head_dim=16),  # transposed, interleaved, biases
    "phimoe": lambda: t.PhimoeConfig(**SMALL, num_local_experts=4),  # its router is a linear layer
    "deepseek_v3": lambda: t.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4}, n_routed_experts=4, moe_intermediate_size=32, n_group=2, topk_group=1,
        q_lora_rank=32, kv_lora_rank=32, first_k_dense_replace=0,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints as transformers writes them; read only."""
    known: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in known:
            known[name] = families.checkpoint(MODELS[name](), tmp_path_factory.mktemp(name))
        return known[name]

    return make


Saved = Callable[[str], Path]


def filled(directory: Path) -> t.PreTrainedModel:
    checkpoint = open_checkpoint(directory)
    model = empty_model(checkpoint.config)
    fill(model, "", checkpoint)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_function_is_that_of_transformers(saved: Saved, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading one expert at a time, and both ways of computing: experts of their tokens, and all of all tokens."""
    monkeypatch.setattr(match, "_converted_by_transformers", None)
    theirs = t.AutoModelForCausalLM.from_pretrained(saved(name), dtype=torch.float32)
    ours = filled(saved(name))
    assert sum(isinstance(m, Expert) for m in ours.modules()) == 4
    ids = torch.randint(0, 384, (2, 9))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (ours(ids).logits - expected).abs().max() < 1e-4 * expected.abs().max()
        monkeypatch.setattr(SplitExperts, "forward", SplitExperts._of_all)
        assert (ours(ids).logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert set(left_alone(ours).values()) == {ROUTER}
    assert len(left_alone(ours)) == 1


def test_experts_without_a_gate() -> None:
    """Nemotron-H has up and down projections only."""
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    config = t.NemotronHConfig(n_routed_experts=4, moe_intermediate_size=32, hidden_size=64, moe_latent_size=None)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    fused = NemotronHExperts(config)
    for parameter in fused.parameters():
        parameter.data = torch.randn_like(parameter)
    x, index = torch.randn(5, 64), torch.tensor([[0, 1], [1, 3], [3, 0], [0, 3], [1, 0]])
    weights = torch.rand(5, 2)
    values = dict(fused.named_parameters())
    with torch.no_grad():
        expected = fused(x, index, weights)
    holder: Any = torch.nn.Module()
    holder.experts = fused
    split_experts(holder)
    split = holder.experts
    for name, part in split.parts.items():
        layer, _, key = name.rpartition(".")
        split.get_submodule(layer)._parameters[key] = torch.nn.Parameter(part.of(values[part.fused][part.expert]))
    assert [n for n, _ in split.experts[0].named_children()] == ["up_proj", "down_proj"]
    with torch.no_grad():
        torch.testing.assert_close(split(x, index, weights), expected)


def test_what_an_expert_makes_of_tokens_that_did_not_choose_it_is_left_out(saved: Saved) -> None:
    """Even where it overflows."""
    experts = next(m for m in filled(saved("mixtral")).modules() if isinstance(m, SplitExperts))
    x, index, weights = torch.randn(3, 64), torch.tensor([[0, 1], [0, 1], [2, 1]]), torch.full((3, 2), 0.5)
    with torch.no_grad():
        expected = experts._of_chosen(x, index, weights)
        experts.experts[3].up_proj.weight.fill_(float("inf"))
        torch.testing.assert_close(experts._of_all(x, index, weights), expected)


def test_stacked_experts_are_read_one_by_one(saved: Saved) -> None:
    """The file holds [4, 128, 64]; what is read of it is a view of the file's memory map."""
    checkpoint = open_checkpoint(saved("granitemoe"))
    name = "model.layers.0.block_sparse_moe"
    (file,) = saved("granitemoe").glob("*.safetensors")
    with safe_open(str(file), "pt") as handle:
        stacked = handle.get_tensor(f"{name}.input_linear.weight")
    assert torch.equal(checkpoint.tensor(f"{name}.experts.2.gate_proj.weight"), stacked[2, :128])
    up = checkpoint.tensor(f"{name}.experts.2.up_proj.weight")
    assert torch.equal(up, stacked[2, 128:])
    assert up.untyped_storage().nbytes() == file.stat().st_size


def test_a_stack_of_another_shape_is_refused(saved: Saved, tmp_path: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        name = next(n for n in tensors if n.endswith("output_linear.weight"))
        tensors[name] = tensors[name][:3]

    wrong = edited(saved("granitemoe"), tmp_path / "wrong", cut)
    with pytest.raises(AwqTrtError, match=r"output_linear\.weight has shape \[3, 64, 128\], config\.json says \[4, "):
        open_checkpoint(wrong)


def test_a_file_that_transformers_has_to_compute_is_read_in_memory(saved: Saved, tmp_path: Path) -> None:
    """Experts stored fused in a file of a family whose table stacks single ones: transformers takes it as it is."""
    source = saved("mixtral")
    model = t.AutoModelForCausalLM.from_pretrained(source)
    model.config.save_pretrained(tmp_path)
    save_file({n: p.detach().clone() for n, p in model.named_parameters()}, tmp_path / "model.safetensors")
    a, b = open_checkpoint(source), open_checkpoint(tmp_path)
    assert set(a.readers) == set(b.readers)
    for name in a.readers:
        assert torch.equal(a.tensor(name), b.tensor(name)), name


def test_missing_expert_is_named(saved: Saved, tmp_path: Path) -> None:
    wrong = edited(
        saved("qwen3_moe"), tmp_path / "wrong", lambda x: x.pop("model.layers.0.mlp.experts.2.up_proj.weight")
    )
    with pytest.raises(AwqTrtError, match=r"layers\.0\.mlp\.experts\.2\.up_proj\.weight is not in the checkpoint"):
        open_checkpoint(wrong)


@pytest.mark.parametrize("name", MODELS)
def test_names_in_files_are_those_of_transformers(saved: Saved, name: str) -> None:
    (file,) = saved(name).glob("*.safetensors")
    with safe_open(str(file), "pt") as handle:
        stored = set(handle.keys())
    names = StoredNames(empty_model(open_checkpoint(saved(name)).config))
    keys = {n: names.key(n) for n, _ in empty_model(open_checkpoint(saved(name)).config).named_parameters()}
    assert len(set(keys.values())) == len(keys)
    if name not in ("granitemoe", "gpt_oss"):  # whose experts are stacked in the file
        assert set(keys.values()) <= stored | {"lm_head.weight"}
    for parameter, key in keys.items():
        assert names.parameter(key) == parameter


def routed(directory: Path, inputs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Expert of the only block -> the hidden states that transformers' router sends to it."""
    model = t.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager")
    seen: dict[str, list[torch.Tensor]] = {}

    def note(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        for e in range(4):
            seen.setdefault(str(e), []).append(args[0][(args[1] == e).any(-1)])

    model.model.layers[0].mlp.experts.register_forward_pre_hook(note)
    with torch.no_grad():
        for sample in inputs:
            model(**sample)
    return {e: torch.cat(states) for e, states in seen.items()}


def test_statistics_are_those_of_the_routed_tokens(saved: Saved) -> None:
    checkpoint = open_checkpoint(saved("qwen3_moe"))
    torch.manual_seed(3)
    inputs = [{"input_ids": torch.randint(0, 384, (1, n))} for n in (5, 24, 1)]
    stream = BlockStream(checkpoint, inputs)
    hidden, block = list(stream.record()), stream.load(0, checkpoint)
    groups = observe(block, [lambda j=j: stream.run(0, hidden[j], j) for j in range(3)])
    states = routed(saved("qwen3_moe"), inputs)
    counts = {}
    for group in groups:
        if group.names[0].startswith("mlp.experts."):
            expert = group.names[0].split(".")[2]
            counts[expert, len(group.names)] = group.statistics.tokens
            if len(group.names) == 2:
                assert group.names == [f"mlp.experts.{expert}.{n}_proj" for n in ("gate", "up")]
                h = states[expert].t() @ states[expert]
                torch.testing.assert_close(group.statistics.hessian, h, rtol=1e-3, atol=1e-3 * float(h.abs().max()))
    assert counts == {(e, n): len(s) for e, s in states.items() for n in (1, 2) if len(s)}
    assert sum(len(s) for s in states.values()) == 2 * 30


def test_quantized_experts_and_their_tokens_in_the_report(saved: Saved, tmp_path: Path) -> None:
    report = quantize(saved("mixtral"), tmp_path / "q", CALIBRATED)
    experts = [x for x in report.layers if ".experts." in x.name]
    assert len(experts) == 12
    assert sum(x.tokens for x in experts if x.name.endswith("down_proj")) == 2 * 2 * 64
    for layer in experts:  # what an expert's projections read, the whole block shares; what they make is their own
        own = layer.name.replace("down_proj", "up_proj") if layer.name.endswith("down_proj") else None
        assert layer.folded_into == own or layer.alpha == 0
    assert all(x.error < x.error_rounding for x in experts)
    assert report.pre_scales == 8
    assert report.left_in_float["model.layers.0.mlp.gate"] == ROUTER
    quantized = open_quantized(tmp_path / "q")
    assert "model.layers.0.block_sparse_moe.experts.3.w1.qweight" in quantized.stored
    assert "model.layers.0.block_sparse_moe.gate.weight" in quantized.stored
    assert set(quantized.linears) == set(report.quantized)
    float_, rounded = filled(saved("mixtral")), empty_model(quantized.config)
    fill(rounded, "", quantized)
    ids = torch.randint(0, 384, (1, 32))
    with torch.no_grad():
        a, b = float_(ids).logits, rounded(ids).logits
    assert (a - b).norm() < 0.6 * a.norm()  # some tokens go to other experts now


def test_experts_that_few_or_no_tokens_reach(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that sends everything to experts 0 and 1, and one token to 2."""
    directory = edited(saved("mixtral"), tmp_path / "m", lambda tensors: None)
    tiny_models.tokenizer().save_pretrained(directory)
    chosen = torch.tensor([[0, 1]])

    def choose(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        index = chosen.expand(len(x), 2).clone()
        index[0, 1] = 2
        return x[:, :4], torch.full(index.shape, 0.5), index

    monkeypatch.setattr("transformers.models.mixtral.modeling_mixtral.MixtralTopKRouter.forward", choose)
    report = quantize(directory, tmp_path / "q", replace(CALIBRATED, calibration_samples=1))
    found = warnings([vars(x) for x in report.layers], report.quantized, "float16")
    assert len(found) == 2
    unseen = (
        "model.layers.0.mlp.experts.3.down_proj, model.layers.0.mlp.experts.3.gate_proj, model.layers.0.mlp.experts.3"
    )
    assert f"no calibration token reached {unseen}" in found[0]
    assert "few calibration tokens (1 and up, of 64) reached model.layers.0.mlp.experts.2" in found[1]
    assert set(open_quantized(tmp_path / "q").linears) == set(report.quantized)
    tokens = {x.name.split(".")[-2]: x.tokens for x in report.layers if "experts" in x.name}
    assert tokens == {"0": 64, "1": 63, "2": 1}
    fold = {x.name.split(".")[-2]: x.folded_into for x in report.layers if x.name.endswith("down_proj")}
    assert fold == {e: f"model.layers.0.mlp.experts.{e}.up_proj" for e in "012"}


def test_a_fold_is_tried_on_an_expert_that_is_reached(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first window reaches experts 0 and 1 only, and groups are taken from the last to the first."""
    first: list[torch.Tensor] = []

    def choose(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first.append(x[0].float().cpu())
        index = torch.tensor([[0, 1]] if torch.allclose(first[0], first[-1]) else [[2, 3]]).expand(len(x), 2)
        return x[:, :4], torch.full(index.shape, 0.5), index

    monkeypatch.setattr("transformers.models.mixtral.modeling_mixtral.MixtralTopKRouter.forward", choose)
    report = quantize(saved("mixtral"), tmp_path / "q", CALIBRATED)
    fold = {x.name.split(".")[-2]: x.folded_into for x in report.layers if x.name.endswith("down_proj")}
    assert fold == {e: f"model.layers.0.mlp.experts.{e}.up_proj" for e in "0123"}


def test_a_linear_router_stays_in_float(saved: Saved, tmp_path: Path) -> None:
    report = quantize(saved("phimoe"), tmp_path / "q", CALIBRATED)
    assert report.left_in_float["model.layers.0.mlp.router"] == ROUTER
    assert not any("router" in name for name in (*report.quantized, *open_quantized(tmp_path / "q").linears))


def test_experts_of_an_unknown_form_are_listed(tmp_path: Path) -> None:
    config = t.Llama4TextConfig(
        **SMALL, num_local_experts=4, intermediate_size_mlp=128, head_dim=16, interleave_moe_layer_step=1,
    )  # fmt: skip
    config.architectures = ["Llama4ForCausalLM"]
    model = empty_model(config)
    assert left_alone(model)["model.layers.0.feed_forward.experts"] == UNSPLITTABLE
    assert left_alone(model.model.layers[0])["feed_forward.experts"] == UNSPLITTABLE  # by the names in the block
    prefix, _ = find_blocks(model)
    assert prefix == "model.layers"


def test_experts_quantized_by_autoawq_are_read_under_their_names(saved: Saved, tmp_path: Path) -> None:
    """Our own, in AutoAWQ's layout, under the hub's names and under transformers'."""
    quantize(saved("mixtral"), tmp_path / "a", QuantizeConfig(method="rtn", group_size=32, pre_scale=False))
    tensors: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "a").glob("*.safetensors"):
        tensors |= load_file(file)
    assert any(".block_sparse_moe.experts.0.w2.qweight" in n for n in tensors)

    def rename(found: dict[str, torch.Tensor]) -> None:
        for name in list(found):
            new = name.replace("block_sparse_moe", "mlp")
            for old, layer in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
                new = new.replace(f".{old}.", f".{layer}.")
            found[new] = found.pop(name)

    other = edited(tmp_path / "a", tmp_path / "b", rename)
    a, b = open_quantized(tmp_path / "a"), open_quantized(other)
    assert set(a.linears) == set(b.linears)
    for name, layer in a.linears.items():
        assert torch.equal(layer.dequantize(), b.linears[name].dequantize())
    for name in a.readers:
        assert torch.equal(a.tensor(name), b.tensor(name))
