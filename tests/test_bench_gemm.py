"""tools/bench_gemm.py: the shapes, the arithmetic of the floor and the targets, packing, and a run without a GPU."""

from __future__ import annotations

import ctypes
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import bench_gemm
from bench.gemm import (
    measure,
    method_awq_trt,
    method_fbgemm,
    method_gemlite,
    method_humming,
    method_int4pack,
    processes,
    targets,
    timing,
)
from bench.gemm.measure import Settings
from bench.gemm.methods import METHODS, PROCESSES, SHARES, Packed, named
from bench.gemm.plot import draw
from bench.gemm.problem import Problem, make_problem, pack_words, relative_error
from bench.gemm.shapes import HEADLINE, MODELS, Shape, rotations, shapes

from awq_trt import layout
from awq_trt.linear import QuantizedLinear
from awq_trt.packed_formats import to_parts

TOOLS = Path(__file__).parents[1] / "tools"
SHAPE = Shape(40, 192, 64)
CELL = {"n": 4096, "k": 4096, "m": 1, "variant": "default", "dtype": "float16", "error": 1e-4, "us": 10.0}


def problem(symmetric: bool = False, dtype: str = "float16", shape: Shape = SHAPE) -> Problem:
    return make_problem(shape, dtype, symmetric, 5, "cpu", seed=3)


def settings(**changes: Any) -> Settings:
    default = Settings((SHAPE,), (1, 5), "float16", False, 3, "cpu", None, 4.0, 1 << 20, 3)
    return Settings.from_json(default.as_json() | changes)


def test_shapes_of_the_models() -> None:
    found = {(s.n, s.k): s for s in shapes()}
    assert [(s.n, s.k) for s in shapes()][:3] == list(HEADLINE)
    assert set(found) == {
        (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (10240, 8192), (8192, 8192), (57344, 8192),
        (8192, 28672), (24576, 4096), (4096, 12288), (960, 576), (576, 576), (3072, 576), (576, 1536),
    }  # fmt: skip
    assert found[4096, 4096].layers == ("Llama-3.1-8B o", "Qwen3-8B o")
    for shape in found.values():
        assert layout.supports(shape.n, shape.k, shape.group_size)
        assert shape.group_size == (64 if "SmolLM2" in shape.layers[0] else 128)
    assert len(shapes(["Llama-3.1-8B"])) == 4 == len(MODELS)


def test_bytes_and_floor() -> None:
    shape = Shape(4096, 4096, 128)
    weights = 4096 * 4096 // 2 + 4096 * 32 * 2 + 4096 * 32 // 2
    assert shape.weight_bytes(symmetric=False) == weights == 8716288
    assert shape.weight_bytes(symmetric=True) == weights - 4096 * 32 // 2
    assert shape.bytes(16, symmetric=False) == weights + 2 * 16 * (4096 + 4096)
    assert shape.floor_us(1, False, 3e12) == pytest.approx((weights + 2 * 8192) / 3e6)
    packed = method_awq_trt.pack(make_problem(Shape(64, 128, 64), "float16", False, 1, "cpu", 0))
    assert sum(t.nbytes for t in packed if t is not None) == Shape(64, 128, 64).weight_bytes(False)


def test_rotations_leave_the_cache_behind() -> None:
    l2, large = 50 << 20, 1 << 40
    for size in (1 << 17, 8716288, 1 << 28):
        count = rotations(size, l2, 4, large)
        assert count >= 2
        assert count * size >= 4 * l2
        assert count == 2 or (count - 1) * size < 4 * l2
    assert rotations(8 << 20, l2, 4, 32 << 20) == 4
    assert rotations(8 << 20, l2, 4, 1) == 1


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
    one = make_problem(Shape(64, 128, 32), "bfloat16", symmetric, 5, "cpu", seed=3)
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
    one = make_problem(SHAPE, "bfloat16", symmetric, 5, "cpu", seed=3)
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
    assert [method_gemlite.kernel_for(m) for m in (1, 2, 32)] == ["GEMV_REVSPLITK", "GEMM_SPLITK", "GEMM_SPLITK"]


def test_words_hold_eight_values_in_the_order_asked_for() -> None:
    values = torch.arange(16, dtype=torch.uint8).reshape(1, 16)
    assert pack_words(values).tolist() == [[0x76543210, 0xFEDCBA98 - (1 << 32)]]
    assert pack_words(values[:, :8], (7, 6, 5, 4, 3, 2, 1, 0)).tolist() == [[0x01234567]]


STUB = """
static long seen[16];
const long* last(void) { return seen; }
int awq_trt_tactics(int* ids, int capacity) { ids[0] = 7; ids[1] = 3; return capacity < 2 ? 0 : 2; }
unsigned long awq_trt_workspace_bytes(int tokens, int n, int k, int group_size, int tactic) { return tokens * n; }
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


def test_timing_is_per_call() -> None:
    found = timing.timing_of([3.2, 1.6, 4.8, 1.6], calls=16)
    assert found == timing.Timing(us=150.0, p10_us=100.0, calls=16, replays=4)
    calls: list[int] = []
    counted = timing.FakeTimer(replays=3).measure([lambda: calls.append(0), lambda: calls.append(1)] * 5)
    assert calls == [0, 1] * 10
    assert counted.calls == 20 >= timing.MIN_CALLS
    used = timing.bandwidth(timing.FakeTimer(), "cpu", 1 << 12)
    assert used["by"] == "copy"
    assert used["used"] == used["copy"] == 2 * used["read"]  # type: ignore[operator]


def test_targets_met_missed_and_not_measured() -> None:
    fast = {**CELL, "method": "awq_trt", "floor_us": 3.0, "us": 5.0}
    rows = [
        fast,
        {**fast, "variant": "tactic 2", "us": 4.0},
        {**fast, "m": 32, "us": 6.0},
        {**CELL, "method": "cublas", "us": 14.0},
        {**CELL, "method": "cublas", "m": 32, "us": 11.0},
        {**CELL, "method": "humming", "us": 4.4},
        {**CELL, "method": "gemlite", "us": 9.0},
        {**CELL, "method": "humming", "m": 32, "problem": "wrong"} | {"us": 5.0},
        {"method": "fbgemm", "n": 4096, "k": 4096, "m": 1, "variant": "", "problem": "RuntimeError: no"},
    ]
    by_name = {entry["what"]: entry for entry in targets.evaluate(rows)}
    floor, small, missing, _, large, every, mean, error = by_name.values()
    assert floor["met"] is True
    assert floor["value"] == pytest.approx(4.0 / (1.15 * 3 + 2.5), abs=1e-3)
    assert small["met"] is True
    assert (small["value"], small["at"], small["cells"]) == (3.5, [4096, 4096, 1], 1)
    assert missing["met"] is None
    assert (large["met"], large["cells"]) == (False, 1)
    assert every["met"] is False
    assert (every["value"], every["at"]) == (0.833, [4096, 4096, 32])
    assert mean["met"] is False
    assert mean["value"] == pytest.approx(math.sqrt(1.1 * 5 / 6), abs=1e-3)
    assert error["met"] is True
    assert by_name.keys() == {e["what"] for e in targets.evaluate(rows, "default")}
    assert targets.evaluate(rows, "default")[0]["value"] == pytest.approx(5.0 / 5.95, abs=1e-3)
    assert "MISSED" in targets.line(every)
    assert "not measured" in targets.line(missing)
    assert {e["met"] for e in targets.evaluate([])} == {None}


def test_floors_are_put_into_timed_rows_only() -> None:
    rows: list[dict[str, Any]] = [dict(CELL), {"n": 4096, "k": 4096, "m": 1, "problem": "wrong"}]
    targets.add_floors(rows, [Shape(4096, 4096, 128)], symmetric=False, bandwidth=3e12)
    assert rows[0]["floor_us"] == 2.911
    assert rows[0]["fraction_of_floor"] == 0.2911
    assert "floor_us" not in rows[1]


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
    output = tmp_path / "result.json"
    command = ["bench_gemm.py", "--dry-run", "--seed", "5", "--output", output, *arguments]
    monkeypatch.setattr(sys, "argv", [str(a) for a in command])
    code = bench_gemm.main()
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]
    return code, json.loads(output.read_text())


@pytest.mark.parametrize("options", [(), ("--symmetric", "--dtype", "bfloat16")])
def test_dry_run_writes_a_record(
    options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, record = run(monkeypatch, tmp_path, "--plot", tmp_path / "result.svg", *options)
    assert code == 0
    assert set(record) == {
        "date", "hardware", "versions", "settings", "refusals", "rows", "device", "targets", "not_run", "seconds",
    }  # fmt: skip
    assert record["settings"]["seed"] == 5
    assert record["not_run"] == []
    assert set(record["device"]["bandwidth"]) == {"copy", "read", "used", "by"}
    assert set(record["refusals"]) >= {"int4pack"} or torch.cuda.is_available()
    timed = [row for row in record["rows"] if "us" in row]
    assert {row["method"] for row in timed} >= {"awq_trt", "cublas"}
    for row in timed:
        assert set(row) == {
            "method", "dtype", "n", "k", "m", "variant", "pack_seconds", "bytes", "copies", "error", "us", "p10_us",
            "warm_us", "calls", "replays", "floor_us", "fraction_of_floor",
        }  # fmt: skip
        assert row["error"] < measure.LARGEST_ERROR[row["dtype"]]
        assert row["copies"] >= 2
    out = capsys.readouterr().out
    assert "57344x8192" in out, "the plan is of the real layers"
    assert "14 shapes x 7 x 6 methods" in out
    assert "geometric mean" in out
    assert (tmp_path / "result.svg").read_text().count("64x128") or "<svg" in (tmp_path / "result.svg").read_text()


def test_a_peer_that_raises_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(library: Path | None) -> None:
        raise ImportError("built for another torch")

    def wrong(tensors: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(y)

    def raises(tensors: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    def writes_half(tensors: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y[:, ::2] = 0
        return y

    def cannot_pack(problem: Problem, tokens: Any) -> list[Packed]:
        raise ValueError("group 64")

    forms = {"wrong": wrong, "raises": raises, "half": writes_half}
    monkeypatch.setattr(method_humming, "load", refuses)
    monkeypatch.setattr(method_int4pack, "load", lambda library: lambda p, tokens: [Packed([p.layer.q], forms)])
    monkeypatch.setattr(method_gemlite, "load", lambda library: cannot_pack)
    names = ["cublas", "humming", "int4pack", "gemlite"]
    rows = list(processes.run(settings(), names, 100, isolate=False))
    assert {"method": "humming", "refusal": "ImportError: built for another torch"} in rows
    problems = {(r["method"], r["variant"], r["m"]): r["problem"] for r in rows if "problem" in r}
    assert problems["int4pack", "raises", 1] == "RuntimeError: no such kernel"
    assert "relative error 1, not timed" in problems["int4pack", "wrong", 5]
    assert "relative error nan, not timed" in problems["int4pack", "half", 5]
    assert problems["gemlite", "", 1] == "ValueError: group 64"
    assert {r["method"] for r in rows if "us" in r} == {"cublas"}
    assert {r["dtype"] for r in rows if r.get("method") == "int4pack"} == {"bfloat16"}
    json.dumps(rows, allow_nan=False)


def test_a_result_that_changes_while_it_is_timed_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    one, seen = problem(), []

    def drifts(tensors: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(0)
        return one.expected[: len(y)] * (1 if len(seen) < 3 else 2)

    found = measure.cell(drifts, [[]], one, 1, timing.FakeTimer())
    assert found == {"problem": "relative error 1, after the replays; at most 0.005"}


def test_stops_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, record = run(monkeypatch, tmp_path, "--seconds", "0", "--methods", "awq_trt", "cublas")
    assert code == 1
    assert record["rows"] == []
    assert len(record["not_run"]) == 2 * 2 * 7
    assert ["cublas", 64, 128, 1] in record["not_run"]

    clock = iter([0.0, *[0.0] * 3, *[1.0] * 4, *[9.0] * 99])
    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    rows = [r for r in measure.measure(settings(), ["awq_trt", "cublas"], 5.0, first=False) if "us" in r]
    assert 0 < len(rows) < 4


def test_own_kernels_that_are_wrong_fail_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    zeros = lambda tensors, x, y: torch.zeros_like(y)  # noqa: E731
    monkeypatch.setattr(method_awq_trt, "load", lambda library: lambda p, tokens: [Packed([p.layer.q], {"": zeros})])
    code, record = run(monkeypatch, tmp_path, "--methods", "awq_trt", "cublas")
    assert code == 1
    assert {"cublas"} == {row["method"] for row in record["rows"] if "us" in row}


def test_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come as from this process; one that dies, or does not end, is a refusal and what it had said is kept."""
    apart = list(processes.run(settings(), ["awq_trt", "cublas"], 100))
    here = list(processes.run(settings(), ["awq_trt", "cublas"], 100, isolate=False))
    moving = ("pack_seconds",)
    assert [{k: v for k, v in r.items() if k not in moving} for r in apart] == [
        {k: v for k, v in r.items() if k not in moving} for r in here
    ]
    script = 'import sys, os; print(\'@row {"method": "cublas", "m": 1}\', flush=True); '
    popen = subprocess.Popen

    def instead(code: str) -> None:
        fake = SimpleNamespace(PIPE=subprocess.PIPE, Popen=lambda c, **k: popen([sys.executable, "-c", code], **k))
        monkeypatch.setattr(processes, "subprocess", fake)

    instead(script + "print('cuda', file=sys.stderr, flush=True); os.abort()")
    kept, refusal = processes.child(settings(), ["cublas"], 50, 50, first=False)
    assert kept == {"method": "cublas", "m": 1}
    assert "ended with code -6" in refusal["refusal"]
    assert "cuda" in refusal["refusal"]
    instead(script + "import time; time.sleep(600)")
    monkeypatch.setattr(processes, "GRACE_SECONDS", 1)
    assert "ended with code -9" in list(processes.child(settings(), ["cublas"], 0, 50, first=False))[1]["refusal"]


def test_plot_of_a_made_up_record(tmp_path: Path) -> None:
    rows = [
        {**CELL, "method": name, "m": m, "us": us / m, "fraction_of_floor": 0.5, "floor_us": 3.0}
        for name, us in (("awq_trt", 40), ("cublas", 90), ("humming", 45))
        for m in (1, 8)
    ]
    record = {
        "date": "2026-01-01T00:00:00+00:00",
        "hardware": [{"name": "A GPU"}],
        "settings": {
            "shapes": [{"n": 4096, "k": 4096}, {"n": 64, "k": 64}],
            "tokens": [1, 8, 32],
            "dtype": "float16",
        },
        "rows": [*rows, {"method": "fbgemm", "n": 64, "k": 64, "m": 1, "variant": "", "problem": "no"}],
    }
    for name in ("result.svg", "result.png"):
        draw(record, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    assert "<svg" in (tmp_path / "result.svg").read_text()


def test_every_method_has_a_process_and_a_share() -> None:
    assert sorted(name for group in PROCESSES for name in group) == sorted(m.name for m in METHODS)
    assert len(SHARES) == len(PROCESSES)
    assert [m.name for m in named(["humming", "awq_trt"])] == ["awq_trt", "humming"]
    with pytest.raises(KeyError, match="no method nonsense"):
        named(["nonsense"])


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    def said(*arguments: object) -> str:
        command = [sys.executable, TOOLS / "bench_gemm.py", "--output", tmp_path / "r.json", *arguments]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        return done.stderr

    assert "--build DIR" in said("--library", tmp_path)
    assert "no method nonsense" in said("--dry-run", "--methods", "nonsense")
    if not torch.cuda.is_available():
        assert "use --dry-run" in said("--methods", "cublas")


def test_dequantized_layers_are_what_cublas_is_given() -> None:
    one = problem()
    assert isinstance(one.layer, QuantizedLinear)
    assert one.layer.zeros is not None
    w = (one.layer.q.reshape(SHAPE.n, -1, 64).float() - one.layer.zeros[..., None]) * one.layer.scales[
        ..., None
    ].float()
    assert torch.equal(one.layer.dequantize(), w.reshape(SHAPE.n, SHAPE.k).half())
