"""A decoder in TensorRT or TensorRT-RTX on a GPU, with the cache written in place and decode calls as CUDA graphs.

All caches are one allocation. A call binds past_key_values.* and present.* to the same place in it, at the offset of
its first row (TensorRT's KV_CACHE_UPDATE writes in place). Profile 0 decodes, profile 1 prefills.

A graph holds addresses and shapes, so decode calls begin at row 0, and their batches are powers of two and max_batch.
TensorRT wants an execution context for each captured graph ("CUDA Graphs" in its developer guide); all share one block
of activation memory, because only one runs at a time. TensorRT-RTX captures by itself, once the kernels that it
compiles at run time are ready, so there one context decodes all batches.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from awq_trt.engine.runtimes import RUNTIMES, trt_logger
from awq_trt.errors import AwqTrtError
from awq_trt.serve.decoder import Decoder

DECODE, PREFILL = 0, 1
"""Optimization profiles, in the order of metadata.optimization_profiles."""

ALIGNMENT = 256
"""Bytes; what IExecutionContext.set_tensor_address asks of every address."""


class TensorRtDecoder(Decoder):
    """See `Decoder`.

    Args:
        sidecar: the content of the plan's. max_batch: rows, at most those that the plan was built for; None is that.

    Raises:
        AwqTrtError: not a decoder with a fixed cache, its TensorRT or a GPU or a PyTorch with CUDA is missing, the plan
            does not load here, or there is too little memory.
    """

    def __init__(self, path: Path, sidecar: dict[str, Any], *, max_batch: int | None = None) -> None:
        largest = built_for(path, sidecar)
        super().__init__(path, sidecar["model"], largest if max_batch is None else max_batch)
        if self.max_batch > largest:
            raise AwqTrtError(f"{path} was built for a batch of {largest}; {max_batch} rows need another --max-batch.")
        strides = {name: math.prod(shape) * self.cache_itemsize for name, shape in self.cache_shapes.items()}
        if self.max_batch > 1 and any(stride % ALIGNMENT for stride in strides.values()):
            raise AwqTrtError(
                f"{path}: a row of its cache has {min(strides.values())} bytes, no multiple of {ALIGNMENT}, so rows "
                "cannot be run alone. Export with a --max-seq that is a multiple of 128."
            )
        self._trt = _module(sidecar["versions"]["runtime"])
        self._gpu = Gpu()
        self._words: deque[str] = deque(maxlen=4)  # TensorRT's last warnings and errors
        self._logger = trt_logger(self._trt, lambda severity, text: self._words.append(text))
        self._runtime, self._engine = self._load(sidecar)
        self._dtypes = {
            self._trt.DataType.HALF: torch.float16,
            self._trt.DataType.BF16: torch.bfloat16,
            self._trt.DataType.FLOAT: torch.float32,
        }
        self._strides = strides
        places = np.cumsum([0, *(self.max_batch * _aligned(s) for s in strides.values())]).tolist()
        self._offsets = dict(zip(strides, places, strict=False))
        # a call's lengths and tokens come in one copy: past_length, input_length, input_ids, each aligned
        self._part = _aligned(8 * self.max_batch) // 8
        try:
            self._cache = self._gpu.bytes(places[-1]).zero_()
            self._memory = self._gpu.bytes(max(1, self._engine.device_memory_size_v2))
            self._inputs = self._gpu.bytes(8 * (2 * self._part + self.max_batch * self.prefill_chunk))
        except torch.OutOfMemoryError as error:
            raise AwqTrtError(
                f"{path}: the GPU has no room for a cache of {self.max_batch} rows ({places[-1] >> 20} MiB) beside the "
                f"weights: {error} Take a smaller max_batch."
            ) from error
        self._staging = self._gpu.pinned(self._inputs.numel())
        self._config = self._runtime_config()
        self._prefill = self._context(PREFILL)
        self._steps: dict[int, _Step] = {}  # by batch
        self._bound: _Step | None = None  # whose addresses the context has, where all steps share one

    def decode_rows(self, first: int, last: int) -> tuple[int, int]:
        """See `Decoder.decode_rows`: from row 0, up to the next batch that has a graph."""
        return 0, min(self.max_batch, 1 << last.bit_length())

    def clear(self, row: int) -> None:
        """See `Decoder.clear`."""
        with self._gpu.work():
            for name, stride in self._strides.items():
                start = self._offsets[name] + row * stride
                self._cache[start : start + stride].zero_()

    def close(self) -> None:
        """See `Decoder.close`."""
        if self.closed:
            return
        self.closed = True
        self._gpu.synchronize()
        self._steps.clear()
        self._bound = self._prefill = self._config = self._engine = self._runtime = None
        self._cache = self._memory = self._inputs = self._staging = torch.empty(0)

    def _run(self, row: int, ids: np.ndarray, past: np.ndarray, new: np.ndarray) -> np.ndarray:
        b, s = ids.shape
        with self._gpu.work():
            self._send(ids, past, new)
            if row == 0 and s == 1:
                logits = self._decode(b)
            else:
                logits = self._logits(b, s)
                self._bind(self._prefill, row, b, s, logits)
                self._execute(self._prefill)
            if self.every_logit:
                last = torch.from_numpy(np.maximum(new, 1) - 1).to(logits.device)
                logits = logits[torch.arange(b, device=logits.device), last]
            return logits.reshape(b, self.vocab_size).float().cpu().numpy()

    def _decode(self, b: int) -> torch.Tensor:
        """A decode call of rows 0 .. b; its logits. The first of a batch prepares TensorRT, the second is captured."""
        if b not in self._steps:
            known = next(iter(self._steps.values()), None) if self._config is not None else None
            step = self._steps[b] = _Step(known.context if known else self._context(DECODE), self._logits(b, 1))
            self._bind(step.context, 0, b, 1, step.logits)
            self._execute(step.context)
        elif self._config is not None:
            step = self._steps[b]
            if self._bound is not step:
                self._bind(step.context, 0, b, 1, step.logits)
            self._execute(step.context)
        else:
            step = self._steps[b]
            if step.replay is None:
                step.replay = self._captured(step.context)
            step.replay()
        self._bound = step
        return step.logits

    def _captured(self, context: Any) -> Callable[[], None]:
        try:
            return self._gpu.capture(lambda: self._execute(context))
        except (RuntimeError, AwqTrtError) as error:
            warnings.warn(f"{self.path}: decoding without CUDA graphs, which is slower: {error}", stacklevel=2)
            return lambda: self._execute(context)

    def _send(self, ids: np.ndarray, past: np.ndarray, new: np.ndarray) -> None:
        """Put a call's inputs on the GPU."""
        b, end = len(past), 2 * self._part + ids.size
        staging = self._staging.view(torch.int64).numpy()
        staging[:b], staging[self._part : self._part + b], staging[2 * self._part : end] = past, new, ids.ravel()
        self._inputs[: 8 * end].copy_(self._staging[: 8 * end], non_blocking=True)

    def _logits(self, b: int, s: int) -> torch.Tensor:
        """An empty tensor for the logits of a call."""
        dtype = self._dtypes[self._engine.get_tensor_dtype("logits")]
        shape = (b, s if self.every_logit else 1, self.vocab_size)
        return self._gpu.bytes(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

    def _bind(self, context: Any, row: int, b: int, s: int, logits: torch.Tensor) -> None:
        """Shapes and addresses of a call."""
        at = self._inputs.data_ptr()
        inputs: dict[str, tuple[tuple[int, ...], int]] = {
            "past_length": ((b,), at),
            "input_length": ((b,), at + 8 * self._part),
            "input_ids": ((b, s), at + 16 * self._part),
        }
        if self.every_logit:
            del inputs["input_length"]
        outputs = {"logits": logits.data_ptr()}
        for name, shape in self.cache_shapes.items():
            place = self._cache.data_ptr() + self._offsets[name] + row * self._strides[name]
            inputs[f"past_key_values.{name}"] = ((b, *shape), place)
            outputs[f"present.{name}"] = place
        for name, (dims, _) in inputs.items():
            self._check(context.set_input_shape(name, dims), f"{name} of shape {dims}")
        for name, place in (outputs | {name: place for name, (_, place) in inputs.items()}).items():
            self._check(context.set_tensor_address(name, place), f"the address of {name}")

    def _execute(self, context: Any) -> None:
        self._check(context.execute_async_v3(self._gpu.stream), "a call")

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise AwqTrtError(f"{self.path}: TensorRT refused {what}. {' '.join(self._words)}")

    def _context(self, profile: int) -> Any:
        """A new execution context for a profile, on the shared memory."""
        user = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(user if self._config is None else self._config)
        self._check(context is not None, "an execution context")
        context.set_device_memory(self._memory.data_ptr(), self._memory.numel())
        self._check(context.set_optimization_profile_async(profile, self._gpu.stream), f"profile {profile}")
        self._gpu.synchronize()
        return context

    def _runtime_config(self) -> Any:
        """How contexts are made that capture CUDA graphs by themselves (TensorRT-RTX); None where there are none."""
        if not hasattr(self._trt, "CudaGraphStrategy"):
            return None
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        config.set_runtime_cache(config.create_runtime_cache())  # a kernel that both contexts need is compiled once
        return config

    def _load(self, sidecar: dict[str, Any]) -> tuple[Any, Any]:
        """(runtime, engine); the logger and the runtime must outlive the engine."""
        runtime = self._trt.Runtime(self._logger)
        runtime.engine_host_code_allowed = True  # the plan brings its plugin
        plugin = sidecar["plugin"]
        if plugin is not None and not plugin["embedded"]:
            runtime.get_plugin_registry().load_library(plugin["path"])
        engine = runtime.deserialize_cuda_engine(self.path.read_bytes())
        if engine is None:
            raise AwqTrtError(
                f"{self.path}: {self._trt.__name__} {self._trt.__version__} does not load this plan. "
                f"{' '.join(self._words)} It was built by {sidecar['versions'].get('runtime_version')} for "
                f"compute capability {', '.join(sidecar['gpu_architectures'])}; build it again for this machine."
            )
        alias = getattr(engine, "get_aliased_input_tensor", None)
        if alias is not None and any(alias(f"present.{n}") != f"past_key_values.{n}" for n in self.cache_shapes):
            warnings.warn(f"{self.path}: this engine does not write its cache in place.", stacklevel=2)
        return runtime, engine


@dataclass
class _Step:
    """The decode call of one batch: logits [b, 1, vocab] are where it leaves them; `replay` runs its CUDA graph."""

    context: Any
    logits: torch.Tensor
    replay: Callable[[], None] | None = None


class Gpu:
    """Memory, a stream and CUDA graphs of the current GPU, by PyTorch.

    Raises:
        AwqTrtError: PyTorch sees no GPU.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch sees no GPU"
            raise AwqTrtError(
                f"a plan runs on an NVIDIA GPU, and {why}. Use a PyTorch with CUDA (pip install torch) where "
                "there is a GPU, or give the .onnx file, which runs on the CPU."
            )
        self._stream = torch.cuda.Stream()
        self.stream: int = self._stream.cuda_stream

    def bytes(self, size: int) -> torch.Tensor:
        """uint8 [size] of GPU memory, whatever it holds; its address is a multiple of 256."""
        with self.work():
            return torch.empty(size, dtype=torch.uint8, device="cuda")

    def pinned(self, size: int) -> torch.Tensor:
        """uint8 [size] of host memory that can be copied without waiting."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def work(self) -> AbstractContextManager[Any]:
        """Inside, PyTorch works on this stream too."""
        return torch.cuda.stream(self._stream)

    def synchronize(self) -> None:
        """Wait until the stream is idle."""
        self._stream.synchronize()

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """Record what `call` puts on the stream, without running it; returns what runs it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            call()
        return graph.replay


def built_for(path: Path, sidecar: dict[str, Any]) -> int:
    """The largest batch of a plan's decode profile; 1 where the sidecar does not know input_ids."""
    shapes = [p["inputs"].get("input_ids") for p in sidecar["profiles"] if p.get("name") == "decode"]
    return shapes[0]["max"][0] if shapes and shapes[0] else 1


def _module(runtime: str) -> Any:
    try:
        return importlib.import_module(runtime)
    except ImportError as error:
        raise AwqTrtError(f"the plan needs {runtime}: {error}. Run:\n    {RUNTIMES.get(runtime, '')}") from error


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
