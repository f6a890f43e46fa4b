"""The script that tries families, on some that are right, some that are refused, and two made wrong."""

from __future__ import annotations

import json
from pathlib import Path

import families
import family_check
import pytest
from commands import export
from family_check import check, judge
from safetensors.torch import load_file, save_file
from tiny_families import CHANGES, CLASSES, NAMES, tiny


def test_a_right_answer_and_two_wrong_ones(tmp_path: Path) -> None:
    """After the export, the original is changed: another activation, or another weight."""
    config, cls = tiny("bert")
    source = families.checkpoint(config, tmp_path / "m", cls=cls)
    awq, onnx = tmp_path / "out.awq", tmp_path / "out.onnx"
    assert export("--model", source, "--onnx", onnx, "--no-verify", "--method", "rtn").returncode == 0
    found = judge(source, awq, onnx, {})
    assert found["outcome"] == "right"
    assert found["relative"] < 5e-3
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(json.dumps(json.loads(text) | {"hidden_act": "relu"}))
    found = judge(source, awq, onnx, {})
    assert found["outcome"] == "WRONG"
    assert found["relative"] > 0.05
    (source / "config.json").write_text(text)
    tensors = load_file(source / "model.safetensors")
    tensors["bert.encoder.layer.1.output.dense.weight"] *= -1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    found = judge(source, awq, onnx, {})
    assert found["outcome"] == "WRONG"
    assert found["relative"] < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["opt", "swin", "siglip_vision_model"])
def test_right(family: str) -> None:
    """A decoder, through its cache; blocks of different widths; weights that are used without their module."""
    assert check(family)["outcome"] == "right"


@pytest.mark.slow
def test_refused_with_advice_that_works() -> None:
    """A text that is no longer than the model's positions, whatever its configuration calls them."""
    found = check("mpt", real=False)
    assert found["outcome"] == "refused"
    assert "--kv-cache dynamic" in found["message"]


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("mamba", "another state"),
        ("bloom", "takes no position_ids"),
        ("albert", "more than once"),
        ("ctrl", "transformer.pos_encoding, which is neither"),
        ("resnet", "no image_size"),
    ],
)
def test_refused(family: str, words: str) -> None:
    found = check(family, real=False)
    assert found["outcome"] == "refused"
    assert words in found["message"]


def test_what_it_does_not_know_and_a_failure_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check("no-such-family")["outcome"] == "unknown"
    assert set(CHANGES) | set(CLASSES) <= set(NAMES)
    assert len(NAMES) >= 40

    def broken(*_: object, **__: object) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(family_check, "export", broken)
    found = check("opt")
    assert found["outcome"] == "WRONG"
    assert "broken" in found["message"]
