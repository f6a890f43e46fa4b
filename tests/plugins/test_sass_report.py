"""tools/sass_report.py: paths through machine code, what the kernels issue, predicted times, the record."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sass_report
from bench.gemm.shapes import HEADLINE, PREFILL, TOKENS, Shape, shapes
from bench.sass import listing, paths, prediction, prefill
from bench.sass.prediction import GPUS, GemmPlan, Plan, ask_planner, predict

ROOT = Path(__file__).parents[2]
H100 = GPUS[0]
SLOTS = {
    1: {128: 202, 64: 238, 32: 265},
    2: {128: 246, 64: 260, 32: 295},
    3: {128: 465, 64: 503, 32: 580},
    4: {128: 521, 64: 555, 32: 656},
}
"""Tokens / 8 -> group size -> issue slots for a unit, at most: 10 % over the slowest architecture and type today."""

PREFILL_SLOTS = {
    "GemmKernel": {(4, 8): 532, (8, 8): 514, (4, 16): 723, (8, 16): 684},
    "WgmmaKernel": {(1, 16): 169, (2, 8): 268, (2, 16): 271},
}
"""Numbers of the template -> issue slots of a warp for a unit, at most: 10 % over the slowest today."""

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


# The loop of a gemm kernel: a wait, a refill unless there is no more, in it copies of scales by some lanes, X that is
# aligned or is not, the place of the next tile; then one of two ways to multiply.
GEMM_LOOP = """
          @P6 EXIT
head:     @!P2 BRA four
          DEPBAR.LE SB0, 0x1
          BRA joined
four:     DEPBAR.LE SB0, 0x2
joined:   BAR.SYNC.DEFER_BLOCKING 0x0
          @P0 BRA filled
          LDGSTS.E.BYPASS.128 [R57], [R54.64], P1
          @P4 BRA tokens
          LDGSTS.E.BYPASS.128 [R57+0x100], [R52.64]
tokens:   @!P1 BRA slowly
          LDGSTS.E.BYPASS.128 [R147], [R222.64], P3
          BRA advance
slowly:   @P3 LDG.E.U16.CONSTANT R56, [R222.64]
          STS.128 [R147], R52
advance:  @P5 BRA filled
          MUFU.RCP R54, R54
          IADD3 R52, R54, 0x1, RZ
filled:   LDGDEPBAR
          @!P0 BRA plain
          LDG.E.CONSTANT R177, [R202.64]
          HMMA.16816.F32 R20, R8, R12, R20
          HMMA.16816.F32 R24, R8, R14, R24
          BRA next
plain:    LDSM.16.M88.4 R12, [R3]
          HMUL2 R9, R9, R10
          HMMA.16816.F32 R20, R8, R12, R20
          HMMA.16816.F32 R24, R8, R14, R24
next:     @P1 BRA end
          BRA head
end:      @P2 BRA head
          STG.E.128 [R8.64], R16
          EXIT
"""

# That of the warps of a wgmma kernel that multiply: a wait that may have to be repeated, out of the way.
WGMMA_LOOP = """
          @P6 EXIT
head:     SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR16], R4
          @!P0 BRA again
ready:    @!P1 BRA plain
          LDG.E.CONSTANT R165, desc[UR32][R4.64]
          HGMMA.64x128x16.F32 R24, R160, gdesc[UR16], R24
          BRA next
plain:    LDS.128 R8, [R13+0x4000]
          WARPGROUP.ARRIVE
          HGMMA.64x128x16.F32 R24, R160, gdesc[UR16], R24
          HGMMA.64x128x16.F32 R88, R164, gdesc[UR16], R88, gsb0
          WARPGROUP.DEPBAR.LE gsb0, 0x1
          @!P2 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R3+URZ+0x38], RZ
next:     @!P0 BRA head
          EXIT
again:    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR16], R4
          @!P0 BRA again
          BRA ready
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
def loops(kernels: list[listing.Kernel]) -> sass_report.Loops:
    """The decode kernels' paths, of every architecture of the installed library."""
    return sass_report.decode_loops(kernels)


@pytest.fixture(scope="session")
def units(kernels: list[listing.Kernel]) -> list[prefill.Unit]:
    """Those of the kernels for many tokens."""
    return sass_report.prefill_units(kernels)


@pytest.fixture(scope="session")
def predicted(loops: sass_report.Loops, host_check: Path) -> list[dict[str, Any]]:
    return sass_report.predicted_rows(loops, host_check)


@pytest.fixture(scope="session")
def planned(host_check: Path) -> list[dict[str, Any]]:
    return prefill.planned_rows(host_check)


def test_parse(made_up: tuple[listing.Instruction, ...]) -> None:
    assert len(made_up) == len(LOOP.strip().splitlines())
    assert [i.address for i in made_up] == [16 * n for n in range(len(made_up))]
    copy = made_up[7]
    assert (copy.guard, copy.opcode, copy.base) == ("P2", "LDGSTS.E.BYPASS.128", "LDGSTS")
    assert copy.operands == "[R2+0x400], desc[UR4][R6.64]"
    assert [i.never for i in made_up[4:7]] == [False, True, False]
    counts = {"LDGSTS.128": 2, "STG.128": 1, "LDSM": 2, "LDS": 3, "HMMA": 8}
    assert listing.count(made_up) == dict.fromkeys((*listing.COUNTED, "local"), 0) | counts
    assert listing.count(listing.parse("/*0000*/ STL [R1], R2 ;\n/*0010*/ LDL.LU R2, [R1] ;"))["local"] == 2
    assert not {opcode for opcode in listing.PIPE_OF if not opcode.isalnum()}
    assert len(listing.PIPE_OF) == sum(len(names.split()) for names in listing.PIPES.values())  # none is listed twice


def test_sections() -> None:
    """Asked for sm_90, cuobjdump lists sm_90a, too, and each source file by itself."""
    text = "Fatbin\n====\narch = sm_90\nhost = linux\none\narch = sm_90a\ntwo\narch = sm_90\nthree\n"
    assert listing.sections(text) == {"90": "host = linux\none\nthree\n", "90a": "two\n"}


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
    assert "FROB" in sass_report.loop_rows({("90", "Half", 1): {1: unit}})[0]["unknown"]


def test_no_main_loop() -> None:
    with pytest.raises(ValueError, match="is this the decode kernel"):
        paths.steady(listing.parse(assemble(LOOP.replace("SB0", "SB1"))), 1)


def test_unit_of_a_made_up_gemm_loop() -> None:
    code = listing.parse(assemble(GEMM_LOOP))
    unit = paths.steady_unit(code)
    # two for the wait, barrier, refill 3 + 2 with its branch, its end, commit and branch, 4 to multiply, the jump back
    assert unit.slots == 2 + 1 + 1 + 3 + 3 + 1 + 2 + 4 + 2
    assert unit.by_opcode() == {"BRA": 9, "DEPBAR": 1, "BAR": 1, "LDGSTS": 3, "LDGDEPBAR": 1, "LDSM": 1, "HMUL2": 1,
                                "HMMA": 2}  # fmt: skip
    assert unit.lead == unit.slots - 4
    assert unit.multiplications() == 2
    assert unit.wavefronts() == 3 * 4 + 4
    # without the way that loads nothing into registers, there is none
    with pytest.raises(ValueError, match="is this one of the kernels"):
        paths.steady_unit([replace(i, opcode="LDG.E") if i.base == "HMUL2" else i for i in code])
    with pytest.raises(ValueError, match="is this one of the kernels"):
        paths.steady_unit([replace(i, opcode="NOP") if i.base == "HMMA" else i for i in code])


def test_unit_of_a_made_up_wgmma_loop() -> None:
    unit = paths.steady_unit(listing.parse(assemble(WGMMA_LOOP)))
    assert unit.by_opcode() == {"SYNCS": 2, "BRA": 3, "LDS": 1, "WARPGROUP": 2, "HGMMA": 2}
    assert unit.multiplications() == 2 * 16
    assert unit.wavefronts() == 4 + 2 * 8
    assert unit.lead == 5
    assert unit.unknown() == []


def test_clocks(kernels: list[listing.Kernel]) -> None:
    """By hand, of the largest tiles: 256 x 128 x 64 multiply-adds for 8 warps."""
    gemm = next(k for k in kernels if (k.sm, k.title) == ("90", "GemmKernel<Half, 8, 16>"))
    wgmma = next(k for k in kernels if (k.sm, k.title) == ("90a", "WgmmaKernel<Half, 2, 16>"))
    assert (prefill.tile(gemm), prefill.tile(wgmma)) == ((256, 128), (256, 128))
    assert (prefill.warps(gemm), prefill.warps(wgmma)) == (8, 8)
    rows = prefill.clock_rows([(k, paths.steady_unit(k.code)) for k in (gemm, wgmma)])
    assert [(r["gpu"], r["tile"]) for r in rows] == [("H100 SXM", "256x128")] * 2
    assert [r["tensor"] for r in rows] == [round(256 * 128 * 64 / 2048 / 0.62), 256 * 128 * 64 // 2048]
    assert {r["l2"] for r in rows} == {round((256 * 32 + 128 * 128) / (2 * H100.share) * H100.ghz)}
    for row in rows:
        clocks = {name: row[name] for name in ("issue", "alu", "fma", "tensor", "shared", "l2")}
        assert clocks[row["bound"]] == max(clocks.values())


def test_resources(kernels: list[listing.Kernel]) -> None:
    rows = [sass_report.kernel_row(kernel) for kernel in kernels]
    assert Counter(r["sm"] for r in rows) == {a: 6 if a == "90a" else 18 for a in listing.ARCHITECTURES}
    for row in rows:
        family, numbers = row["kernel"].split("Kernel")[0], re.findall(r"\d+", row["kernel"].split(",", 1)[-1])
        assert row["local"] == row["stack"] == row["local_bytes"] == 0, row
        assert row["threads"] in (128, 256, 384, 512)
        assert (row["HGMMA"] > 0) == (row["UTMALDG"] > 0) == (row["USETMAXREG"] > 0) == (family == "Wgmma"), row
        assert (row["HMMA"] > 0) == (family in ("Decode", "Gemm")), row
        assert (row["LDG.128"] > 0 < row["LDSM"]) if family != "Wgmma" else row["SYNCS"] > 0, row
        assert (row["ATOMG"] > 0 < row["LDGSTS.128"]) == (family != "Dequantize"), row
        assert row["STG.128"] > 0, row
        if family == "Decode":  # what plans take for granted: 16 warps in one block or two, half with larger strips
            assert row["warps"] >= 16 // paths.strip_tiles(int(numbers[0])), row
        if family == "Gemm":  # resident: plugins/plan/gemm_plan.h
            assert row["warps"] >= 8 if numbers != ["4", "16"] else 4, row


def test_steady_state_of_every_decode_kernel(loops: sass_report.Loops) -> None:
    assert len(loops) == 6 * 2 * 4
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


def test_steady_state_of_every_kernel_for_many_tokens(units: list[prefill.Unit]) -> None:
    assert len(units) == 6 * 2 * 4 + 2 * 3
    for kernel, unit in units:
        where, opcodes = f"sm_{kernel.sm} {kernel.title}", unit.by_opcode()
        features, tokens = prefill.tile(kernel)
        assert unit.multiplications() == features // 16 * tokens // 8 * 4 / prefill.warps(kernel), where
        assert opcodes["LDS"] >= 5 * features // 16 / prefill.warps(kernel), where  # weights, 2 scales, 2 zeros
        if kernel.family == "GemmKernel":  # strips, scales and zeros, tokens; two tiles of tokens at once
            assert opcodes["LDGSTS"] == 2 + 3 + tokens * 8 // kernel.threads, where
            assert opcodes["LDSM"] == 4 * tokens // 16, where
            assert opcodes["BAR"] == 1, where
        else:
            assert opcodes["LDGSTS"] == opcodes["LDSM"] == opcodes["BAR"] == 0, where
            assert opcodes["SYNCS"] == 2, where  # the stage is full; the one before is free
        assert not {"LDL", "STL", "LDG", "STG", "STS", "MUFU"} & set(opcodes), where
        assert unit.unknown() == [], where
        assert unit.slots <= PREFILL_SLOTS[kernel.family][kernel.numbers], where


def test_tensor_cores_are_busier_than_the_schedulers(units: list[prefill.Unit]) -> None:
    """Else no schedule could keep them busy; what L2 and shared memory need depends on the GPU, not on the code."""
    rows = prefill.clock_rows(units)
    assert len(rows) == len(GPUS) * 4 + 3
    for row in rows:
        assert row["tensor"] >= 0.99 * max(row[name] for name in ("issue", "alu", "fma")), row


def test_plans(host_check: Path, loops: sass_report.Loops) -> None:
    """The division of work is the plugin's, and its ring is as deep as the machine code's wait says."""
    layer = Shape(8192, 28672, 128)
    odd = Shape(8192, 28671, 128)
    plan, many, *rest = ask_planner(
        host_check, [(layer, 1, H100, 1), (layer, 33, H100, 1), (odd, 1, H100, 1), (layer, 1, H100, 9)]
    )
    assert rest == [None, None]
    assert isinstance(plan, Plan)
    assert isinstance(many, GemmPlan)
    assert plan.ranges * plan.slices <= H100.multiprocessors
    assert plan.most_strips * plan.ranges >= layer.n / 16
    assert plan.most_units * plan.slices >= layer.k / 128
    assert plan.shared_bytes < H100.shared_bytes
    unit = loops["90", "Half", 1][1]
    waits = [i.operands for i in unit.code if i.opcode == "DEPBAR.LE"]
    assert waits == [f"SB0, {plan.stages - 2:#x}"]
    with pytest.raises(ValueError, match="does not plan"):
        ask_planner(Path("/bin/false"), [(layer, 1, H100, 1)])


def test_plans_for_many_tokens(host_check: Path, kernels: list[listing.Kernel]) -> None:
    """There is a kernel for every tile, and its blocks fit: dynamic and static memory, and 1 KiB of the system."""
    found = {
        (k.sm, k.family[0].lower(), prefill.tile(k)): k for k in kernels if k.family[0] in "GW" and k.dtype == "Half"
    }
    cells = [
        (shape, m, gpu, tactic) for gpu in GPUS for shape in shapes() for m in PREFILL for tactic in (1, 2, 3, 4, 5)
    ]
    tiles = set()
    for (shape, m, gpu, _), plan in zip(cells, ask_planner(host_check, cells), strict=True):
        assert isinstance(plan, GemmPlan)
        sm = f"{gpu.sm}a" if plan.kernel == "wgmma" else str(gpu.sm)
        kernel = found[sm, plan.kernel[0], (plan.rows, plan.tokens)]
        tiles.add((sm, kernel.title))
        static = kernel.shared - (1024 if gpu.sm >= 90 else 0)
        blocks = -(-plan.blocks // gpu.multiprocessors)
        assert blocks * (plan.shared_bytes + static + 1024) <= gpu.shared_bytes, (shape, m, gpu.name, plan)
        assert plan.tiles == -(-shape.n // plan.rows) * -(-m // plan.tokens)
        assert plan.units == -(-shape.k // prefill.UNIT_COLUMNS)
    assert {title for sm, title in tiles if sm == "90a"} == {
        f"WgmmaKernel<Half, {t}>" for t in ("1, 16", "2, 8", "2, 16")
    }


def test_planned_rows(planned: list[dict[str, Any]]) -> None:
    cells = {(r["gpu"], r["n"], r["k"], r["m"]) for r in planned}
    assert len(planned) == len(cells) == len(GPUS) * len(shapes()) * len(PREFILL)
    for row in planned:
        assert row["us"] > row["floor_us"] > 0, row
        assert row["kernel"] == "gemm" or row["gpu"] == H100.name, row
    layer = Shape(8192, 28672, 128)
    assert prefill.floor_us(layer, 64, H100) == pytest.approx(layer.bytes(64, symmetric=False) / 3e6)
    assert prefill.floor_us(layer, 8192, H100) == pytest.approx(2 * 8192 * 8192 * 28672 / 790e6)
    assert prefill.cublas_us(layer, 8192, H100) == pytest.approx(1.2 + 2 * 8192 * 8192 * 28672 / 790e6)


def test_targets_of_many_tokens() -> None:
    """With times that are made up: exactly at the limit, and a little beyond it in one cell."""
    layers = [s for s in shapes() if s.group_size == 128]
    rows = [{"gpu": H100.name, "n": s.n, "k": s.k, "m": m, "us": us} for s in layers for m in PREFILL
            for us in [1.3 * prefill.floor_us(s, m, H100) + 2.99 if m == 64 else s.flops(m) / 790e6 / 0.76 if m < 512
                       else prefill.cublas_us(s, m, H100) / 0.951]]  # fmt: skip
    found = prefill.evaluate(rows)
    assert [e["met"] for e in found] == [True] * 4
    assert [e["meet"] for e in found] == [e["cells"] for e in found] == [10, 10, 10, 50]
    for row in rows:
        if (row["n"], row["k"]) == HEADLINE[0]:
            row["us"] *= 1.1
    found = prefill.evaluate(rows)
    assert [e["met"] for e in found] == [False, False, False, False]
    assert [e["cells"] - e["meet"] for e in found] == [1, 1, 1, 5]
    assert all(e["what"].startswith(prefill.ESTIMATED) for e in found)


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
    kernels: list[listing.Kernel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sass_report, "read_library", lambda library: kernels)
    monkeypatch.setattr(sys, "argv", ["sass_report.py", "--output", str(tmp_path / "report.json")])
    assert sass_report.main() == 0
    text = capsys.readouterr().out
    check_record(tmp_path / "report.json")
    assert text.count("predicted, not measured") >= len(GPUS) + 4
    assert text.count(prefill.ESTIMATED) >= len(GPUS) + 4
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
    assert record["prefill_times"].startswith(prefill.ESTIMATED)
    assert all("not measured: " in t["what"] and t["met"] is not None for t in record["targets"])
    assert len(record["targets"]) == 1 + len(HEADLINE) + 4
    assert record["architectures"] == [f"sm_{a}" for a in listing.ARCHITECTURES]
    assert all(re.fullmatch(r"V?\d+\.\d+\.\d+", v) for v in record["versions"].values())
    assert set(record["versions"]) == {"awq_trt", "cuobjdump", "ptxas"}
    sizes = {
        "kernels": 6 * 18 + 6,
        "loops": 6 * 2 * 4 * 3,
        "predicted": len(GPUS) * len(shapes()) * len(TOKENS),
        "prefill_loops": 6 * 2 * 4 + 6,
        "prefill_clocks": len(GPUS) * 4 + 3,
        "prefill": len(GPUS) * len(shapes()) * len(PREFILL),
    }
    for name, size in sizes.items():
        rows = [dict(zip(record[name]["columns"], row, strict=True)) for row in record[name]["rows"]]
        assert len(rows) == size
        assert all(value is not None for row in rows for value in row.values())
        assert all(row.get("unknown", "") == "" for row in rows)
    assert path.stat().st_size < 200_000


def test_committed_record() -> None:
    check_record(ROOT / "tools" / "results" / "sass-report.json")
