"""Traces a transformers model into an ONNX graph that has the right interface and no weights.

Weights are fake tensors while torch traces, so no model is ever in memory; in the graph they are initializers that have
a name, a shape and a dtype and no data.

A decoder takes and returns its KV cache (kv_cache.py). With a fixed one, padding is on the right, and past_length and
input_length say which tokens are real. With a dynamic one that follows from the attention mask alone: the position of a
token is the number of real tokens before it, so padding may be on either side, and an empty past is a prompt.
"""

from __future__ import annotations

import ast
import logging
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import onnx
import onnx_ir
import torch
import transformers
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.cache_utils import DynamicCache

from awq_trt.checkpoint.model import main_output
from awq_trt.errors import AwqTrtError
from awq_trt.export import kv_cache, rope
from awq_trt.export.kv_cache import KvCache, Pairs
from awq_trt.export.operator import IR_VERSION, OPSET
from awq_trt.export.rewrite import module_path

PREFIX = "model."
"""What the wrappers below put before the names of the model's parameters."""


_TOKENS = {0: "batch_size", 1: "sequence_length"}
_SUMS = {
    "past_sequence_length + sequence_length": "total_sequence_length",
    "sequence_length + past_sequence_length": "total_sequence_length",
}


@dataclass(frozen=True)
class Trace:
    """An ONNX graph and what its empty initializers stand for.

    Attributes:
        model: opset 21, or 24 with a fixed cache; inputs and outputs named, dimensions named batch_size,
            sequence_length and so on.
        weights: initializer name -> every name that parameter has in the model (several where it is tied). The data of
            these initializers are missing.
        cache: of a decoder with a fixed one, else None. decoder: whether it is one.
    """

    model: onnx.ModelProto
    weights: dict[str, tuple[str, ...]]
    cache: KvCache | None = None
    decoder: bool = False


@dataclass(frozen=True)
class DecoderOptions:
    """What a decoder's graph looks like.

    Attributes:
        kv_cache: "fixed" or "dynamic". capacity, prefill_chunk: of a fixed one, see `kv_cache.plan_cache`.
        all_logits: logits of every new token; else, with a fixed cache, of each row's last one only.
    """

    kv_cache: str = "fixed"
    capacity: int | None = None
    prefill_chunk: int | None = None
    all_logits: bool = False

    @property
    def longest(self) -> int:
        """Tokens that a sequence may have as far as the options say; 0 for a cache that grows."""
        return self.capacity or (kv_cache.CAPACITY if self.kv_cache == "fixed" else 0)


@dataclass(frozen=True)
class _Interface:
    """How to call a wrapper: example inputs and which of their dimensions vary; the names of graph inputs and outputs,
    in order, and of their varying dimensions by axis."""

    wrapper: torch.nn.Module
    inputs: tuple[Any, ...]
    dynamic: tuple[Any, ...]
    input_dims: dict[str, dict[int, str]]
    output_dims: dict[str, dict[int, str]]
    cache: KvCache | None = None


class _FixedDecoder(torch.nn.Module):
    """(input_ids, past_length[, input_length], past) -> (logits, present), for a fixed cache.

    Logits of the last real token of each row where there is an input_length, else of all.
    """

    def __init__(self, model: transformers.PreTrainedModel, cache: KvCache) -> None:
        super().__init__()
        self.model, self.cache = model, cache

    def forward(
        self, input_ids: torch.Tensor, past_length: torch.Tensor, input_length: torch.Tensor | None, past: Pairs
    ) -> Any:
        positions = past_length[:, None] + torch.arange(input_ids.shape[1])[None]
        cache = kv_cache.fixed_cache(past, past_length, self.cache)
        # only models that know no attention interface look at it, for its width: a bias for every slot (alibi)
        own = not self.model._supports_attention_backend
        ones = torch.ones(input_ids.shape[0], self.cache.capacity, dtype=torch.long) if own else None
        head = self.model.get_output_embeddings()
        handle = None
        if input_length is not None:
            handle = head.register_forward_pre_hook(lambda _, x: (kv_cache.last_token(x[0], input_length),))
        try:
            output = self.model(
                input_ids=input_ids,
                attention_mask=ones,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
            )
        finally:
            if handle is not None:
                handle.remove()
        return output.logits, [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr]


class _Decoder(torch.nn.Module):
    """(input_ids, attention_mask, past) -> (logits, present): the cache as a flat list of (key, value) per layer."""

    def __init__(self, model: torch.nn.Module, takes_positions: bool) -> None:
        super().__init__()
        self.model, self.takes_positions = model, takes_positions

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: Pairs) -> Any:
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=kv_cache.dynamic_cache(past),
            use_cache=True,
            return_dict=True,
            **({"position_ids": positions} if self.takes_positions else {}),
        )
        return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]


class _Encoder(torch.nn.Module):
    """(main input[, attention_mask]) -> the first of blocks.OUTPUTS that the model has."""

    def __init__(self, model: torch.nn.Module, main: str, output: str) -> None:
        super().__init__()
        self.model, self.main, self.output = model, main, output

    def forward(self, data: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        return self.model(**{self.main: data}, **mask, return_dict=True)[self.output]


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
            decoder = _is_decoder(model)
            interface = _decoder(model, options or DecoderOptions()) if decoder else _encoder(model, dtype)
            fixed = interface.cache is not None
            with kv_cache.fixed_masks() if fixed else nullcontext():
                program = torch.export.export(
                    interface.wrapper, interface.inputs, dynamic_shapes=interface.dynamic, strict=False
                )
            if dtype != torch.bfloat16:
                program = _without_bfloat16(program)
            exported = torch.onnx.export(
                program,
                interface.inputs,
                input_names=list(interface.input_dims),
                output_names=list(interface.output_dims),
                opset_version=kv_cache.OPSET if fixed else OPSET,
                optimize=False,
                verbose=False,
            )
            assert exported is not None
            weights = _weights_to_inputs(exported.model.graph)
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
    return Trace(proto, _inputs_to_initializers(proto.graph, weights, names), interface.cache, decoder)


def _without_bfloat16(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Multiply in fp32 what a model multiplies in bfloat16 all the same (Falcon's alibi), and round the product.

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
    names: dict[int, list[str]] = {}
    for name, tied in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tied), []).append(name)
    fakes: dict[int, torch.nn.Parameter] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    kind = dtype if parameter.is_floating_point() else parameter.dtype
                    if id(parameter) not in fakes:
                        empty = torch.empty(parameter.shape, dtype=kind)
                        fakes[id(parameter)] = torch.nn.Parameter(empty, requires_grad=False)
                    module._parameters[key] = fakes[id(parameter)]
    return {name: tuple(same) for same in names.values() for name in same}


def _is_decoder(model: transformers.PreTrainedModel) -> bool:
    if "decoder_input_ids" in signature(model.forward).parameters:
        raise AwqTrtError(
            f"{type(model).__name__} is an encoder-decoder; only decoders (causal language models) and encoders are "
            "supported (of Whisper, the encoder)."
        )
    if model.can_generate() and "past_key_values" not in signature(model.forward).parameters:
        raise AwqTrtError(
            f"{type(model).__name__} keeps its state in something else than a cache of keys and values (a recurrent "
            "model); only attention caches are supported."
        )
    return bool(model.can_generate())


def _decoder(model: transformers.PreTrainedModel, options: DecoderOptions) -> _Interface:
    if options.kv_cache not in kv_cache.KINDS:
        raise AwqTrtError(f"KV cache {options.kv_cache!r} is not one of {', '.join(kv_cache.KINDS)}.")
    _choose_own_attention(model)
    probe = _probe(model, input_ids=torch.zeros(1, 2, dtype=torch.long), past_key_values=DynamicCache(), use_cache=True)
    layers = getattr(probe.get("past_key_values"), "layers", None) or []
    kept = [x for x in layers if getattr(x, "keys", None) is not None and x.keys.ndim == 4]
    if not kept or len(kept) < len(layers):
        raise AwqTrtError(
            f"{type(model).__name__} does not keep keys and values of every layer in its cache (a recurrent or mixed "
            "model); only attention caches are supported."
        )
    takes_positions = "position_ids" in signature(model.forward).parameters
    if options.kv_cache == "dynamic":
        return _dynamic_decoder(model, kept, takes_positions)
    if not takes_positions or model.get_output_embeddings() is None:
        raise AwqTrtError(
            f"{type(model).__name__} takes no position_ids, or has no output embedding, which a fixed KV cache needs; "
            "use --kv-cache dynamic."
        )
    shapes = [(x.keys.shape[1], x.keys.shape[3], x.values.shape[3]) for x in kept]
    plan = kv_cache.plan_cache(model.config, shapes, options.capacity, options.prefill_chunk)
    return _fixed_decoder(model, kept[0].keys.dtype, plan, options.all_logits)


def _choose_own_attention(model: transformers.PreTrainedModel) -> None:
    """The attention that is traced where a model does not take ours (with a dynamic cache; Falcon in any case).

    Not "eager" for a Falcon with alibi: there transformers 5.23 adds the bias to the mask and to the scores as well.
    """
    if model.config.model_type == "falcon" and model.config.alibi:
        model.config._attn_implementation = "sdpa"  # its setter does not know Falcon
    else:
        model.set_attn_implementation("eager")


def _fixed_decoder(
    model: transformers.PreTrainedModel, dtype: torch.dtype, plan: KvCache, all_logits: bool
) -> _Interface:
    if model._supports_attention_backend:
        model.set_attn_implementation("awq_trt")
    past = [
        (
            torch.zeros(2, x.kv_heads, x.slots, x.head_dim, dtype=dtype),
            torch.zeros(2, x.kv_heads, x.slots, x.value_head_dim, dtype=dtype),
        )
        for x in plan.layers
    ]
    new = min(3, plan.prefill_chunk)
    row = {0: "batch_size"}
    names = _cache_names(len(past))
    return _Interface(
        wrapper=_FixedDecoder(model, plan),
        inputs=(
            torch.zeros(2, new, dtype=torch.long),
            torch.tensor([1, 0]),
            None if all_logits else torch.tensor([new, 1]),
            past,
        ),
        dynamic=(
            _dynamic(_TOKENS),
            _dynamic(row),
            None if all_logits else _dynamic(row),
            [(_dynamic(row), _dynamic(row))] * len(past),
        ),
        input_dims={
            "input_ids": _TOKENS,
            "past_length": row,
            **({} if all_logits else {"input_length": row}),
            **{f"past_key_values.{name}": row for name in names},
        },
        output_dims={"logits": _TOKENS if all_logits else row, **{f"present.{name}": row for name in names}},
        cache=plan,
    )


def _dynamic_decoder(model: transformers.PreTrainedModel, kept: list[Any], takes_positions: bool) -> _Interface:
    past = [
        (torch.zeros(2, *x.keys.shape[1:2], 5, x.keys.shape[3], dtype=x.keys.dtype),
         torch.zeros(2, *x.values.shape[1:2], 5, x.values.shape[3], dtype=x.values.dtype))
        for x in kept
    ]  # fmt: skip
    ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 8, dtype=torch.long)
    cache_dims = {0: "batch_size", 2: "past_sequence_length"}
    present_dims = {0: "batch_size", 2: "total_sequence_length"}
    names = _cache_names(len(past))
    return _Interface(
        wrapper=_Decoder(model, takes_positions),
        inputs=(ids, mask, past),
        dynamic=(_dynamic(_TOKENS), _dynamic(_TOKENS), [(_dynamic(cache_dims), _dynamic(cache_dims))] * len(past)),
        input_dims={
            "input_ids": _TOKENS,
            "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
            **{f"past_key_values.{name}": cache_dims for name in names},
        },
        output_dims={"logits": _TOKENS, **{f"present.{name}": present_dims for name in names}},
    )


def _cache_names(layers: int) -> list[str]:
    return [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]


def _encoder(model: transformers.PreTrainedModel, dtype: torch.dtype) -> _Interface:
    main = model.main_input_name
    if main == "input_ids":
        data, dims = torch.zeros(2, 7, dtype=torch.long), _TOKENS
    elif main == "pixel_values":
        size = model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        data, dims = torch.zeros(2, model.config.num_channels, height, width, dtype=dtype), {0: "batch_size"}
    elif main == "input_features" and hasattr(model.config, "max_source_positions"):
        frames = 2 * model.config.max_source_positions  # Whisper's: every second one is left by its convolutions
        data, dims = torch.zeros(2, model.config.num_mel_bins, frames, dtype=dtype), {0: "batch_size"}
    else:
        raise AwqTrtError(
            f"{type(model).__name__} takes {main!r}; only models of input_ids or pixel_values, and the encoder of "
            "Whisper, are supported."
        )
    masked = main == "input_ids" and "attention_mask" in signature(model.forward).parameters
    mask = {"attention_mask": torch.ones_like(data)} if masked else {}
    output = main_output(_probe(model, **{main: data}, **mask))
    return _Interface(
        wrapper=_Encoder(model, main, output),
        inputs=(data, *mask.values()),
        dynamic=(_dynamic(dims),) * (1 + len(mask)),
        input_dims={main: dims, **dict.fromkeys(mask, dims)},
        output_dims={output: {0: "batch_size"} if output.endswith("_embeds") else dims},
    )


def _dynamic(dims: dict[int, str]) -> dict[int, Any]:
    return dict.fromkeys(dims, torch.export.Dim.DYNAMIC)


def _probe(model: transformers.PreTrainedModel, **inputs: Any) -> Any:
    """The model's outputs for these inputs, as fake tensors: shapes and dtypes only."""
    mode = next(p.fake_mode for p in model.parameters() if isinstance(p, FakeTensor))
    fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with mode, torch.no_grad():
        return model(**fake, return_dict=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks torch makes about optional packages and about its own internals."""
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


def _name_dims(graph: onnx.GraphProto, interface: _Interface) -> None:
    """Replace torch's symbols (s70) by the names of the interface, in every shape of the graph."""
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
    """Name every node by its module, /model/layers.0/mlp/up_proj/MatMul, with the help of torch's notes."""
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
