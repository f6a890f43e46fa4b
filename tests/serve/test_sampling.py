"""Sampling against transformers' processors, which define what the settings mean."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process

from awq_trt.errors import AwqTrtError
from awq_trt.serve.sampling import Sampler, Sampling, candidates, penalized

VOCABULARY = 1000


def random_logits(seed: int, spread: float = 4) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(VOCABULARY) * spread).astype(np.float32)


def by_transformers(logits: np.ndarray, sampling: Sampling, prompt: list[int]) -> np.ndarray:
    """Probabilities [vocab] as `generate` of transformers would have them."""
    processors: list[Any] = []
    if sampling.repetition_penalty != 1:
        processors.append(logits_process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1:
        processors.append(logits_process.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(logits_process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(logits_process.TopPLogitsWarper(sampling.top_p))
    scores = torch.from_numpy(logits.copy())[None]
    for processor in processors:
        scores = processor(torch.tensor([prompt]), scores)
    return scores.double().softmax(-1)[0].numpy()


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 1.0, "top_k": 5000},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.01},
    {"temperature": 1.0, "top_p": 0.9999},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "repetition_penalty": 0.7},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_distribution_is_that_of_transformers(settings: dict[str, Any]) -> None:
    sampling = Sampling(**settings)
    for seed in range(10):
        logits = random_logits(seed, spread=1 + seed)
        prompt = np.random.default_rng(seed).integers(0, VOCABULARY, 30).tolist()
        seen = np.zeros(VOCABULARY, bool)
        seen[prompt] = True
        ids, probabilities = candidates(penalized(logits, seen, sampling.repetition_penalty), sampling)
        found = np.zeros(VOCABULARY)
        found[ids] = probabilities
        np.testing.assert_allclose(found, by_transformers(logits, sampling, prompt), rtol=1e-4, atol=1e-9)
        assert (np.diff(ids) > 0).all()


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_is_that_of_transformers(penalty: float) -> None:
    sampler, chosen = Sampler(Sampling(repetition_penalty=penalty), [3, 7], VOCABULARY), [3, 7]
    logits = random_logits(0)
    for _ in range(20):  # the same logits again: the penalty must count what was chosen, too
        scores = torch.from_numpy(logits)[None]
        if penalty != 1:
            processor = logits_process.RepetitionPenaltyLogitsProcessor(penalty)
            scores = processor(torch.tensor([chosen]), scores.clone())
        expected = int(scores.argmax())
        assert sampler(logits) == expected
        chosen.append(expected)
    assert (len(set(chosen[2:])) == 1) == (penalty == 1)


def test_equal_logits_at_the_edge_of_top_k_all_stay() -> None:
    logits = np.array([1, 5, 3, 3, 3, 0], np.float32)
    ids, probabilities = candidates(logits, Sampling(temperature=1, top_k=2))
    assert ids.tolist() == [1, 2, 3, 4]
    assert probabilities.sum() == pytest.approx(1)


def test_tokens_are_as_frequent_as_their_probabilities() -> None:
    logits = random_logits(1, spread=1)
    sampling = Sampling(temperature=0.9, top_k=20, seed=5)
    sampler, n = Sampler(sampling, [], VOCABULARY), 20000
    counts = np.bincount([sampler(logits) for _ in range(n)], minlength=VOCABULARY)
    expected = by_transformers(logits, sampling, []) * n
    there = expected > 0
    assert counts[~there].sum() == 0
    chi2 = ((counts - expected)[there] ** 2 / expected[there]).sum()
    assert chi2 < 50  # 19 degrees of freedom: by chance once in 10 000


def test_seeds() -> None:
    def tokens(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1, seed=seed), [], VOCABULARY)
        return [sampler(random_logits(i, spread=1)) for i in range(20)]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)


def test_a_bit_of_noise_does_not_change_what_is_sampled() -> None:
    """Logits differ in their last bits between batches of other sizes."""
    random = np.random.default_rng(0)
    samplers = [Sampler(Sampling(temperature=1, top_p=0.95, seed=3), [], VOCABULARY) for _ in range(2)]
    for i in range(200):
        logits = np.repeat(random_logits(i, spread=1)[: VOCABULARY // 2], 2)  # every probability is there twice
        noisy = logits + random.uniform(-1e-6, 1e-6, VOCABULARY).astype(np.float32)
        assert samplers[0](logits) == samplers[1](noisy)


def test_extreme_logits() -> None:
    logits = np.full(VOCABULARY, -np.inf, np.float32)
    logits[[4, 9]] = 3e38, 2e38
    assert Sampler(Sampling(temperature=1e-3, top_p=0.5), [], VOCABULARY)(logits) == 4
    assert Sampler(Sampling(temperature=100.0, top_k=3), [], VOCABULARY)(logits) == 4


extreme = st.sampled_from([0.0, -0.0, 1.0, 1e-45, 1e-39, 3.4e38, -3.4e38, -math.inf]) | st.floats(
    width=32, allow_nan=False
)


@given(
    logits=st.lists(extreme, min_size=1, max_size=40),
    temperature=st.sampled_from([0.0, 5e-324, 1e-44, 1e-7, 100.0]) | st.floats(0, 100),
    top_k=st.integers(0, 50) | st.just((1 << 31) - 1),
    top_p=st.sampled_from([5e-324, 1e-20, 1.0]) | st.floats(0, 1, exclude_min=True),
    penalty=st.sampled_from([0.01, 1.0, 100.0]) | st.floats(0.01, 100),
    seen=st.lists(st.integers(0, 39), max_size=40),
    seed=st.integers(0, (1 << 64) - 1),
)
@example([0.0] * 5, 100.0, 0, 1e-20, 1.0, [], 0)
@example([3e38, -3e38], 1.0, 0, 1.0, 0.01, [0, 1], 0)
@example([-3e38, -3e38], 1.0, 0, 1.0, 100.0, [0, 1], 0)
@example([-math.inf, -3e38], 0.0, 0, 1.0, 100.0, [0, 1], 0)
@settings(max_examples=200, deadline=None)
def test_every_setting_and_every_logit_give_a_token(
    logits: list[float], temperature: float, top_k: int, top_p: float, penalty: float, seen: list[int], seed: int
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty, seed=seed)
    sampler = Sampler(sampling, [i for i in seen if i < len(logits)], len(logits))
    row = np.array(logits, np.float32)
    if not np.isfinite(row.max()):
        with pytest.raises(AwqTrtError, match="NaN or Inf"):
            sampler(row)
        return
    for _ in range(3):
        assert np.isfinite(row[sampler(row)])  # -Inf is a token that cannot be


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers(bad: float) -> None:
    logits = random_logits(0)
    logits[7] = bad
    for temperature in (0.0, 1.0):
        with pytest.raises(AwqTrtError, match="NaN or Inf: .*bfloat16"):
            Sampler(Sampling(temperature=temperature), [], VOCABULARY)(logits)
    with pytest.raises(AwqTrtError, match="NaN or Inf"):
        Sampler(Sampling(), [], VOCABULARY)(np.full(VOCABULARY, -np.inf, np.float32))


@pytest.mark.parametrize(
    ("setting", "value", "wanted"),
    [
        ("max_tokens", 0, "1 to 2147483647"),
        ("max_tokens", 1 << 31, "1 to 2147483647"),
        ("max_tokens", 1.5, "whole number"),
        ("max_tokens", True, "whole number"),
        ("temperature", -0.1, "0 .greedy. to 100"),
        ("temperature", 1e30, "0 .greedy. to 100"),
        ("temperature", float("nan"), "to 100"),
        ("temperature", float("inf"), "to 100"),
        ("temperature", 10**400, "to 100"),
        pytest.param("temperature", 10**5000, "is a huge int; .* to 100", id="huge"),
        ("temperature", "hot", "a number"),
        ("temperature", True, "a number"),
        ("temperature", None, "a number"),
        ("top_k", -1, "from 0"),
        ("top_k", 2.0, "whole number"),
        ("top_k", 1 << 31, "to 2147483647"),
        ("top_p", 0.0, "above 0"),
        ("top_p", 1.01, "at most 1"),
        ("top_p", float("nan"), "above 0"),
        ("repetition_penalty", 0, "0.01 to 100"),
        ("repetition_penalty", 1e-44, "0.01 to 100"),
        ("repetition_penalty", 101, "0.01 to 100"),
        ("repetition_penalty", float("inf"), "0.01 to 100"),
        ("stop", ("",), "1 to 1024 characters"),
        ("stop", ("x" * 1025,), "^stop is .{100}…; it must be strings of 1 to 1024 characters.$"),
        ("stop", ("x",) * 65, "at most 64"),
        ("stop", itertools.repeat("x"), "at most 64"),
        ("stop", (3,), "strings"),
        ("stop", b"x", "strings"),
        ("stop", 3, "strings"),
        ("seed", -1, "0 to 2.64 - 1"),
        ("seed", 1 << 64, "0 to 2.64 - 1"),
        ("seed", "x", "whole number"),
        ("ignore_eos", "no", "True or False"),
    ],
)
def test_values_out_of_range(setting: str, value: Any, wanted: str) -> None:
    with pytest.raises(AwqTrtError, match=wanted) as caught:
        Sampling(**{setting: value})
    assert str(caught.value).startswith(f"{setting} is ")
    assert len(str(caught.value)) < 250


def test_values_of_other_types() -> None:
    assert Sampling(stop="abc").stop == ("abc",)  # type: ignore[arg-type]
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    assert len(Sampling(stop=("x" * 1024,) * 64).stop) == 64
    one = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), top_p=Fraction(1, 2))  # type: ignore[arg-type]
    assert (one.temperature, one.top_k, one.top_p) == (0.5, 3, 0.5)
    assert json.dumps(dataclasses.asdict(one))
