"""The report: what it warns of, what its table and plot hold."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from layer_rows import MODEL, layer
from rich.console import Console

from awq_trt.awq import report
from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.quantize import quantize
from awq_trt.errors import AwqTrtError

TOOL = Path(__file__).parents[2] / "tools" / "report.py"


def text(layers: list[dict[str, Any]], full: bool = False) -> list[str]:
    """The table, line by line."""
    console = Console(width=160, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(report.table(layers, full=full))
    return [line for line in console.export_text().splitlines() if "│" in line]


def test_one_line_per_kind_and_the_worst() -> None:
    lines = text(MODEL)
    assert len(lines) == 2 + report.WORST
    assert re.findall(r"[\w.–()]+", lines[0])[:4] == ["q_proj", "4", "0.15", "(0.00–0.30)"]
    assert "model.layers.3.q_proj" in lines[2]
    assert "0.1300" in lines[2]
    assert not any("model.layers.0." in line for line in lines)


def test_full_has_one_line_per_layer() -> None:
    lines = text(MODEL, full=True)
    assert [line.split()[1] for line in lines] == [x["name"] for x in MODEL]


def test_kinds_leave_out_blocks_and_experts() -> None:
    assert report.kind("model.layers.13.self_attn.q_proj") == "self_attn.q_proj"
    assert report.kind("model.layers.13.mlp.experts.7.down_proj") == "mlp.experts.*.down_proj"
    assert report.kind("head") == "head"
    assert report.block("model.layers.13.mlp.experts.7.down_proj") == 13


def test_where_the_scale_went() -> None:
    assert report.where(layer("a", alpha=0)) == "-"
    assert report.where(layer("a", folded_into=None)) == "pre-scale"
    assert report.where(layer("a")) == "norm"


def test_overflow_is_a_warning_in_float16_only() -> None:
    layers = [*MODEL, layer("model.layers.2.down_proj", largest_activation=61000.0)]
    names = [x["name"] for x in layers]
    (warning,) = report.warnings(layers, names, "float16")
    assert "61000" in warning
    assert "model.layers.2.down_proj" in warning
    assert "bfloat16" in warning
    assert report.warnings(layers, names, "bfloat16") == []
    assert report.warnings(MODEL, [x["name"] for x in MODEL], "float16") == []


def test_layers_without_tokens_and_with_few() -> None:
    experts = [layer(f"model.layers.0.experts.{i}.up", tokens=4096 if i < 6 else 40 + i) for i in range(8)]
    unseen = [f"model.layers.0.experts.{i}.up" for i in range(8, 13)]
    none, few = report.warnings(experts, [x["name"] for x in experts] + unseen, "float16")
    assert none.startswith("no calibration token reached")
    assert "and 2 more" in none
    assert "46 and up, of 4096" in few
    assert "experts.6.up, model.layers.0.experts.7.up." in few


def test_rounding_alone_warns_of_nothing() -> None:
    assert report.warnings([], ["model.layers.0.up"], "float16") == []


def test_short_calibration_of_a_dense_model_is_no_warning() -> None:
    """Every layer of it sees all tokens, few as they are."""
    assert report.warnings([layer("a", tokens=64), layer("b", tokens=64)], ["a", "b"], "float16") == []


def test_plot_is_one_self_contained_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.plot(MODEL, tmp_path / "x.svg", "a model", "float16")
    svg = (tmp_path / "x.svg").read_text()
    assert "<svg" in svg
    references = set(re.findall(r'(?:href|src)="([^#"][^"]*)"', svg))
    assert not references, "it must not load anything"
    report.plot(MODEL, tmp_path / "x.png", "a model", "bfloat16")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_means_and_maxima_over_experts() -> None:
    experts = [layer(f"m.{i}.experts.{e}.up", error=e, largest_activation=e) for i in (0, 3) for e in (1.0, 2.0)]
    assert report.curve(experts, "error") == ([0, 3], [1.5, 1.5])
    assert report.curve(experts, "largest_activation") == ([0, 3], [2.0, 2.0])


def test_a_head_is_drawn_behind_the_last_block() -> None:
    layers = [
        layer("model.layers.0.up", error=1.0),
        layer("model.layers.11.up", error=1.0),
        layer("lm_head", error=2.0),
    ]
    assert report.blocks(layers) == 12
    assert report.kind("lm_head") == "lm_head"
    assert report.curve(layers[2:], "error", report.blocks(layers)) == ([12], [2.0])


def test_plots_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AwqTrtError, match="nothing to plot"):
        report.plot([], tmp_path / "x.svg", "", "float16")
    if importlib.util.find_spec("matplotlib"):
        with pytest.raises(AwqTrtError, match="a plot cannot be a nonsense: write svg, pdf, png"):
            report.plot(MODEL, tmp_path / "x.nonsense", "", "float16")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(AwqTrtError, match="pip install"):
        report.plot(MODEL, tmp_path / "x.svg", "", "float16")


def test_tool_on_a_directory_of_ours_and_of_another(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(models / "llama", tmp_path / "llama.awq", QuantizeConfig(calibration_samples=2, calibration_length=64))
    main = runpy.run_path(str(TOOL))["main"]
    assert main([str(tmp_path / "llama.awq"), "--full"]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "llama.awq" / "awq_trt.json").read_text())["layers"]
    assert len(rows) == 14
    for row in rows:
        assert re.search(rf"{row['name']} .* {row['error']:.4f}", printed)
    (tmp_path / "llama.awq" / "awq_trt.json").unlink()
    assert main([str(tmp_path / "llama.awq")]) == 2
    assert "another tool quantized it" in capsys.readouterr().err
