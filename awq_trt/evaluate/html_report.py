"""One page about a model that was quantized and built: pipeline, layers, accuracy, sizes, memory, speed, launch lines.

A single file that loads nothing and runs no script; its content security policy forbids both. The template
data/report.html.j2 says what stands on it, and escapes all names: they come from checkpoints, which may be hostile.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from awq_trt.awq import report
from awq_trt.checkpoint.config import config_json
from awq_trt.checkpoint.report import REPORT, read_report
from awq_trt.engine import memory, trtexec
from awq_trt.engine.sidecar import path_of, read_sidecar
from awq_trt.errors import AwqTrtError
from awq_trt.evaluate.records import Table, read_record
from awq_trt.export.metadata import read_graph
from awq_trt.files import PACKAGE
from awq_trt.outputs import Output
from awq_trt.publishing import check_outputs, publishing
from awq_trt.serve.triton.repository import launch_plan

MARK = b'name="generator" content="awq_trt report"'
"""In the template."""


def output(path: Path) -> Output:
    """A page to write."""
    return Output(path, mark=MARK)


def write_html_report(
    path: Path,
    *,
    awq_dir: Path | None = None,
    onnx: Path | None = None,
    engine: Path | None = None,
    accuracy: Mapping[str, Any] | None = None,
    records: Sequence[Path] = (),
) -> None:
    """Write the page. Something to report on is needed: a quantized directory, a plan, or both.

    Args:
        path: the .html file. awq_dir: quantized directory; None takes the one that the plan's sidecar points to, if
            it is there. onnx: the ONNX file, for its size where there is no plan. engine: the plan, beside its sidecar.
        accuracy: what the verification measured; None takes the sidecar's. records: files of measurements, see
            records.py.

    Raises:
        AwqTrtError: a missing or damaged file, or a directory without awq_trt.json; something would be lost at `path`,
            or another run writes there.
    """
    sources = [source for source in (awq_dir, onnx, engine, *records) if source is not None]
    check_outputs([output(path)], sources)
    sidecar: dict[str, Any] = {}
    quantized: dict[str, Any] = {}
    if engine is not None:
        if not engine.is_file():
            raise AwqTrtError(f"{engine}: no such file. Give the path of a plan.")
        sidecar = read_sidecar(path_of(engine))
        tokenizer = sidecar["model"].get("tokenizer")  # it lies in the quantized directory
        if awq_dir is None and isinstance(tokenizer, str) and (engine.parent / tokenizer / REPORT).is_file():
            awq_dir = engine.parent / tokenizer
    elif awq_dir is None:
        raise AwqTrtError("nothing to report on: give a quantized directory, or a plan.")
    if awq_dir is not None and (awq_dir / REPORT).is_file():
        quantized = read_report(awq_dir, whole=True)
    elif engine is None:
        raise AwqTrtError(f"{awq_dir}: no {REPORT}: another tool quantized it, or it is no such directory.")
    config = {} if awq_dir is None else config_json(awq_dir / "config.json")
    dtype = str(sidecar.get("model", {}).get("dtype") or config.get("dtype") or config.get("torch_dtype") or "float16")
    title, layers = (engine or awq_dir or path).name, quantized.get("layers", [])
    graph = read_graph(onnx) if onnx and not engine else None
    facts: dict[str, Any] = {
        "title": title,
        "quantized": quantized,
        "sidecar": sidecar,
        "accuracy": accuracy or sidecar.get("accuracy") or {},
        "dtype": dtype,
        "directory": awq_dir and (awq_dir.name, sum(f.stat().st_size for f in awq_dir.rglob("*") if f.is_file())),
        "onnx": graph and (graph.path.name, graph.onnx_bytes + graph.data_bytes),
        "warnings": report.warnings(layers, [], dtype, quantized.get("largest_value", (0.0, ""))),
        "int4_layers": len(layers) or len(sidecar.get("quantized", [])),
        "left_in_float": sidecar.get("left_in_float") or quantized.get("left_in_float") or {},
        "records": [read_record(file) for file in records],
    }
    if layers:
        facts |= _layers(layers, title, dtype)
    if engine is not None:
        served, (cache, io) = launch_plan(sidecar), memory.cache_and_io(sidecar)
        facts["warnings"] += [f"TensorRT: {text}" for text in sidecar["build"].get("warnings", [])] + [*served.warnings]
        facts |= {"plan": engine.name, "cache_bytes": cache, "io_bytes": io, "batch": memory.max_batch(sidecar)}
        caches = (sidecar["model"].get("kv_cache") or {}).get("layers", [])
        facts["cache_layers"] = Counter((x["kv_heads"], x["slots"], x["head_dim"], x.get("window")) for x in caches)
        facts["profiles"] = [_profile(profile) for profile in sidecar["profiles"]]
        facts["launch"] = {f"time profile {p['name']}": trtexec.command(engine, p["name"]) for p in sidecar["profiles"]}
        facts["launch"] |= {"serve with Triton": served.command, "serve with Triton in a container": served.docker}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((PACKAGE / "data" / "report.html.j2").read_text())
    with publishing(output(path), sources) as (temporary,):
        temporary.write_text(template.render(facts), encoding="utf-8")


def _layers(layers: Sequence[report.Layer], title: str, dtype: str) -> dict[str, Any]:
    """The plot as SVG in base64, or why there is none; the table of kinds and worst layers, and that of all layers."""
    found: dict[str, Any] = {"layer_tables": []}
    try:
        svg = base64.b64encode(report.drawn(layers, "svg", title, dtype)).decode()
        found["chart"] = f"data:image/svg+xml;base64,{svg}"
    except AwqTrtError as error:
        found["no_chart"] = str(error)
    for caption, full in (("Error of outputs: kinds of layers, then the worst layers", False), ("All layers", True)):
        columns = report.table(layers, full=full).columns
        rows = list(zip(*(map(str, column.cells) for column in columns), strict=True))
        found["layer_tables"].append((caption, [column.header for column in columns], rows))
    return found


def _profile(profile: Mapping[str, Any]) -> Table:
    """Shapes of an optimization profile; inputs of the same shapes, as the caches of layers, share a row."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, shapes in profile["inputs"].items():
        key = tuple(" × ".join(map(str, shapes[which])) or "scalar" for which in ("min", "opt", "max"))
        names.setdefault(key, []).append(name)
    rows = [(report.listed(same, 1), *key) for key, same in names.items()]
    return f"Profile {profile['name']}", ("input", "smallest", "tuned for", "largest"), rows
