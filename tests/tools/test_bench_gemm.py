"""tools/bench_gemm.py: the shapes, the floor and the targets, runs without a GPU, records, reports and plots."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_gemm
import gpu_check
import pytest
import torch
from bench.gemm import (
    measure,
    method_awq_trt,
    method_gemlite,
    method_humming,
    method_int4pack,
    processes,
    report,
    targets,
    timing,
)
from bench.gemm.measure import Settings
from bench.gemm.methods import Packed
from bench.gemm.plot import draw
from bench.gemm.problem import Problem, make_problem
from bench.gemm.record import read, write
from bench.gemm.shapes import HEADLINE, PREFILL, TOKENS, Shape, rotations, shapes

from awq_trt import layout

TOOLS = Path(__file__).parents[2] / "tools"
SHAPE = Shape(40, 192, 64)
CELL = {"n": 4096, "k": 4096, "m": 1, "variant": "default", "dtype": "float16", "error": 1e-4, "us": 10.0}
SETTINGS = Settings((SHAPE,), (1, 5), "float16", False, 3, "cpu", None, 4.0, 1 << 20, 3)


def test_shapes_of_the_models() -> None:
    found = {(s.n, s.k): s for s in shapes()}
    assert [(s.n, s.k) for s in shapes()][:3] == list(HEADLINE)
    assert len(found) == 14 > len(shapes(["Llama-3.1-8B"])) == 4
    assert {(6144, 4096), (28672, 4096), (4096, 14336), (57344, 8192), (24576, 4096), (960, 576)} <= set(found)
    assert found[4096, 4096].layers == ("Llama-3.1-8B o", "Qwen3-8B o")
    for shape in found.values():
        assert layout.supports(shape.n, shape.k, shape.group_size)
        assert shape.group_size == (64 if "SmolLM2" in shape.layers[0] else 128)


def test_bytes_and_floor() -> None:
    shape = Shape(4096, 4096, 128)
    weights = 4096 * 4096 // 2 + 4096 * 32 * 2 + 4096 * 32 // 2
    assert shape.weight_bytes(symmetric=False) == weights == 8716288
    assert shape.weight_bytes(symmetric=True) == weights - 4096 * 32 // 2
    assert shape.bytes(16, symmetric=False) == weights + 2 * 16 * (4096 + 4096)
    assert shape.floor_us(1, False, 3e12) == pytest.approx((weights + 2 * 8192) / 3e6)
    assert shape.floor_us(1, False, 3e12, 800e12) == shape.floor_us(1, False, 3e12)
    assert shape.floor_us(512, False, 3e12, 800e12) == pytest.approx(2 * 512 * 4096 * 4096 / 800e6)
    packed = method_awq_trt.pack(make_problem(Shape(64, 128, 64), "float16", False, (1,), "cpu", 0))
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


def timed_rows(m: int, own: float, cublas: float, peer: float, **changes: Any) -> list[dict[str, Any]]:
    """One cell of 4096 x 4096, in microseconds, with its floor."""
    rows = [{**CELL, "m": m, "method": name, "us": us, "group_size": 128}
            for name, us in (("awq_trt", own), ("cublas", cublas), ("humming", peer))]  # fmt: skip
    targets.add_floors(rows, [Shape(4096, 4096, 128)], symmetric=False, bandwidth=3e12, peak=800e12)
    return [row | changes for row in rows]


def judged(*cells: list[dict[str, Any]], variant: str | None = None) -> dict[str, dict[str, Any]]:
    rows = [row for rows in cells for row in rows]
    return {entry["what"]: entry for entry in targets.evaluate(rows, {row["m"] for row in rows} or (1, 64), variant)}


def test_targets_of_decoding() -> None:
    slower = {**timed_rows(1, 5, 1, 1)[0], "variant": "tactic 2"}
    wrong = [{**CELL, "m": 32, "method": "gemlite", "problem": "wrong"}, {"method": "fbgemm", "m": 1, "problem": "no"}]
    found = judged(timed_rows(1, 4, 14, 4.4), [slower], timed_rows(32, 6, 11, 5), wrong)
    floor = found["time / (1.15 floor + 2.5 us), up to 16 tokens"]
    assert floor["value"] == pytest.approx(4 / (1.15 * 2.911 + 2.5), abs=1e-3)
    assert floor["met"] is True
    small = found["cuBLAS / own, 4096x4096, up to 16 tokens"]
    assert (small["value"], small["at"], small["cells"]) == (3.5, [4096, 4096, 1], 1)
    missing, large = found["cuBLAS / own, 4096x14336, up to 16 tokens"], found["cuBLAS / own, 32 tokens"]
    assert [(e["met"], e["cells"]) for e in (missing, large)] == [(None, 0), (False, 1)]
    every, mean = (found[f"best peer / own, {what}"] for what in ("every cell", "geometric mean"))
    assert (every["met"], every["value"], every["at"]) == (False, 0.833, [4096, 4096, 32])
    assert (mean["met"], mean["value"]) == (False, pytest.approx((1.1 * 5 / 6) ** 0.5, abs=1e-3))
    assert found["error / error of cuBLAS"]["met"] is True
    assert judged(timed_rows(1, 4, 14, 4), [slower], variant="tactic 2")[small["what"]]["value"] == 2.8
    assert targets.line(every).startswith("MISSED: best peer / own, every cell: 0.833 (limit 1.0) at 4096x4096, 32 tok")
    assert "not measured" in targets.line(missing)
    assert {e["met"] for e in judged().values()} == {None}


def test_targets_of_prefill() -> None:
    """Limits as they are asked for; each is met on one side of it and missed on the other."""
    good = 1.3 * Shape(4096, 4096, 128).floor_us(64, False, 3e12, 800e12) + 2.9
    names = ["time / (1.3 floor + 3 us), 64 tokens", "cuBLAS / own, 64 to 256 tokens",
             "best peer / own, from 64 tokens, every cell"]  # fmt: skip
    met = judged(timed_rows(64, good, 1.31 * good, 0.96 * good))
    missed = judged(timed_rows(64, good + 0.2, 1.29 * good, 0.94 * good))
    for name in names:
        assert (met[name]["met"], missed[name]["met"]) == (True, False)
    for m, limit in ((128, 0.70), (256, 0.75)):
        us = 2 * m * 4096**2 / 800e6 / limit
        name = f"fraction of the peak, {m} tokens, group 128"
        assert judged(timed_rows(m, us * 0.99, us, us))[name]["met"] is True
        assert judged(timed_rows(m, us * 1.01, us, us))[name]["met"] is False
        assert judged(timed_rows(m, us * 1.01, us, us, group_size=64))[name]["met"] is None
    every, middle = (f"cuBLAS / own, beyond 256 tokens, {what}" for what in ("every cell", "median"))
    peers = "best peer / own, from 64 tokens, geometric mean"
    three = [timed_rows(m, 100, us, 120) for m, us in ((512, 95.5), (1024, 99), (8192, 130))]
    assert [judged(*three)[name]["met"] for name in (every, middle, names[1], peers)] == [True, False, None, True]
    four = judged(*three[1:], timed_rows(512, 100, 94, 120), timed_rows(2048, 100, 110, 105))
    assert [four[name]["met"] for name in (every, middle)] == [False, True]


def test_decode_and_prefill_are_judged_apart() -> None:
    """A prefill cell that loses moves no target of decoding, and the other way round."""
    decode, prefill = timed_rows(32, 5, 15, 7), timed_rows(512, 100, 50, 50)
    alone, other, both = ({what: e.get("value") for what, e in judged(*cells).items() if not what.startswith("error")}
                          for cells in ([decode], [prefill], [decode, prefill]))  # fmt: skip
    assert not alone.keys() & other.keys()
    assert both == alone | other


def test_floors_are_put_into_timed_rows_only() -> None:
    (first, *_), (many, *_) = timed_rows(1, 10, 10, 10), timed_rows(1024, 50, 50, 50)
    assert (first["floor_us"], first["fraction_of_floor"]) == (2.911, 0.2911)
    assert (many["floor_us"], many["fraction_of_floor"]) == (42.95, 0.859)
    assert many["fraction_of_peak"] == pytest.approx(2 * 1024 * 4096**2 / 50e-6 / 800e12, abs=1e-4)
    wrong: list[dict[str, Any]] = [{"n": 4096, "k": 4096, "m": 1, "problem": "wrong"}]
    targets.add_floors(wrong, [Shape(4096, 4096, 128)], symmetric=False, bandwidth=3e12, peak=800e12)
    assert "floor_us" not in wrong[0]


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
    code, record = run(
        monkeypatch, tmp_path, "--plot", tmp_path / "result.svg", "--tokens", "32", "1", "64", "200", "200", *options
    )
    assert code == 0
    assert record["settings"]["seed"] == 5
    assert record["settings"]["tokens"] == [1, 32, 64, 200]
    assert record["not_run"] == []
    assert set(record["device"]["bandwidth"]) == {"copy", "read", "used", "by"}
    by = f"64x64x64, {record['settings']['dtype']}"
    assert record["device"]["peak"] == {"used": 2 * 64**3 * 1e6, "by": by}, "in a microsecond"
    assert set(record["refusals"]) >= {"int4pack"} or torch.cuda.is_available()
    timed = [row for row in record["rows"] if "us" in row]
    assert {row["method"] for row in timed} >= {"awq_trt", "cublas"}
    for row in timed:
        assert set(row) == {
            "method", "dtype", "n", "k", "group_size", "m", "variant", "pack_seconds", "bytes", "copies", "error",
            "worst_part", "us", "p10_us", "calls", "replays", "floor_us", "fraction_of_floor", "fraction_of_peak",
            *(["warm_us"] if row["m"] <= 32 else []),
        }  # fmt: skip
        assert row["error"] < measure.LARGEST_ERROR[row["dtype"]]
        assert row["copies"] >= 2
    out = capsys.readouterr().out
    for words in ("57344x8192", "14 shapes x 4 x 6 methods", "geometric mean"):
        assert words in out, "what is printed is of the real layers"
    assert "<svg" in (tmp_path / "result.svg").read_text()


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
    rows = list(processes.run(SETTINGS, names, 100, isolate=False))
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
    one, seen = make_problem(SHAPE, "float16", False, (1, 5), "cpu", seed=3), []

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
    rows = [r for r in measure.measure(SETTINGS, ["awq_trt", "cublas"], 5.0, first=False) if "us" in r]
    assert 0 < len(rows) < 4


def test_own_kernels_that_are_wrong_fail_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    zeros = lambda tensors, x, y: torch.zeros_like(y)  # noqa: E731
    monkeypatch.setattr(method_awq_trt, "load", lambda library: lambda p, tokens: [Packed([p.layer.q], {"": zeros})])
    code, record = run(monkeypatch, tmp_path, "--methods", "awq_trt", "cublas")
    assert code == 1
    assert {"cublas"} == {row["method"] for row in record["rows"] if "us" in row}


def test_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come as from this process; one that dies, or does not end, is a refusal and what it had said is kept."""
    apart = list(processes.run(SETTINGS, ["awq_trt", "cublas"], 100))
    here = list(processes.run(SETTINGS, ["awq_trt", "cublas"], 100, isolate=False))
    assert [row | {"pack_seconds": 0} for row in apart] == [row | {"pack_seconds": 0} for row in here]
    script = 'import sys, os; print(\'@row {"method": "cublas", "m": 1}\', flush=True); '
    popen = subprocess.Popen

    def instead(code: str) -> None:
        fake = SimpleNamespace(PIPE=subprocess.PIPE, Popen=lambda c, **k: popen([sys.executable, "-c", code], **k))
        monkeypatch.setattr(processes, "subprocess", fake)

    instead(script + "print('cuda', file=sys.stderr, flush=True); os.abort()")
    kept, refusal = processes.child(SETTINGS, ["cublas"], 50, 50, first=False)
    assert kept == {"method": "cublas", "m": 1}
    assert "ended with code -6" in refusal["refusal"]
    assert "cuda" in refusal["refusal"]
    instead(script + "import time; time.sleep(600)")
    monkeypatch.setattr(processes, "GRACE_SECONDS", 1)
    assert "ended with code -9" in list(processes.child(SETTINGS, ["cublas"], 0, 50, first=False))[1]["refusal"]


def test_plot_has_a_logarithmic_axis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self))
    made = made_up_record({(4096, 4096): 1.0})
    made["settings"]["tokens"] = [1, 24, 48, 64, 8192]
    draw(made, tmp_path / "x.svg")
    lower = figures[0].axes[1]
    assert lower.get_xticks().tolist() == [1, 64, 8192]
    (own, *_) = lower.get_lines()
    assert own.get_xdata().tolist() == [1, 64, 8192], "measured cells, at their number of tokens"
    assert own.get_ydata().tolist() == [2, 2, 2]


def made_up_record(layers: dict[tuple[int, int], float]) -> dict[str, Any]:
    """cuBLAS takes twice the own time, which is (1 + tokens) us times a number for each (N, K)."""
    rows = [
        {**CELL, "method": method, "variant": variant, "n": n, "k": k, "m": m, "us": us * share * (1 + m),
         "group_size": 128, "fraction_of_floor": 0.5}
        for (n, k), us in layers.items() for m in (1, 64, 8192)
        for method, variant, share in (("awq_trt", "default", 1.25), ("awq_trt", "other", 1), ("cublas", "default", 2))
    ]  # fmt: skip
    return {
        "date": "2026-01-02T00:00:00+00:00",
        "hardware": [{"name": "A GPU"}],
        "settings": {"shapes": [{"n": n, "k": k, "group_size": 128} for n, k in layers], "tokens": [1, 64, 8192],
                     "dtype": "float16", "symmetric": False, "device": "cuda"},
        "device": {"bandwidth": {"used": 3e12}, "peak": {"used": 790e12}},
        "rows": rows, "targets": {}, "refusals": {}, "not_run": [], "seconds": 1.0,
    }  # fmt: skip


def test_report_has_each_layer_and_their_sum() -> None:
    layers = {(6144, 4096): 1.0, (4096, 4096): 2.0, (28672, 4096): 3.0, (4096, 14336): 4.0}
    text = report.markdown(made_up_record(layers))
    assert "A GPU, float16, 2026-01-02" in text
    assert "3000 GB/s, 790 TFLOP/s" in text
    assert "takes 1.25 times as long" in text
    assert text.count("## ") == 2, "Qwen3-8B shares layers with Llama-3.1-8B, the others have none here"
    llama = text[text.index("## Llama-3.1-8B") : text.index("## Qwen3-8B")]
    assert "| tokens | qkv 6144x4096 | o 4096x4096 | gate_up 28672x4096 | down 4096x14336 | all four |" in llama
    assert "| 1 | 4.00 / 2.00 = **2.00** | 8.00 / 4.00 = **2.00** |" in llama
    assert "| 64 | 130 / 65.00 = **2.00** |" in llama
    assert "| 40.00 / 20.00 = **2.00** |\n" in llama
    assert "| 8.00 / 4.00 = **2.00** | - / - | - / - | - / - |" in text[text.index("## Qwen3") :]
    one_sided = made_up_record(layers)
    one_sided["rows"] = [r for r in one_sided["rows"] if (r["n"], r["method"]) != (6144, "awq_trt")]
    assert "| 1 | 4.00 / - | 8.00 / 4.00 = **2.00** |" in report.markdown(one_sided)
    assert "| 40.00 / - |\n" in report.markdown(one_sided)


def test_report_and_plot_from_a_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A GPU is not asked for, nothing is measured, the file stays as it is."""
    code, record = run(monkeypatch, tmp_path, "--tokens", "1", "64", "--report", tmp_path / "first.md")
    assert code == 0
    assert "Made up" in (tmp_path / "first.md").read_text()
    before = (tmp_path / "result.json").read_bytes()
    monkeypatch.setattr(processes, "run", None)
    command = ["bench_gemm.py", "--from", tmp_path / "result.json", "--report", tmp_path / "second.md",
               "--plot", tmp_path / "second.svg"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(a) for a in command])
    assert bench_gemm.main() == 0
    assert (tmp_path / "second.md").read_bytes() == (tmp_path / "first.md").read_bytes()
    assert "<svg" in (tmp_path / "second.svg").read_text()
    assert (tmp_path / "result.json").read_bytes() == before
    write(record, tmp_path / "again.json")
    assert read(tmp_path / "again.json") == record


def test_records_that_are_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(text: str | None) -> str:
        path = tmp_path / "r.json"
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(sys, "argv", ["bench_gemm.py", "--from", str(path)])
        assert bench_gemm.main() == 2
        words = capsys.readouterr().err
        assert words.startswith(f"bench_gemm: {path}: ")
        assert words.count("\n") == 1
        return words

    assert "No such file" in said(None)
    assert "cannot be read as JSON" in said("{")
    assert "no date, hardware" in said("[]")
    old = made_up_record({})
    del old["device"]["peak"]
    assert "no device.peak in it" in said(json.dumps(old))


def test_ranges_of_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    def tokens(*options: str) -> tuple[int, ...]:
        args = bench_gemm.parser().parse_args(["--output", "r.json", "--dry-run", *options])
        return bench_gemm.settings_of(args).tokens

    assert tokens() == tokens("--range", "decode") == TOKENS == (1, 2, 4, 8, 16, 24, 32)
    assert tokens("--range", "prefill") == PREFILL == tuple(2**i for i in range(6, 14))
    assert tokens("--range", "all") == TOKENS + PREFILL
    assert tokens("--tokens", "100", "7") == (7, 100)
    for wrong in (["--tokens", "1", "--range", "all"], ["--from", "r.json"]):
        with pytest.raises(SystemExit):
            tokens(*wrong)
        assert "not allowed with" in capsys.readouterr().err
    with pytest.raises(gpu_check.UsageError, match="--tokens 0: "):
        tokens("--tokens", "0")


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
