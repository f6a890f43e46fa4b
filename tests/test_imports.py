"""The rooms of the package: what a file may import, by the room it is in. Read from the sources, nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "awq_trt"
GROUND = {"errors", "files", "linear", "layout", "outputs", "publishing", "schema"}
ALLOWED = {
    "checkpoint": set(),
    "awq": {"checkpoint"},
    "export": {"checkpoint"},
    "engine": {"checkpoint", "awq", "export"},
    "serve": {"checkpoint", "awq", "export", "engine"},
    "evaluate": {"checkpoint", "awq", "export", "engine", "serve"},
    "cli": {"checkpoint", "awq", "export", "engine", "serve", "evaluate"},
}
"""Room -> the rooms to its left. Everything may import the ground; the ground imports nothing but itself."""


def modules(package: Path) -> dict[str, Path]:
    """Dotted name, without "awq_trt." -> file; the package's own __init__ and __main__, which only point, left out."""
    files = (f for f in sorted(package.rglob("*.py")) if f.parent != package or not f.stem.startswith("__"))
    return {".".join(f.relative_to(package).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imports(file: Path, known: set[str]) -> Iterator[tuple[str, int]]:
    """The modules of this package that a file imports, wherever in it, and the line; not those for type checkers."""
    tree = ast.parse(file.read_text())
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            own = name.removeprefix("awq_trt.")
            if own != name:
                yield (own if own in known else own.rpartition(".")[0]), node.lineno


def broken_rules(package: Path) -> list[str]:
    """One line for each import that breaks a rule: `file:line imports what: which rule`."""
    files = modules(package)
    found, edges = [], {}
    for name, file in files.items():
        room = name.split(".")[0]
        edges[name] = []
        for target, line in imports(file, set(files)):
            other = target.split(".")[0]
            edges[name].append(target)
            where = f"{file.relative_to(package.parent)}:{line} imports {target}"
            if room in GROUND and other not in GROUND:
                found.append(f"{where}: the ground ({', '.join(sorted(GROUND))}) imports no room")
            elif room not in GROUND and room not in ALLOWED:
                found.append(f"{where}: {room} is neither a room nor ground")
            elif room in ALLOWED and other not in GROUND | ALLOWED[room] | {room}:
                left = ", ".join(sorted(ALLOWED[room])) or "the ground alone"
                found.append(f"{where}: {room} may import {left}")
    return found + [f"import cycle: {' -> '.join(cycle)}" for cycle in cycles(edges)]


def cycles(edges: dict[str, list[str]]) -> list[list[str]]:
    """Cycles among the modules, one for each module that closes one."""
    found, done = [], set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
            return
        if name in done:
            return
        for target in edges.get(name, []):
            visit(target, [*path, name])
        done.add(name)

    for name in edges:
        visit(name, [])
    return found


def test_imports_run_from_left_to_right() -> None:
    found = broken_rules(PACKAGE)
    assert not found, "\n".join(found)


def test_the_init_of_a_room_is_empty() -> None:
    inits = [f for f in PACKAGE.rglob("__init__.py") if f.parent != PACKAGE]
    assert len(inits) >= len(ALLOWED)
    assert [f for f in inits if f.read_text().strip()] == []


def test_a_wrong_import_is_named(tmp_path: Path) -> None:
    room = tmp_path / "awq_trt"
    for name in ("checkpoint", "awq", "export"):
        (room / name).mkdir(parents=True)
        (room / name / "__init__.py").touch()
    (room / "errors.py").write_text("from awq_trt.awq import search\n")
    (room / "checkpoint" / "reader.py").write_text("def f():\n    from awq_trt.awq import search\n")
    (room / "awq" / "search.py").write_text("from awq_trt.checkpoint.reader import f\nimport awq_trt.export.trace\n")
    (room / "export" / "trace.py").write_text("import os\nfrom awq_trt.errors import AwqTrtError\n")
    assert broken_rules(room) == [
        "awq_trt/awq/search.py:2 imports export.trace: awq may import checkpoint",
        "awq_trt/checkpoint/reader.py:2 imports awq.search: checkpoint may import the ground alone",
        f"awq_trt/errors.py:1 imports awq.search: the ground ({', '.join(sorted(GROUND))}) imports no room",
        "import cycle: awq.search -> checkpoint.reader -> awq.search",
        "import cycle: awq.search -> export.trace -> errors -> awq.search",
    ]
