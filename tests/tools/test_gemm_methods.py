"""tools/bench/gemm: a layer in the form of each method, the comparison in double precision, the clock."""

from __future__ import annotations

import contextlib
import ctypes
import math
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench.gemm import measure, method_awq_trt, method_fbgemm, method_gemlite, method_humming, method_int4pack, timing
from bench.gemm.measure import Settings
from bench.gemm.methods import METHODS, Packed
from bench.gemm.problem import Problem, checked_tokens, make_problem, relative_error, worst_part
from bench.gemm.shapes import Shape

from awq_trt.checkpoint.formats import to_parts

SHAPE = Shape(40, 192, 64)


def problem(symmetric: bool = False) -> Problem:
    return make_problem(SHAPE, "float16", symmetric, (1, 5), "cpu", seed=3)


@pytest.mark.parametrize("symmetric", [False, True])
def test_problem_is_the_same_for_all_and_its_reference_exact(symmetric: bool) -> None:
    one = problem(symmetric)
    weight = one.layer.dequantize().double()
    assert relative_error(one.x.double() @ weight.t(), one.expected) < 1e-3
    assert torch.equal(problem(symmetric).layer.q, one.layer.q)
    assert len(one.layer.q.unique()) == 16
    other = one.cast("bfloat16")
    assert other.layer.q is one.layer.q
    assert other.layer.scales.dtype == other.x.dtype == torch.bfloat16
    assert not torch.equal(other.expected, one.expected)
    assert one.cast("float16") is one
    assert math.isnan(relative_error(torch.full_like(one.expected, torch.nan), one.expected))


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_own_form_loses_nothing(symmetric: bool) -> None:
    one = problem(symmetric)
    (packed,) = method_awq_trt.load(None)(one, (1, 5))
    out = packed.variants["default"](packed.tensors, one.x, torch.empty(5, SHAPE.n, dtype=torch.float16))
    assert relative_error(out, one.expected) < 1e-3
    assert (packed.tensors[2] is None) == symmetric


def test_humming_is_given_what_autoawq_stores() -> None:
    """Its own packer needs a GPU: what goes in is compared with this package's AutoAWQ layout instead."""
    one = problem()
    found, expected = method_humming.awq_tensors(one), to_parts("awq-gemm", one.layer)
    assert all(torch.equal(found[name], expected[name]) for name in ("qweight", "qzeros", "scales"))


@pytest.mark.parametrize("symmetric", [False, True])
def test_int4pack_scales_and_zeros(symmetric: bool) -> None:
    """torch's CPU kernel takes the same scales and zeros; only the order of its nibbles is the GPU's own."""
    one = make_problem(Shape(64, 128, 32), "bfloat16", symmetric, (5,), "cpu", seed=3)
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(one.layer.q.int(), 2)
    both = method_int4pack.scales_and_zeros(one)
    assert both.shape == (4, 64, 2)
    out = torch.ops.aten._weight_int4pack_mm_for_cpu(one.x, weight, 32, both)
    assert relative_error(out, one.expected) < measure.LARGEST_ERROR["bfloat16"]
    bytes_ = method_int4pack.nibbles(one.layer.q)
    assert torch.equal(torch.stack([bytes_ >> 4, bytes_ & 15], -1).flatten(1), one.layer.q)


@pytest.mark.parametrize("symmetric", [False, True])
def test_fbgemm_is_given_signed_nibbles_and_float_zeros(symmetric: bool) -> None:
    """W = q * scale + zero with q signed, low bits first, as its `pack_int4` and `int4_row_quantize_zp` have it."""
    one = make_problem(SHAPE, "bfloat16", symmetric, (5,), "cpu", seed=3)
    weight, scales, zeros = method_fbgemm.pack(one)[0].tensors
    assert weight is not None
    assert scales is not None
    assert zeros is not None
    q = torch.stack([weight << 4 >> 4, weight >> 4], -1).flatten(1)  # arithmetic shifts keep the sign
    group = torch.arange(SHAPE.k) // SHAPE.group_size
    dequantized = q.float() * scales.t().float()[:, group] + zeros.t().float()[:, group]
    assert relative_error(one.x.float() @ dequantized.t(), one.expected) < measure.LARGEST_ERROR["bfloat16"]


def test_gemlite_is_asked_for_what_it_has_settings_for() -> None:
    """Its packer needs a GPU to be imported at all."""
    wanted = ["GEMV_REVSPLITK", *["GEMM_SPLITK"] * 3, *["GEMM"] * 2]
    assert [method_gemlite.kernel_for(m) for m in (1, 2, 32, 64, 128, 8192)] == wanted


STUB = """
static long seen[16];
const long* last(void) { return seen; }
int awq_trt_tactics(int* ids, int capacity) { ids[0] = 7; ids[1] = 3; return capacity < 2 ? 0 : 2; }
unsigned long awq_trt_workspace_bytes(int tokens, int n, int k) { return tokens * n; }
unsigned long awq_trt_counter_bytes(int n) { return 4 * n; }
const char* awq_trt_error_text(int error) { return "no such tactic"; }
int awq_trt_gemm(const void* x, const void* qweight, const void* scales, const void* zeros, const void* bias,
                 const void* pre_scale, void* y, int tokens, int n, int k, int group_size, int is_bfloat16, int tactic,
                 void* workspace, void* counters, void* stream) {
  long now[] = {(long)x, (long)qweight, (long)scales, (long)zeros, (long)bias, (long)pre_scale, (long)y, tokens, n, k,
                group_size, is_bfloat16, tactic, workspace != 0, counters != 0, (long)stream};
  for (int i = 0; i < 16; ++i) seen[i] = now[i];
  return tactic == 3 ? 1 : 0;
}
"""


@pytest.mark.parametrize("symmetric", [False, True])
def test_arguments_of_the_c_library(tmp_path: Path, symmetric: bool) -> None:
    compiler = shutil.which("cc")
    assert compiler
    (tmp_path / "stub.c").write_text(STUB)
    library = tmp_path / method_awq_trt.LIBRARY
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "stub.c"], check=True)
    one = problem(symmetric)
    (packed,) = method_awq_trt.load(library)(one, (1, 5))
    assert list(packed.variants) == ["default", "tactic 7", "tactic 3"]
    y = torch.empty(5, SHAPE.n, dtype=torch.float16)
    assert packed.variants["tactic 7"](packed.tensors, one.x, y) is y
    last = ctypes.CDLL(str(library)).last
    last.restype = ctypes.POINTER(ctypes.c_long)
    pointers = [0 if t is None else t.data_ptr() for t in packed.tensors]
    expected = [one.x.data_ptr(), *pointers, 0, 0, y.data_ptr(), 5, SHAPE.n, SHAPE.k, 64, 0, 7, 1, 1, 0]
    assert last()[:16] == expected
    with pytest.raises(method_awq_trt.KernelError, match="no such tactic.*code 1"):
        packed.variants["tactic 3"](packed.tensors, one.x, y)


@pytest.mark.parametrize("tokens", [(1, 5), (64, 128, 8192), (1000,), (65, 79, 80)])
def test_checked_tokens_are_in_every_tile(tokens: tuple[int, ...]) -> None:
    """Tiles of 16 tokens, as no kernel has smaller ones, for each number of tokens, its tail included."""
    checked = checked_tokens(tokens, seed=3)
    assert checked == sorted(set(checked))
    for m in tokens:
        within = [t for t in checked if t < m]
        assert {t // 16 for t in within} == {t // 16 for t in range(m)}
        assert {0, m - 1} <= set(within)
        assert set(range(min(m, 64))) <= set(within)
    assert len(checked) < 64 + len(tokens) + max(tokens) / 16
    assert max(tokens) < 1000 or checked != checked_tokens(tokens, seed=4), "places in a tile vary"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_wrong_tile_in_a_large_product_is_seen(dtype: str) -> None:
    """Rounding alone passes, whatever part of the tokens is asked for; and tokens that are shifted are seen."""
    one = make_problem(Shape(2048, 256, 128), dtype, False, (1024,), "cpu", seed=3)
    right = one.x @ one.layer.dequantize().t()
    limit = measure.LARGEST_ERROR[dtype]
    error, worst = one.errors(right)
    assert error < limit
    assert worst < measure.WORST_PART * limit / 2
    for token in (0, 336, 1008):
        for feature in (0, 1016, 2032):
            wrong = right.clone()
            tile = slice(token, token + 16), slice(feature, feature + 16)
            wrong[tile] -= (one.x[tile[0], :32] @ one.layer.dequantize()[tile[1], :32].t()).to(wrong.dtype)
            error, worst = one.errors(wrong)
            assert worst > measure.WORST_PART * limit, "a k-slice of 32 of 256 columns is missing"
            wrong[tile] = torch.nan
            assert math.isnan(one.errors(wrong)[1])
    shifted = torch.cat([right[:512], right[511:1023]])
    assert one.errors(shifted)[0] > 0.5
    assert one.errors(right[:100])[0] < limit
    assert worst_part(torch.zeros(2, 8), torch.ones(2, 8).double()) == 1


def test_x_and_y_take_turns_from_64_tokens_on() -> None:
    """As many copies as take the cache four times, x and y among what they take; the same x and y for decoding."""
    one = make_problem(SHAPE, "float16", False, (4, 256), "cpu", seed=3)
    seen: list[tuple[int, int, int, int]] = []

    def call(tensors: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append((len(x), tensors[0].data_ptr(), x.data_ptr(), y.data_ptr()))
        return y.copy_(x.float() @ one.layer.dequantize().float().t())

    packed = Packed([one.layer.q], {"default": call})
    settings = Settings((), (4, 256), "float16", False, 3, "cpu", None, 4.0, 1 << 30, 3)
    rows = list(measure.cells(settings, METHODS[1], lambda: [packed], one, timing.FakeTimer(), 50000, math.inf))
    assert [r["m"] for r in rows if "us" in r] == [4, 256]
    weights, touched = 40 * 192, 40 * 192 + 2 * 256 * (40 + 192)
    assert [r["copies"] for r in rows] == [math.ceil(200000 / weights), 2]
    assert touched * 2 >= 200000
    for m, inputs in ((4, 1), (256, 2)):
        of_m = [places for places in seen if places[0] == m]
        assert len({w for _, w, _, _ in of_m}) == (27 if m == 4 else 2)
        assert len({x for _, _, x, _ in of_m}) == len({y for _, _, _, y in of_m}) == inputs
        assert len({(w, x) for _, w, x, _ in of_m}) == (27 if m == 4 else 2), "a copy keeps its x"


@pytest.mark.parametrize(
    ("count", "us", "calls", "replays"),
    [(16, 5.0, 16, 30), (3, 5.0, 18, 30), (1000, 3.0, 1000, 20), (2, 700.0, 14, 7), (2, 50000.0, 2, 7)],
)
def test_fewer_calls_where_they_take_longer(count: int, us: float, calls: int, replays: int) -> None:
    assert count * timing.repeats(count, us) == calls
    assert timing.replays_for(calls * us, 30) == replays
    assert timing.replays_for(calls * us, 3) == 3


class FakeCuda:
    """As much of torch.cuda as the clock uses, with a time of its own: microseconds of what was queued."""

    def __init__(self) -> None:
        self.now, self.capturing, self.replayed = 0.0, False, 0
        self.current_stream = self.Stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.stream = lambda stream: contextlib.nullcontext()
        self.synchronize = lambda: None

    def work(self, us: float) -> None:
        if self.capturing:
            self.captured += us
        else:
            self.now += us

    def Event(self, enable_timing: bool) -> SimpleNamespace:  # noqa: N802
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: (other.at - event.at) / 1e3
        return event

    def CUDAGraph(self) -> SimpleNamespace:  # noqa: N802
        def begin(capture_error_mode: str) -> None:
            self.capturing, self.captured = True, 0.0

        def replay() -> None:
            self.replayed += 1
            self.now += self.captured

        return SimpleNamespace(
            capture_begin=begin, capture_end=lambda: setattr(self, "capturing", False), replay=replay
        )


@pytest.mark.parametrize(("copies", "us", "calls", "replays"), [(3, 5.0, 18, 30), (2, 3000.0, 2, 10), (1, 9e4, 1, 7)])
def test_graph_timer(copies: int, us: float, calls: int, replays: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph holds what its time allows, and all of it is counted; on a clock that is a sum."""
    cuda = FakeCuda()
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=cuda))
    found = timing.GraphTimer(30).measure([lambda: cuda.work(us)] * copies)
    assert found == timing.Timing(us=us, p10_us=us, calls=calls, replays=replays)
    assert cuda.replayed == 1 + math.ceil(replays / 10) + replays

    def fails() -> None:
        if cuda.capturing:
            raise RuntimeError("not in a graph")

    with pytest.raises(RuntimeError, match="not in a graph"):
        timing.GraphTimer(30).measure([fails])
    assert not cuda.capturing


def test_timing_is_per_call() -> None:
    found = timing.timing_of([3.2, 1.6, 4.8, 1.6], calls=16)
    assert found == timing.Timing(us=150.0, p10_us=100.0, calls=16, replays=4)
    calls: list[int] = []
    counted = timing.FakeTimer(replays=3).measure([lambda: calls.append(0), lambda: calls.append(1)] * 5)
    assert calls == [0, 1] * 10
    assert counted.calls == 20 >= timing.MIN_CALLS
    used = timing.bandwidth(timing.FakeTimer(), "cpu", 1 << 12)
    assert used["by"] == "copy"
    assert used["used"] == used["copy"] == 2 * used["read"]
