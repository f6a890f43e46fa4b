"""A decoder in TensorRT or TensorRT-RTX on a GPU, with the cache written in place and decode calls as CUDA graphs.

All caches are one allocation. A call binds past_key_values.* and present.* to the same place in it, at its first row
(TensorRT's KV_CACHE_UPDATE writes in place). Profile 0 decodes, profile 1 prefills.

A graph holds addresses and shapes, so decode calls begin at row 0, and their batches are powers of two and max_batch.
TensorRT wants an execution context for each captured graph ("CUDA Graphs" in its developer guide); all share one block
of activation memory, because only one runs at a time. TensorRT-RTX captures by itself, once the kernels that it
compiles at run time are ready.
"""

from __future__ import annotations

import importlib
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from awq_trt.engine.plugin import ENVIRONMENT_VARIABLE
from awq_trt.engine.runtimes import RUNTIMES, trt_logger
from awq_trt.errors import AwqTrtError
from awq_trt.files import verify
from awq_trt.serve.decoder import Decoder

DECODE, PREFILL = 0, 1
"""Optimization profiles, in the order of metadata.optimization_profiles."""

ALIGNMENT = 256
"""Bytes; IExecutionContext.set_tensor_address wants every address to be a multiple."""


class TensorRtDecoder(Decoder):
    """A decoder with a fixed cache, from a plan.

    Args:
        sidecar: the content of the plan's. max_batch: rows, at most those that the plan was built for; None is that.

    Raises:
        AwqTrtError: not a decoder with a fixed cache, its TensorRT or a GPU or a PyTorch with CUDA is missing, the plan
            does not load here, or there is too little memory.
    """

    def __init__(self, path: Path, sidecar: dict[str, Any], *, max_batch: int | None = None) -> None:
        shapes = [p["inputs"].get("input_ids") for p in sidecar["profiles"] if p.get("name") == "decode"]
        largest = shapes[0]["max"][0] if shapes and shapes[0] else 1
        super().__init__(path, sidecar["model"], largest if max_batch is None else max_batch)
        if self.max_batch > largest:
            raise AwqTrtError(f"{path} was built for max_batch={largest}; {self.max_batch} rows need another plan.")
        self.check_inputs({t["name"]: t["dims"] for t in (*sidecar["inputs"], *sidecar["outputs"])})
        rows = {name: math.prod(shape) * self.cache_itemsize for name, shape in self.cache_shapes.items()}
        if self.max_batch > 1 and any(size % ALIGNMENT for size in rows.values()):
            raise AwqTrtError(
                f"{path}: a row of its cache has {min(rows.values())} bytes, no multiple of {ALIGNMENT}, so rows "
                "cannot be run alone. Export with a capacity that is a multiple of 128."
            )
        sizes = [_aligned(self.max_batch * size) for size in rows.values()]
        # a call's lengths and tokens come in one copy: past_length, input_length, input_ids, each aligned
        self._part = _aligned(8 * self.max_batch) // 8
        try:
            self._plan = TensorRtPlan(path, sidecar)
            self._gpu = self._plan.gpu
            cache = self._gpu.bytes(sum(sizes)).split(sizes)
            self._inputs = self._gpu.bytes(8 * (2 * self._part + self.max_batch * self.prefill_chunk))
        except torch.OutOfMemoryError as error:
            raise AwqTrtError(
                f"{path}: the GPU has no room for a cache of {self.max_batch} rows ({sum(sizes) >> 20} MiB) beside the "
                f"weights: {error} Take a smaller max_batch."
            ) from error
        self._cache = {  # uint8 [max_batch, bytes of a row]
            name: block[: self.max_batch * size].view(self.max_batch, size)
            for (name, size), block in zip(rows.items(), cache, strict=True)
        }
        for row in range(self.max_batch):
            self.clear(row)
        self._staging = self._gpu.pinned(self._inputs.numel())
        self._prefill = self._plan.context(PREFILL)
        self._steps: dict[int, _Step] = {}  # by batch
        alias = getattr(self._plan.engine, "get_aliased_input_tensor", None)
        if alias is not None and any(alias(f"present.{n}") != f"past_key_values.{n}" for n in rows):
            warnings.warn(f"{path}: this engine does not write its cache in place.", stacklevel=2)

    def decode_rows(self, first: int, last: int) -> tuple[int, int]:
        """See `Decoder.decode_rows`: from row 0, up to the next batch that has a graph."""
        return 0, min(self.max_batch, 1 << last.bit_length())

    def clear(self, row: int) -> None:
        with self._gpu.work():
            for cache in self._cache.values():
                cache[row] = 0

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._gpu.synchronize()
            del self._steps, self._prefill, self._cache, self._inputs, self._staging, self._plan

    def _run(self, row: int, ids: np.ndarray, past: np.ndarray, new: np.ndarray) -> np.ndarray:
        b, s = ids.shape
        with self._gpu.work():
            self._send(ids, past, new)
            if row == 0 and s == 1:
                logits = self._decode(b)
            else:
                logits = self._bind(self._prefill, row, b, s)
                self._plan.execute(self._prefill)
            if self.every_logit:
                last = torch.from_numpy(np.maximum(new, 1) - 1).to(logits.device)
                logits = logits[torch.arange(b, device=logits.device), last]
            return logits.reshape(b, self.vocab_size).float().cpu().numpy()

    def _decode(self, b: int) -> torch.Tensor:
        """A decode call of the rows 0 .. b - 1; its logits. A batch's first call prepares TensorRT, its second is
        captured."""
        if b not in self._steps:
            context = self._plan.context(DECODE)
            self._steps[b] = _Step(self._bind(context, 0, b, 1), partial(self._plan.execute, context))
        step = self._steps[b]
        if step.calls == 1 and not self._plan.captures:
            try:
                step.run = self._gpu.capture(step.run)
            except (RuntimeError, AwqTrtError) as error:
                warnings.warn(f"{self.path}: decoding without CUDA graphs, which is slower: {error}", stacklevel=2)
        step.run()
        step.calls += 1
        return step.logits

    def _send(self, ids: np.ndarray, past: np.ndarray, new: np.ndarray) -> None:
        """Put a call's inputs on the GPU."""
        b, end = len(past), 2 * self._part + ids.size
        staging = self._staging.view(torch.int64).numpy()
        staging[:b], staging[self._part : self._part + b], staging[2 * self._part : end] = past, new, ids.ravel()
        self._inputs[: 8 * end].copy_(self._staging[: 8 * end], non_blocking=True)

    def _bind(self, context: Any, row: int, b: int, s: int) -> torch.Tensor:
        """Set a call's shapes and addresses; an empty tensor for its logits."""
        logits = self._plan.empty("logits", (b, s if self.every_logit else 1, self.vocab_size))
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
            place = self._cache[name][row].data_ptr()
            inputs[f"past_key_values.{name}"] = ((b, *shape), place)
            outputs[f"present.{name}"] = place
        self._plan.bind(context, inputs, outputs)
        return logits


@dataclass
class _Step:
    """The decode call of one batch."""

    logits: torch.Tensor  # [b, 1, vocab], where the call leaves them
    run: Callable[[], None]  # does the call, or replays its CUDA graph
    calls: int = 0


class TensorRtPlan:
    """A plan, loaded in the TensorRT that built it; its calls run on one stream.

    Args:
        sidecar: the content of the plan's.

    Raises:
        AwqTrtError: its TensorRT, a GPU or a PyTorch with CUDA is missing, or the plan does not load here.
        torch.OutOfMemoryError: no room for the activations.
    """

    def __init__(self, path: Path, sidecar: dict[str, Any]) -> None:
        self._path, self._trt, self.gpu = path, _module(sidecar["versions"]["runtime"]), Gpu()
        self._log: deque[str] = deque(maxlen=4)  # TensorRT's last warnings and errors
        # Like the runtime, it must outlive the engine.
        self._logger = trt_logger(self._trt, lambda severity, text: self._log.append(text))
        self._runtime = self._trt.Runtime(self._logger)
        self._runtime.engine_host_code_allowed = True  # the plan brings its plugin
        plugin = sidecar["plugin"]
        if plugin is not None and not plugin["embedded"]:
            library = Path(os.environ.get(ENVIRONMENT_VARIABLE) or plugin["path"]).expanduser()
            verify(library, plugin["sha256"], path)
            self._runtime.get_plugin_registry().load_library(str(library))
        self.engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise AwqTrtError(
                f"{path}: {self._trt.__name__} {self._trt.__version__} does not load this plan. "
                f"{' '.join(self._log)} It was built by {sidecar['versions'].get('runtime_version')} for "
                f"compute capability {', '.join(sidecar['gpu_architectures'])}; build it again for this machine."
            )
        self._memory = self.gpu.bytes(max(1, self.engine.device_memory_size_v2))  # activations of all contexts
        self._dtypes = {tensor["name"]: getattr(torch, tensor["dtype"]) for tensor in sidecar["outputs"]}
        self.captures = hasattr(self._trt, "CudaGraphStrategy")  # CUDA graphs, by itself (TensorRT-RTX)
        self._how = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED  # of making contexts
        if self.captures:
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(self._how)
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            config.set_runtime_cache(config.create_runtime_cache())  # a kernel of several contexts is compiled once
            self._how = config

    def context(self, profile: int) -> Any:
        """A new execution context for an optimization profile; only one may run at a time."""
        context = self.engine.create_execution_context(self._how)
        self._check(context is not None, "an execution context")
        context.set_device_memory(self._memory.data_ptr(), self._memory.numel())
        self._check(context.set_optimization_profile_async(profile, self.gpu.stream), f"profile {profile}")
        self.gpu.synchronize()
        return context

    def run(self, profile: int, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One call of any graph on the CPU's tensors; all outputs, on the GPU."""
        context = self.context(profile)
        memory = {name: self.gpu.bytes(x.nbytes).view(x.dtype).view(x.shape).copy_(x) for name, x in inputs.items()}
        places = {name: (tuple(x.shape), x.data_ptr()) for name, x in memory.items()}
        self.bind(context, places, {})  # then the shapes of outputs are known
        outputs = {name: self.empty(name, tuple(context.get_tensor_shape(name))) for name in self._dtypes}
        self.bind(context, places, {name: x.data_ptr() for name, x in outputs.items()})
        self.gpu.synchronize()
        self.execute(context)
        self.gpu.synchronize()
        return outputs

    def empty(self, output: str, shape: tuple[int, ...]) -> torch.Tensor:
        """GPU memory for an output."""
        dtype = self._dtypes[output]
        return self.gpu.bytes(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

    def bind(self, context: Any, inputs: Mapping[str, tuple[tuple[int, ...], int]], outputs: Mapping[str, int]) -> None:
        """Set the shape and address of each input and the address of each output."""
        for name, (shape, _) in inputs.items():
            self._check(context.set_input_shape(name, shape), f"{name} of shape {shape}")
        for name, address in {**{name: address for name, (_, address) in inputs.items()}, **outputs}.items():
            self._check(context.set_tensor_address(name, address), f"the address of {name}")

    def execute(self, context: Any) -> None:
        """Put a call on the stream."""
        self._check(context.execute_async_v3(self.gpu.stream), "a call")

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise AwqTrtError(f"{self._path}: TensorRT refused {what}. {' '.join(self._log)}")


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
        """uint8 [size] of GPU memory, uninitialized; its address is a multiple of 256."""
        with self.work():
            return torch.empty(size, dtype=torch.uint8, device="cuda")

    def pinned(self, size: int) -> torch.Tensor:
        """uint8 [size] of host memory that is copied to the GPU without waiting."""
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


def _module(runtime: str) -> Any:
    try:
        return importlib.import_module(runtime)
    except ImportError as error:
        raise AwqTrtError(f"the plan needs {runtime}: {error}. Run:\n    {RUNTIMES.get(runtime, '')}") from error


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
