"""Some hundred mutated files at every run, more with `--fuzz-cases N`; and that the harness sees what it is to see."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import mutations
import pytest
import run
import targets

CASES = 300


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    run.make_seeds(folder)
    return folder


def test_mutated_files_are_accepted_or_refused_in_words(seeds: Path, pytestconfig: pytest.Config) -> None:
    found = run.fuzz(run.plan(pytestconfig.getoption("--fuzz-cases") or CASES), seeds)
    assert [f"--target {x['target']!r} --case {x['case']}: {x['message']}" for x in run.bad(found)] == []
    assert {x["target"] for x in found} == set(targets.TARGETS)
    assert {x["outcome"] for x in found} == {"accepted", "refused"}


def test_files_that_are_not_mutated_are_accepted(seeds: Path) -> None:
    for name, target in targets.TARGETS.items():
        folder = seeds / name
        for file in sorted({f.relative_to(folder) for pattern in target.files for f in folder.glob(pattern)}):
            found = target.read(folder, file)
            assert target.judge is None or target.judge(folder, file, found) == "", name
            run.clean(folder, target)


def test_the_same_seed_is_the_same_case(seeds: Path) -> None:
    cases = [("sidecar", i) for i in range(5)]
    first, second = (sorted((x["case"], x.get("message")) for x in run.fuzz(cases, seeds)) for _ in range(2))
    assert [case for case, _ in first] == [0, 1, 2, 3, 4]
    assert [(c, m and m.rpartition("/")[2]) for c, m in first] == [(c, m and m.rpartition("/")[2]) for c, m in second]


def fails() -> None:
    raise KeyError("x")


def hangs() -> None:
    time.sleep(60)


def crashes() -> None:
    import os

    os._exit(11)


def fills_memory() -> bytearray:
    return bytearray(4 << 30)


@pytest.mark.parametrize(
    ("act", "outcome"), [(fails, "bare"), (hangs, "hang"), (crashes, "crash"), (fills_memory, "bare"), (len, "bare")]
)
def test_what_must_not_be_is_seen(
    seeds: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], outcome: str
) -> None:
    monkeypatch.setattr(run, "SECONDS", 1)
    good = targets.TARGETS["sidecar"]
    monkeypatch.setitem(targets.TARGETS, "sidecar", replace(good, read=lambda folder, file: act()))
    (found,) = run.fuzz([("sidecar", 0)], seeds)
    assert found["outcome"] == outcome


def test_a_wrong_acceptance_is_seen(seeds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = targets.TARGETS["safetensors"]
    swapped = replace(good, read=lambda folder, file: {})
    monkeypatch.setitem(targets.TARGETS, "safetensors", swapped)
    found = run.fuzz([("safetensors", i) for i in range(40)], seeds)
    assert any(x["outcome"] == "wrong" and "other names" in x["message"] for x in found)


def test_a_case_does_not_depend_on_those_before() -> None:
    before = repr(mutations.ODD)
    for seed in range(2000):
        mutations.any_json(b'{"a": [1, {"b": "x"}], "c": {"d": [2]}}', Random(seed))
    assert repr(mutations.ODD) == before
