"""The judge of what is read: the model that transformers' own `from_pretrained` makes of a directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t
from safetensors.torch import load_file, save_file

from awq_trt.checkpoint.experts import parts_of
from awq_trt.checkpoint.model import empty_model
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.checkpoint.reader import Checkpoint

Tensors = dict[str, torch.Tensor]


def rewrite(directory: Path, change: Callable[[Tensors], object]) -> Path:
    """Change the tensors in model.safetensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def configure(directory: Path, *without: str, **changes: Any) -> Path:
    """Change fields of config.json, and take some out."""
    config = json.loads((directory / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if key not in without}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def shard(directory: Path, count: int = 2) -> Path:
    """Distribute model.safetensors over shards with an index."""
    tensors = load_file(directory / "model.safetensors")
    weight_map = {n: f"model-{1 + i % count:05}-of-{count:05}.safetensors" for i, n in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        of_file = {n: tensor for n, tensor in tensors.items() if weight_map[n] == file}
        save_file(of_file, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def load(directory: Path) -> tuple[Any, dict[str, Any]]:
    """transformers' model of a directory in fp32, and what it says of the loading."""
    config = t.AutoConfig.from_pretrained(directory)
    cls = getattr(t, config.architectures[0])
    model, info = cls.from_pretrained(directory, dtype=torch.float32, output_loading_info=True, use_safetensors=True)
    return model, info


def assert_same_as_transformers(directory: Path, part: str | None = None) -> Checkpoint:
    """Every parameter that we read is that of transformers' model, and tied where it is tied there."""
    ours, (theirs, _) = open_checkpoint(directory, part=part), load(directory)
    expected = dict(theirs.named_parameters(remove_duplicate=False)) | dict(theirs.named_buffers())
    if ours.note.startswith("the text part"):  # of a vision-language model: its decoder and its head
        expected = {f"model.{n}": p for n, p in theirs.get_decoder().named_parameters(remove_duplicate=False)}
        expected["lm_head.weight"] = theirs.get_output_embeddings().weight
    model = empty_model(ours.config)
    parts = parts_of(model)
    names = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): n for n, p in model.named_parameters()}
    for name, parameter in names.items():
        read = ours.tensor(first[id(parameter)])
        if name in parts:
            place = parts[name]
            value = place.of(expected[place.fused][place.expert])
        else:
            value = expected[name].t() if name in ours.transposed else expected[name]
        assert torch.equal(read.float(), value.float()), name
    stored = {name for name in ours.readers if name not in names}
    assert all(torch.equal(ours.tensor(name), expected[name]) for name in stored)
    for name, parameter in names.items():
        same = {other for other, p in names.items() if p is parameter}
        if name not in parts:
            assert same == {other for other, p in expected.items() if p is expected[name]} & set(names), name
    return ours
