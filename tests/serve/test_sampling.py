"""Sampling against transformers' processors, which define what the settings mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
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


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("stop", ("",)),
        ("stop", (3,)),
        ("stop", 3),
        ("seed", -1),
        ("seed", "x"),
    ],
)
def test_values_out_of_range(setting: str, value: object) -> None:
    with pytest.raises(AwqTrtError, match=f"{setting} is .*; it must be"):
        Sampling(**{setting: value})  # type: ignore[arg-type]
    assert Sampling(stop="abc").stop == ("abc",)  # type: ignore[arg-type]
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
