"""Opening an exported decoder, as an ONNX file or as a TensorRT plan."""

from __future__ import annotations

from pathlib import Path

from awq_trt.engine.sidecar import path_of, read_sidecar
from awq_trt.errors import AwqTrtError
from awq_trt.export.metadata import read_graph
from awq_trt.serve.decoder import Decoder


def open_decoder(path: str | Path, *, max_batch: int | None = None, threads: int | None = None) -> Decoder:
    """Load an exported decoder.

    Args:
        path: .onnx runs in ONNX Runtime on the CPU, a plan in the TensorRT that built it, on the GPU.
        max_batch: rows of the cache; None is 4 for ONNX, and what the plan was built for.
        threads: of ONNX Runtime; None is one for each core.

    Raises:
        AwqTrtError: no such file, not a decoder with a fixed cache, nothing to run it with, no GPU.
    """
    path = Path(path)
    if not path.is_file():
        raise AwqTrtError(f"{path}: no such file. Give an .onnx file or a plan that awq_trt exported.")
    if path.suffix == ".onnx":
        from awq_trt.serve.ort import OrtDecoder

        rows = 4 if max_batch is None else max_batch
        return OrtDecoder(path, read_graph(path).metadata, max_batch=rows, threads=threads)
    from awq_trt.serve.tensorrt import TensorRtDecoder

    return TensorRtDecoder(path, read_sidecar(path_of(path)), max_batch=max_batch)
