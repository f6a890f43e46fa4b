"""The GPU's side of generation without a GPU: a TensorRT made of ONNX Runtime, which reads and writes the very
addresses that it is given and insists on what TensorRT insists on. Left is what only a GPU can show: its arithmetic.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny_onnx
import torch
from decoders import call

from awq_trt.engine import sidecar
from awq_trt.errors import AwqTrtError
from awq_trt.export.metadata import read_graph
from awq_trt.serve import tensorrt
from awq_trt.serve.decoder import Decoder
from awq_trt.serve.generate import generate
from awq_trt.serve.open import open_decoder
from awq_trt.serve.sampling import Sampling
from awq_trt.serve.tensorrt import ALIGNMENT, DECODE, PREFILL, TensorRtDecoder

ROWS, CHUNK = 5, 16


class FakeGpu:
    """Host memory, every block at a multiple of 256; a capture notes calls instead of running them, as CUDA does."""

    recording: list[Callable[[], None]] | None = None
    can_capture = True

    def __init__(self) -> None:
        self.stream, self.sizes, self.captures = 7, [], 0

    def bytes(self, size: int) -> torch.Tensor:
        self.sizes.append(size)
        whole = torch.full((size + ALIGNMENT,), 255, dtype=torch.uint8)  # NaN in every float
        start = -whole.data_ptr() % ALIGNMENT
        return whole[start : start + size]

    def pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def work(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def synchronize(self) -> None:
        pass

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        if not self.can_capture:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captures += 1
        FakeGpu.recording = recorded = []
        call()
        FakeGpu.recording = None
        return lambda: next(run() for run in recorded)


class Context:
    """IExecutionContext: one profile, shapes and addresses that stay until they are set again."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._shapes, self._addresses = engine, {}, {}
        self._memory = self._profile = None

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % ALIGNMENT == 0
        assert size >= self._engine.device_memory_size_v2
        self._memory = memory

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle == 7
        self._profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name == "input_ids" and not (shape[0] <= ROWS and shape[1] <= (CHUNK if self._profile == PREFILL else 1)):
            self._engine.logger.log(self._engine.logger.ERROR, "shape is outside of the profile")
            return False
        assert name in self._engine.inputs
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory % ALIGNMENT == 0, name
        assert name in {*self._engine.inputs, *self._engine.outputs}
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == 7
        assert self._memory is not None
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        if FakeGpu.recording is not None:
            FakeGpu.recording.append(lambda: self._engine.run(self, shapes, addresses, "replayed"))
        else:
            self._engine.run(self, shapes, addresses, "executed")
        return True


class Engine:
    """ICudaEngine on an ONNX file in fp16. `log` notes every run: (how, batch, tokens, context)."""

    device_memory_size_v2 = 1000
    in_place = True

    def __init__(self, plan: bytes, logger: Any) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(plan, options, ["CPUExecutionProvider"])
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.logger, self.log, self.contexts = logger, [], []

    def get_tensor_dtype(self, name: str) -> Any:
        assert name == "logits"
        return DataType.HALF

    def get_aliased_input_tensor(self, name: str) -> str | None:
        assert name in self.outputs
        return name.replace("present", "past_key_values") if self.in_place else None

    def create_execution_context(self, how: Any) -> Context:
        assert how == Strategy.USER_MANAGED or how.strategy == Strategy.USER_MANAGED
        self.contexts.append(Context(self))
        return self.contexts[-1]

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def run(self, context: Context, shapes: dict[str, Any], addresses: dict[str, int], how: str) -> None:
        binding = self.session.io_binding()
        batch, new = shapes["input_ids"]
        for name in self.inputs:
            dtype = np.float16 if name.startswith("past_key") else np.int64
            binding.bind_input(name, "cpu", 0, dtype, shapes[name], addresses[name])
        for name in self.outputs:
            past = name.replace("present", "past_key_values")
            shape = (batch, new if every(self) else 1, tiny_onnx.VOCAB) if name == "logits" else shapes[past]
            assert name == "logits" or addresses[name] == addresses[past]  # KV_CACHE_UPDATE: one buffer
            binding.bind_output(name, "cpu", 0, np.float16, shape, addresses[name])
        self.session.run_with_iobinding(binding)
        self.log.append((how, batch, new, self.contexts.index(context)))


def every(engine: Engine) -> bool:
    return "input_length" not in engine.inputs


class RuntimeConfig:
    strategy = cuda_graph_strategy = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> str:
        return "cache"

    def set_runtime_cache(self, cache: str) -> None:
        assert cache == "cache"


class Registry:
    loaded: list[str] = []  # noqa: RUF012

    def load_library(self, path: str) -> None:
        self.loaded.append(path)


class Runtime:
    """IRuntime: takes no plan with a plugin inside unless host code is allowed."""

    engine_host_code_allowed = False

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        if not self.engine_host_code_allowed or plan.startswith(b"other"):
            self.logger.log(self.logger.INFO, "a detail")
            self.logger.log(self.logger.ERROR, "the engine was built for another GPU")
            return None
        return Engine(plan, self.logger)

    def get_plugin_registry(self) -> Registry:
        return Registry()


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)


class DataType(enum.Enum):
    HALF, BF16, FLOAT = range(3)


class Strategy(enum.Enum):
    STATIC, USER_MANAGED = range(2)


FAKE = {
    "__name__": "tensorrt",
    "__version__": "11.1",
    "ILogger": ILogger,
    "Runtime": Runtime,
    "DataType": DataType,
    "ExecutionContextAllocationStrategy": Strategy,
}
TRT = SimpleNamespace(**FAKE)
RTX = SimpleNamespace(**FAKE, CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE=1))


def plan_of(onnx: Path, *, embedded: bool = True, content: bytes | None = None) -> Path:
    """A plan (the ONNX file itself) with its sidecar."""
    plan = onnx.with_suffix(".plan")
    plan.write_bytes(onnx.read_bytes() if content is None else content)
    shapes = {"input_ids": {"min": [1, 1], "opt": [ROWS, 1], "max": [ROWS, 1]}}
    known = {
        "schema": sidecar.SCHEMA,
        "versions": {"runtime": "tensorrt", "runtime_version": "11.0"},
        "gpu_architectures": ["9.0"],
        "model": read_graph(onnx).metadata,
        "profiles": [{"name": "decode", "inputs": shapes}, {"name": "prefill", "inputs": shapes}],
        "plugin": {"path": "/somewhere/libplugin.so", "embedded": embedded},
        "sizes": {"plan": plan.stat().st_size},
    }
    empty = {key: (kind if isinstance(kind, type) else kind[0])() for key, kind in sidecar.KEYS.items()}
    sidecar.path_of(plan).write_text(json.dumps(empty | known))
    return plan


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_onnx.fixed_decoder(tmp_path_factory.mktemp("tiny") / "m.onnx", chunk=CHUNK)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TensorRtDecoder]:
    """open_decoder with the fake TensorRT and GPU."""

    def open(plan: Path, trt: Any = TRT, **options: Any) -> TensorRtDecoder:
        monkeypatch.setattr(tensorrt, "_module", lambda _: trt)
        monkeypatch.setattr(tensorrt, "Gpu", FakeGpu)
        decoder = open_decoder(plan, **options)
        assert isinstance(decoder, TensorRtDecoder)
        return decoder

    return open


class Numbers:
    """A tokenizer whose text is the ids."""

    eos_token_id = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f" {i}" for i in ids)


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
    log = decoder._engine.log
    assert [entry[0] for entry in log] == ["executed", "replayed", "replayed", "replayed"] + ["executed"] * 3
    assert decoder._gpu.captures == 1
    profiles = [decoder._engine.contexts[context]._profile for *_, context in log]
    assert profiles == [DECODE] * 5 + [PREFILL] * 2
    assert len(decoder._engine.contexts) == 3
    assert len({context._memory for context in decoder._engine.contexts}) == 1


def test_rtx_captures_by_itself(opened: Any, onnx: Path) -> None:
    decoder = opened(plan_of(onnx), RTX)
    for batch in (2, 2, 4, 2):
        call(decoder, 0, [[1]] * batch, [3] * batch, [1] * batch)
    assert decoder._config.cuda_graph_strategy == 1
    assert decoder._gpu.captures == 0
    assert [entry[3] for entry in decoder._engine.log] == [1] * 4  # one context for all batches
    assert [entry[1] for entry in decoder._engine.log] == [2, 2, 4, 2]


def test_without_graphs_it_is_only_slower(opened: Any, onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeGpu, "can_capture", False)
    decoder = opened(plan_of(onnx))
    with pytest.warns(UserWarning, match="without CUDA graphs.*not permitted"):
        check_tokens(decoder, onnx)
    assert {how for how, *_ in decoder._engine.log} == {"executed"}


def test_one_allocation_for_all_caches(opened: Any, onnx: Path) -> None:
    decoder = opened(plan_of(onnx), max_batch=3)
    assert decoder.cache_bytes == 2 * 2 * 3 * 2 * 64 * 16 * 2
    assert decoder._gpu.sizes[0] == decoder.cache_bytes
    assert len(decoder._gpu.sizes) == 3  # and activations, and inputs
    assert not decoder._cache.any()  # the memory was full of NaN before


def test_only_the_new_slots_of_the_rows_are_written(opened: Any, onnx: Path) -> None:
    decoder = opened(plan_of(onnx))
    cache = decoder._cache.view(torch.float16).reshape(4, ROWS, 2, 64, 16)  # [layer and part, row, head, slot, dim]
    call(decoder, 2, [[1, 2, 3], [4, 5, 0]], [5, 0], [3, 2])
    written = cache.ne(0).any(4).any(2)
    for part in range(4):
        assert written[part].nonzero().tolist() == [[2, 5], [2, 6], [2, 7], [3, 0], [3, 1], [3, 2]]
    decoder.clear(2)
    assert cache.ne(0).any(4).any(2)[:, 2].sum() == 0
    assert cache.ne(0).any(4).any(2)[:, 3].sum() == 12


def test_rows_that_cannot_be_run_alone(opened: Any, tmp_path: Path) -> None:
    onnx = tiny_onnx.fixed_decoder(tmp_path / "m.onnx", capacity=18)  # 18 * 2 * 16 * 2 bytes, not a multiple of 256
    with pytest.raises(AwqTrtError, match="row of its cache has 1152 bytes, no multiple of 256"):
        opened(plan_of(onnx))
    decoder = opened(plan_of(onnx), max_batch=1)
    assert np.isfinite(call(decoder, 0, [[1, 2]], [0], [2])).all()


def test_refusals(opened: Any, onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AwqTrtError, match="built for a batch of 5; 9 rows need another --max-batch"):
        opened(plan_of(onnx), max_batch=9)
    with pytest.raises(AwqTrtError, match="tensorrt 11.1 does not load .* another GPU .*11.0 .*9.0"):
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


def test_an_engine_that_copies_its_cache(opened: Any, onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "in_place", False)
    with pytest.warns(UserWarning, match="does not write its cache in place"):
        opened(plan_of(onnx))


def test_a_plugin_beside_the_plan_is_loaded(opened: Any, onnx: Path) -> None:
    opened(plan_of(onnx))
    assert Registry.loaded == []
    opened(plan_of(onnx, embedded=False))
    assert Registry.loaded == ["/somewhere/libplugin.so"]


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
    own = {"run", "log", "inputs", "outputs", "session", "logger", "contexts", "loaded", "strategy", "in_place"}
    for fake, there in real.items():
        names = {name for name in dir(fake) if not name.startswith("_")} - own
        assert names
        assert names <= set(dir(there)), fake
    assert {"HALF", "BF16", "FLOAT"} <= set(trt.DataType.__members__)
    assert "USER_MANAGED" in trt.ExecutionContextAllocationStrategy.__members__
    assert "WHOLE_GRAPH_CAPTURE" in trt.CudaGraphStrategy.__members__
    assert "memory: typing.SupportsInt, size: typing.SupportsInt" in trt.IExecutionContext.set_device_memory.__doc__
