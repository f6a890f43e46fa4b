"""Traces a transformers model into an ONNX graph that has the right interface (interface.py) and no weights.

Weights are fake tensors while torch traces, so no model is ever in memory; in the graph they are initializers that have
a name, a shape and a dtype and no data.
"""

from __future__ import annotations

import ast
import logging
import re
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir
import torch
import transformers
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from awq_trt.errors import AwqTrtError
from awq_trt.export import kv_cache, rope
from awq_trt.export.interface import DecoderOptions, Interface, arguments, interface_of
from awq_trt.export.kv_cache import KvCache
from awq_trt.export.operator import IR_VERSION, OPSET
from awq_trt.export.rewrite import module_path

PREFIX = "model."
"""What the modules of interface.py put before the names of the model's parameters."""

_SUMS = {
    "past_sequence_length + sequence_length": "total_sequence_length",
    "sequence_length + past_sequence_length": "total_sequence_length",
}


@dataclass(frozen=True)
class Trace:
    """An ONNX graph and the parameters that its initializers stand for."""

    model: (
        onnx.ModelProto
    )  # opset 21, or 24 with a fixed cache; inputs, outputs and dynamic dimensions have their names
    weights: dict[
        str, tuple[str, ...]
    ]  # initializer without data -> the parameter's names in the model, several if tied
    cache: KvCache | None = None  # of a decoder with a fixed one
    decoder: bool = False


def trace(model: transformers.PreTrainedModel, dtype: torch.dtype, options: DecoderOptions | None = None) -> Trace:
    """Export a model with empty weights.

    Args:
        model: parameters on any device (meta, usually), buffers with their values; its parameters are replaced.
        dtype: of floating-point parameters and of the KV cache. options: for decoders.

    Raises:
        AwqTrtError: torch cannot trace the model or has no ONNX form of an operator; says which and where.
    """
    attention = model.config._attn_implementation
    try:
        with _quiet():
            rope.freeze(model)
            names = _fake_parameters(model, dtype)
            interface = interface_of(model, dtype, options or DecoderOptions())
            inputs = arguments(interface.inputs)
            dynamic = {
                name: dict.fromkeys(dims, torch.export.Dim.DYNAMIC) for name, dims in interface.input_dims.items()
            }
            dynamic_shapes = arguments({name: dynamic.get(name) for name in interface.inputs})
            fixed = interface.cache is not None
            with kv_cache.fixed_masks() if fixed else nullcontext():
                program = torch.export.export(interface.module, inputs, dynamic_shapes=dynamic_shapes, strict=False)
            if dtype != torch.bfloat16:
                program = _without_bfloat16(program)
            exported = torch.onnx.export(
                program,
                inputs,
                input_names=list(interface.input_dims),
                output_names=list(interface.output_dims),
                opset_version=kv_cache.OPSET if fixed else OPSET,
                optimize=False,
                verbose=False,
            )
            assert exported is not None
            weights = _weights_to_inputs(exported.model.graph)
            if others := sorted({weight.removeprefix(PREFIX) for weight in weights} - {*names}):
                raise AwqTrtError(
                    f"{type(model).__name__} computes with {others[0]}, which is neither a parameter nor a buffer of "
                    "it and so has no values before the model runs; such models cannot be exported."
                )
            _simplify(exported.model)
            proto = onnx_ir.to_proto(exported.model)
    except AwqTrtError:
        raise
    except Exception as error:
        raise AwqTrtError(f"{type(model).__name__} could not be turned into an ONNX graph: {_reason(error)}") from error
    finally:
        model.set_attn_implementation(attention)  # the configuration is the caller's
        model.config._attn_implementation = attention
    _name_dims(proto.graph, interface)
    _name_nodes(proto.graph)
    proto.ir_version = IR_VERSION
    weight_names = _inputs_to_initializers(proto.graph, weights, names)
    return Trace(proto, weight_names, interface.cache, interface.decoder)


def _without_bfloat16(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Multiply in fp32 and round the product where an fp16 model multiplies in bfloat16 (Falcon's alibi).

    The values stay what they are, and ONNX Runtime's CPU provider, which has no bfloat16 kernels, can run the graph.
    """
    values = [node.meta.get("val") for node in program.graph.nodes]
    if not any(isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 for value in values):
        return program

    def multiply(a: torch.Tensor, b: torch.Tensor) -> Any:
        if torch.result_type(a, b) != torch.bfloat16:
            return NotImplemented
        return (a.bfloat16().float() * b.bfloat16().float()).bfloat16()

    return program.run_decompositions({torch.ops.aten.mul.Tensor: multiply})


def _fake_parameters(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, tuple[str, ...]]:
    """Replace every parameter by a fake one on the CPU; returns parameter name -> all names of that parameter."""
    names: defaultdict[torch.nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for parameter, tied in names.items():
            empty = torch.empty(parameter.shape, dtype=dtype if parameter.is_floating_point() else parameter.dtype)
            fake = torch.nn.Parameter(empty, requires_grad=False)
            for name in tied:
                module, _, key = name.rpartition(".")
                model.get_submodule(module)._parameters[key] = fake
    return {name: tuple(tied) for tied in names.values() for name in tied}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warnings about optional packages and its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _weights_to_inputs(graph: onnx_ir.Graph) -> list[str]:
    """Make graph inputs of the weights (fake tensors): the optimizer folds constants, and these have no values."""
    weights = []
    for name, value in list(graph.initializers.items()):
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            del graph.initializers[name]
            value.const_value = None
            graph.inputs.append(value)
            weights.append(name)
    return weights


def _simplify(model: onnx_ir.Model) -> None:
    """What torch's `ONNXProgram.optimize` does, but for its rewrite rules: they take nine tenths of its time and change
    next to nothing in a transformer.
    """
    common.InlinePass()(model)
    fold_constants(model, onnx_shape_inference=True)
    for simplify in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        simplify(model)


def _inputs_to_initializers(
    graph: onnx.GraphProto, weights: list[str], names: dict[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Make the weights initializers without data, under the first of their names; drop those that no node reads."""
    used = {i for node in graph.node for i in node.input}
    renamed = {}
    inputs = {value.name: value for value in graph.input}
    for weight in weights:
        value = inputs.pop(weight)
        if weight in used:
            tied = names[weight.removeprefix(PREFIX)]
            renamed[weight] = tied[0]
            graph.initializer.add(
                name=tied[0],
                dims=[d.dim_value for d in value.type.tensor_type.shape.dim],
                data_type=value.type.tensor_type.elem_type,
                data_location=onnx.TensorProto.EXTERNAL,
            )
    kept = list(inputs.values())
    del graph.input[:]
    graph.input.extend(kept)
    for node in graph.node:
        node.input[:] = [renamed.get(i, i) for i in node.input]
    return {name: names[name] for name in renamed.values()}


def _name_dims(graph: onnx.GraphProto, interface: Interface) -> None:
    """Replace torch's symbols (s70) by the names of dynamic dimensions, in every shape of the graph."""
    symbols: dict[str, str] = {}
    for value in graph.input:
        for axis, name in interface.input_dims.get(value.name, {}).items():
            symbols.setdefault(value.type.tensor_type.shape.dim[axis].dim_param, name)
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if given := interface.output_dims.get(value.name, {}).get(axis):
                dim.dim_param = given
            elif dim.dim_param:
                text = re.sub(r"\w+", lambda m: symbols.get(m[0], m[0]), dim.dim_param)
                dim.dim_param = _SUMS.get(text, text)


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Name every node by its module, /model/layers.0/mlp/up_proj/MatMul, from the scopes that torch notes in it."""
    seen: Counter[str] = Counter()
    for node in graph.node:
        notes = {p.key: p.value for p in node.metadata_props}
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
        scope = scopes[-2] if len(scopes) > 1 and not scopes[0] else ""  # others are torch's own, not of the model
        path = f"{module_path(f'{scope}.'.removeprefix(PREFIX).rstrip('.'))}/{node.op_type}"
        seen[path] += 1
        node.name = path if seen[path] == 1 else f"{path}_{seen[path] - 1}"
    for tensor in graph.initializer:
        del tensor.metadata_props[:]  # the rewriter drops the notes of everything else


def _reason(error: BaseException) -> str:
    """The root of a chain of exceptions in one line, with the last line of model code that was running."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    frames = [f for e in chain for f in traceback.extract_tb(e.__traceback__) if "/models/" in f.filename]
    text = " ".join(str(chain[-1]).split())
    message = f"{type(chain[-1]).__name__}: {text[:500]}"
    if frames:
        message += f" (in {'/'.join(frames[-1].filename.split('/')[-2:])}, line {frames[-1].lineno}: {frames[-1].line})"
    return message
