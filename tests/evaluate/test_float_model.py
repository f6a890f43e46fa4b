"""The judge of what was read: transformers' own model. Wrong readings that go the whole way must be noticed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import tiny_models
import torch
import transformers as t
from torch import nn

from awq_trt.awq.blocks import BlockStream
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.checkpoint.reader import Checkpoint
from awq_trt.engine import child
from awq_trt.errors import AwqTrtError
from awq_trt.evaluate import float_model
from awq_trt.evaluate.float_model import judge

LITTLE = 1
"""Bytes of memory: no model fits."""


def ids(length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(2, 384, (1, length), generator=torch.Generator().manual_seed(seed))}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> a checkpoint of it; of "gemma3-vision" and so on the whole, of which a part is read."""
    folder, made = tmp_path_factory.mktemp("float"), dict[str, Path]()

    def make(name: str) -> Path:
        if name in made:
            return made[name]
        if name in families.DECODERS:
            made[name] = families.checkpoint(families.DECODERS[name](), folder / name)
        elif name in families.ENCODERS:
            cls, config = families.ENCODERS[name]
            made[name] = families.checkpoint(config(), folder / name, cls=getattr(t, cls))
        else:
            config = t.Gemma3Config(
                text_config=families.DECODERS["gemma3"]().to_dict(),
                vision_config={**families.SHAPE, **families.IMAGES},
                mm_tokens_per_image=4,
            )
            made[name] = families.checkpoint(config, folder / name, cls=t.Gemma3ForConditionalGeneration)
        return made[name]

    return make


def test_predictions_are_transformers_own(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, as it is outside of tests."""
    monkeypatch.setattr(float_model, "run_child", child.run_child)
    samples = [ids(48, seed) for seed in range(2)]
    found = judge(open_checkpoint(models / "llama"), samples, [ids(20)])
    assert found.judge == f"transformers {t.__version__}, from_pretrained"
    model = t.AutoModelForCausalLM.from_pretrained(models / "llama", dtype=torch.float32)
    assert found.predictions is not None
    for sample, chosen, loss in zip(samples, found.predictions.chosen, found.predictions.losses, strict=True):
        with torch.no_grad():
            output = model(**sample, labels=sample["input_ids"])
        assert torch.equal(chosen, output.logits.argmax(-1))
        assert math.isclose(loss, float(output.loss), rel_tol=1e-4)


def test_a_model_that_brings_its_code(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own does not know the module of its configuration before transformers has read it."""
    monkeypatch.setattr(float_model, "run_child", child.run_child)
    folder = Path(shutil.copytree(models / "llama", tmp_path / "m"))
    (folder / "own_code.py").write_text(
        "import transformers\n"
        "class OwnConfig(transformers.LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnForCausalLM(transformers.LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    content = json.loads((folder / "config.json").read_text()) | {
        "model_type": "own_llama",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(content))
    checkpoint = open_checkpoint(folder, trust_remote_code=True)
    assert judge(checkpoint, [], [ids(20)]).judge.endswith("from_pretrained")


IMAGE, SOUND = {"pixel_values": torch.ones(1, 3, 32, 32)}, {"input_features": torch.ones(1, 16, 64)}


@pytest.mark.parametrize("memory", [None, LITTLE])
@pytest.mark.parametrize(
    ("name", "part", "sample"),
    [
        ("mixtral", None, ids(20)),  # experts are stacked
        ("gpt2", None, ids(20)),  # weights are turned round, the head is tied
        ("clip", "text", ids(20)),
        ("clip", "vision", IMAGE),
        ("whisper", "encoder", SOUND),  # a part that from_pretrained does not find alone
        ("gemma3-vision", None, ids(20)),  # its language model
    ],
)
def test_right_readings_pass(
    checkpoints: Callable[[str], Path], name: str, part: str | None, sample: Any, memory: int | None
) -> None:
    found = judge(open_checkpoint(checkpoints(name), part=part), [sample], [sample], memory=memory)
    assert found.judge.endswith("tensor by tensor" if memory else "from_pretrained")
    assert (found.predictions is None) == (memory is not None)


def wrong(checkpoint: Checkpoint, name: str, reader: Callable[[], torch.Tensor]) -> Checkpoint:
    return replace(checkpoint, readers={**checkpoint.readers, name: reader})


@pytest.mark.parametrize("memory", [None, LITTLE])
@pytest.mark.parametrize(
    ("name", "tensor", "other"),
    [
        ("mixtral", "model.layers.1.mlp.experts.2.gate_proj.weight", "model.layers.1.mlp.experts.2.up_proj.weight"),
        ("gpt2", "transformer.h.1.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.weight"),
        ("llama2", "lm_head.weight", "model.embed_tokens.weight"),  # tied, and the file has two
    ],
)
def test_another_tensor_is_noticed(
    checkpoints: Callable[[str], Path], name: str, tensor: str, other: str, memory: int | None
) -> None:
    checkpoint = open_checkpoint(checkpoints(name))
    checkpoint = wrong(checkpoint, tensor, checkpoint.readers[other])
    place = tensor.replace("2.gate_proj.weight", "gate_up_proj")
    with pytest.raises(AwqTrtError, match=rf"{place}: what was read is not what transformers"):
        judge(checkpoint, [ids(20)], [ids(20)], memory=memory)


def test_one_bit_is_noticed(checkpoints: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(checkpoints("mixtral"))
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    value = checkpoint.tensor(name).clone()
    value.view(torch.int32)[5, 7] ^= 1
    with pytest.raises(AwqTrtError, match=r"experts\.down_proj: what was read"):
        judge(wrong(checkpoint, name, lambda: value), [], [ids(20)], memory=LITTLE)


def test_a_wrong_pass_over_the_blocks_is_noticed(
    checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tensors are right; what is computed of them is not."""
    right = BlockStream.run

    def run(self: BlockStream, i: int, state: Any, sample: int) -> Any:
        hidden, *others = right(self, i, state, sample)
        return (hidden + 0.02 * state[0], *others)

    monkeypatch.setattr(BlockStream, "run", run)
    with pytest.raises(AwqTrtError, match=r"the model computes something else than transformers"):
        judge(open_checkpoint(checkpoints("llama2")), [], [ids(20)])


def test_a_model_that_transformers_does_not_load(models: Path, tmp_path: Path) -> None:
    """The file is gone in the meantime, say: what transformers answers is in the message."""
    (tmp_path / "m").symlink_to(models / "llama")
    checkpoint = open_checkpoint(tmp_path / "m")
    missing = tuple(tmp_path / "gone" / file.name for file in checkpoint.files)
    with pytest.raises(AwqTrtError, match=r"does not load this checkpoint.*gone"):
        judge(replace(checkpoint, files=missing), [], [ids(20)])


def test_overflow_is_found_before_anything_is_quantized(tmp_path: Path) -> None:
    """A sum that only the residual stream holds: no layer reads it, as norms stand before them all."""
    source = tiny_models.llama(tmp_path / "m", torch_dtype="bfloat16")
    model = t.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    layer = model.get_submodule("model.layers.0.self_attn.o_proj")
    assert isinstance(layer, nn.Linear)
    layer.weight.data *= 1e6
    model.save_pretrained(source)
    checkpoint = replace(open_checkpoint(source), dtype=torch.float16)
    with pytest.raises(AwqTrtError, match=r"activations reach \S+ in \S+, and float16 ends at 65504"):
        judge(checkpoint, [], [ids(20)])
    judge(replace(checkpoint, dtype=torch.bfloat16), [], [ids(20)])
