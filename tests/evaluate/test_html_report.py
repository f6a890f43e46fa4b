"""The page: well-formed, self-contained, complete, and deaf to what names in it say."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny_onnx
from layer_rows import MODEL, layer
from stand_ins import CACHE, plan_in

from awq_trt.awq import report
from awq_trt.engine import sidecar
from awq_trt.errors import AwqTrtError
from awq_trt.evaluate import html_report
from awq_trt.evaluate.html_report import write_html_report
from awq_trt.evaluate.speed_tables import read_speeds
from awq_trt.evaluate.svg_chart import HEIGHT, WIDTH, Series, chart

TOOLS = Path(__file__).parents[2] / "tools"
DRAWN = {"line", "circle", "rect", "path"}
HOSTILE = "</title></style><script>alert(1)</script>\"'onload=x {{ 7*7 }} &amp; \u202eevil"
ACCURACY = {
    "text": "heldout.txt",
    "held_out": {
        "float": {"perplexity": 48.95, "top1": 1.0},
        "rounding": {"perplexity": 59.98, "top1": 0.672},
        "awq": {"perplexity": 52.66, "top1": 0.819},
    },
    "onnx": {"max_abs": 0.0247, "relative": 5.2e-4, "top1": 0.992, "logits": 6291456, "generated": "Once", "tokens": 32,
             "tokens_equal": 31, "gap": 0.0041},
}  # fmt: skip
REPORT = {
    "source": "llama",
    "method": "awq",
    "clip": True,
    "feedback": True,
    "symmetric": False,
    "group_size": 64,
    "calibration": {"source": "package default", "windows": 16, "length": 512},
    "left_in_float": {"lm_head": "outside the repeated blocks"},
    "layers": MODEL,
}
GEMM = {
    "date": "2026-11-20T10:00:00+00:00",
    "hardware": [{"name": "NVIDIA H100"}],
    "settings": {
        "dtype": "float16", "device": "cuda", "tokens": [1, 8, 64],
        "shapes": [{"n": 4096, "k": 4096, "group_size": 128, "layers": ["Llama-3.1-8B o", "Qwen3-8B o"]}],
    },
    "device": {"bandwidth": {"used": 3e12}, "peak": {"used": 790e12}},
    "rows": [
        {"method": "awq_trt", "variant": "default", "n": 4096, "k": 4096, "m": 1, "us": 6.0},
        {"method": "awq_trt", "variant": "tactic 2", "n": 4096, "k": 4096, "m": 1, "us": 5.0},
        {"method": "awq_trt", "variant": "tactic 3", "n": 4096, "k": 4096, "m": 1, "us": 1.0, "problem": "wrong"},
        {"method": "cublas", "variant": "default", "n": 4096, "k": 4096, "m": 1, "us": 15.0},
        {"method": "awq_trt", "variant": "default", "n": 4096, "k": 4096, "m": 8, "us": 8.0},
        {"method": "cublas", "variant": "default", "n": 4096, "k": 4096, "m": 8, "us": 16.0},
        {"method": "cublas", "variant": "default", "n": 4096, "k": 4096, "m": 64, "us": 20.0},
        {"method": "humming", "variant": "default", "n": 4096, "k": 4096, "m": 64, "us": 9.0},
    ],
}  # fmt: skip


class Page(HTMLParser):
    """A parsed page; every tag must be closed, in order, and every attribute be given once."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # the tag it is in, the text
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, names)
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in DRAWN, tag
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of every tag of this name."""
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, *tags: str) -> list[str]:
        """Texts directly inside these tags."""
        return [text for tag, text in self.texts if tag in tags]


@pytest.fixture
def awq_dir(tmp_path: Path) -> Path:
    return awq_dir_of(tmp_path / "out.awq")


def awq_dir_of(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "awq_trt.json").write_text(json.dumps(REPORT | changes))
    (folder / "config.json").write_text('{"dtype": "bfloat16"}')
    (folder / "model.safetensors").write_bytes(b"0" * 1_500_000)
    return folder


def page_of(folder: Path, **options: Any) -> Page:
    """Write, read, parse, and check what holds for every page."""
    write_html_report(folder / "out.html", **options)
    text = (folder / "out.html").read_text(encoding="utf-8")
    page = Page(text)
    check_page(page, text)
    return page


def check_page(page: Page, text: str) -> None:
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"(?:https?:)?//\w", re.sub(r"\{  // a page.*", "{", text)), "nothing is loaded, or linked"
    assert "@import" not in text
    assert "url(" not in text
    for tag, attributes in page.tags:
        assert not {"src", "href", "xlink:href", "srcset", "action", "style"} & attributes.keys(), tag
        assert not [name for name in attributes if name.startswith("on")], tag
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
        if tag == "svg":
            assert ("aria-labelledby" in attributes and attributes["role"] == "img") or attributes[
                "aria-hidden"
            ] == "true"
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = " ".join(a["aria-labelledby"] or "" for _, a in page.tags if "aria-labelledby" in a).split()
    assert set(named) <= set(ids)
    assert Counter(tag for tag, _ in page.tags)["script"] == 1
    assert Counter(tag for tag, _ in page.tags)["table"] == Counter(tag for tag, _ in page.tags)["caption"]
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")


def test_every_layer_is_there(tmp_path: Path, awq_dir: Path) -> None:
    page = page_of(tmp_path, awq_dir=awq_dir, accuracy=ACCURACY)
    names = page.text("th")
    assert [n for n in names if n.startswith("model.layers")] == [x["name"] for x in MODEL]
    cells = page.text("td")
    for row in MODEL:
        assert f"{row['error']:.4f}" in cells
        assert f"{row['alpha']:.2f}" in cells
    numbers = [a["data-value"] for a in page.all("td") if "data-value" in a]
    assert {str(row["error"]) for row in MODEL} <= set(numbers)
    assert "lm_head" in names
    assert "outside the repeated blocks" in cells
    assert page.text("strong") == ["52.66 (+3.71)", "81.9%", "8"]
    assert {"48.95", "59.98", "52.66", "100.0%", "67.2%"} <= set(cells)
    assert page.text("blockquote") == ["Once"]
    assert any(
        "31 of 32 greedy tokens equal, the rest within 0.004 of the best logit:" in " ".join(text.split())
        for text in page.text("p")
    )
    assert "1.5 MB" in page.text("span")
    assert "Not measured on a GPU." in page.text("p")


def test_plots_without_matplotlib(tmp_path: Path, awq_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = page_of(tmp_path, awq_dir=awq_dir)
    charts = [a for a in page.all("svg") if a.get("role") == "img"]
    assert len(charts) == len(report.PANELS)
    kinds = 2  # q_proj and up_proj, and a dotted line of each for the error before
    assert len(page.all("path")) == len(report.PANELS) * kinds + kinds
    assert len(page.all("circle")) == len(report.PANELS) * len(MODEL)
    for a in page.all("circle"):
        assert 0 < float(a["cx"] or 0) < WIDTH
        assert 0 < float(a["cy"] or 0) < HEIGHT
    legend = [text for tag, text in page.texts if tag == "li" and text in ("q_proj", "up_proj")]
    assert len(legend) == len(report.PANELS) * kinds


def test_a_plan_alone_and_its_directory(tmp_path: Path, awq_dir: Path) -> None:
    engine = plan_in(tmp_path, kind="decoder", metadata={"kv_cache": {"kind": "dynamic"}, "dtype": "float16"})
    page = page_of(tmp_path, engine=engine)
    assert "Not known here: the plan was built from an ONNX file, without the quantized directory." in page.text("p")
    assert "Profile 0: decode" in page.text("caption")
    assert "dynamic: past in, longer past out" in page.text("td")
    assert {"4 × 2 × 63 × 16", "4 × 1"} <= set(page.text("td"))
    assert "past_key_values.0.key and 1 more" in page.text("th")
    assert [line for line in page.text("code") if line.endswith("out.trtexec.sh decode")]
    assert any("Triton's TensorRT backend loads plans of TensorRT only" in text for text in page.text("p"))
    content = json.loads(sidecar.path_of(engine).read_text())
    content["model"]["tokenizer"] = "out.awq"
    sidecar.path_of(engine).write_text(json.dumps(content))
    page = page_of(tmp_path, engine=engine)
    assert "model.layers.3.up_proj" in page.text("th")
    assert [
        page.texts[i + 1][1] for i, (tag, text) in enumerate(page.texts) if (tag, text) == ("span", "quantized")
    ] == ["out.awq"]


def test_a_fixed_cache_and_served_plan(tmp_path: Path) -> None:
    engine = plan_in(tmp_path, "tensorrt", metadata={"kv_cache": None})
    content = json.loads(sidecar.path_of(engine).read_text())
    content["model"]["kv_cache"] = CACHE
    content["accuracy"] = ACCURACY
    sidecar.path_of(engine).write_text(json.dumps(content))
    page = page_of(tmp_path, engine=engine)
    cells = page.text("td")
    assert "fixed: written in place, never copied" in cells
    assert "1 of 3 heads × 2048 slots × 64" in cells
    assert "52.66" in cells
    assert any(line.startswith("tritonserver") for line in page.text("code"))
    assert len([a for a in page.all("button") if a.get("class") == "copy"]) == len(page.text("code"))


def test_an_encoder_that_was_rounded(tmp_path: Path) -> None:
    folder = awq_dir_of(tmp_path / "vit.awq", layers=[], method="rtn", group_size=-1, left_in_float={})
    accuracy = {
        "text": "x.npz",
        "held_out": {"float": {"perplexity": None, "top1": 1.0}, "rtn": {"perplexity": None, "top1": 0.5}},
    }
    page = page_of(tmp_path, awq_dir=folder, accuracy=accuracy)
    assert "The layers were rounded to nearest: there was no search to report on." in page.text("p")
    assert "whole row" in page.text("td")
    assert page.text("strong")[0] == "50.0%"
    assert not [a for a in page.all("svg") if a.get("role")]


def test_onnx_without_a_plan(tmp_path: Path, awq_dir: Path) -> None:
    model = tiny_onnx.quantized(tmp_path / "q.onnx", external=True)
    page = page_of(tmp_path, awq_dir=awq_dir, onnx=model)
    assert "q.onnx" in page.text("b")
    size = model.stat().st_size + (tmp_path / "q.onnx.data").stat().st_size
    assert html_report.size(size) in page.text("span")


def test_hostile_names_are_text(tmp_path: Path) -> None:
    """Names come from checkpoints: none of them may become a tag, an attribute, or end the page."""
    rows = [layer(f"{HOSTILE}.{i}.up", folded_into=HOSTILE, error=0.1 * i) for i in range(1, 3)]
    folder = awq_dir_of(
        tmp_path / "a<b>&'\".awq", source=HOSTILE, layers=rows, left_in_float={HOSTILE: HOSTILE}, method=HOSTILE
    )
    generated = {"onnx": ACCURACY["onnx"] | {"generated": HOSTILE}, "text": HOSTILE}
    accuracy = ACCURACY | generated | {"held_out": {HOSTILE: {"perplexity": 3.0, "top1": 1.0}}}
    engine = plan_in(tmp_path, metadata={"kv_cache": None, "left_in_float": {HOSTILE: HOSTILE}, "model_type": HOSTILE})
    content = json.loads(sidecar.path_of(engine).read_text())
    content["build"]["warnings"] = [HOSTILE]
    profile = content["profiles"][0]
    profile["name"] = HOSTILE
    sidecar.path_of(engine).write_text(json.dumps(content))
    record = tmp_path / "<r>.json"
    record.write_text(json.dumps([{"count": 1}, {"name": HOSTILE, "averageMs": 1.0, "medianMs": 1.0}]))
    page = page_of(tmp_path, awq_dir=folder, engine=engine, accuracy=accuracy, records=[record])
    texts = " ".join(text for _, text in page.texts)
    assert texts.count("{{ 7*7 }}") == texts.count("</title></style><script>alert(1)</script>") > 15
    assert "49" not in page.text("h1", "td", "th", "p", "code")
    assert [line for line in page.text("code") if "<script>alert(1)</script>" in line]
    assert any(HOSTILE in (a.get("aria-label") or "") for a in page.all("button"))


def test_numbers_that_no_axis_holds(tmp_path: Path) -> None:
    rows = [
        layer("m.0.up", error=0.0, error_rounding=0.0, largest_activation=0.0),
        layer("m.1.up", largest_activation=7e4),
    ]
    page = page_of(tmp_path, awq_dir=awq_dir_of(tmp_path / "o.awq", layers=rows))
    assert not any("nan" in (a["d"] or "") for a in page.all("path"))
    nothing = [layer("m.0.up", error=0.0, error_rounding=0.0)]
    page = page_of(tmp_path, awq_dir=awq_dir_of(tmp_path / "p.awq", layers=nothing))
    assert len([a for a in page.all("svg") if a.get("role")]) == len(report.PANELS) - 1


def test_warnings_are_shown(tmp_path: Path) -> None:
    rows = [layer("m.0.up", largest_activation=61000.0)]
    folder = awq_dir_of(tmp_path / "o.awq", layers=rows)
    assert not [t for t in page_of(tmp_path, awq_dir=folder).text("p") if "61000" in t], "bfloat16 has room"
    (folder / "config.json").write_text('{"torch_dtype": "float16"}')
    page = page_of(tmp_path, awq_dir=folder)
    assert [t for t in page.text("p") if "61000" in t]
    assert "float16 ends" in page.text("text")


# ---- speed


def test_a_record_of_the_benchmark(tmp_path: Path, awq_dir: Path) -> None:
    record = tmp_path / "decode.json"
    record.write_text(json.dumps(GEMM))
    page = page_of(tmp_path, awq_dir=awq_dir, records=[record])
    (speed,) = read_speeds([record])
    assert [[cell.text for cell in row] for row in speed.tables[0].rows] == [
        ["1", "15.0", "5.0", "3.00"], ["8", "16.0", "8.0", "2.00"], ["64", "20.0", "-", "-"],
    ]  # fmt: skip
    assert "4096 × 4096, group 128: Llama-3.1-8B o, Qwen3-8B o" in page.text("caption")
    assert any("NVIDIA H100, float16, 2026-11-20" in text for text in page.text("p"))
    assert "as fast as 16 bits" in page.text("text")
    assert not [t for t in page.text("p") if "Not measured" in t and "GPU" in t]
    record.write_text(json.dumps(GEMM | {"settings": GEMM["settings"] | {"device": "cpu"}}))
    assert any("Made up" in text for text in page_of(tmp_path, awq_dir=awq_dir, records=[record]).text("p"))


def test_a_dry_run_of_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real tool's record, not one like it."""
    record = tmp_path / "r.json"
    monkeypatch.setattr(
        sys, "argv", ["bench_gemm.py", "--dry-run", "--output", str(record), "--seed", "1", "--tokens", "1", "8"]
    )
    monkeypatch.syspath_prepend(str(TOOLS))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOLS / "bench_gemm.py"), run_name="__main__")
    assert ended.value.code == 0
    (speed,) = read_speeds([record])
    assert [len(table.rows) for table in speed.tables] == [2, 2]
    assert all(
        cell.value is not None and cell.value > 0 for table in speed.tables for row in table.rows for cell in row
    )


def test_what_trtexec_leaves(tmp_path: Path) -> None:
    times, layers = tmp_path / "decode.times.json", tmp_path / "decode.layers.json"
    times.write_text(json.dumps([{"computeMs": ms / 100, "latencyMs": ms / 50} for ms in range(1, 101)]))
    rows = [
        {"name": f"layer {i}", "timeMs": i, "averageMs": float(i), "medianMs": i, "percentage": 1} for i in range(1, 31)
    ]
    layers.write_text(json.dumps([{"count": 100}, *rows]))
    first, second = read_speeds([times, layers])
    assert [cell.text for cell in first.tables[0].rows[0]] == [
        "on the GPU",
        "0.010",
        "0.500",
        "0.900",
        "0.990",
        "0.505",
    ]
    assert first.tables[0].rows[1][2].text == "1.000"
    assert len(second.tables[0].rows) == 20
    assert [cell.text for cell in second.tables[0].rows[0]] == ["layer 30", "30.0000", "30.0000", "6.5"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("{}", "neither a record"),
        ("[]", "neither a record"),
        ("[1]", "neither a record"),
        ('[{"count": 1}, {"name": "x"}]', "neither a record"),
        (None, "cannot be read"),
    ],
)
def test_records_that_are_none(tmp_path: Path, awq_dir: Path, text: str | None, words: str) -> None:
    record = tmp_path / "r.json"
    if text is not None:
        record.write_text(text)
    with pytest.raises(AwqTrtError, match=f"r.json: {words}"):
        write_html_report(tmp_path / "out.html", awq_dir=awq_dir, records=[record])
    assert not (tmp_path / "out.html").exists()


# ---- charts


def test_axes() -> None:
    drawn = chart("t", "block", [Series("a", [0, 1, 2, 29], [0.01, 0.1, 1, 10], 9)], log_y=True, mark=(5.0, "five"))
    assert drawn is not None
    assert [t.text for t in drawn.x_ticks] == ["0", "5", "10", "15", "20", "25"]
    assert [t.text for t in drawn.y_ticks] == ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1", "2", "5", "10"]
    ys = [p.y for p in drawn.lines[0].points]
    assert ys == sorted(ys, reverse=True)
    assert math.isclose(ys[0] - ys[1], ys[1] - ys[2], abs_tol=0.2)
    assert drawn.mark is not None
    assert ys[3] < drawn.mark.at < ys[2]
    assert (drawn.lines[0].color, drawn.lines[0].dashed) == (1, True)


def test_charts_of_little() -> None:
    one = chart("t", "block", [Series("a", [3], [0.0], 0), Series("b", [], [], 1)])
    assert one is not None
    assert one.lines[1].path == ""
    assert [p.text for p in one.lines[0].points] == ["a, block 3: 0"]
    assert chart("t", "block", [Series("a", [1], [0.0], 0)], log_y=True) is None
    assert chart("t", "block", [Series("a", [1], [math.nan], 0)]) is None
    assert chart("t", "block", []) is None
    far = chart("t", "block", [Series("a", [1, 2], [1, 2], 0)], log_y=True, mark=(65504.0, "float16 ends"))
    assert far is not None
    assert far.mark is None


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e12])
@pytest.mark.parametrize("log", [False, True])
def test_there_are_always_ticks(scale: float, log: bool) -> None:
    for values in ([1.0, 1.0], [1.0, 1.3], [1.0, 900.0], [1.0, 1e9]):
        drawn = chart("t", "x", [Series("a", [0, 1], [v * scale for v in values], 0)], log_y=log)
        assert drawn is not None
        assert 1 <= len(drawn.y_ticks) <= 10
        assert all(0 <= t.at <= HEIGHT for t in drawn.y_ticks)


# ---- bad input, and the command lines


def test_bad_input(tmp_path: Path, awq_dir: Path) -> None:
    out = tmp_path / "out.html"
    with pytest.raises(AwqTrtError, match="nothing to report on"):
        write_html_report(out)
    with pytest.raises(AwqTrtError, match="no such file"):
        write_html_report(out, engine=tmp_path / "none.plan")
    with pytest.raises(AwqTrtError, match="another tool quantized it"):
        write_html_report(out, awq_dir=tmp_path)
    for text in ("[]", "{}", "{"):
        (awq_dir / "awq_trt.json").write_text(text)
        with pytest.raises(AwqTrtError, match="Quantize again"):
            write_html_report(out, awq_dir=awq_dir)
    assert not out.exists()
    (awq_dir / "awq_trt.json").unlink()
    page = page_of(tmp_path, awq_dir=awq_dir, engine=plan_in(tmp_path))
    assert "out.awq" in page.text("b"), "a directory of another tool has its place in the drawing"


def test_report_tool(tmp_path: Path, awq_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(TOOLS / "report.py"))["main"]
    engine, out = plan_in(tmp_path), tmp_path / "out.html"
    assert main([str(engine), "--html", str(out)]) == 0
    assert out.exists()
    for words, message in (
        ([engine], "give --html FILE"),
        ([engine, engine], "one of each"),
        ([tmp_path / "none"], "no such file or directory"),
        ([awq_dir, "--record", engine], "--record is for the page"),
    ):
        assert main([str(word) for word in words]) == 2
        assert message in capsys.readouterr().err


def test_export_writes_the_page(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    main = runpy.run_path(str(TOOLS / "export.py"))["main"]
    words = ["--engine", str(tmp_path / "o.plan"), "--report", str(tmp_path / "o.html"), "--quiet"]
    assert main(["--model", str(exported / "llama.onnx"), *words, "--runtime", "tensorrt_rtx"]) == 0
    text = (tmp_path / "o.html").read_text()
    page = Page(text)
    check_page(page, text)
    assert len([n for n in page.text("th") if n.startswith("model.layers.")]) == 14
    assert "fixed: written in place, never copied" in page.text("td")
