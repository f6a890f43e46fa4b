"""tools/run_plan.py on the fake TensorRT (fake_tensorrt.py). Refusals: tests/plugins/test_gpu_check.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import run_plan
import tiny_onnx
from fake_tensorrt import CHUNK, RTX, install, plan_of
from onnx import TensorProto, helper


def encoder(path: Path) -> Path:
    """ids and a mask to features."""
    dims, value = ["batch_size", "sequence_length"], helper.make_tensor_value_info
    inputs = [value(name, TensorProto.INT64, dims) for name in ("ids", "attention_mask")]
    outputs = [value("features", TensorProto.FLOAT16, [*dims, 8])]
    table = tiny_onnx.initializer("table", np.random.default_rng(0).standard_normal((50, 8)).astype(np.float16))
    nodes = [helper.make_node("Mul", ["ids", "attention_mask"], ["kept"])]
    nodes += [helper.make_node("Gather", ["table", "kept"], ["rows"]), helper.make_node("Sin", ["rows"], ["features"])]
    return tiny_onnx.save(path, nodes, inputs, outputs, [table], metadata={"kv_cache": None, "dtype": "float16"})


decoder = partial(tiny_onnx.fixed_decoder, chunk=CHUNK)


@pytest.mark.parametrize(("make", "profiles"), [(decoder, {"prefill", "decode"}), (encoder, {"default"})])
def test_outputs_are_compared_in_every_profile(
    make: Callable[[Path], Path], profiles: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = make(tmp_path / "m.onnx")
    install(monkeypatch, RTX)
    answer = run_plan.check(plan_of(onnx), onnx)
    assert (answer["ran"], answer["agrees"]) == (True, True)
    assert {call["profile"] for call in answer["profiles"]} == profiles
    assert all(0 < error < 0.01 for call in answer["profiles"] for error in call["relative_error"].values())
    for wrong in (1e-9, float("nan")):
        monkeypatch.setitem(run_plan.TOLERANCE, "float16", wrong)
        assert not run_plan.check(plan_of(onnx), onnx)["agrees"]
