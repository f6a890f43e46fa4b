"""A decoder in ONNX Runtime on a CPU, in fp32, with the cache written in place.

The file itself would be too slow: its function unpacks every weight in every call. So a copy with fp32 activations and
MatMulNBits is run (fp32.py), whose greedy tokens are those of the eager model in fp32 with the weights
(q - zero) * scale. ONNX Runtime maps the copy's data when it loads it, and the copy is deleted right then.

past_key_values.* and present.* of a call are bound to the same memory: TensorScatter then writes the new tokens and
copies nothing. The cache of adjacent rows is contiguous, so any of them can be run alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from awq_trt.errors import AwqTrtError, brief
from awq_trt.export.fp32 import float32_copy
from awq_trt.publishing import scratch
from awq_trt.serve.decoder import Decoder


class OrtDecoder(Decoder):
    """A decoder with a fixed cache, from an ONNX file.

    Args:
        facts: metadata of the file. threads: of ONNX Runtime, None for one per core.

    Raises:
        AwqTrtError: not a decoder with a fixed cache, no room for the copy (TMPDIR says where), ONNX Runtime does not
            take it.
    """

    cache_itemsize = 4

    def __init__(self, path: Path, facts: dict[str, Any], *, max_batch: int, threads: int | None = None) -> None:
        super().__init__(path, facts, max_batch)
        if threads is not None and threads < 1:
            raise AwqTrtError(f"threads is {threads}; it must be at least 1.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # cores are shared with a server
        try:
            with scratch() as folder:
                copy = folder / "decoder.onnx"
                float32_copy(path, copy, nbits=True)
                self._session: Any = onnxruntime.InferenceSession(str(copy), options, ["CPUExecutionProvider"])
        except (OSError, AwqTrtError) as error:
            raise AwqTrtError(f"{path}: no room for its copy in fp32 (TMPDIR says where): {error}") from error
        except Exception as error:  # ONNX Runtime has a class for each kind of failure
            raise AwqTrtError(
                f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {brief(error)}"
            ) from error
        self.check_inputs({x.name: x.shape for x in (*self._session.get_inputs(), *self._session.get_outputs())})
        self._cache = {name: np.zeros((max_batch, *shape), np.float32) for name, shape in self.cache_shapes.items()}

    def _run(self, row: int, ids: np.ndarray, past: np.ndarray, new: np.ndarray) -> np.ndarray:
        b, s = ids.shape
        logits = np.empty((b, s if self.every_logit else 1, self.vocab_size), np.float32)
        inputs = {"input_ids": ids, "past_length": past} | ({} if self.every_logit else {"input_length": new})
        outputs = {"logits": logits}
        for name, cache in self._cache.items():
            inputs[f"past_key_values.{name}"] = outputs[f"present.{name}"] = cache[row : row + b]
        binding = self._session.io_binding()
        try:
            for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
                for name, array in arrays.items():
                    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise AwqTrtError(f"{self.path}: ONNX Runtime failed: {brief(error)}") from error
        return logits[np.arange(b), np.maximum(new, 1) - 1 if self.every_logit else 0]

    def clear(self, row: int) -> None:
        for cache in self._cache.values():
            cache[row] = 0

    def close(self) -> None:
        self.closed, self._session, self._cache = True, None, {}
