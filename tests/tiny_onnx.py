"""Small ONNX files with the inputs, dimension names and operator attributes that the exporter writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from awq_trt.export.external_data import ELEM_TYPES, inline
from awq_trt.layout import pack_qweight, pack_scales, pack_zeros
from awq_trt.linear import QuantizedLinear

FLOATS = {torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 64, 4, 2, 16, 64


def node(op: str, inputs: str, outputs: str, name: str = "", **attributes: Any) -> onnx.NodeProto:
    """A node of space-separated names of inputs and outputs."""
    return helper.make_node(op, inputs.split(), outputs.split(), name, **attributes)


def graph_of(path: Path) -> onnx.GraphProto:
    """The graph of a file, without its weights."""
    return onnx.load(path, load_external_data=False).graph


def shapes(values: Any) -> dict[str, list[Any]]:
    """Name -> sizes and names of dimensions."""
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def model_of(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, torch.Tensor],
    *,
    rank: int = 2,
    opset: int = 21,
    k: int = 96,
    n: int = 40,
) -> onnx.ModelProto:
    """X [.., k] -> nodes -> Y [.., n], both of the dtype of the first constant."""
    elem_type, lead = ELEM_TYPES[next(iter(constants.values())).dtype], ["B", "S"][: rank - 1]
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("X", elem_type, [*lead, k])],
        [helper.make_tensor_value_info("Y", elem_type, [*lead, n])],
        [inline(name, value) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def session(model: Path | onnx.ModelProto, disabled: Sequence[str] = ()) -> onnxruntime.InferenceSession:
    """A model in ONNX Runtime, without the optimizers that are disabled."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(source, options, providers, disabled_optimizers=list(disabled))


def run_all(model: onnx.ModelProto, x: torch.Tensor, disabled: Sequence[str] = ()) -> list[torch.Tensor]:
    """Every output of a model with the input X."""
    return [torch.from_numpy(y) for y in session(model, disabled).run(None, {"X": x.numpy()})]


def initializer(name: str, value: np.ndarray | torch.Tensor) -> onnx.TensorProto:
    """An initializer; torch tensors may be fp16 or bf16."""
    if isinstance(value, np.ndarray):
        return numpy_helper.from_array(value, name)
    raw = value.contiguous().view(torch.int16).numpy().tobytes()
    return helper.make_tensor(name, FLOATS[value.dtype], list(value.shape), raw, raw=True)


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Sequence[onnx.TensorProto],
    *,
    external: bool = False,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Write the model; with `external` its weights go to `<path>.data`."""
    graph = helper.make_graph(list(nodes), "tiny", list(inputs), list(outputs), list(weights))
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("awq_trt", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    if metadata is not None:
        helper.set_model_props(model, {"awq_trt": json.dumps(metadata)})
    location = path.name + ".data"
    onnx.save(model, str(path), save_as_external_data=external, location=location, size_threshold=0)
    return path


def decoder(path: Path, **options: Any) -> Path:
    """One attention layer with a KV cache in fp16, the decoder interface of the exporter."""
    fp16, int64 = TensorProto.FLOAT16, TensorProto.INT64
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return initializer(name, (rng.standard_normal(shape) * 0.1).astype(np.float16))

    weights = [weight("embedding", VOCAB, HIDDEN), weight("wo", HIDDEN, VOCAB)]
    weights += [initializer("axes", np.array([1, 2])), initializer("one", np.array(1, np.float16))]
    weights += [initializer("big", np.array(1e4, np.float16)), initializer("merged", np.array([0, 0, HIDDEN]))]
    nodes = [helper.make_node("Gather", ["embedding", "input_ids"], ["x"])]
    for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        weights.append(weight("w" + name, HIDDEN, heads * HEAD_DIM))
        weights.append(initializer(name + "_shape", np.array([0, 0, heads, HEAD_DIM])))
        nodes.append(helper.make_node("MatMul", ["x", "w" + name], [name + "_flat"]))
        nodes.append(helper.make_node("Reshape", [name + "_flat", name + "_shape"], [name + "_split"]))
        nodes.append(helper.make_node("Transpose", [name + "_split"], [name], perm=[0, 2, 1, 3]))
    past, present = "past_key_values.0.", "present.0."
    nodes += [
        helper.make_node("Concat", [past + "key", "k"], [present + "key"], axis=2),
        helper.make_node("Concat", [past + "value", "v"], [present + "value"], axis=2),
        helper.make_node("Cast", ["attention_mask"], ["mask_float"], to=fp16),
        helper.make_node("Sub", ["mask_float", "one"], ["mask_minus"]),
        helper.make_node("Mul", ["mask_minus", "big"], ["mask_flat"]),
        helper.make_node("Unsqueeze", ["mask_flat", "axes"], ["mask"]),
        helper.make_node("Attention", ["q", present + "key", present + "value", "mask"], ["attended"]),
        helper.make_node("Transpose", ["attended"], ["heads_last"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["heads_last", "merged"], ["joined"]),
        helper.make_node("MatMul", ["joined", "wo"], ["logits"]),
    ]
    value = helper.make_tensor_value_info
    inputs = [
        value("input_ids", int64, ["batch_size", "sequence_length"]),
        value("attention_mask", int64, ["batch_size", "total_sequence_length"]),
    ]
    outputs = [value("logits", fp16, ["batch_size", "sequence_length", VOCAB])]
    for kind in ("key", "value"):
        inputs.append(value(past + kind, fp16, ["batch_size", KV_HEADS, "past_sequence_length", HEAD_DIM]))
        outputs.append(value(present + kind, fp16, ["batch_size", KV_HEADS, "total_sequence_length", HEAD_DIM]))
    return save(path, nodes, inputs, outputs, weights, **options)


def fixed_decoder(
    path: Path, *, capacity: int = 64, chunk: int = 16, layers: int = 2, every_logit: bool = False, **facts: Any
) -> Path:
    """Attention layers with a KV cache of fixed capacity in fp16, positions embedded, and the exporter's metadata.

    `facts` are put into the metadata.
    """
    fp16, int64, value = TensorProto.FLOAT16, TensorProto.INT64, helper.make_tensor_value_info
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return initializer(name, (rng.standard_normal(shape) / np.sqrt(shape[0]) * 1.5).astype(np.float16))

    weights = [
        initializer("embedding", rng.standard_normal((VOCAB, HIDDEN)).astype(np.float16)),
        initializer("positions", rng.standard_normal((capacity, HIDDEN)).astype(np.float16)),
        weight("head", HIDDEN, VOCAB),
        *(initializer(f"c{i}", np.array(i)) for i in (0, 1)),
        *(
            initializer(name, np.array(axes))
            for name, axes in (("axes_1", [1]), ("axes_12", [1, 2]), ("axes_13", [1, 3]))
        ),
        initializer("slot", np.arange(capacity)),
        initializer("merged", np.array([0, 0, HEADS * HEAD_DIM])),
    ]
    lines: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Shape", ["input_ids"], "new", {"start": 1, "end": 2}),
        ("Squeeze", ["new"], "new0", {}),
        ("Range", ["c0", "new0", "c1"], "offset", {}),
        ("Unsqueeze", ["past_length", "axes_1"], "past", {}),
        ("Add", ["past", "offset"], "position", {}),  # [batch, new]
        ("Unsqueeze", ["position", "axes_13"], "query_position", {}),
        ("LessOrEqual", ["slot", "query_position"], "mask", {}),  # [batch, 1, new, slots]
        ("Gather", ["embedding", "input_ids"], "token", {}),
        ("Gather", ["positions", "position"], "place", {}),
        ("Add", ["token", "place"], "x0", {}),
    ]
    inputs = [value("input_ids", int64, ["batch_size", "sequence_length"]), value("past_length", int64, ["batch_size"])]
    outputs = [value("logits", fp16, ["batch_size", "sequence_length" if every_logit else 1, VOCAB])]
    for i in range(layers):
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weights.append(weight(f"w{name}{i}", HIDDEN, heads * HEAD_DIM))
            weights.append(initializer(f"{name}{i}_shape", np.array([0, 0, heads, HEAD_DIM])))
            lines.append(("MatMul", [f"x{i}", f"w{name}{i}"], f"{name}{i}_flat", {}))
            lines.append(("Reshape", [f"{name}{i}_flat", f"{name}{i}_shape"], f"{name}{i}_split", {}))
            lines.append(("Transpose", [f"{name}{i}_split"], f"{name}{i}", {"perm": [0, 2, 1, 3]}))
        for name, part in (("k", "key"), ("v", "value")):
            cache = ["batch_size", KV_HEADS, capacity, HEAD_DIM]
            inputs.append(value(f"past_key_values.{i}.{part}", fp16, cache))
            outputs.append(value(f"present.{i}.{part}", fp16, cache))
            scattered = [f"past_key_values.{i}.{part}", f"{name}{i}", "past_length"]
            lines.append(("TensorScatter", scattered, f"present.{i}.{part}", {"axis": 2}))
        weights.append(weight(f"wo{i}", HEADS * HEAD_DIM, HIDDEN))
        lines += [
            ("Attention", [f"q{i}", f"present.{i}.key", f"present.{i}.value", "mask"], f"a{i}_heads", {}),
            ("Transpose", [f"a{i}_heads"], f"a{i}_split", {"perm": [0, 2, 1, 3]}),
            ("Reshape", [f"a{i}_split", "merged"], f"a{i}", {}),
            ("MatMul", [f"a{i}", f"wo{i}"], f"o{i}", {}),
            ("Add", [f"x{i}", f"o{i}"], f"x{i + 1}", {}),
        ]
    if every_logit:
        lines.append(("MatMul", [f"x{layers}", "head"], "logits", {}))
    else:
        inputs.insert(2, value("input_length", int64, ["batch_size"]))
        lines += [
            ("Max", ["input_length", "c1"], "length", {}),
            ("Sub", ["length", "c1"], "last", {}),
            ("Unsqueeze", ["last", "axes_12"], "last_index", {}),
            ("GatherND", [f"x{layers}", "last_index"], "last_x", {"batch_dims": 1}),
            ("MatMul", ["last_x", "head"], "logits", {}),
        ]
    nodes = [helper.make_node(op, of, [to], name=to, **attributes) for op, of, to, attributes in lines]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    layer = {"kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "value_head_dim": HEAD_DIM, "slots": capacity, "window": None}
    sizes = {"capacity": capacity, "prefill_chunk": chunk, "dtype": "float16", "layers": [layer] * layers}
    known = {
        "model_type": "tiny",
        "kv_cache": {"kind": "fixed", **sizes},
        "logits": "all" if every_logit else "last",
        "vocab_size": VOCAB,
        "generation": {"eos_token_id": [0], "bos_token_id": None, "pad_token_id": None},
        "tokenizer": None,
    }
    helper.set_model_props(model, {"awq_trt": json.dumps(known | facts)})
    onnx.save(model, str(path))
    return path


def quantized(
    path: Path,
    *,
    n: int = 64,
    k: int = 256,
    group_size: int = 64,
    dtype: torch.dtype = torch.float16,
    zeros: bool = True,
    bias: bool = False,
    pre_scale: bool = False,
    splits: Sequence[int] = (),
    layers: int = 1,
    change: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """`layers` W4A16Gemm nodes side by side on one input X [batch_size, sequence_length, k], random weights.

    With `splits`, whose sum is n, each has an output for every entry: y_0_0, y_0_1, ... instead of y_0.
    `change` overrides attributes of the nodes; None removes one.
    """
    rng = np.random.default_rng(1)
    groups = k // group_size
    nodes, outputs, weights = [], [], []
    for i in range(layers):
        parts: dict[str, np.ndarray | torch.Tensor] = {
            "qweight": pack_qweight(torch.from_numpy(rng.integers(0, 16, (n, k), np.uint8))).numpy(),
            "scales": pack_scales(torch.rand(n, groups).to(dtype)),
        }
        if zeros:
            parts["zeros"] = pack_zeros(torch.from_numpy(rng.integers(0, 16, (n, groups), np.uint8))).numpy()
        if bias:
            parts["bias"] = torch.rand(n).to(dtype)
        if pre_scale:
            parts["pre_scale"] = torch.rand(k).to(dtype)
        weights += [initializer(f"{name}_{i}", value) for name, value in parts.items()]
        attributes = {
            "out_features": n,
            "in_features": k,
            "group_size": group_size,
            "has_zeros": int(zeros),
            "has_bias": int(bias),
            "has_pre_scale": int(pre_scale),
            "plugin_version": "1",
            "plugin_namespace": "",
        }
        if splits:
            attributes["splits"] = splits
        attributes = {key: v for key, v in (attributes | (change or {})).items() if v is not None}
        results = {f"y_{i}_{j}": width for j, width in enumerate(splits)} or {f"y_{i}": n}
        names = ["x", *(f"{name}_{i}" for name in parts)]
        nodes.append(
            helper.make_node("W4A16Gemm", names, list(results), name=f"linear_{i}", domain="awq_trt", **attributes)
        )
        for name, width in results.items():
            shape = ["batch_size", "sequence_length", width]
            outputs.append(helper.make_tensor_value_info(name, FLOATS[dtype], shape))
    x = helper.make_tensor_value_info("x", FLOATS[dtype], ["batch_size", "sequence_length", k])
    return save(path, nodes, [x], outputs, weights, **options)


def random_linear(
    n: int,
    k: int,
    group: int,
    *,
    zeros: bool,
    pre_scale: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    return QuantizedLinear(
        torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator),
        (torch.rand(n, k // group, generator=generator) * 0.01 + 0.001).to(dtype),
        torch.randint(0, 16, (n, k // group), dtype=torch.uint8, generator=generator) if zeros else None,
        group,
        (torch.rand(k, generator=generator) + 0.5).to(dtype) if pre_scale else None,
    )
