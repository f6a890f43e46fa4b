"""The decoder on a GPU, without a GPU: see fake_tensorrt.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_onnx
import torch
from decoders import call
from fake_tensorrt import (
    CHUNK,
    ROWS,
    RTX,
    TRT,
    Context,
    Engine,
    FakeGpu,
    ILogger,
    Registry,
    Runtime,
    RuntimeConfig,
    install,
    plan_of,
)

from awq_trt.engine import sidecar
from awq_trt.engine.plugin import ENVIRONMENT_VARIABLE, library_path
from awq_trt.errors import AwqTrtError
from awq_trt.serve import tensorrt
from awq_trt.serve.decoder import Decoder
from awq_trt.serve.generate import generate
from awq_trt.serve.open import open_decoder
from awq_trt.serve.sampling import Sampling
from awq_trt.serve.tensorrt import DECODE, PREFILL, TensorRtDecoder


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_onnx.fixed_decoder(tmp_path_factory.mktemp("tiny") / "m.onnx", chunk=CHUNK)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TensorRtDecoder]:
    """open_decoder with the fake TensorRT and GPU."""

    def open(plan: Path, trt: Any = TRT, **options: Any) -> TensorRtDecoder:
        install(monkeypatch, trt)
        decoder = open_decoder(plan, **options)
        assert isinstance(decoder, TensorRtDecoder)
        return decoder

    return open


class Numbers:
    """A tokenizer whose text is the ids."""

    eos_token_id = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f" {i}" for i in ids)

    def convert_ids_to_tokens(self, token: int) -> str:
        return f" {token}"


def check_tokens(decoder: Decoder, onnx: Path) -> None:
    """Eight requests of other lengths on five rows: each token is the best one in fp32, but for what fp16 changes."""
    random = np.random.default_rng(1)
    prompts = [random.integers(1, 64, n).tolist() for n in (3, 40, 1, 17, 16, 5, 9, 30)]
    found = generate(decoder, prompts, Sampling(max_tokens=12, ignore_eos=True), tokenizer=Numbers())
    with open_decoder(onnx, max_batch=1, threads=1) as reference:
        for prompt, one in zip(prompts, found, strict=True):
            ids = [*prompt, *one.token_ids]
            for past in range(len(ids) - 1):
                logits = call(reference, 0, [[ids[past]]], [past], [1])[0]
                assert past + 1 < len(prompt) or logits[ids[past + 1]] > logits.max() - 0.1
    assert len({one.token_ids for one in found}) == 8


@pytest.mark.parametrize("trt", [TRT, RTX], ids=["tensorrt", "rtx"])
@pytest.mark.parametrize("every_logit", [False, True])
def test_generates_what_onnx_runtime_does(opened: Any, tmp_path: Path, trt: Any, every_logit: bool) -> None:
    onnx = tiny_onnx.fixed_decoder(tmp_path / "m.onnx", chunk=CHUNK, every_logit=every_logit)
    decoder = opened(plan_of(onnx), trt)
    assert decoder.max_batch == ROWS
    check_tokens(decoder, onnx)
    decoder.close()
    decoder.close()


def test_a_graph_and_a_context_for_each_batch(opened: Any, onnx: Path) -> None:
    """The first call of a batch runs as it is, the second is captured, from then on the graph is replayed."""
    decoder = opened(plan_of(onnx))
    assert [decoder.decode_rows(0, last) for last in range(ROWS)] == [(0, 1), (0, 2), (0, 4), (0, 4), (0, 5)]
    assert decoder.decode_rows(3, 3) == (0, 4)
    for step in range(4):
        call(decoder, 0, [[1]] * 4, [step] * 4, [1] * 4)
    call(decoder, 0, [[1]], [4], [1])
    call(decoder, 2, [[1]], [4], [1])  # not from row 0: the other profile
    call(decoder, 0, [[1, 2]], [5], [2])
    log, contexts = decoder._plan.engine.log, decoder._plan.engine.contexts
    assert [entry[0] for entry in log] == ["executed", "replayed", "replayed", "replayed"] + ["executed"] * 3
    assert decoder._gpu.captures == 1
    profiles = [contexts[context]._profile for *_, context in log]
    assert profiles == [DECODE] * 5 + [PREFILL] * 2
    assert len(contexts) == 3
    assert len({context._memory for context in contexts}) == 1


def test_rtx_captures_by_itself(opened: Any, onnx: Path) -> None:
    decoder = opened(plan_of(onnx), RTX)
    for batch in (2, 2, 4, 2):
        call(decoder, 0, [[1]] * batch, [3] * batch, [1] * batch)
    assert decoder._plan._how.cuda_graph_strategy == 1
    assert decoder._gpu.captures == 0
    assert decoder._plan.engine.log == [
        ("executed", batch, 1, context) for batch, context in ((2, 1), (2, 1), (4, 2), (2, 1))
    ]


def test_without_graphs_it_is_only_slower(opened: Any, onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeGpu, "can_capture", False)
    decoder = opened(plan_of(onnx))
    with pytest.warns(UserWarning, match="without CUDA graphs.*not permitted"):
        check_tokens(decoder, onnx)
    assert {how for how, *_ in decoder._plan.engine.log} == {"executed"}


def test_one_allocation_for_all_caches(opened: Any, onnx: Path) -> None:
    decoder = opened(plan_of(onnx), max_batch=3)
    assert decoder.cache_bytes == 2 * 2 * 3 * 2 * 64 * 16 * 2
    assert decoder._gpu.sizes[1] == decoder.cache_bytes
    assert len(decoder._gpu.sizes) == 3  # activations before it, inputs behind it
    assert not any(cache.any() for cache in decoder._cache.values())  # the memory was full of NaN before


def test_only_the_new_slots_of_the_rows_are_written(opened: Any, onnx: Path) -> None:
    decoder = opened(plan_of(onnx))

    def written() -> torch.Tensor:
        """[layer and part, row, slot]"""
        caches = [cache.view(torch.float16).reshape(ROWS, 2, 64, 16) for cache in decoder._cache.values()]
        return torch.stack(caches).ne(0).any(4).any(2)

    call(decoder, 2, [[1, 2, 3], [4, 5, 0]], [5, 0], [3, 2])
    for part in range(4):
        assert written()[part].nonzero().tolist() == [[2, 5], [2, 6], [2, 7], [3, 0], [3, 1], [3, 2]]
    decoder.clear(2)
    assert written()[:, 2].sum() == 0
    assert written()[:, 3].sum() == 12


def test_rows_that_cannot_be_run_alone(opened: Any, tmp_path: Path) -> None:
    onnx = tiny_onnx.fixed_decoder(tmp_path / "m.onnx", capacity=18)  # 18 * 2 * 16 * 2 bytes, not a multiple of 256
    with pytest.raises(AwqTrtError, match="row of its cache has 1152 bytes, no multiple of 256"):
        opened(plan_of(onnx))
    decoder = opened(plan_of(onnx), max_batch=1)
    assert np.isfinite(call(decoder, 0, [[1, 2]], [0], [2])).all()


def test_refusals(opened: Any, onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AwqTrtError, match="built for max_batch=5; 9 rows need another plan"):
        opened(plan_of(onnx), max_batch=9)
    with pytest.raises(AwqTrtError, match="tensorrt 11.1 does not load .* another GPU .*10.14 .*9.0"):
        opened(plan_of(onnx, content=b"other"))
    decoder = opened(plan_of(onnx))
    decoder.prefill_chunk = 32  # more than the profile's
    with pytest.raises(AwqTrtError, match=r"refused input_ids of shape \(1, 20\). .*outside of the profile"):
        call(decoder, 0, [[1] * 20], [0], [20])

    def full(self: FakeGpu, size: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(FakeGpu, "bytes", full)
    with pytest.raises(AwqTrtError, match="no room for a cache of 5 rows .*smaller max_batch"):
        opened(plan_of(onnx))


def test_a_plugin_beside_the_plan_and_a_cache_that_is_copied(
    opened: Any, onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(plan_of(onnx))
    assert Registry.loaded == []
    monkeypatch.setattr(Engine, "in_place", False)
    with pytest.warns(UserWarning, match="does not write its cache in place"):
        opened(plan_of(onnx, embedded=False))
    assert Registry.loaded == [str(library_path().resolve())]
    other = tmp_path / "other.so"
    other.write_bytes(library_path().read_bytes() + b"x")
    plan = plan_of(onnx, embedded=False)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(other))
    with pytest.raises(AwqTrtError, match="other.so: is not the file"):
        opened(plan)
    assert len(Registry.loaded) == 1


def test_a_machine_that_lacks_something(onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(onnx)
    monkeypatch.setattr(tensorrt.importlib, "import_module", lambda name: __import__("no_such_" + name))
    with pytest.raises(AwqTrtError, match=r"plan needs tensorrt: No module .*\n.*pip install tensorrt"):
        open_decoder(plan)
    monkeypatch.setattr(tensorrt, "_module", lambda _: TRT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version, why in ((None, "built without CUDA"), ("13.0", "sees no GPU")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(AwqTrtError, match=f"NVIDIA GPU, and .*{why}.*onnx file, which runs on the CPU"):
            open_decoder(plan)
    sidecar.path_of(plan).unlink()
    with pytest.raises(AwqTrtError, match="keep the two together"):
        open_decoder(plan)


def test_the_real_bindings_have_what_the_fakes_have() -> None:
    """Every name that the decoder uses of TensorRT, checked where only TensorRT-RTX can be installed."""
    trt = pytest.importorskip("tensorrt_rtx")
    real = {
        Context: trt.IExecutionContext,
        Engine: trt.ICudaEngine,
        Runtime: trt.Runtime,
        Registry: trt.IPluginRegistry,
        RuntimeConfig: trt.IRuntimeConfig,
        ILogger: trt.ILogger,
    }
    own = {
        "run",
        "log",
        "inputs",
        "outputs",
        "session",
        "logger",
        "contexts",
        "loaded",
        "shape_of",
        "strategy",
        "in_place",
    }
    for fake, there in real.items():
        names = {name for name in dir(fake) if not name.startswith("_")} - own
        assert names
        assert names <= set(dir(there)), fake
    assert "USER_MANAGED" in trt.ExecutionContextAllocationStrategy.__members__
    assert "WHOLE_GRAPH_CAPTURE" in trt.CudaGraphStrategy.__members__
    assert "memory: typing.SupportsInt, size: typing.SupportsInt" in trt.IExecutionContext.set_device_memory.__doc__
