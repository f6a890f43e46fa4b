"""The page: well-formed, self-contained, complete, and deaf to what names in it say."""

from __future__ import annotations

import base64
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tiny_onnx
from layer_rows import MODEL, layer
from stand_ins import CACHE, plan_in

from awq_trt.engine import sidecar
from awq_trt.errors import AwqTrtError
from awq_trt.evaluate.html_report import write_html_report
from awq_trt.evaluate.records import read_record

TOOLS = Path(__file__).parents[2] / "tools"
HOSTILE = "</title></style><script>alert(1)</script>\"'onload=x {{ 7*7 }} %s %(x)s &amp; \u202eevil"
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
        {"method": method, "variant": "default", "n": 4096, "k": 4096, "m": m, "us": us} | more
        for method, m, us, more in (
            ("awq_trt", 1, 6.0, {}),
            ("awq_trt", 1, 5.0, {"variant": "tactic 2"}),
            ("awq_trt", 1, 1.0, {"variant": "tactic 3", "problem": "wrong"}),
            ("cublas", 1, 15.0, {}), ("cublas", 64, 20.0, {}), ("humming", 64, 9.0, {}),
        )
    ],
}  # fmt: skip


class Page:
    """A page, which is well-formed XML too."""

    def __init__(self, text: str) -> None:
        self.root = ElementTree.fromstring(text)

    def all(self, name: str) -> list[ElementTree.Element]:
        return list(self.root.iter(name))

    def text(self, name: str) -> list[str]:
        return [" ".join("".join(tag.itertext()).split()) for tag in self.root.iter(name)]


@pytest.fixture(autouse=True)
def plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib is there only for the tests that ask for its drawings: it takes a second for each."""
    if "drawn" not in request.node.name:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture
def awq_dir(tmp_path: Path) -> Path:
    return awq_dir_of(tmp_path / "out.awq")


def awq_dir_of(folder: Path, dtype: str = "bfloat16", **changes: Any) -> Path:
    folder.mkdir()
    (folder / "awq_trt.json").write_text(json.dumps(REPORT | changes))
    (folder / "config.json").write_text(json.dumps({"torch_dtype": dtype}))
    (folder / "model.safetensors").write_bytes(b"0" * 1_500_000)
    return folder


def edit_sidecar(engine: Path, **changes: Any) -> None:
    content = json.loads(sidecar.path_of(engine).read_text())
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(content[key], dict) else value
    sidecar.path_of(engine).write_text(json.dumps(content))


def page_of(folder: Path, **options: Any) -> Page:
    """Write, read, parse, and check what holds for every page."""
    write_html_report(folder / "out.html", **options)
    return checked((folder / "out.html").read_text(encoding="utf-8"))


def checked(text: str) -> Page:
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"(?:https?:)?//\w|@import|url\(", re.sub(r"base64,[\w+/=]*", "", text)), "nothing is loaded"
    for tag in page.root.iter():
        assert tag.tag != "script"
        assert (
            tag.keys() in ([], ["lang"], ["charset"], ["name", "content"], ["http-equiv", "content"], ["scope"])
            or tag.tag == "img"
        )
    for image in page.all("img"):
        assert image.get("alt")
        assert (image.get("src") or "").startswith("data:image/svg+xml;base64,")
    assert len(page.all("table")) == len(page.all("caption"))
    (policy,) = [tag.get("content") for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return page


def test_every_layer_is_there(tmp_path: Path, awq_dir: Path) -> None:
    page = page_of(tmp_path, awq_dir=awq_dir, accuracy=ACCURACY)
    names, cells, texts = page.text("th"), page.text("td"), page.text("p")
    listed = [n for n in names if n.startswith("model.layers")]
    assert listed[-len(MODEL) :] == [x["name"] for x in MODEL]
    assert listed[0] == "model.layers.3.q_proj", "the worst comes first"
    assert {"q_proj", "up_proj", "lm_head"} <= set(names)
    for row in MODEL:
        assert {f"{row['error']:.4f}", f"{row['alpha']:.2f}"} <= set(cells)
    assert {"outside the repeated blocks", "8 in INT4, 1 left in 16 bits", "1.5 MB"} <= set(cells)
    assert {"48.95", "59.98 (+11.03)", "52.66 (+3.71)", "100.0%", "67.2%"} <= set(cells)
    assert page.text("blockquote") == ["Once"]
    assert [t for t in texts if t.endswith("31 of 32 greedy tokens equal, the rest within 0.004 of the best logit")]
    assert "Not measured on a GPU." in texts
    assert [t for t in texts if "pip install 'awq_trt[plot]'" in t]
    assert not page.all("img")


def test_layers_are_drawn(tmp_path: Path) -> None:
    """Also where a logarithmic axis has no place for a value."""
    zeros = {"error": 0.0, "error_rounding": 0.0, "largest_activation": 0.0}
    for i, rows in enumerate((MODEL, [layer("m.0.up", **zeros), layer("m.1.up")], [layer("m.0.up", **zeros)])):
        page = page_of(tmp_path, awq_dir=awq_dir_of(tmp_path / f"{i}.awq", layers=rows))
        (image,) = page.all("img")
        assert b"</svg>" in base64.b64decode((image.get("src") or "").partition(",")[2])
    assert not [t for t in page.text("p") if "matplotlib" in t]


def test_a_plan_alone_and_its_directory(tmp_path: Path, awq_dir: Path) -> None:
    engine = plan_in(tmp_path, kind="decoder", metadata={"kv_cache": {"kind": "dynamic"}, "dtype": "float16"})
    page = page_of(tmp_path, engine=engine)
    texts = page.text("p")
    assert "Not known here: the plan was built from an ONNX file, without the quantized directory." in texts
    assert "KV cache: dynamic: past in, longer past out." in texts
    assert "Profile decode" in page.text("caption")
    assert {"4 × 2 × 63 × 16", "4 × 1", "4.0 kB"} <= set(page.text("td"))
    assert {"past_key_values.0.key and 1 more", "KV cache", "inputs and outputs", "together"} <= set(page.text("th"))
    assert [line for line in page.text("pre") if line.endswith("out.trtexec.sh decode")]
    assert [text for text in page.text("aside") if "Triton's TensorRT backend loads plans of TensorRT only" in text]
    edit_sidecar(engine, model={"tokenizer": "out.awq"})
    page = page_of(tmp_path, engine=engine)
    assert {"model.layers.3.up_proj", "quantized"} <= set(page.text("th"))
    assert "out.awq" in page.text("td")


def test_a_fixed_cache_and_served_plan(tmp_path: Path) -> None:
    engine = plan_in(tmp_path, "tensorrt", metadata={"kv_cache": None})
    layers = [*CACHE["layers"], *CACHE["layers"], CACHE["layers"][0] | {"window": 512}]  # type: ignore[index]
    edit_sidecar(engine, model={"kv_cache": CACHE | {"layers": layers}}, accuracy=ACCURACY)
    page = page_of(tmp_path, engine=engine)
    assert "KV cache: fixed, written in place, never copied" in page.text("caption")
    assert {"2048", "3 heads × 2048 slots × 64", "window 512", "52.66 (+3.71)"} <= set(page.text("td"))
    assert {"2 layers", "1 layers"} <= set(page.text("th"))
    assert any(line.startswith("tritonserver") for line in page.text("pre"))


def test_an_encoder_that_was_rounded(tmp_path: Path) -> None:
    folder = awq_dir_of(tmp_path / "vit.awq", layers=[], method="rtn", group_size=-1, left_in_float={})
    rows = {"float": {"perplexity": None, "top1": 1.0}, "rtn": {"perplexity": None, "top1": 0.5}}
    page = page_of(tmp_path, awq_dir=folder, accuracy={"text": "x.npz", "held_out": rows})
    assert "The layers were rounded to nearest: there was no search to report on." in page.text("p")
    assert {"whole row", "50.0%", "-"} <= set(page.text("td"))


def test_onnx_without_a_plan(tmp_path: Path, awq_dir: Path) -> None:
    tiny_onnx.quantized(tmp_path / "q.onnx", external=True)
    page = page_of(tmp_path, awq_dir=awq_dir, onnx=tmp_path / "q.onnx")
    total = (tmp_path / "q.onnx").stat().st_size + (tmp_path / "q.onnx.data").stat().st_size
    assert {"q.onnx", f"{total / 1000:.1f} kB"} <= set(page.text("td"))


def test_hostile_names_are_text_even_drawn(tmp_path: Path) -> None:
    """Names come from checkpoints: none of them may become a tag, an attribute, or end the page."""
    rows = [layer(f"{HOSTILE}.{i}.up", folded_into=HOSTILE, error=0.1 * i) for i in range(1, 3)]
    rows += [layer(f"x.1.{HOSTILE}")]
    calibration = {"source": HOSTILE, "windows": 8, "length": 512}
    changes = {"source": HOSTILE, "layers": rows, "left_in_float": {HOSTILE: HOSTILE}, "method": HOSTILE}
    folder = awq_dir_of(tmp_path / "a<b>&'\".awq", HOSTILE, calibration=calibration, **changes)
    accuracy = {
        "held_out": {HOSTILE: {"perplexity": 3.0, "top1": 1.0}},
        "onnx": ACCURACY["onnx"] | {"generated": HOSTILE},  # type: ignore[operator]
        "text": HOSTILE,
    }
    engine = plan_in(tmp_path, metadata={"kv_cache": None, "left_in_float": {HOSTILE: HOSTILE}, "model_type": HOSTILE})
    content = json.loads(sidecar.path_of(engine).read_text())
    profiles = [content["profiles"][0] | {"name": HOSTILE}]
    plugin = {"version": HOSTILE, "path": HOSTILE, "embedded": False}
    model = {"onnx": HOSTILE, "kv_cache": CACHE | {"dtype": HOSTILE}}
    edit_sidecar(engine, build={"warnings": [HOSTILE]}, profiles=profiles, plugin=plugin, model=model, created=HOSTILE)
    (tmp_path / "<r>.json").write_text(json.dumps([{"count": 1}, {"name": HOSTILE, "averageMs": 1.0, "medianMs": 1.0}]))
    page = page_of(tmp_path, awq_dir=folder, engine=engine, accuracy=accuracy, records=[tmp_path / "<r>.json"])
    texts = " ".join(page.text("html"))
    assert texts.count("{{ 7*7 }}") == texts.count("</title></style><script>alert(1)</script>") > 25
    assert " 49 " not in texts
    assert len([line for line in page.text("pre") if "<script>alert(1)</script>" in line]) == 1
    assert page.all("img"), "drawn, or the reason would say why not"


@pytest.mark.parametrize(("dtype", "count"), [("bfloat16", 0), ("float16", 1)])
def test_warnings_are_shown(tmp_path: Path, dtype: str, count: int) -> None:
    folder = awq_dir_of(tmp_path / "out.awq", dtype, layers=[layer("m.0.up", largest_activation=61000.0)])
    assert ["61000" in text for text in page_of(tmp_path, awq_dir=folder).text("aside")] == [True] * count


def test_a_record_of_the_benchmark(tmp_path: Path, awq_dir: Path) -> None:
    record = tmp_path / "decode.json"
    record.write_text(json.dumps(GEMM))
    page = page_of(tmp_path, awq_dir=awq_dir, records=[record])
    ((_, _, rows),) = read_record(record)[2]
    assert rows == [(1, "15.0", "5.0", "3.00"), (64, "20.0", "-", "-")]
    assert {"15.0", "3.00"} <= set(page.text("td"))
    assert "4096 × 4096, group 128: Llama-3.1-8B o, Qwen3-8B o" in page.text("caption")
    assert any("NVIDIA H100, float16, 2026-11-20" in text for text in page.text("p"))
    assert "Not measured on a GPU." not in page.text("p")
    record.write_text(json.dumps(GEMM | {"settings": GEMM["settings"] | {"device": "cpu"}}))  # type: ignore[operator]
    assert any("Made up" in text for text in page_of(tmp_path, awq_dir=awq_dir, records=[record]).text("p"))


def test_a_dry_run_of_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real tool's record, not one like it."""
    words = ["bench_gemm.py", "--dry-run", "--output", str(tmp_path / "r.json"), "--seed", "1", "--tokens", "1", "8"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.syspath_prepend(str(TOOLS))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOLS / "bench_gemm.py"), run_name="__main__")
    assert ended.value.code == 0
    tables = read_record(tmp_path / "r.json")[2]
    assert [len(rows) for _, _, rows in tables] == [2, 2]
    assert all(float(str(cell)) > 0 for _, _, rows in tables for row in rows for cell in row)


def test_what_trtexec_leaves(tmp_path: Path) -> None:
    times, layers = tmp_path / "decode.times.json", tmp_path / "decode.layers.json"
    times.write_text(json.dumps([{"computeMs": ms / 100, "latencyMs": ms / 50} for ms in range(1, 101)]))
    rows = [{"name": f"layer {i}", "averageMs": float(i), "medianMs": i} for i in range(1, 31)]
    layers.write_text(json.dumps([{"count": 100}, *rows]))
    ((_, _, calls),), ((_, _, slowest),) = read_record(times)[2], read_record(layers)[2]
    assert list(calls[0]) == ["on the GPU", "0.010", "0.500", "0.900", "0.990", "0.505"]
    assert calls[1][2] == "1.000"
    assert len(slowest) == 20
    assert slowest[0] == ("layer 30", "30.0000", "30.0000", "6.5")


def test_bad_input(tmp_path: Path, awq_dir: Path) -> None:
    out = tmp_path / "out.html"
    for options, message in (
        ({}, "nothing to report on"),
        ({"engine": tmp_path / "none.plan"}, "no such file"),
        ({"awq_dir": tmp_path}, "another tool quantized it"),
    ):
        with pytest.raises(AwqTrtError, match=message):
            write_html_report(out, **options)  # type: ignore[arg-type]
    for text in ("[]", "{}", "{"):
        (awq_dir / "awq_trt.json").write_text(text)
        with pytest.raises(AwqTrtError, match="Quantize again"):
            write_html_report(out, awq_dir=awq_dir)
    record = tmp_path / "r.json"
    for text in ("{", "{}", "[]", "[1]", '[{"count": 1}, {"name": "x"}]', None):
        record.unlink() if text is None else record.write_text(text)
        with pytest.raises(AwqTrtError, match=r"r.json: (.*Give a file that bench_gemm.py|no such file)"):
            write_html_report(out, engine=plan_in(tmp_path), records=[record])
    assert not out.exists()
    (awq_dir / "awq_trt.json").unlink()
    page = page_of(tmp_path, awq_dir=awq_dir, engine=plan_in(tmp_path))
    assert "out.awq" in page.text("td"), "a directory of another tool has its place among the files"


def test_report_tool(tmp_path: Path, awq_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(TOOLS / "report.py"))["main"]
    engine, out = str(plan_in(tmp_path)), tmp_path / "out.html"
    assert main([engine, "--html", str(out)]) == 0
    assert out.exists()
    for words, message in (
        ([engine], "give --html FILE"),
        ([engine, engine], "one of each"),
        ([str(tmp_path / "none")], "no such file or directory"),
        ([str(awq_dir), "--record", engine], "--record is for the page"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_export_writes_the_page(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    main = runpy.run_path(str(TOOLS / "export.py"))["main"]
    words = ["--engine", str(tmp_path / "o.plan"), "--report", str(tmp_path / "o.html"), "--quiet"]
    assert main(["--model", str(exported / "llama.onnx"), *words, "--runtime", "tensorrt_rtx"]) == 0
    page = checked((tmp_path / "o.html").read_text())
    assert len([n for n in page.text("th") if n.startswith("model.layers.")]) == 14 + 5
    assert "KV cache: fixed, written in place, never copied" in page.text("caption")
