"""The control flow of a kernel, and the way a warp takes through one turn of its main loop."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from bench.sass.listing import Instruction

UNIT_TILES = 2
"""Turns of a loop inside the main loop: it goes over the tiles of a unit (plugins/plan/decode_plan.h)."""

HMMA_PER_UNIT, FFMA_PER_PART = 8, 4
"""Of 16 features of a unit and a tile of tokens: one HMMA for 16 columns; one FFMA for each of a lane's sums of a
scaled part."""

MULTIPLY = ("HMMA", "HGMMA")
_RARE = ("LDG", "MUFU")
_ENDS = ("EXIT", "RET", "BRX", "JMP")
_STORES = ("STG", "STS", "ST", "ATOM", "ATOMG", "ATOMS", "RED")
_MOST_STEPS = 200_000


@dataclass(frozen=True)
class Graph:
    """Basic blocks in the order of the code, and where each may go on (indices of blocks)."""

    blocks: tuple[tuple[Instruction, ...], ...]
    next: tuple[tuple[int, ...], ...]
    loops: dict[int, set[int]] = field(default_factory=dict)  # natural loops: header -> blocks


def _target(branch: Instruction) -> int:
    return int(re.findall(r"0x([0-9a-f]+)", branch.operands)[-1], 16)


def _successors(last: Instruction, following: int | None) -> list[int | None]:
    """Addresses after a block's last instruction. Warps are converged: BRA.DIV is never taken, BRA.CONV always."""
    if last.base == "BRA" and ".DIV" not in last.opcode:
        conditional = bool(last.guard) or re.search(r"\bU?P\d", last.operands) is not None
        return [_target(last), *([following] if conditional else [])]
    if last.base in _ENDS and not last.guard:
        return []
    return [following]


def graph_of(code: Sequence[Instruction]) -> Graph:
    """Basic blocks, edges and natural loops of a function."""
    following = {a.address: b.address for a, b in pairwise(code)}
    branches = [i for i in code if i.base == "BRA" or i.base in _ENDS]
    starts = {code[0].address} | {_target(b) for b in branches if b.base == "BRA"}
    starts |= {following[b.address] for b in branches if b.address in following}
    blocks: list[list[Instruction]] = []
    for instruction in code:
        if instruction.address in starts:
            blocks.append([])
        blocks[-1].append(instruction)
    index = {block[0].address: i for i, block in enumerate(blocks)}
    after = [tuple(index[a] for a in _successors(b[-1], following.get(b[-1].address)) if a is not None) for b in blocks]
    return Graph(tuple(map(tuple, blocks)), tuple(after), _loops(after))


def _loops(after: Sequence[tuple[int, ...]]) -> dict[int, set[int]]:
    """Natural loops: for every edge to a block that dominates its source, the blocks that reach it past the header."""
    before: dict[int, set[int]] = {i: set() for i in range(len(after))}
    for block, targets in enumerate(after):
        for target in targets:
            before[target].add(block)
    reached, todo = {0}, [0]
    while todo:
        for target in after[todo.pop()]:
            if target not in reached:
                reached.add(target)
                todo.append(target)
    dominators = {block: set(reached) if block else {0} for block in reached}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            new = {block} | set.intersection(*(dominators[b] for b in before[block] & reached))
            changed, dominators[block] = changed or new != dominators[block], new
    loops: dict[int, set[int]] = {}
    for block in reached:
        for header in after[block]:
            if header in dominators[block]:
                body, todo = loops.setdefault(header, {header}), [block]
                while todo:
                    at = todo.pop()
                    if at not in body:
                        body.add(at)
                        todo.extend(before[at] & reached)
    return loops


def main_loops(graph: Graph) -> list[int]:
    """Headers of the smallest loops that wait for copies, start copies and multiply: one for each way of scaling."""
    found = []
    for header, body in graph.loops.items():
        opcodes = {i.base for b in body for i in graph.blocks[b]}
        if {"LDGSTS", "HMMA"} <= opcodes and wait_depth(graph, body) is not None:
            found.append(header)
    if not found:
        raise ValueError("no loop with DEPBAR.LE SB0, LDGSTS and HMMA: is this the decode kernel?")
    return [h for h in found if not any(other != h and graph.loops[other] < graph.loops[h] for other in found)]


def wait_depth(graph: Graph, body: set[int]) -> int | None:
    """How many groups of copies may still be under way at the loop's wait; None where it has none."""
    for block in body:
        for i in graph.blocks[block]:
            match = re.match(r"SB0, 0x(\w+)", i.operands) if i.opcode == "DEPBAR.LE" else None
            if match:
                return int(match.group(1), 16)
    return None


def paths(graph: Graph, header: int, hmma: int) -> list[list[int]]:
    """Every way through one turn of a loop that stores nothing and has at most `hmma` HMMAs.

    Loops inside are gone through UNIT_TILES times, no more and no less.
    """
    body = graph.loops[header]
    inner = {h: blocks for h, blocks in graph.loops.items() if h in body and h != header and blocks <= body}
    cost = [sum(i.base == "HMMA" for i in b) for b in graph.blocks]
    stores = [any(i.base in _STORES for i in b) for b in graph.blocks]
    found, steps = [], 0
    todo: list[tuple[int, list[int], int, dict[int, int]]] = [(header, [], 0, {})]
    while todo:
        block, taken, multiplied, turns = todo.pop()
        steps += 1
        if steps > _MOST_STEPS:
            raise ValueError("too many paths through the main loop")
        multiplied += cost[block]
        if stores[block] or multiplied > hmma:
            continue
        taken = [*taken, block]
        for after in graph.next[block]:
            if after == header:
                found.append(taken)
            elif after in body:
                now = dict(turns)
                if after in inner and block in inner[after]:  # back to the start of a loop inside
                    now[after] = now.get(after, 1) + 1
                left = [h for h, blocks in inner.items() if block in blocks and after not in blocks]
                if all(n <= UNIT_TILES for n in now.values()) and all(now.get(h, 1) == UNIT_TILES for h in left):
                    todo.append((after, taken, multiplied, now))
    return found


def strip_tiles(token_tiles: int) -> int:
    """Rows of 16 output features in a strip, and so in a unit: StripTiles of plugins/plan/decode_plan.h."""
    return 2 if token_tiles > 2 else 1


@dataclass(frozen=True)
class Steady:
    """What a warp issues for one unit of weights in the middle of its work.

    A unit of the decode kernels is a strip's output features x 128 columns, one of the others a tile's x 64 columns.
    """

    code: tuple[Instruction, ...]

    @property
    def slots(self) -> int:
        """Issue slots: predicated instructions take theirs too."""
        return len(self.code)

    def by_pipe(self) -> Counter[str]:
        """Issue slots of each pipe; "unknown" for opcodes that PIPES does not list."""
        return Counter(i.pipe for i in self.code)

    def by_opcode(self) -> Counter[str]:
        """Issue slots of each opcode without modifiers."""
        return Counter(i.base for i in self.code)

    def unknown(self) -> list[str]:
        """Opcodes that PIPES does not list."""
        return sorted({i.base for i in self.code if i.pipe == "unknown"})

    @property
    def lead(self) -> int:
        """Issue slots before the first multiplication."""
        return next(n for n, i in enumerate(self.code) if i.base in MULTIPLY)

    def multiplications(self) -> int:
        """Of 16 features x 8 tokens x 16 columns: an HMMA is one; a warp has a quarter of a warpgroup's HGMMA."""
        return sum(1 if i.base == "HMMA" else _tokens(i) // 8 for i in self.code if i.base in MULTIPLY)

    def wavefronts(self) -> int:
        """Accesses of 128 bytes to shared memory: all lanes, but few in a guarded copy (of scales).

        An HGMMA reads its tokens once for four warps: assumed.
        """
        return sum(_wavefronts(i) for i in self.code if not i.never)


def _tokens(i: Instruction) -> int:
    """Of an HGMMA: 128 in HGMMA.64x128x16.F32."""
    return int(i.opcode.split("x")[1])


def _wavefronts(i: Instruction) -> int:
    if i.base == "HGMMA":
        return _tokens(i) * 32 // 128 // 4
    if i.base not in ("LDS", "LDSM", "STS", "LDGSTS"):
        return 0
    if i.base == "LDGSTS" and i.guard:
        return 1
    if i.base == "LDSM":
        return int(i.opcode.rsplit(".", 1)[-1]) if i.opcode[-1] in "24" else 1
    return 4 if ".128" in i.opcode else 2 if ".64" in i.opcode else 1


def steady(code: Sequence[Instruction], token_tiles: int) -> dict[int, Steady]:
    """Parts per unit -> the path of a unit whose place in the ring is filled again and that does not complete a strip.

    Of several such paths: the shortest one after the last HMMA (further ones lead through the end of a strip that has
    nothing to store), and of those the longest one.
    """
    graph = graph_of(code)
    candidates: dict[int, tuple[tuple[int, int], Steady]] = {}
    sums = strip_tiles(token_tiles) * token_tiles
    hmma = HMMA_PER_UNIT * sums
    for path in [path for header in main_loops(graph) for path in paths(graph, header, hmma)]:
        taken = tuple(i for block in path for i in graph.blocks[block])
        opcodes = Counter(i.base for i in taken)
        parts, rest = divmod(opcodes["FFMA"], FFMA_PER_PART * sums)
        if opcodes["HMMA"] != hmma or not opcodes["LDGSTS"] or rest:
            continue
        tail = len(taken) - max(n for n, i in enumerate(taken) if i.base == "HMMA")
        rank = (tail, -len(taken))
        if parts not in candidates or rank < candidates[parts][0]:
            candidates[parts] = rank, Steady(taken)
    return {parts: found for parts, (_, found) in sorted(candidates.items())}


def steady_unit(code: Sequence[Instruction]) -> Steady:
    """One turn of the loop that multiplies, of the gemm and wgmma kernels: in it, a warp goes on to its next unit.

    Left out are the blocks that load from global memory into registers (pre_scale, and X that is not aligned) and
    those that divide (where the next tile is). Of the paths that remain, without repetition (of a wait that was not
    over): one with the most copies, since lanes that copy scales and lanes that do not take turns, and of those the
    shortest one.
    """
    graph = graph_of(code)
    multiply = [any(i.base in MULTIPLY for i in block) for block in graph.blocks]
    loops = [header for header, body in graph.loops.items() if any(multiply[b] for b in body)]
    header = min(loops, key=lambda h: len(graph.loops[h]), default=0)
    body = {b for b in graph.loops.get(header, ()) if not any(i.base in _RARE for i in graph.blocks[b])}
    found: list[tuple[int, ...]] = []
    todo: list[tuple[int, ...]] = [(header,)] if loops else []
    while todo:
        path = todo.pop()
        for after in graph.next[path[-1]]:
            if after == header and any(multiply[b] for b in path):
                found.append(path)
            elif after in body and after not in path:
                todo.append((*path, after))
            if len(found) + len(todo) > _MOST_STEPS:
                raise ValueError("too many paths through the main loop")
    if not found:
        raise ValueError("no loop with HMMA or HGMMA: is this one of the kernels for many tokens?")
    taken = [tuple(i for b in path for i in graph.blocks[b]) for path in found]
    return Steady(min(taken, key=lambda t: (-sum(i.base == "LDGSTS" for i in t), len(t))))
