"""ONNX Runtime on a cache that is never copied, and what is said of files that cannot be run."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_onnx
from decoders import call

from awq_trt.errors import AwqTrtError
from awq_trt.serve import ort
from awq_trt.serve.open import open_decoder
from awq_trt.serve.ort import OrtDecoder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_onnx.fixed_decoder(tmp_path_factory.mktemp("tiny") / "m.onnx")


def test_what_it_says_of_itself_until_it_is_closed(model: Path) -> None:
    with open_decoder(model, max_batch=3, threads=1) as decoder:
        assert isinstance(decoder, OrtDecoder)
        assert (decoder.max_batch, decoder.capacity, decoder.prefill_chunk, decoder.vocab_size) == (3, 64, 16, 64)
        assert decoder.cache_bytes == 2 * 2 * 3 * 2 * 64 * 16 * 4 == sum(c.nbytes for c in decoder._cache.values())
        assert decoder.facts["model_type"] == "tiny"
    with open_decoder(model) as decoder:
        assert decoder.max_batch == 4
    with pytest.raises(AwqTrtError, match="closed"):
        call(decoder, 0, [[1]], [0], [1])


def test_only_the_new_slots_of_the_rows_are_written(model: Path) -> None:
    with open_decoder(model, max_batch=4, threads=1) as decoder:
        assert isinstance(decoder, OrtDecoder)
        for i, cache in enumerate(decoder._cache.values()):
            cache[:] = np.random.default_rng(i).standard_normal(cache.shape)
        before = {name: cache.copy() for name, cache in decoder._cache.items()}
        call(decoder, 1, [[1, 2, 3], [4, 5, 0]], [3, 10], [3, 2])
        for name, cache in decoder._cache.items():
            changed = (cache != before[name]).any((1, 3))  # [rows, slots]
            assert np.flatnonzero(changed[1]).tolist() == [3, 4, 5]
            assert np.flatnonzero(changed[2]).tolist() == [10, 11, 12]  # padding too
            assert not changed[[0, 3]].any()
        decoder.clear(1)
        for name, cache in decoder._cache.items():
            assert not cache[1].any()
            assert (cache[0] == before[name][0]).all()


def test_the_cache_is_not_copied(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime warns of every cache that it copies; so it does where the output is bound elsewhere."""
    with open_decoder(model, max_batch=2, threads=1) as decoder:
        assert isinstance(decoder, OrtDecoder)
        run, options = decoder._session.run_with_iobinding, onnxruntime.RunOptions()
        options.log_severity_level = 2
        elsewhere = np.zeros((1, 2, 64, 16), np.float32)

        def listening(binding: Any, wrong: bool = False) -> None:
            if wrong:
                binding.bind_output("present.0.key", "cpu", 0, np.float32, elsewhere.shape, elsewhere.ctypes.data)
            run(binding, options)

        decoder._session.run_with_iobinding = listening
        call(decoder, 1, [[1, 2]], [3], [2])
        call(decoder, 0, [[1], [1]], [5, 5], [1, 1])
        assert "copying" not in capfd.readouterr().err
        decoder._session.run_with_iobinding = lambda binding: listening(binding, wrong=True)
        call(decoder, 0, [[1]], [5], [1])
        assert capfd.readouterr().err.count("copying past_cache") == 1
        assert elsewhere.any()


def test_nothing_is_left_beside_the_model_or_in_tmp(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with open_decoder(model, threads=1) as decoder:
        assert list(tmp_path.iterdir()) == []
        assert call(decoder, 0, [[1]], [0], [1]).shape == (1, 64)
    assert [p.name for p in model.parent.iterdir()] == ["m.onnx"]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(AwqTrtError, match="no room .*TMPDIR"):
        open_decoder(model)


def test_all_logits(model: Path, tmp_path: Path) -> None:
    """Of a file with the logits of every token, those after each row's last real one are taken."""
    every = tiny_onnx.fixed_decoder(tmp_path / "every.onnx", every_logit=True)
    ids, past, new = [[1, 2, 3], [4, 0, 0], [5, 6, 0]], [0, 0, 0], [3, 1, 2]
    with open_decoder(model, threads=1) as one, open_decoder(every, threads=1) as other:
        np.testing.assert_allclose(call(one, 1, ids, past, new), call(other, 1, ids, past, new), atol=1e-5)
        assert call(other, 0, [[1]], [0], [0]).shape == (1, 64)


@pytest.mark.parametrize(
    ("row", "ids", "past", "new", "why"),
    [
        (3, [[1], [1]], [0, 0], [1, 1], "2 rows from 3 .* the cache has 4"),
        (-1, [[1]], [0], [1], "from -1"),
        (0, [[1]], [0, 0], [1], "2 and 1 lengths"),
        (0, [[1] * 17], [0], [17], "at most 16 in a call"),
        (0, [[1] * 4], [14], [4], "may not cross a multiple of 16"),
        (0, [[1] * 4], [0], [5], r"\[5\] real"),
        (0, [[1]], [0], [-1], r"\[-1\] real"),
        (0, [[1, 1]], [63], [1], "2 new tokens after .*63.*; the cache holds 64"),
        (0, [[1]], [-1], [1], "after .*-1"),
        (0, [[64]], [0], [1], "vocabulary of 64"),
        (0, [[-1]], [0], [1], "vocabulary of 64"),
    ],
)
def test_calls_against_the_rules(model: Path, row: int, ids: Any, past: Any, new: Any, why: str) -> None:
    with open_decoder(model, max_batch=4, threads=1) as decoder, pytest.raises(AwqTrtError, match=why):
        call(decoder, row, ids, past, new)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"kv_cache": {"kind": "dynamic"}}, 'grows with every token .kv_cache="dynamic"'),
        ({"kv_cache": None, "model_type": "bert"}, "type bert is an encoder"),
    ],
)
def test_files_that_generate_nothing(tmp_path: Path, facts: dict[str, Any], why: str) -> None:
    path = tiny_onnx.fixed_decoder(tmp_path / "m.onnx", **facts)
    with pytest.raises(AwqTrtError, match=f"m.onnx: .*{why}.*kv_cache=.fixed"):
        open_decoder(path)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"kv_cache": {"kind": "fixed"}}, "key 'kv_cache.capacity' is missing. Export it again"),
        ({"vocab_size": "many"}, "key 'vocab_size' holds a str, 'many'"),
        ({"generation": {"eos_token_id": 2**40}}, "key 'generation.eos_token_id' holds a int"),
        ({"vocab_size": 63}, "does not fit its inputs and outputs"),
        ({"vocab_size": 2**31 - 1}, "does not fit its inputs and outputs"),
    ],
)
def test_facts_of_other_types_or_of_another_model(tmp_path: Path, facts: dict[str, Any], why: str) -> None:
    path = tiny_onnx.fixed_decoder(tmp_path / "m.onnx", **facts)
    with pytest.raises(AwqTrtError, match=f"m.onnx.*{why}"):
        open_decoder(path)


def test_a_cache_that_would_fill_the_memory(tmp_path: Path) -> None:
    path = tiny_onnx.fixed_decoder(tmp_path / "m.onnx")
    model = onnx.load(path)
    facts = json.loads(model.metadata_props[0].value)
    facts["kv_cache"]["layers"][0]["slots"] = 2**31 - 1
    model.metadata_props[0].value = json.dumps(facts)
    onnx.save(model, path)
    with pytest.raises(AwqTrtError, match="does not fit its inputs and outputs"):
        open_decoder(path)


def test_files_that_are_none(model: Path, tmp_path: Path) -> None:
    with pytest.raises(AwqTrtError, match="no such file"):
        open_decoder(tmp_path / "missing.onnx")
    with pytest.raises(AwqTrtError, match="no such file"):
        open_decoder(tmp_path)
    (tmp_path / "x.onnx").write_bytes(b"nonsense")
    with pytest.raises(AwqTrtError, match="not an ONNX file"):
        open_decoder(tmp_path / "x.onnx")
    with pytest.raises(AwqTrtError, match="not exported by awq_trt"):
        open_decoder(tiny_onnx.decoder(tmp_path / "foreign.onnx"))
    with pytest.raises(AwqTrtError, match="older version"):
        open_decoder(tiny_onnx.decoder(tmp_path / "old.onnx", metadata={"format": "plugin"}))
    broken = onnx.load(model)
    broken.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(broken, tmp_path / "broken.onnx")
    with pytest.raises(AwqTrtError, match="ONNX Runtime .* cannot load it"):
        open_decoder(tmp_path / "broken.onnx")
    for bad in ({"max_batch": 0}, {"threads": 0}):
        with pytest.raises(AwqTrtError, match="at least 1"):
            open_decoder(model, **bad)


def test_a_disk_that_is_full(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = AwqTrtError("could not write /tmp/x: No space left on device.")
    monkeypatch.setattr(ort, "float32_copy", Mock(side_effect=full))
    with pytest.raises(AwqTrtError, match="TMPDIR.*No space left"):
        open_decoder(model)
