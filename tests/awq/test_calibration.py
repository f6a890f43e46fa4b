"""Calibration inputs."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

from awq_trt.awq.calibration import DEFAULT_TEXT, HELD_OUT_TEXT, arrays, calibration_inputs, read_text, windows
from awq_trt.awq.config import EFFORTS
from awq_trt.errors import AwqTrtError


def test_default_texts_are_long_enough_and_disjoint() -> None:
    calibration, held_out = DEFAULT_TEXT.read_text(), HELD_OUT_TEXT.read_text()
    assert len(calibration) > EFFORTS["best"]["calibration_samples"] * 512 * 4  # about four characters to a token
    assert len(held_out) > 25_000

    def phrases(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    assert not phrases(calibration) & phrases(held_out)


def test_windows_are_spread_over_the_text() -> None:
    tokenizer = tiny_models.tokenizer()
    found = windows(DEFAULT_TEXT, tokenizer, samples=4, length=64)
    ids = tokenizer(DEFAULT_TEXT.read_text())["input_ids"]
    assert [w["input_ids"].shape for w in found] == [(1, 64)] * 4
    assert found[0]["input_ids"][0].tolist() == ids[:64]
    assert found[-1]["input_ids"][0].tolist() == ids[-64:]


def test_fewer_windows_where_the_text_is_short(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("word " * 100)
    assert len(windows(tmp_path / "t.txt", tiny_models.tokenizer(), samples=1000, length=32)) < 20


@pytest.mark.parametrize("text", ["", " \n", "three short words"])
def test_empty_or_too_short_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(AwqTrtError, match=r"t\.txt: \d+ tokens of text, but one calibration window needs 512"):
        windows(tmp_path / "t.txt", tiny_models.tokenizer(), samples=8, length=512)


def test_directory_of_texts(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.bin").write_text("not this")
    assert read_text(tmp_path) == "first\n\nsecond"
    (tmp_path / "empty").mkdir()
    with pytest.raises(AwqTrtError, match="no .txt, .md, .jsonl file"):
        read_text(tmp_path / "empty")


def test_files_are_read_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a directory, too, files after the bound add nothing."""
    monkeypatch.setattr("awq_trt.awq.calibration.MAX_CHARACTERS", 5)
    for name, text in {"a.txt": "éaa", "b.txt": "bbbb", "c.txt": "c"}.items():
        (tmp_path / name).write_text(text)
    assert read_text(tmp_path) == "éaa\n\nbb"
    assert read_text(tmp_path / "b.txt") == "bbbb"
    (tmp_path / "d.txt").write_text("dddddd")
    assert read_text(tmp_path / "d.txt") == "ddddd"


def test_datasets_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is not asked: a stand-in module records how `datasets` would be called."""
    calls = []

    def load_dataset(name: str, configuration: str | None, **options: object) -> list[dict[str, str]]:
        calls.append((name, configuration, options))
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_text("Salesforce/wikitext:wikitext-2-raw-v1") == "one\n\ntwo"
    assert calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "train", "streaming": True})]


def test_datasets_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(AwqTrtError, match="pip install datasets"):
        read_text("some/dataset")


def test_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", pixel_values=np.arange(12, dtype=np.float32).reshape(3, 4))
    found = calibration_inputs(tmp_path / "x.npz", None, samples=2, length=512)
    assert [f["pixel_values"].tolist() for f in found] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    np.savez(tmp_path / "kinds.npz", a=np.ones((1, 2)), b=np.ones((1, 2), np.float16), c=np.ones((1, 2), np.int64))
    (found,) = arrays(tmp_path / "kinds.npz", 1)
    assert [found[name].dtype for name in "abc"] == [torch.float32, torch.float32, torch.int64]


def test_bad_arrays(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(AwqTrtError, match="not a .npz"):
        arrays(tmp_path / "text.npz", 2)
    np.savez(tmp_path / "pickle.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(AwqTrtError, match="not a .npz of plain arrays"):
        arrays(tmp_path / "pickle.npz", 2)
    np.savez(tmp_path / "uneven.npz", a=np.zeros(2), b=np.zeros(3))
    with pytest.raises(AwqTrtError, match="same, non-zero number of samples"):
        arrays(tmp_path / "uneven.npz", 2)


def test_model_without_tokenizer() -> None:
    with pytest.raises(AwqTrtError, match="no tokenizer.*inputs in calibration as a .npz"):
        windows(DEFAULT_TEXT, None, 8, 512)
