"""A model run block by block: the numbers of the whole model, and no more of it in memory than that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from awq_trt.awq.blocks import BlockStream, Inputs, State
from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.quantize import quantize
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.checkpoint.reader import Checkpoint


def inputs_of(name: str, count: int = 3) -> list[Inputs]:
    torch.manual_seed(0)
    if name == "vit":
        return [{"pixel_values": torch.randn(1, 3, 32, 32)} for _ in range(count)]
    return [{"input_ids": torch.randint(0, 384, (1, 24))} for _ in range(count)]


def last_states(stream: BlockStream, checkpoint: Checkpoint) -> list[State]:
    states = list(stream.record())
    for i in range(len(stream.blocks)):
        stream.load(i, checkpoint)
        states = [stream.run(i, state, j) for j, state in enumerate(states)]
        stream.unload(i)
    return states


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_outputs_are_those_of_the_whole_model(models: Path, name: str) -> None:
    checkpoint, inputs = open_checkpoint(models / name), inputs_of(name)
    whole = getattr(transformers, checkpoint.config.architectures[0]).from_pretrained(models / name, dtype="float32")
    stream = BlockStream(checkpoint, inputs)
    for j, hidden in enumerate(last_states(stream, checkpoint)):
        with torch.no_grad():
            expected = whole.eval()(**inputs[j]).logits
        torch.testing.assert_close(stream.head(hidden, j), expected, rtol=1e-4, atol=1e-4)


def memory_in_use(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters(remove_duplicate=False) if not parameter.is_meta}


def test_embedding_and_head_are_not_filled_for_recording(models: Path) -> None:
    checkpoint = open_checkpoint(models / "llama")
    read: list[str] = []
    tensor = type(checkpoint).tensor

    class Noted(type(checkpoint)):  # type: ignore[misc]
        def tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return tensor(self, name)

    noted = Noted(**{k: getattr(checkpoint, k) for k in checkpoint.__dataclass_fields__})
    stream = BlockStream(noted, inputs_of("llama"))
    next(stream.record())
    assert read == []
    assert memory_in_use(stream.model) == set()
    stream = BlockStream(noted, inputs_of("llama"))
    states = last_states(stream, noted)
    assert not any("embed" in name or "lm_head" in name for name in read)
    stream.head(states[0], 0)
    assert memory_in_use(stream.model) == {"lm_head.weight", "model.norm.weight"}


def test_a_weight_used_without_calling_its_module_is_filled(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside modules are filled when they are called; where that is not enough, all are."""
    inputs = inputs_of("llama")
    checkpoint = open_checkpoint(models / "llama")
    expected = list(BlockStream(checkpoint, inputs).record())
    monkeypatch.setattr(nn.Embedding, "forward", lambda self, ids: self.weight[ids])
    stream = BlockStream(checkpoint, inputs)
    for (a,), (b,) in zip(stream.record(), expected, strict=True):
        assert torch.equal(a, b)
    assert memory_in_use(stream.model) == set()


def test_masks_and_rotary_tables_are_kept_once(models: Path) -> None:
    stream = BlockStream(open_checkpoint(models / "llama"), inputs_of("llama"))
    assert len(list(stream.record())) == 3

    def tensors(value: object) -> list[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return [value]
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
        return [t for part in parts for t in tensors(part)]

    calls = [tensors(call) for block in stream._calls for call in block]
    assert len(calls) == 2 * 3
    assert len(calls[0]) >= 2
    assert len({id(t) for call in calls for t in call}) == len(calls[0])


def test_embedding_rows_are_read_in_the_dtype_of_the_file_and_computed_in_fp32(models: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    (sample,) = inputs_of("llama", 1)
    ((hidden,),) = BlockStream(open_checkpoint(tmp_path / "bf16"), [sample]).record()
    assert hidden.dtype == torch.float32
    assert torch.equal(hidden, model.model.embed_tokens.weight.float()[sample["input_ids"]])


def test_computing_in_bfloat16_is_near_float32(models: Path, tmp_path: Path) -> None:
    options = {"calibration_samples": 2, "calibration_length": 64}
    exact = quantize(models / "llama", tmp_path / "a", QuantizeConfig(**options))  # type: ignore[arg-type]
    near = quantize(models / "llama", tmp_path / "b", QuantizeConfig(compute_dtype=torch.bfloat16, **options))  # type: ignore[arg-type]
    for a, b in zip(exact.layers, near.layers, strict=True):
        assert a.name == b.name
        assert b.error == pytest.approx(a.error, rel=0.5)  # where another scale was chosen
    assert sum(b.error for b in near.layers) == pytest.approx(sum(a.error for a in exact.layers), rel=0.1)
    assert any(a.error != b.error for a, b in zip(exact.layers, near.layers, strict=True))
