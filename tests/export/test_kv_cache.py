"""A decoder with a fixed KV cache: what is written where, what is attended to, and what the graph has and has not.

Tolerance as in test_export.py: three times what the eager model in fp16 is off by.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from random_models import Model
from tiny_onnx import graph_of, session, shapes

from awq_trt.errors import AwqTrtError
from awq_trt.evaluate.verify import generate_onnx, onnx_session, run_onnx
from awq_trt.export import kv_cache
from awq_trt.export.export import OnnxReport, export_quantized
from awq_trt.export.interface import DecoderOptions
from awq_trt.export.kv_cache import CacheLayer, KvCache, plan_cache
from awq_trt.export.metadata import optimization_profiles, read_graph

CAPACITY = 40
SIZES = {"llama": 8, "mistral": 4, "gpt2": 16, "qwen2": 40, "mistral, long chunk": 8}
"""Model -> prefill chunk; Mistral's window is 4 tokens, so that its ring has 8 slots and 4 behind it; 16 and 8 with a
chunk longer than the window."""

Exported = Callable[[str], tuple[Model, OnnxReport]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    known: dict[str, tuple[Model, OnnxReport]] = {}

    def export(kind: str) -> tuple[Model, OnnxReport]:
        if kind not in known:
            model = Model(kind.split(",")[0])
            options = DecoderOptions(capacity=CAPACITY, prefill_chunk=SIZES[kind])
            known[kind] = model, export_quantized(model, tmp_path_factory.mktemp(kind) / "m.onnx", decoder=options)
        return known[kind]

    return export


class Batch:
    """Rows of a batch and their caches in ONNX Runtime, fed as a runtime feeds them."""

    def __init__(self, path: Path, sequences: list[torch.Tensor]) -> None:
        self.session = session(path)
        self.sequences = sequences
        self.past = np.zeros(len(sequences), np.int64)
        caches = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        self.cache = {i.name: np.zeros((len(sequences), *i.shape[1:]), np.float16) for i in caches}

    def step(self, new: list[int], garbage: int = 7) -> np.ndarray:
        """Feed so many tokens of each row, padded with garbage; returns the logits [rows, V]."""
        ids = np.full((len(new), max(new)), garbage, np.int64)
        for row, n in enumerate(new):
            ids[row, :n] = self.sequences[row][0, self.past[row] : self.past[row] + n]
        inputs = {"input_ids": ids, "past_length": self.past, "input_length": np.array(new)}
        logits, *present = self.session.run(None, inputs | self.cache)
        assert all(np.isfinite(value).all() for value in (logits, *present)), "NaN in padding would spread"
        self.cache = dict(zip(self.cache, present, strict=True))
        self.past = self.past + np.array(new)
        assert logits.shape[1] == 1
        return logits[:, 0].astype(np.float32)


@pytest.mark.parametrize("kind", list(SIZES))
def test_ragged_batch_in_chunks_then_token_by_token(exported: Exported, kind: str) -> None:
    """Rows of 19, 1 and 8 prompt tokens, fed in chunks that never cross a multiple of the chunk, then generating."""
    model, report = exported(kind)
    lengths, generated, chunk = (19, 1, 8), 20, SIZES[kind]
    sequences = [torch.randint(0, 96, (1, n + generated)) for n in lengths]
    references = [model.logits(input_ids=s)[0] for s in sequences]
    limit = 3 * max(
        float((model.logits(torch.float16, input_ids=s)[0] - r).abs().max())
        for s, r in zip(sequences, references, strict=True)
    )
    batch = Batch(report.path, sequences)

    def check(new: list[int]) -> None:
        logits = batch.step(new)
        for row, n in enumerate(new):
            if n:
                expected = references[row][batch.past[row] - 1].numpy()
                assert np.abs(logits[row] - expected).max() <= limit, (row, batch.past)

    while any(new := [min(chunk - p % chunk, n - p) for p, n in zip(batch.past, lengths, strict=True)]):
        check(new)
    for step in range(generated):
        check([1, 1, int(step < 5)])  # the last row is finished after five tokens, and takes part as padding
    with torch.no_grad():  # the comparison would notice a wrong weight
        unrounded = model.unquantized(input_ids=sequences[0]).logits[0]
    assert (unrounded - references[0]).abs().max() > limit


def test_a_window_forgets_and_full_attention_does_not(exported: Exported) -> None:
    """What is twenty tokens back changes the logits of Llama, not those of Mistral with one layer and a window of 4."""
    for kind, changes in (("llama", True), ("mistral", False)):
        _, report = exported(kind)
        first = torch.randint(0, 96, (1, 24))
        second = torch.cat([(first[:, :4] + 1) % 96, first[:, 4:]], 1)
        results = []
        for sequence in (first, second):
            batch = Batch(report.path, [sequence])
            while batch.past[0] < 24:
                logits = batch.step([min(SIZES[kind] - batch.past[0] % SIZES[kind], 24 - batch.past[0])])
            results.append(logits)
        assert (not np.array_equal(*results)) == changes


def test_stale_slots_of_another_sequence_do_not_matter(exported: Exported) -> None:
    """A row whose cache is full of an earlier sequence gives the bits that an empty one gives."""
    for kind in ("llama", "mistral"):
        _, report = exported(kind)
        old, new = torch.randint(0, 96, (1, CAPACITY)), torch.randint(0, 96, (1, 12))
        used = Batch(report.path, [old])
        while used.past[0] < CAPACITY:
            used.step([min(SIZES[kind] - used.past[0] % SIZES[kind], CAPACITY - used.past[0])])
        fresh = Batch(report.path, [new])
        used.sequences, used.past = [new], np.zeros(1, np.int64)
        while fresh.past[0] < 12:
            n = [min(SIZES[kind] - fresh.past[0] % SIZES[kind], 12 - fresh.past[0])]
            assert np.array_equal(used.step(n), fresh.step(n))


def test_a_row_without_new_tokens_gives_the_first_logits(exported: Exported) -> None:
    """Its index is 0, not -1: runtimes differ in what a negative one is."""
    sequences = [torch.randint(0, 96, (1, 6)), torch.tensor([[1, 2, 3, 7]])]
    batches = [Batch(exported("llama")[1].path, sequences) for _ in range(2)]
    for batch in batches:
        batch.step([3, 3])
    assert np.array_equal(batches[0].step([3, 1]), batches[1].step([3, 0]))  # padding is token 7, too


def test_past_and_present_are_one_buffer(exported: Exported) -> None:
    """Bound to the same memory, only the slots of new tokens change."""
    _, report = exported("llama")
    ort = session(report.path)
    rng = np.random.default_rng(0)
    caches = {
        i.name: rng.standard_normal((2, *i.shape[1:])).astype(np.float16)
        for i in ort.get_inputs()
        if i.name.startswith("past_key_values.")
    }
    before = {name: value.copy() for name, value in caches.items()}
    binding = ort.io_binding()
    for name, value in caches.items():
        for bind, tensor in (
            (binding.bind_input, name),
            (binding.bind_output, name.replace("past_key_values", "present")),
        ):
            bind(tensor, "cpu", 0, np.float16, value.shape, value.ctypes.data)
    binding.bind_cpu_input("input_ids", np.zeros((2, 3), np.int64))
    binding.bind_cpu_input("past_length", np.array([4, 30]))
    binding.bind_cpu_input("input_length", np.array([3, 2]))
    binding.bind_output("logits")
    ort.run_with_iobinding(binding)
    for name, value in caches.items():
        changed = (value != before[name]).any((1, 3))
        assert [np.flatnonzero(row).tolist() for row in changed] == [[4, 5, 6], [30, 31, 32]]


@pytest.mark.parametrize("kind", list(SIZES))
def test_no_cache_tensor_is_copied_in_the_graph(exported: Exported, kind: str) -> None:
    """From past to present there is TensorScatter and nothing else, and nothing but Attention reads a whole cache."""
    model, report = exported(kind)
    onnx.checker.check_model(str(report.path), full_check=True)
    graph = graph_of(report.path)
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    scatters = {node.input[0]: node.output[0] for node in graph.node if node.op_type == "TensorScatter"}
    pasts = [i.name for i in graph.input if i.name.startswith("past_key_values.")]
    layers = model.config.num_hidden_layers
    assert len(pasts) == 2 * layers
    for past in pasts:
        assert readers[past] == ["TensorScatter"]
        assert scatters[past] == past.replace("past_key_values", "present")
        assert readers[scatters[past]] == ["Attention"]
    assert sum(node.op_type == "Attention" for node in graph.node) == layers


def test_interface_and_facts(exported: Exported) -> None:
    model, report = exported("llama")
    graph = graph_of(report.path)
    row = ["batch_size"]
    cache = {f"{i}.{p}": ["batch_size", 2, CAPACITY, 16] for i in (0, 1) for p in ("key", "value")}
    assert shapes(graph.input) == {
        "input_ids": ["batch_size", "sequence_length"],
        "past_length": row,
        "input_length": row,
        **{f"past_key_values.{name}": shape for name, shape in cache.items()},
    }
    assert shapes(graph.output) == {
        "logits": ["batch_size", 1, 96],
        **{f"present.{name}": shape for name, shape in cache.items()},
    }
    symbols = {d for shape in shapes(graph.value_info).values() for d in shape if isinstance(d, str)}
    assert symbols <= {"batch_size", "sequence_length"}
    facts = read_graph(report.path).metadata
    layer = {"kv_heads": 2, "head_dim": 16, "value_head_dim": 16, "slots": CAPACITY, "window": None}
    expected = {"kind": "fixed", "dtype": "float16", "capacity": CAPACITY, "prefill_chunk": 8, "layers": [layer] * 2}
    assert facts["kv_cache"] == expected
    assert (facts["logits"], facts["vocab_size"], facts["tokenizer"]) == ("last", 96, None)
    assert facts["generation"] == model.generation
    profiles = optimization_profiles(read_graph(report.path), max_batch=3, max_seq=None)
    assert [p.shapes["input_ids"] for p in profiles] == [((1, 1), (3, 1), (3, 1)), ((1, 1), (3, 8), (3, 8))]
    assert profiles[1].shapes["past_key_values.0.key"] == ((1, 2, CAPACITY, 16), *[(3, 2, CAPACITY, 16)] * 2)
    with pytest.raises(AwqTrtError, match="a KV cache for 40 tokens, and max_seq is 64: export it again"):
        optimization_profiles(read_graph(report.path), max_batch=3, max_seq=64)


def test_all_logits(exported: Exported, tmp_path: Path) -> None:
    """all_logits=True gives them; a file of last logits gives the same ones when it is checked; both in chunks."""
    model, report = exported("mistral")
    options = DecoderOptions(capacity=CAPACITY, prefill_chunk=SIZES["mistral"], all_logits=True)
    other = export_quantized(model, tmp_path / "all.onnx", decoder=options)
    assert "input_length" not in {i.name for i in graph_of(other.path).input}
    assert read_graph(other.path).metadata["logits"] == "all"
    ids = np.random.default_rng(0).integers(0, 96, (2, 21))
    whole = run_onnx(onnx_session(other.path), {"input_ids": ids})["logits"]
    assert whole.shape == (2, 21, 96)
    checked = run_onnx(onnx_session(report.path, all_logits=True), {"input_ids": ids})["logits"]
    assert np.array_equal(whole, checked)
    last = run_onnx(onnx_session(report.path), {"input_ids": ids})["logits"]
    assert last.shape == (2, 1, 96)
    assert np.abs(last[:, 0].astype(np.float32) - whole[:, -1]).max() <= 2e-2 * np.abs(whole).max()
    assert sorted(p.name for p in report.path.parent.iterdir()) == ["m.onnx", "m.onnx.data"]
    with pytest.raises(AwqTrtError, match="41 tokens, but the KV cache has room for 40"):
        run_onnx(onnx_session(report.path), {"input_ids": np.zeros((1, 41), np.int64)})


def test_greedy_tokens_are_those_of_the_dynamic_cache(exported: Exported, tmp_path: Path) -> None:
    model, report = exported("llama")
    dynamic = export_quantized(model, tmp_path / "d.onnx", decoder=DecoderOptions("dynamic"))
    prompt = np.random.default_rng(1).integers(0, 96, (1, 13))
    ids = [generate_onnx(onnx_session(path), prompt, 20).tolist() for path in (report.path, dynamic.path)]
    assert ids[0] == ids[1]
    assert read_graph(dynamic.path).metadata["kv_cache"] == {"kind": "dynamic"}


def test_nothing_but_the_cache_grows_with_the_capacity(exported: Exported, tmp_path: Path) -> None:
    """The graph holds the numbers of the slots once, 8 bytes each, for the mask."""
    model, report = exported("llama")
    larger = export_quantized(model, tmp_path / "m.onnx", decoder=DecoderOptions(capacity=400, prefill_chunk=8))
    assert report.cache is not None
    assert larger.cache is not None
    assert [[x.slots for x in r.cache.layers] for r in (report, larger)] == [[CAPACITY] * 2, [400] * 2]
    assert larger.data_bytes == report.data_bytes
    assert larger.onnx_bytes - report.onnx_bytes < 8 * (400 - CAPACITY) + 512  # 400 is longer than 40, in many shapes


def llama(**changes: Any) -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(num_hidden_layers=2, **changes)


SHAPES = [(2, 16, 16)] * 2


def test_sizes_by_default() -> None:
    assert plan_cache(llama(max_position_embeddings=8192), SHAPES, None, None) == KvCache(
        2048, 1024, (CacheLayer(2, 16, 16, 2048),) * 2
    )
    assert plan_cache(llama(max_position_embeddings=512), SHAPES, None, None).capacity == 512
    gemma = transformers.Gemma3TextConfig(
        num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=512
    )
    plan = plan_cache(gemma, SHAPES, 8192, None)
    assert (plan.prefill_chunk, [x.slots for x in plan.layers]) == (512, [512 + 2 * 512, 8192])
    assert [x.window for x in plan.layers] == [512, None]
    plan = plan_cache(gemma, SHAPES, 8192, 200)
    assert plan.layers[0].slots == 600 + 2 * 200  # three chunks hold the window
    plan = plan_cache(gemma, SHAPES, 1000, None)
    assert plan.layers[0].slots == 1000  # a ring would be larger than the capacity: the window is in the mask alone


@pytest.mark.parametrize(
    ("capacity", "chunk", "message"),
    [
        (1, None, "a KV cache for 1 tokens: it must be at least 2"),
        (1024, None, "this model was made for 512 positions"),
        (256, 0, "a prefill chunk of 0 tokens"),
        (256, 257, "at most the capacity 256"),
    ],
)
def test_sizes_that_cannot_be(capacity: int, chunk: int | None, message: str) -> None:
    with pytest.raises(AwqTrtError, match=message):
        plan_cache(llama(max_position_embeddings=512), SHAPES, capacity, chunk)


def test_unknown_kind_and_position_bias_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AwqTrtError, match="KV cache 'paged' is not one of fixed, dynamic"):
        export_quantized(Model("llama"), tmp_path / "m.onnx", decoder=DecoderOptions("paged"))
    none = torch.zeros(1, 1, 1, 1)
    with pytest.raises(AwqTrtError, match="with a position bias cannot be exported"):
        kv_cache.attention(torch.nn.Module(), none, none, none, none, position_bias=none)
    assert not list(tmp_path.iterdir())
