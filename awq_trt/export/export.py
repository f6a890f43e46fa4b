"""A quantized checkpoint in; model.onnx and model.onnx.data out.

The graph is traced without weights (trace.py), its quantized layers are replaced (rewrite.py), and only then the
weights are read, one tensor at a time, and written once. The fp16 form of a quantized weight is never made.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import torch

from awq_trt.checkpoint.directory import local_path
from awq_trt.checkpoint.model import empty_model, persistent_buffers
from awq_trt.checkpoint.quantized import QuantizedCheckpoint, open_quantized
from awq_trt.errors import AwqTrtError
from awq_trt.export.exportable import EarlyTrace
from awq_trt.export.external_data import TORCH_DTYPES, DataFile, Read, values
from awq_trt.export.interface import DecoderOptions
from awq_trt.export.kv_cache import KvCache
from awq_trt.export.metadata import METADATA_KEY, PRODUCER, data_path, output
from awq_trt.export.rewrite import FusedNode, QuantizedNode, rewrite
from awq_trt.export.rope import resolve_longrope
from awq_trt.export.trace import Trace, trace
from awq_trt.layout import DTYPES
from awq_trt.linear import QuantizedLinear
from awq_trt.publishing import check_outputs, publishing

Progress = Callable[[str, int, int], None]
"""(what is going on, steps done, steps in all)"""
Check = Callable[[Path], None]
"""Is called with the ONNX file before it is where it belongs; raises where it must not get there."""


@dataclass(frozen=True)
class OnnxReport:
    """What was written."""

    path: Path  # the graph
    data_path: Path  # its weights, beside it
    format: str  # "plugin" or "qdq"
    dtype: str  # "float16" or "bfloat16"
    quantized: tuple[QuantizedNode, ...]  # the INT4 layers of the graph
    fused: tuple[FusedNode, ...]  # the nodes that compute several of them
    left_in_float: dict[str, str]  # module -> why it is not INT4
    onnx_bytes: int
    data_bytes: int
    cache: KvCache | None = None  # of a decoder with a fixed one


def export_onnx(
    quantized_dir: str | Path,
    onnx_path: str | Path,
    *,
    format: str = "plugin",
    dtype: str | None = None,
    fuse: bool = True,
    decoder: DecoderOptions | None = None,
    check: Check | None = None,
    progress: Progress | None = None,
    early: EarlyTrace | None = None,
) -> OnnxReport:
    """Export a quantized checkpoint to ONNX.

    Args:
        quantized_dir: what quantized_checkpoint wrote. onnx_path: file to write; the weights go to `<onnx_path>.data`.
        format: "plugin" (W4A16Gemm nodes, for TensorRT and, through their functions, ONNX Runtime) or "qdq"
            (DequantizeLinear, portable). dtype: "float16" or "bfloat16"; None takes that of the scales.
        fuse: in format "plugin", one node for quantized layers that read the same tensor (see rewrite.py).
        decoder: form and size of the KV cache, and of which tokens there are logits; None takes the defaults.
        check: sees the file, its data beside it, before anything of an older one is replaced (`verify`).
        progress: called now and then. early: what `check_exportable` returned before the model was quantized.

    Raises:
        AwqTrtError: the model cannot be exported (says where), tensors are missing, the disk is full; or something
            would be lost at `onnx_path`, or another run writes there. Then nothing is written.
    """
    source = open_quantized(quantized_dir)
    tokenizer = None if source.tokenizer is None else local_path(quantized_dir)
    return export_quantized(
        source,
        onnx_path,
        format=format,
        dtype=dtype,
        fuse=fuse,
        decoder=decoder,
        tokenizer=tokenizer,
        sources=(Path(quantized_dir),),
        check=check,
        progress=progress,
        early=early,
    )


def export_quantized(
    source: QuantizedCheckpoint,
    onnx_path: str | Path,
    *,
    format: str = "plugin",
    dtype: str | None = None,
    fuse: bool = True,
    decoder: DecoderOptions | None = None,
    tokenizer: Path | None = None,
    sources: Sequence[Path] = (),
    check: Check | None = None,
    progress: Progress | None = None,
    early: EarlyTrace | None = None,
) -> OnnxReport:
    """`export_onnx` of an open checkpoint.

    Args:
        tokenizer: directory to note for those who run the file. sources: what must not be lost, see outputs.py.
    """
    path, options = Path(onnx_path), decoder or DecoderOptions()
    check_outputs([output(path)], sources)
    progress = progress or (lambda what, done, total: None)
    if dtype is None:
        first = next(iter(source.linears.values()), None)
        dtype = "float16" if first is None else str(first.scales.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise AwqTrtError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    config = resolve_longrope(source.config, options.longest)
    known = None if early is None else early.of(config, DTYPES[dtype], options)
    model = empty_model(config, attn_implementation="eager")
    _load_buffers(model, source, DTYPES[dtype])
    progress("Tracing the model", 0, 1)
    traced = known or trace(model, DTYPES[dtype], options)
    progress("Tracing the model", 1, 1)
    layers, unused = _layers_of(source, traced, model)
    left = {**source.left_in_float, **unused}
    with publishing(output(path), sources) as (path_tmp, data_tmp):
        with data_tmp.open("wb") as file:
            data = DataFile(file, data_path(path).name)
            linears = _Linears(source.linears, layers, DTYPES[dtype], progress)
            read = _reader(source, traced)
            proto, quantized, fused = rewrite(
                traced.model, linears, format=format, fuse=fuse, store=data.store, read=read
            )
            empty = [tensor for tensor in proto.graph.initializer if tensor.name in traced.weights]
            for i, tensor in enumerate(empty):
                tensor.CopyFrom(data.store(tensor.name, read(tensor)))
                progress("Writing the other weights", i + 1, len(empty))
        facts = {
            "version": metadata.version("awq_trt"),
            "format": format,
            "dtype": dtype,
            "model_type": source.config.model_type,
            "max_positions": _positions(model) if model.main_input_name == "input_ids" else None,
            **(_decoder_facts(source, traced, options, dtype) if traced.decoder else {}),
            "tokenizer": None if tokenizer is None else os.path.relpath(tokenizer.resolve(), path.parent.resolve()),
            "quantized": [asdict(node) for node in quantized],
            "fused": [asdict(node) for node in fused],
            "left_in_float": left,
            "data": data.facts,
        }
        proto.metadata_props.add(key=METADATA_KEY, value=json.dumps(facts))
        proto.producer_name, proto.producer_version = PRODUCER, facts["version"]
        path_tmp.write_bytes(proto.SerializeToString())
        sizes = path_tmp.stat().st_size, data_tmp.stat().st_size
        if check is not None:
            check(path_tmp)
    return OnnxReport(path, data_path(path), format, dtype, tuple(quantized), tuple(fused), left, *sizes, traced.cache)


class _Linears(Mapping[str, QuantizedLinear]):
    """Initializer -> layer in the dtype of the graph, read when asked for and not kept."""

    def __init__(
        self, linears: Mapping[str, QuantizedLinear], layers: dict[str, str], dtype: torch.dtype, progress: Progress
    ) -> None:
        self.linears, self.layers, self.dtype, self.progress, self.done = linears, layers, dtype, progress, 0

    def __getitem__(self, weight: str) -> QuantizedLinear:
        self.done += 1
        self.progress("Packing INT4 weights", self.done, len(self))
        linear = self.linears[self.layers[weight]]
        scale = None if linear.pre_scale is None else linear.pre_scale.to(self.dtype)
        return replace(linear, scales=linear.scales.to(self.dtype), pre_scale=scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def _positions(model: torch.nn.Module) -> int | None:
    """Tokens that a table of learned positions has room for, the first rows that some models leave unused taken off."""
    tables = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding) and re.search("pos|wpe", n)]
    unused = [getattr(m, "offset", 0) if m.padding_idx is None else m.padding_idx + 1 for m in tables]
    return min((m.num_embeddings - rows for m, rows in zip(tables, unused, strict=True)), default=None)


def _load_buffers(model: torch.nn.Module, source: QuantizedCheckpoint, dtype: torch.dtype) -> None:
    """Give the buffers that the checkpoint stores (running means, say) its values; the others hold theirs already."""
    for name in persistent_buffers(model):
        parent, _, key = name.rpartition(".")
        try:
            value = source.tensor(name)
        except AwqTrtError:  # tables such as position_ids, which older checkpoints have and newer ones leave out
            continue
        model.get_submodule(parent)._buffers[key] = value.to(dtype) if value.is_floating_point() else value


def _layers_of(
    source: QuantizedCheckpoint, traced: Trace, model: torch.nn.Module
) -> tuple[dict[str, str], dict[str, str]]:
    """Initializer -> quantized layer, and layer -> reason for those that the graph does not compute."""
    initializers = {name: initializer for initializer, tied in traced.weights.items() for name in tied}
    unused = [layer for layer in source.linears if f"{layer}.weight" not in initializers]
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if foreign := [layer for layer in unused if f"{layer}.weight" not in known]:
        raise AwqTrtError(
            f"quantized layer {foreign[0]} is not a layer of {type(model).__name__}; config.json and the weights "
            "belong to different models."
        )
    layers = {initializers[f"{x}.weight"]: x for x in source.linears if x not in unused}
    return layers, dict.fromkeys(unused, "no output of the exported graph depends on it")


def _reader(source: QuantizedCheckpoint, traced: Trace) -> Read:
    """Values of the traced graph's initializers: weights from the checkpoint, what torch computed from the graph."""

    def read(initializer: onnx.TensorProto) -> torch.Tensor:
        if initializer.name not in traced.weights:
            return values(initializer)
        value = source.tensor(traced.weights[initializer.name][0])
        if list(value.shape) != list(initializer.dims):
            raise AwqTrtError(
                f"tensor {initializer.name} is {list(value.shape)} in the checkpoint and {list(initializer.dims)} in "
                "the model of its config.json; they belong to different models."
            )
        return value.to(TORCH_DTYPES[initializer.data_type])

    return read


def _decoder_facts(source: QuantizedCheckpoint, traced: Trace, options: DecoderOptions, dtype: str) -> dict[str, Any]:
    """What a runtime must know to generate with a decoder."""
    logits = next(output for output in traced.model.graph.output if output.name == "logits")
    cache = {"kind": "dynamic"} if traced.cache is None else {"kind": "fixed", "dtype": dtype, **asdict(traced.cache)}
    return {
        "kv_cache": cache,
        "logits": "all" if traced.cache is None or options.all_logits else "last",
        "vocab_size": logits.type.tensor_type.shape.dim[-1].dim_value,
        "generation": dict(source.generation),
    }
