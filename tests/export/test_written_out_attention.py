"""Attention written out gives what ONNX Runtime's Attention and transformers' eager attention give."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from random_models import Model
from tiny_onnx import session
from transformers.models.llama.modeling_llama import eager_attention_forward

from awq_trt.export.attention import Attention, alone, attentions, write_out
from awq_trt.export.export import export_quantized
from awq_trt.export.interface import DecoderOptions

FP16 = TensorProto.FLOAT16
KINDS = {
    "one head": Attention(1, 1, 16, 16, 24, FP16),
    "grouped queries": Attention(6, 2, 16, 16, 24, FP16),
    "as many keys, an odd width": Attention(3, 3, 20, 20, 24, FP16),
    "values of another width": Attention(4, 1, 24, 16, 24, FP16),
}


@pytest.mark.parametrize("name", KINDS)
def test_alone(name: str) -> None:
    kind = KINDS[name]
    model = alone(kind)
    assert [found for _, found in attentions(model.graph)] == [kind]
    written = onnx.ModelProto.FromString(model.SerializeToString())
    assert write_out(written.graph, [kind]) == 1
    assert not any(node.op_type == "Attention" for node in written.graph.node)
    onnx.checker.check_model(written, full_check=True)

    random, batch, new = np.random.default_rng(0), 2, 5

    def values(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float16)

    query = values(batch, kind.heads, new, kind.head_dim)
    mask = random.random((batch, 1, new, kind.slots)) < 0.5
    mask[..., 0] = True
    feeds: dict[str, Any] = {"query": query, "mask": mask, "past_length": np.array([3, 0])}
    for part, width in (("key", kind.head_dim), ("value", kind.value_head_dim)):
        feeds[f"past_{part}"] = values(batch, kind.kv_heads, kind.slots, width)
        feeds[f"new_{part}"] = values(batch, kind.kv_heads, new, width)
    fused, plain = (session(m).run(None, feeds) for m in (model, written))
    keys, cached = (torch.from_numpy(x).float() for x in plain[1:])
    module = SimpleNamespace(num_key_value_groups=kind.heads // kind.kv_heads, training=False)
    added = torch.where(torch.from_numpy(mask), 0.0, -torch.inf)
    wanted, _ = eager_attention_forward(
        module, torch.from_numpy(query).float(), keys, cached, added, scaling=kind.head_dim**-0.5
    )
    exact = wanted.transpose(1, 2).numpy()
    assert np.abs(plain[0] - exact).max() < 3e-3  # a few roundings to fp16
    assert np.abs(plain[0].astype(np.float32) - fused[0]).max() < 3e-3


def test_in_a_decoder_with_a_sliding_window(tmp_path: Path) -> None:
    """Past the end of the ring of the window, rows of different lengths; the file with its weights beside it."""
    path, written = tmp_path / "m.onnx", tmp_path / "written.onnx"
    export_quantized(Model("mistral"), path, decoder=DecoderOptions(capacity=40, prefill_chunk=4))
    model = onnx.load(path, load_external_data=False)
    kinds = {kind for _, kind in attentions(model.graph)}
    assert write_out(model.graph, kinds) == sum("Attention" in node.name for node in onnx.load(path).graph.node) > 0
    written.write_bytes(model.SerializeToString())
    random = np.random.default_rng(0)
    fused = session(path)
    feeds: dict[str, Any] = {
        "input_ids": random.integers(1, 30, (2, 4)),
        "past_length": np.array([16, 8]),
        "input_length": np.array([4, 2]),
    }
    for tensor in fused.get_inputs()[3:]:
        feeds[tensor.name] = random.standard_normal((2, *tensor.shape[1:])).astype(np.float16)
    one, other = (s.run(None, feeds)[0].astype(np.float32) for s in (fused, session(written)))
    assert np.abs(one - other).max() < 5e-3 * np.abs(one).max()


def test_what_is_no_attention_of_ours_stays() -> None:
    kind = KINDS["one head"]
    for change in ("is_causal", "mask", "heads"):
        model = alone(kind)
        node = model.graph.node[-1]
        if change == "is_causal":
            node.attribute.append(onnx.helper.make_attribute("is_causal", 1))
        elif change == "mask":
            del node.input[3]
        else:
            model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "heads"
        assert list(attentions(model.graph)) == []
        assert write_out(model.graph, [kind]) == 0
