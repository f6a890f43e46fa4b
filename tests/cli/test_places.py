"""Where the commands may not write: refused before any work, and what is there stays."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import tiny_models
from commands import command

from awq_trt.cli import onnx as onnx_command
from awq_trt.cli import quantize as quantize_command


@pytest.fixture
def home(models: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: a model, a quantized one and its ONNX file, and things of the user's."""
    home = tmp_path / "home"
    shutil.copytree(models / "llama", home / "big" / "model")
    shutil.copytree(exported / "llama.awq", home / "llama.awq")
    for name in ("llama.onnx", "llama.onnx.data"):
        shutil.copy(exported / name, home / name)
    (home / "other" / "thesis").mkdir(parents=True)
    (home / "other" / "thesis" / "chapter1.tex").write_text("years of work")
    (home / "notes.txt").write_text("x")
    (home / "repo" / "out").mkdir(parents=True)
    (home / "repo" / "out" / "config.pbtxt").write_text("mine")
    (home / "model").symlink_to("big/model")
    shutil.copytree(home / "llama.awq", home / "tuned.awq")
    (home / "tuned.awq" / "README.md").write_text("a model card")
    monkeypatch.chdir(home)

    def begun(*_: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(quantize_command, "open_model", begun)
    monkeypatch.setattr(onnx_command, "export_checkpoint", begun)
    return home


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("export --model model --awq other", "holds thesis/chapter1.tex, which awq_trt did not write"),
        ("export --model model --awq model", "is what is read"),
        ("export --model big/model --awq model", "is what is read"),
        ("export --model model --awq big", "holds .*big/model, which is read"),
        ("export --model model --awq model/new", "lies inside .*big/model, which is read"),
        ("export --model model --awq tuned.awq", "holds README.md"),
        ("export --model model --awq notes.txt", "this is a file"),
        ("export --model model --awq .", "which is read"),
        ("export --model model --awq ..", "which is read"),
        ("export --model model --onnx other", "this is a directory"),
        ("export --model model --onnx .", "this is a directory"),
        ("export --model model --engine other", "this is a directory"),
        ("export --model model --engine /", "this is a directory"),
        (
            "export --model model --onnx model/model.safetensors --awq x.awq",
            "holds something that awq_trt did not write",
        ),
        ("export --model model --engine out.plan --awq x.awq --onnx x.awq/m.onnx", "m.onnx: lies inside .*x.awq"),
        ("export --model model --engine out.plan --onnx out.plan", "two outputs"),
        ("export --model model --engine out.plan --report out.plan.json", "two outputs"),
        ("export --model model --engine out.plan --report model/config.json", "did not write"),
        ("export --model model --engine out.plan --report other", "this is a directory"),
        ("export --model model --engine notes.txt", "notes.txt: holds something that awq_trt did not write"),
        (
            "export --model model --engine out.plan --triton-repo repo",
            "holds config.pbtxt, which awq_trt",
        ),
        ("export --model model --engine out.plan --triton-repo model", "lies inside .*big/model, which is read"),
        ("quantize model --output other", "holds thesis/chapter1.tex"),
        ("quantize model --output big", "which is read"),
        ("onnx llama.awq --output notes.txt", "did not write"),
        ("onnx llama.awq --output llama.awq/config.json", "did not write"),
        ("engine llama.onnx --output llama.onnx", "is what is read"),
        ("engine llama.onnx --output llama.onnx.data", "is what is read"),
        ("engine llama.onnx --output x.plan --timing-cache llama.onnx", "is what is read"),
        ("engine llama.onnx --output x.plan --timing-cache other", "this is a directory"),
        ("triton llama.onnx --output repo --name out", "holds config.pbtxt"),
        ("triton llama.onnx --output . --name llama.awq", "llama.awq: is what is read"),
        ("report llama.awq --html notes.txt", "did not write"),
        ("report llama.awq --html other", "this is a directory"),
        ("report llama.awq --plot model/config.json", "did not write"),
        ("report llama.awq --plot x.svg --html x.svg", "two outputs"),
        ("eval llama.onnx --output notes.txt", "did not write"),
        ("eval llama.onnx --output other", "this is a directory"),
    ],
)
def test_places_that_are_refused(home: Path, words: str, message: str) -> None:
    before, paths = tiny_models.content(home), sorted(home.rglob("*"))
    result = command(*words.split())
    assert result.returncode == 2, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.count("error:") == 1
    assert (tiny_models.content(home), sorted(home.rglob("*"))) == (before, paths)


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_a_page_a_plot_and_a_record_are_replaced(home: Path, suffix: str) -> None:
    """Those that an earlier run wrote."""
    pytest.importorskip("matplotlib")
    for _ in range(2):
        result = command("report", "llama.awq", "--html", "page.html", "--plot", f"plot.{suffix}")
        assert result.returncode == 0, result.stderr
        assert not list(home.glob(".*"))
