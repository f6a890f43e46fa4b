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
import stand_ins
import torch

from awq_trt.engine import sidecar
from awq_trt.serve import tensorrt
from awq_trt.serve.tensorrt import ALIGNMENT, PREFILL

ROWS, CHUNK = 5, 16
DTYPES = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64}


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

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._engine.shape_of(name, self._shapes)

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
        for node in self.session.get_inputs():
            binding.bind_input(node.name, "cpu", 0, DTYPES[node.type], shapes[node.name], addresses[node.name])
        for node in self.session.get_outputs():
            past = node.name.replace("present", "past_key_values")
            assert past == node.name or addresses[past] == addresses[node.name]  # KV_CACHE_UPDATE: one buffer
            shape = self.shape_of(node.name, shapes)
            binding.bind_output(node.name, "cpu", 0, DTYPES[node.type], shape, addresses[node.name])
        self.session.run_with_iobinding(binding)
        self.log.append((how, *shapes.get("input_ids", ()), self.contexts.index(context)))

    def shape_of(self, output: str, shapes: dict[str, Any]) -> tuple[int, ...]:
        sizes = {dim: n for i in self.session.get_inputs() for dim, n in zip(i.shape, shapes[i.name], strict=True)}
        (node,) = [node for node in self.session.get_outputs() if node.name == output]
        return tuple(sizes.get(dim, dim) for dim in node.shape)


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


class Strategy(enum.Enum):
    STATIC, USER_MANAGED = range(2)


FAKE = {
    "__name__": "tensorrt",
    "__version__": "11.1",
    "ILogger": ILogger,
    "Runtime": Runtime,
    "ExecutionContextAllocationStrategy": Strategy,
}
TRT = SimpleNamespace(**FAKE)
RTX = SimpleNamespace(**FAKE, CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE=1))


def plan_of(onnx: Path, *, embedded: bool = True, content: bytes | None = None) -> Path:
    """A plan (the ONNX file itself) with its sidecar."""
    plan = stand_ins.plan_of(onnx, ROWS, embedded=embedded)
    plan.write_bytes(onnx.read_bytes() if content is None else content)
    facts = json.loads(sidecar.path_of(plan).read_text())
    facts["sizes"]["plan"] = plan.stat().st_size
    sidecar.write(sidecar.path_of(plan), facts)
    return plan


def install(monkeypatch: pytest.MonkeyPatch, trt: Any = TRT) -> None:
    """Let plans run in the fake TensorRT, on the fake GPU."""
    monkeypatch.setattr(tensorrt, "_module", lambda _: trt)
    monkeypatch.setattr(tensorrt, "Gpu", FakeGpu)
