"""What lies where an output goes is lost only if awq_trt wrote it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from awq_trt.errors import AwqTrtError
from awq_trt.outputs import Output, check, sign

MARK = b"made by us"


def directory(path: Path) -> Output:
    return Output(path, directory=True)


def file(path: Path) -> Output:
    return Output(path, (path.with_name(path.name + ".data"),), MARK)


def written(path: Path, *names: str) -> Path:
    """A directory with files in it."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("x")
    return path


def refused(outputs: Output | list[Output], words: str, *sources: Path) -> None:
    with pytest.raises(AwqTrtError, match=words):
        check([outputs] if isinstance(outputs, Output) else outputs, sources)


def test_what_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.onnx").touch()
    sign(written(tmp_path / "ours", "config.json", "1/model.plan"))
    written(tmp_path / "ours", "1/__pycache__/model.pyc")
    (tmp_path / "ours.onnx").write_bytes(b"12" + MARK)
    (tmp_path / "ours.onnx.data").write_bytes(b"weights")
    (tmp_path / "link.onnx").symlink_to("ours.onnx")
    for name in ("absent", "empty", "ours", "a/b/c"):
        check([directory(tmp_path / name)], [tmp_path / "no such source"])
    for name in ("absent.onnx", "empty.onnx", "ours.onnx", "link.onnx"):
        check([file(tmp_path / name)])
    check([directory(tmp_path / "ours"), file(tmp_path / "ours.onnx")])


def test_directories_that_hold_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "thesis", "chapters/1.tex")
    sign(written(tmp_path / "ours", "config.json"))
    written(tmp_path / "ours", "notes.txt")
    written(tmp_path / "stranger", "awq_trt.json")
    (tmp_path / "link").symlink_to("thesis")
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "link").symlink_to("nowhere")
    (tmp_path / "file").write_text("x")
    for name, words in {
        "thesis": "holds chapters/1.tex, which awq_trt did not write",
        "link": "thesis: holds chapters/1.tex",
        "other/../thesis": "thesis: holds chapters/1.tex",
        "ours": "holds notes.txt",
        "stranger": "holds awq_trt.json",
        "dangling": "holds link",
        "file": "this is a file",
    }.items():
        refused(directory(tmp_path / name), words)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in (Path(), Path(".."), Path("/")):
        refused(directory(path), "the current directory cannot be replaced")


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "x.onnx.data").write_text("a table of mine")
    (tmp_path / "link").symlink_to("thesis.tex")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for name, words in {
        "thesis.tex": "holds something that awq_trt did not write",
        "x.onnx": "x.onnx.data: holds something that awq_trt did not write of x.onnx",
        "link": "holds something",
        "broken": "something else",
        "folder": "this is a directory",
        "pipe": "something else",
        "socket": "something else",
    }.items():
        refused(file(tmp_path / name), words)
    refused(file(Path("/dev/null")), "something else")
    refused(Output(Path(), mark=MARK), "this is a directory")
    refused(Output(tmp_path / "folder", mark=b""), "this is a directory")


def test_the_source_is_not_replaced(tmp_path: Path) -> None:
    model = written(tmp_path / "big" / "model", "config.json")
    sign(model)  # even if it is ours
    (tmp_path / "link").symlink_to("big/model")
    (tmp_path / "up").symlink_to("big")
    for path in (model, tmp_path / "link", tmp_path / "up" / "model", model / ".." / "model"):
        refused(directory(path), "is what is read", model)
    refused(directory(model), "is what is read", tmp_path / "link")
    for path in (tmp_path / "big", tmp_path / "up"):
        refused(directory(path), "big: holds .*big/model, which is read", model)
    for path in (model / "out", tmp_path / "link" / "a" / "b"):
        refused(directory(path), "lies inside .*model, which is read", model)
    onnx = tmp_path / "m.onnx"
    onnx.write_bytes(MARK)
    (tmp_path / "hard").hardlink_to(onnx)
    for path in (onnx, tmp_path / "hard", tmp_path / "big" / ".." / "m.onnx"):
        refused(file(path), "is what is read", onnx)
    check([file(model / "model.onnx"), directory(tmp_path / "big" / "out")], [model, onnx])


def test_two_outputs_at_one_place(tmp_path: Path) -> None:
    one, two = tmp_path / "out", tmp_path / "out.data"
    refused([file(one), file(two)], "out.data: two outputs would be written here")
    refused([directory(one), directory(tmp_path / "x" / ".." / "out")], "two outputs")
    refused([directory(one), file(one / "m.onnx")], "m.onnx: lies inside .*out, which is replaced as a whole")
    refused([file(one / "a" / "m.onnx"), directory(one)], "m.onnx: lies inside .*out, which is replaced as a whole")
    check([file(one), directory(tmp_path / "out.awq"), Output(tmp_path / "page.html", mark=MARK)])


def test_mount_points_and_what_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        refused(directory(tmp_path / "empty"), "not writable")
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    refused(directory(tmp_path / "empty"), "a mount point cannot be replaced")
