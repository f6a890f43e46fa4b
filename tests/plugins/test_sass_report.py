"""tools/sass_report.py: paths through machine code, what the decode kernels issue, predicted times, the record."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import sass_report
from bench.gemm.shapes import HEADLINE, TOKENS, Shape, shapes
from bench.sass import listing, paths, prediction
from bench.sass.prediction import GPUS, Plan, ask_planner, predict

ROOT = Path(__file__).parents[2]
H100 = GPUS[0]
SLOTS = {
    1: {128: 202, 64: 238, 32: 265},
    2: {128: 246, 64: 260, 32: 295},
    3: {128: 465, 64: 503, 32: 580},
    4: {128: 521, 64: 555, 32: 656},
}
"""Tokens / 8 -> group size -> issue slots for a unit, at most: 10 % over the slowest architecture and type today."""

# A main loop as the compiler makes it: a wait, a refill, one of two ways to multiply, each a loop over two tiles, and
# the end of a strip. Labels stand for addresses.
LOOP = """
          MOV R1, c[0x0][0x28]
          @P6 EXIT
head:     DEPBAR.LE SB0, 0x2
          BRA.DIV UR4, apart
joined:   @P0 BRA filled
          @!PT LDS RZ, [RZ]
          LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64]
          @P2 LDGSTS.E.BYPASS.128 [R2+0x400], desc[UR4][R6.64]
filled:   LDGDEPBAR
          BRA.U UP0, fine
whole:    LDS.128 R8, [R2]
          LDSM.16.M88.4 R12, [R3]
          HMMA.16816.F32 R20, R8, R12, R20
          HMMA.16816.F32 R20, R8, R12, R20
          HMMA.16816.F32 R20, R8, R12, R20
          HMMA.16816.F32 R20, R8, R12, R20
          @!P1 BRA whole
          FFMA R16, R20, R30, R16
          FFMA R17, R21, R30, R17
          FFMA R18, R22, R31, R18
          FFMA R19, R23, R31, R19
          BRA done
fine:     LDS R30, [R5]
          @P3 LDS.U8 R31, [R5+0x80]
          LDSM.16.M88.4 R12, [R3]
          HMMA.16816.F32 R20, R8, R12, RZ
          HMMA.16816.F32 R20, R8, R12, R20
          HMMA.16816.F32 R20, R8, R12, R20
          HMMA.16816.F32 R20, R8, R12, R20
          FFMA R16, R20, R30, R16
          FFMA R17, R21, R30, R17
          FFMA R18, R22, R31, R18
          FFMA R19, R23, R31, R19
          @P1 BRA done
          BRA fine
done:     ISETP.GE.AND P4, PT, R40, R41, PT
          @!P4 BRA next
          @P5 BRA empty
          STG.E.128 desc[UR4][R8.64], R16
empty:    NOP
next:     @!P0 BRA head
          EXIT
apart:    WARPSYNC.COLLECTIVE R8, over
over:     BRA joined
"""


def assemble(text: str) -> str:
    """The text as cuobjdump lists it: addresses for labels, and a second line of encoding after each instruction."""
    lines = [re.fullmatch(r"(?:(\w+):)?\s+(.*)", line) for line in text.strip("\n").splitlines()]
    labels = {m.group(1): f"{16 * i:#x}" for i, m in enumerate(lines) if m and m.group(1)}
    out = []
    for i, match in enumerate(lines):
        assert match
        words = re.sub(r"\b[a-z]+$", lambda w: labels[w.group()], match.group(2))
        out.append(f"        /*{16 * i:04x}*/    {words} ;    /* 0x000000ff00037b82 */")
        out.append("                                             /* 0x000fe20000000800 */")
    return "\n".join(out)


@pytest.fixture(scope="module")
def made_up() -> tuple[listing.Instruction, ...]:
    return listing.parse(assemble(LOOP))


@pytest.fixture(scope="session")
def read(library: Path) -> tuple[list[dict[str, Any]], sass_report.Loops]:
    """Rows of all kernels and the decode kernels' paths, of every architecture of the installed library."""
    return sass_report.read_library(library.with_name(sass_report.LIBRARY))


@pytest.fixture(scope="session")
def predicted(read: tuple[list[dict[str, Any]], sass_report.Loops], host_check: Path) -> list[dict[str, Any]]:
    return sass_report.predicted_rows(read[1], host_check)


def test_parse(made_up: tuple[listing.Instruction, ...]) -> None:
    assert len(made_up) == len(LOOP.strip().splitlines())
    assert [i.address for i in made_up] == [16 * n for n in range(len(made_up))]
    copy = made_up[7]
    assert (copy.guard, copy.opcode, copy.base) == ("P2", "LDGSTS.E.BYPASS.128", "LDGSTS")
    assert copy.operands == "[R2+0x400], desc[UR4][R6.64]"
    assert [i.never for i in made_up[4:7]] == [False, True, False]
    assert listing.count(made_up) == {"LDG.128": 0, "LDGSTS.128": 2, "HMMA": 8, "LDSM": 2, "LDS": 3, "local": 0}
    assert listing.count(listing.parse("/*0000*/ STL [R1], R2 ;\n/*0010*/ LDL.LU R2, [R1] ;"))["local"] == 2
    assert not {opcode for opcode in listing.PIPE_OF if not opcode.isalnum()}
    assert len(listing.PIPE_OF) == sum(len(names.split()) for names in listing.PIPES.values())  # none is listed twice


def test_paths_through_a_made_up_loop(made_up: tuple[listing.Instruction, ...]) -> None:
    graph = paths.graph_of(made_up)
    (header,) = paths.main_loops(graph)
    assert graph.blocks[header][0].opcode == "DEPBAR.LE"
    assert paths.wait_depth(graph, graph.loops[header]) == 2
    assert len(graph.loops) == 3
    # refilled or not, two ways to multiply, strip not complete or complete with nothing to store
    found = paths.paths(graph, header, hmma=8)
    assert len(found) == len({tuple(p) for p in found}) == 2 * 2 * 2
    assert paths.paths(graph, header, hmma=7) == []
    for path in found:
        opcodes = Counter(i.base for b in path for i in graph.blocks[b])
        assert opcodes["HMMA"] == 8
        assert opcodes["STG"] == opcodes["WARPSYNC"] == 0


def test_steady_path_of_a_made_up_loop(made_up: tuple[listing.Instruction, ...]) -> None:
    found = paths.steady(made_up, token_tiles=1)
    assert list(found) == [1, 2]
    around = 2 + 1 + 3 + 2 + 2 + 1  # wait, branch, refill, dispatch, end of a strip, back
    assert found[1].slots == around + 2 * 7 + 5
    assert found[2].slots == around + 2 * 12 + 1  # the jump back is taken once
    assert found[1].by_pipe() == {"control": 10, "load_store": 3 + 2 * 2, "tensor": 8, "fma": 4, "alu": 1}
    assert found[1].wavefronts() == (4 + 1) + 2 * (4 + 4)  # the guarded copy is of scales
    assert found[2].wavefronts() == (4 + 1) + 2 * (1 + 1 + 4)
    assert paths.steady(made_up, token_tiles=2) == {}
    # older compilers jump over the same detour, where newer ones jump into it
    older = LOOP.replace("BRA.DIV UR4, apart", "BRA.CONV ~URZ, joined\n          CALL.REL.NOINC apart")
    assert paths.steady(listing.parse(assemble(older)), 1)[2].by_opcode() == found[2].by_opcode()


def test_a_loop_for_each_scaling() -> None:
    """Two main loops, one or the other: each is gone through."""
    once = LOOP[LOOP.index("head:") : LOOP.index("          EXIT")]
    twice = re.sub(r"\b(head|apart|joined|filled|whole|fine|done|empty|next)\b", r"\1x", once)
    ends = LOOP[LOOP.index("apart:") :]
    endsx = re.sub(r"\b(apart|over|joined)\b", r"\1x", ends)
    text = f"          @P6 BRA headx\n{once}          EXIT\n{twice}          EXIT\n{ends.strip()}\n{endsx.strip()}"
    code = listing.parse(assemble(text))
    graph = paths.graph_of(code)
    assert len(paths.main_loops(graph)) == 2
    assert list(paths.steady(code, 1)) == [1, 2]
    assert list(paths.steady([replace(i, opcode="NOP") if i.base == "LDGSTS" and i.address > 16 * 40 else i
                              for i in code], 1)) == [1, 2]  # fmt: skip


def test_unknown_opcodes_are_reported(made_up: tuple[listing.Instruction, ...]) -> None:
    unit = paths.steady([replace(i, opcode="FROB.X") if i.base == "ISETP" else i for i in made_up], 1)[1]
    assert unit.unknown() == ["FROB"]
    assert unit.by_pipe()["unknown"] == 1
    assert "FROB" in sass_report.loop_rows({(90, "Half", 1): {1: unit}})[0]["unknown"]


def test_no_main_loop() -> None:
    with pytest.raises(ValueError, match="is this the decode kernel"):
        paths.steady(listing.parse(assemble(LOOP.replace("SB0", "SB1"))), 1)


def test_resources(read: tuple[list[dict[str, Any]], sass_report.Loops]) -> None:
    rows, _ = read
    assert Counter(r["sm"] for r in rows) == dict.fromkeys(listing.ARCHITECTURES, 14)
    for row in rows:
        decode = row["kernel"].startswith("Decode")
        assert row["local"] == row["stack"] == row["local_bytes"] == 0, row
        assert row["threads"] in (128, 256, 512)
        assert row["LDGSTS.128"] > 0 < row["LDSM"], row
        assert row["LDG.128"] > 0 < row["HMMA"], row
        if decode:  # what plans take for granted: 16 warps in one block or in two, half of them with larger strips
            assert row["warps"] >= 16 // paths.strip_tiles(int(row["kernel"][-2])), row


def test_steady_state_of_every_decode_kernel(read: tuple[list[dict[str, Any]], sass_report.Loops]) -> None:
    _, loops = read
    assert len(loops) == len(listing.ARCHITECTURES) * 2 * 4
    for (architecture, dtype, token_tiles), by_parts in loops.items():
        where = f"sm_{architecture} {dtype} {token_tiles}"
        assert sorted(by_parts) == [1, 2, 4], where
        for parts, unit in by_parts.items():
            opcodes = unit.by_opcode()
            assert opcodes["HMMA"] == 8 * token_tiles * paths.strip_tiles(token_tiles), where
            assert opcodes["LDSM"] == 4 * token_tiles, where
            assert opcodes["LDGSTS"] >= 2, where  # a tile is 16 bytes of each lane
            assert not opcodes["LDL"] + opcodes["STL"] + opcodes["LDG"], where
            assert unit.unknown() == [], where
            assert unit.slots <= SLOTS[token_tiles][sass_report.GROUP_SIZE[parts]], where


def test_plans(host_check: Path, read: tuple[list[dict[str, Any]], sass_report.Loops]) -> None:
    """The division of work is the plugin's, and its ring is as deep as the machine code's wait says."""
    layer = Shape(8192, 28672, 128)
    odd = Shape(8192, 28671, 128)
    plans = ask_planner(host_check, [(layer, 1, H100, 1), (layer, 33, H100, 1), (odd, 1, H100, 1), (layer, 1, H100, 9)])
    assert plans[1:] == [None, None, None]
    plan = plans[0]
    assert plan is not None
    assert plan.ranges * plan.slices <= H100.multiprocessors
    assert plan.most_strips * plan.ranges >= layer.n / 16
    assert plan.most_units * plan.slices >= layer.k / 128
    assert plan.shared_bytes < H100.shared_bytes
    unit = read[1][90, "Half", 1][1]
    waits = [i.operands for i in unit.code if i.opcode == "DEPBAR.LE"]
    assert waits == [f"SB0, {plan.stages - 2:#x}"]
    with pytest.raises(ValueError, match="does not plan"):
        ask_planner(Path("/bin/false"), [(layer, 1, H100, 1)])


def test_prediction(made_up: tuple[listing.Instruction, ...]) -> None:
    """By hand: one block of 16 warps, each with one unit of every strip."""
    unit = paths.steady(made_up, 1)[1]
    shape, gpu = Shape(16 * 64 * 132, 128 * 16, 128), replace(H100, achievable=1.0, bandwidth=132 * 20)
    plan = Plan(1, 1, 16, 4, 1, ranges=132, slices=1, most_strips=64, most_units=16, row_bytes=0, shared_bytes=0)
    found = predict(shape, 1, gpu, plan, unit)
    weights, x = 64 * 16 * 1064, 16 * 256
    assert found.resources["memory"] == pytest.approx(weights / 20e3)  # X comes while the rings are filled
    assert found.x == pytest.approx(x / 40e3)
    assert found.resources["issue"] == pytest.approx(x / 40e3 + 64 * 4 * unit.slots / 1.755e3)
    assert found.resources["tensor"] == pytest.approx(x / 40e3 + 64 * 16 * 8 / 0.62 / 1.755e3)
    assert (found.bound, found.split) == ("memory", 0)
    assert found.us == pytest.approx(2 + weights / 20e3)
    split = predict(shape, 1, gpu, replace(plan, ranges=66, slices=2, most_strips=128, most_units=8), unit)
    assert split.split == pytest.approx(1.1 + 2 * 128 * 512 / min(64 * 1.755e3, 40e3 * 2))
    assert split.resources["memory"] == pytest.approx(weights / 20e3 + 128 * 512 / 40e3)


def test_predicted_rows(predicted: list[dict[str, Any]]) -> None:
    cells = {(r["gpu"], r["n"], r["k"], r["m"]) for r in predicted}
    assert len(predicted) == len(cells) == len(GPUS) * len(shapes()) * len(TOKENS)
    for row in predicted:
        resources = {
            name: row[f"{name}_us"] for name in ("memory", "latency", "issue", "alu", "fma", "tensor", "shared")
        }
        assert resources[row["bound"]] == max(resources.values())
        assert row["us"] >= row["best_us"] > row["floor_us"] > 0
        assert row["best_tactic"] in prediction.TACTICS
    for row in predicted:
        if row["gpu"] == H100.name and (row["n"], row["k"]) in HEADLINE:
            assert row["kb_in_flight"] >= 40, row
            assert row["warps"] == (16 if row["m"] <= 16 else 8), row


def test_report(
    read: tuple[list[dict[str, Any]], sass_report.Loops],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sass_report, "read_library", lambda library: read)
    monkeypatch.setattr(sys, "argv", ["sass_report.py", "--output", str(tmp_path / "report.json")])
    assert sass_report.main() == 0
    text = capsys.readouterr().out
    check_record(tmp_path / "report.json")
    assert text.count("predicted, not measured") >= len(GPUS) + 4
    assert "unknown opcodes: none" in text
    for gpu in GPUS:
        assert gpu.name in text
    monkeypatch.setattr(sys, "argv", ["sass_report.py", "--output", "x", "--library", str(tmp_path)])
    assert sass_report.main() == 2
    assert "is missing" in capsys.readouterr().err


def check_record(path: Path) -> None:
    """Everything is there, and what is predicted says so."""
    record = json.loads(path.read_text())
    assert record["times"].startswith("predicted, not measured")
    assert all(t["what"].startswith("predicted, not measured") and t["met"] is not None for t in record["targets"])
    assert len(record["targets"]) == 1 + len(HEADLINE)
    assert record["architectures"] == [f"sm_{a}" for a in listing.ARCHITECTURES]
    assert all(re.fullmatch(r"V?\d+\.\d+\.\d+", v) for v in record["versions"].values())
    assert set(record["versions"]) == {"awq_trt", "cuobjdump", "ptxas"}
    sizes = {"kernels": 6 * 14, "loops": 6 * 2 * 4 * 3, "predicted": len(GPUS) * len(shapes()) * len(TOKENS)}
    for name, size in sizes.items():
        rows = [dict(zip(record[name]["columns"], row, strict=True)) for row in record[name]["rows"]]
        assert len(rows) == size
        assert all(value is not None for row in rows for value in row.values())
    assert all(row[-1] == "" for row in record["loops"]["rows"])  # unknown opcodes
    assert path.stat().st_size < 150_000


def test_committed_record() -> None:
    check_record(ROOT / "tools" / "results" / "sass-report.json")
