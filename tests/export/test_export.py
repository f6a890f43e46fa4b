"""Whole models: every logit against the eager model, the KV cache, what is on disk, what is left after a failure.

Tolerance: the reference is the eager model in fp32 with the very same rounded weights; the eager model in fp16 makes as
many roundings as the ONNX file, so the file may be off by no more than three times what that model is off by.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from random_models import Model
from tiny_onnx import graph_of, session, shapes

from awq_trt.errors import AwqTrtError
from awq_trt.evaluate.verify import onnx_session, run_onnx
from awq_trt.export import export
from awq_trt.export import trace as trace_module
from awq_trt.export.export import OnnxReport, export_quantized
from awq_trt.export.external_data import DataFile
from awq_trt.export.fp32 import float32_copy
from awq_trt.export.interface import DecoderOptions
from awq_trt.export.metadata import read_graph
from awq_trt.linear import quantize_weight


@pytest.fixture(scope="module", autouse=True)
def traces() -> Iterator[None]:
    """Tracing takes seconds and depends on nothing but configuration and dtype: do it once for each."""
    known: dict[tuple[str, torch.dtype, DecoderOptions], Any] = {}

    def trace(model: transformers.PreTrainedModel, dtype: torch.dtype, options: DecoderOptions) -> trace_module.Trace:
        key = (model.config.to_json_string(), dtype, options)
        if key not in known:
            known[key] = trace_module.trace(model, dtype, options)
        return known[key]

    patch = pytest.MonkeyPatch()
    patch.setattr(export, "trace", trace)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Model, OnnxReport]]:
    known: dict[tuple[str, str], tuple[Model, OnnxReport]] = {}

    def export(kind: str, format: str) -> tuple[Model, OnnxReport]:
        if (kind, format) not in known:
            model = Model(kind)
            path = tmp_path_factory.mktemp(f"{kind}_{format}") / "model.onnx"
            known[kind, format] = model, export_dynamic(model, path, format=format)
        return known[kind, format]

    return export


Exported = Callable[[str, str], tuple[Model, OnnxReport]]


def export_dynamic(model: Model, path: Path, **options: Any) -> OnnxReport:
    """With the growing cache; the fixed one has its own tests (test_kv_cache.py)."""
    return export_quantized(model, path, decoder=DecoderOptions("dynamic"), **options)


def run_decoder(
    ort: onnxruntime.InferenceSession, ids: torch.Tensor, mask: torch.Tensor, past: dict[str, np.ndarray] | None = None
) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """Logits and the cache for the next step; an empty cache where `past` is None."""
    caches = [i for i in ort.get_inputs() if i.name.startswith("past_key_values.")]
    if past is None:
        past = {i.name: np.zeros((len(ids), i.shape[1], 0, i.shape[3]), np.float16) for i in caches}
    outputs = ort.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), **past})
    present = dict(zip((i.name for i in caches), outputs[1:], strict=True))
    return torch.from_numpy(outputs[0]).float(), present


def tolerance(model: Model, reference: torch.Tensor, **inputs: torch.Tensor) -> float:
    return 3 * float((model.logits(torch.float16, **inputs) - reference).abs().max())


@pytest.mark.parametrize("format", ["plugin", "qdq"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt2"])
def test_decoder_gives_the_logits_of_the_eager_model(exported: Exported, kind: str, format: str) -> None:
    model, report = exported(kind, format)
    ids = torch.randint(0, 96, (2, 9))
    reference = model.logits(input_ids=ids)
    logits, _ = run_decoder(session(report.path), ids, torch.ones_like(ids))
    limit = tolerance(model, reference, input_ids=ids)
    assert (logits - reference).abs().max() <= limit
    with torch.no_grad():  # the comparison would notice a wrong weight
        unrounded = model.unquantized(input_ids=ids).logits
    assert (unrounded - reference).abs().max() > 5 * limit


@pytest.mark.parametrize("format", ["plugin", "qdq"])
def test_encoders_give_the_logits_of_the_eager_model(exported: Exported, format: str) -> None:
    bert, report = exported("bert", format)
    ids, mask = torch.randint(0, 96, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    reference = bert.logits(input_ids=ids, attention_mask=mask)
    limit = tolerance(bert, reference, input_ids=ids, attention_mask=mask)
    (logits,) = session(report.path).run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    assert np.abs(logits - reference.numpy()).max() <= limit
    ignoring = bert.logits(input_ids=ids)
    assert (ignoring - reference)[1].abs().max() > 5 * limit

    vit, report = exported("vit", format)
    pixels = torch.randn(3, 3, 32, 32).half().float()
    reference = vit.logits(pixel_values=pixels)
    (logits,) = session(report.path).run(["logits"], {"pixel_values": pixels.half().numpy()})
    assert np.abs(logits - reference.numpy()).max() <= tolerance(vit, reference, pixel_values=pixels)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_cache_padding_and_ragged_batch(exported: Exported, kind: str, side: str) -> None:
    """Prompts of 7, 4 and 1 tokens, padded, then four tokens one by one: as if every sequence had run alone."""
    model, report = exported(kind, "plugin")
    ort = session(report.path)
    lengths, steps = (7, 4, 1), 4
    sequences = [torch.randint(0, 96, (1, n + steps)) for n in lengths]
    references = [model.logits(input_ids=s)[0] for s in sequences]
    limit = max(tolerance(model, r, input_ids=s) for r, s in zip(references, sequences, strict=True))
    ids, mask = torch.zeros(3, 7, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64)
    spans = [slice(7 - n, 7) if side == "left" else slice(0, n) for n in lengths]
    for row, (sequence, span, n) in enumerate(zip(sequences, spans, lengths, strict=True)):
        ids[row, span], mask[row, span] = sequence[0, :n], 1
    logits, cache = run_decoder(ort, ids, mask)
    assert torch.isfinite(logits).all()
    for row, (reference, span, n) in enumerate(zip(references, spans, lengths, strict=True)):
        assert (logits[row, span] - reference[:n]).abs().max() <= limit
    if kind == "mistral" and side == "right":
        return  # a window counts cache slots, so padding in the middle takes room in it, in transformers as well
    for step in range(steps):
        ids = torch.cat([s[:, n + step, None] for s, n in zip(sequences, lengths, strict=True)])
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], 1)
        logits, cache = run_decoder(ort, ids, mask, cache)
        for row, (reference, n) in enumerate(zip(references, lengths, strict=True)):
            assert (logits[row, 0] - reference[n + step]).abs().max() <= limit, (row, step)


def test_one_token_alone_and_prompt_in_two_parts(exported: Exported) -> None:
    """Sizes 0 and 1, which torch likes to build in: batch 1, one token, no past; and a past with several new tokens."""
    model, report = exported("llama", "plugin")
    ort = session(report.path)
    ids = torch.randint(0, 96, (1, 8))
    reference = model.logits(input_ids=ids)
    limit = tolerance(model, reference, input_ids=ids)
    first, cache = run_decoder(ort, ids[:, :1], torch.ones(1, 1, dtype=torch.int64))
    rest, cache = run_decoder(ort, ids[:, 1:], torch.ones(1, 8, dtype=torch.int64), cache)
    assert (torch.cat([first, rest], 1) - reference).abs().max() <= limit
    assert cache["past_key_values.1.value"].shape == (1, 2, 8, 16)


def test_interface_is_named(exported: Exported) -> None:
    graph = graph_of(exported("llama", "plugin")[1].path)
    past, total = "past_sequence_length", "total_sequence_length"
    assert shapes(graph.input) == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", total],
        **{f"past_key_values.{i}.{p}": ["batch_size", 2, past, 16] for i in (0, 1) for p in ("key", "value")},
    }
    assert shapes(graph.output) == {
        "logits": ["batch_size", "sequence_length", 96],
        **{f"present.{i}.{p}": ["batch_size", 2, total, 16] for i in (0, 1) for p in ("key", "value")},
    }
    assert {v.type.tensor_type.elem_type for v in graph.input[2:]} == {onnx.TensorProto.FLOAT16}
    symbols = {d for shape in shapes(graph.value_info).values() for d in shape if isinstance(d, str)}
    assert symbols <= {"batch_size", "sequence_length", total, past}
    bert, vit = (graph_of(exported(kind, "plugin")[1].path) for kind in ("bert", "vit"))
    tokens = ["batch_size", "sequence_length"]
    assert shapes(bert.input) == {"input_ids": tokens, "attention_mask": tokens}
    assert shapes(bert.output) == {"logits": [*tokens, 96]}
    assert shapes(vit.input) == {"pixel_values": ["batch_size", 3, 32, 32]}
    assert shapes(vit.output) == {"logits": ["batch_size", 10]}


def test_nodes_are_named_by_their_modules(exported: Exported) -> None:
    graph = graph_of(exported("llama", "plugin")[1].path)
    names = [n.name for n in graph.node]
    assert len(set(names)) == len(names)
    gemms = [n.name for n in graph.node if n.op_type == "W4A16Gemm"]
    assert gemms[:2] == ["/model/layers.0/self_attn/q_proj+v_proj", "/model/layers.0/self_attn/k_proj"]
    assert len(gemms) == 12
    assert "/model/layers.1/post_attention_layernorm/ReduceMean" in names
    assert str(Path(transformers.__file__).parent) not in exported("llama", "plugin")[1].path.read_bytes().decode(
        "latin1"
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "bert", "vit"])
def test_every_layer_and_bias_is_in_its_node(exported: Exported, kind: str) -> None:
    model, report = exported(kind, "plugin")
    onnx.checker.check_model(str(report.path), full_check=True)
    graph = graph_of(report.path)
    nodes = {n.name: n for n in graph.node if n.op_type == "W4A16Gemm"}
    assert [q.name for q in report.quantized] == list(model.linears)
    assert len(nodes) == len(model.linears) - sum(len(node.layers) - 1 for node in report.fused)
    for fused in report.fused:
        assert len(nodes[fused.name].output) == len(fused.layers)
    for layer in report.quantized:
        assert layer.bias == (model.eager.get_submodule(layer.name).bias is not None), layer.name
    facts = json.loads(
        {p.key: p.value for p in onnx.load(report.path, load_external_data=False).metadata_props}["awq_trt"]
    )
    assert (facts["format"], facts["dtype"], facts["model_type"]) == ("plugin", "float16", model.config.model_type)
    assert facts["left_in_float"] == model.left_in_float
    assert facts["fused"] == json.loads(json.dumps([asdict(node) for node in report.fused]))
    assert facts["quantized"][0] == {
        "name": report.quantized[0].name,
        "n": model.linears[report.quantized[0].name].q.shape[0],
        "k": 64,
        "group_size": report.quantized[0].group_size,
        "zeros": True,
        "bias": report.quantized[0].bias,
        "pre_scale": False,
    }


@pytest.mark.parametrize("kind", ["llama", "qwen2", "bert"])
def test_layers_on_one_tensor_are_one_node_with_the_same_bits(tmp_path: Path, kind: str) -> None:
    """Grouped-query attention, biases, and an encoder; unpacking once and in every run."""
    model = Model(kind)
    for i, name in enumerate(model.linears):
        weight = model.state[f"{name}.weight"].float()
        model.linears[name] = quantize_weight(weight, 32, symmetric=False, dtype=torch.float16)
        if kind == "llama" and i < 7:  # the first block has scales that were not folded, one for each input
            scale = torch.linspace(0.5, 1.5, weight.shape[1]).half()
            model.linears[name] = replace(model.linears[name], pre_scale=scale)
    fused = export_dynamic(model, tmp_path / "fused.onnx")
    alone = export_dynamic(model, tmp_path / "alone.onnx", fuse=False)
    wide = 64 if kind == "bert" else 32
    pairs = {"q_proj+k_proj+v_proj": (64, wide, wide), "query+key+value": (64, 64, 64), "gate_proj+up_proj": (128, 128)}
    assert len(fused.fused) == (1 if kind == "bert" else 2 * model.config.num_hidden_layers)
    for node in fused.fused:
        assert node.splits == pairs[node.name.rpartition("/")[2]]
        assert [name.rpartition(".")[2] for name in node.layers] == node.name.rpartition("/")[2].split("+")
        assert len({name.rpartition(".")[0] for name in node.layers}) == 1
    assert fused.quantized == alone.quantized
    assert alone.fused == ()
    facts, before = read_graph(fused.path), read_graph(alone.path)
    assert before.plugin_nodes == len(model.linears)
    assert facts.plugin_nodes == before.plugin_nodes - sum(len(node.layers) - 1 for node in fused.fused)
    pre_scales = 3 * 64 * 2 if kind == "llama" else 0  # of K, V and up, which are those of Q and gate
    assert facts.quantized_bytes == before.quantized_bytes - pre_scales
    assert facts.float_bytes == before.float_bytes
    others = [[n.name for n in graph_of(report.path).node if n.op_type != "W4A16Gemm"] for report in (fused, alone)]
    assert others[0] == others[1]
    inputs = {"input_ids": np.arange(18).reshape(2, 9), "attention_mask": np.ones((2, 9), np.int64)}
    for open_session in (session, onnx_session):
        results = [run_onnx(open_session(report.path), inputs) for report in (fused, alone)]
        for name, value in results[0].items():
            assert np.array_equal(value, results[1][name]), name


@pytest.mark.parametrize("format", ["plugin", "qdq"])
def test_files_hold_the_packed_weights_and_nothing_twice(exported: Exported, format: str) -> None:
    model, report = exported("llama", format)
    data = report.data_path.read_bytes()
    assert (len(data), report.path.stat().st_size) == (report.data_bytes, report.onnx_bytes)
    needed = 0
    for linear in model.linears.values():
        n, k = linear.q.shape
        groups = k // linear.group_size
        needed += n * k // 2 + 2 * n * groups
        needed += n * groups // 2 if linear.zeros is not None else 0
    floats = {n: t for n, t in model.state.items() if n.removesuffix(".weight") not in model.linears}
    floats.pop("lm_head.weight", None)
    needed += sum(t.numel() * 2 for t in floats.values())
    inline = sum(len(t.raw_data) for t in graph_of(report.path).initializer)
    assert abs(len(data) + inline - needed) <= 0.01 * needed + 64 * len(model.linears) + 600  # alignment; constants
    embedding = model.state["model.embed_tokens.weight"].numpy().tobytes()
    assert data.count(embedding[:256]) == 1
    for name, linear in model.linears.items():
        assert linear.dequantize().numpy().tobytes()[:64] not in data
        assert f"{name}.weight" not in {t.name for t in graph_of(report.path).initializer}
    assert not set(model.asked) & {f"{name}.weight" for name in model.linears}
    assert len(model.asked) == len(set(model.asked))
    assert sorted(p.name for p in report.path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_bfloat16_file_is_the_float16_one_in_another_dtype(tmp_path: Path, exported: Exported) -> None:
    model, report = exported("qwen2", "plugin")
    other = export_dynamic(model, tmp_path / "b.onnx", dtype="bfloat16")
    onnx.checker.check_model(str(other.path), full_check=True)
    half, brain = graph_of(report.path), graph_of(other.path)
    assert [(n.op_type, n.name) for n in half.node] == [(n.op_type, n.name) for n in brain.node]
    assert onnx.TensorProto.FLOAT16 not in {t.data_type for t in brain.initializer}
    values = {t.name: t for t in onnx.load(other.path).graph.initializer}
    stored = torch.frombuffer(bytearray(values["model.embed_tokens.weight"].raw_data), dtype=torch.bfloat16)
    assert torch.equal(stored, model.state["model.embed_tokens.weight"].bfloat16().flatten())


@pytest.mark.parametrize("format", ["plugin", "qdq"])
def test_bfloat16_file_runs_as_a_float32_copy(tmp_path: Path, format: str) -> None:
    """ONNX Runtime's CPU provider has no bfloat16. The copy computes in fp32 with the same bf16 weights, so it agrees
    with the fp32 eager model to fp32 rounding. DequantizeLinear's weights are the fp32 product before its rounding.
    """
    model = Model("qwen2")
    for name, linear in model.linears.items():
        brain = model.linears[name] = replace(linear, scales=linear.scales.bfloat16(), pre_scale=None)
        layer = model.eager.get_submodule(name)
        exact = replace(brain, scales=brain.scales.float()).dequantize()
        layer.weight.data = brain.dequantize().float() if format == "plugin" else exact
        layer._forward_pre_hooks.clear()
    for name, value in model.state.items():
        if name.removesuffix(".weight") not in model.linears:
            model.eager.get_parameter(name).data = value.bfloat16().float()
    report = export_dynamic(model, tmp_path / "b.onnx", format=format)
    assert report.dtype == "bfloat16"
    float32_copy(report.path, tmp_path / "f.onnx")
    ids = torch.randint(0, 96, (2, 9))
    ort = session(tmp_path / "f.onnx")
    past = {f"past_key_values.0.{part}": np.zeros((2, 2, 0, 16), np.float32) for part in ("key", "value")}
    inputs = {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 9), np.int64), **past}
    logits = torch.from_numpy(ort.run(["logits"], inputs)[0])
    reference = model.logits(input_ids=ids)
    assert (logits - reference).abs().max() <= reference.abs().max() * 1e-5


def test_layer_outside_the_graph_is_listed(tmp_path: Path) -> None:
    """BERT without a head gives hidden states; its pooler is a layer of the model, but not of that graph."""
    model = Model("bert")
    model.config.architectures = ["BertModel"]
    model.linears = {n.removeprefix("bert."): q for n, q in model.linears.items() if n.startswith("bert.")}
    model.linears["pooler.dense"] = next(iter(model.linears.values()))
    model.state = {n.removeprefix("bert."): t for n, t in model.state.items()}
    report = export_dynamic(model, tmp_path / "m.onnx")
    assert report.left_in_float["pooler.dense"] == "no output of the exported graph depends on it"
    assert [o.name for o in graph_of(report.path).output] == ["last_hidden_state"]
    assert len(report.quantized) == len(model.linears) - 1


class Stop(BaseException):
    """Stands for Ctrl-C; KeyboardInterrupt itself would stop pytest if it got away."""


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Stop()])
def test_failure_while_writing_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    export_dynamic(Model("qwen2"), tmp_path / "model.onnx")
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    store, calls = DataFile.store, []

    def failing(self: DataFile, *args: Any) -> onnx.TensorProto:
        calls.append(args)
        if len(calls) == 20:
            raise error
        return store(self, *args)

    monkeypatch.setattr(DataFile, "store", failing)
    with pytest.raises((AwqTrtError, Stop)) as caught:
        export_dynamic(Model("llama"), tmp_path / "model.onnx")
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value)
        assert "unchanged" in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_checkpoint_that_does_not_fit_its_config_is_an_error(tmp_path: Path) -> None:
    model = Model("llama")
    with pytest.raises(AwqTrtError, match="dtype 'float64' is not one of float16, bfloat16"):
        export_dynamic(model, tmp_path / "m.onnx", dtype="float64")
    model.state["model.norm.weight"] = torch.ones(32).half()
    with pytest.raises(AwqTrtError, match=r"model\.norm\.weight is \[32\] in the checkpoint and \[64\]"):
        export_dynamic(model, tmp_path / "m.onnx")
    model.linears["model.layers.7.mlp.up_proj"] = model.linears["model.layers.0.mlp.up_proj"]
    with pytest.raises(AwqTrtError, match=r"model\.layers\.7\.mlp\.up_proj is not a layer of LlamaForCausalLM"):
        export_dynamic(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
