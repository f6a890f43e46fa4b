"""From logits to the next token: repetition penalty, temperature, top-k, top-p, in this order, as in transformers.

Only numpy, one row at a time: every request has settings and a random generator of its own, so its tokens do not depend
on what else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from awq_trt.errors import AwqTrtError


@dataclass(frozen=True)
class Sampling:
    """How to continue one request.

    Raises:
        AwqTrtError: a value out of its range.
    """

    max_tokens: int | None = 256  # most tokens to generate; None as many as the cache has room for
    temperature: float = 0.0  # logits are divided by it; 0 always takes the most likely token (greedy)
    top_k: int = 0  # only the k most likely tokens (and those as likely as the last of them); 0 for all
    top_p: float = 1.0  # only the most likely tokens with this sum of probabilities (nucleus, Holtzman et al. 2020)
    # positive logits of tokens that occurred, in the prompt too, are divided by it, negative ones multiplied (CTRL,
    # Keskar et al. 2019)
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()  # strings that end the text, not part of it; or special tokens of the tokenizer
    seed: int | None = None  # of the random numbers; None for others every time
    ignore_eos: bool = False  # go on after an end-of-sequence token

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", tuple(stop) if isinstance(stop, Iterable) else stop)
        most, penalty = self.max_tokens, self.repetition_penalty
        strings = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        for name, valid, wanted in (
            ("max_tokens", most is None or _whole(most, 1), "a whole number from 1, or None"),
            ("temperature", _real(self.temperature) and self.temperature >= 0, "a number from 0 (greedy)"),
            ("top_k", _whole(self.top_k, 0), "a whole number from 0 (all tokens)"),
            ("top_p", _real(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", _real(penalty) and penalty > 0, "above 0"),
            ("stop", strings, "strings of at least one character"),
            ("seed", self.seed is None or _whole(self.seed, 0), "a whole number from 0, or None"),
        ):
            if not valid:
                raise AwqTrtError(f"{name} is {getattr(self, name)!r}; it must be {wanted}.")


def _whole(value: object, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


class Sampler:
    """Chooses the tokens of one request.

    Args:
        prompt: its token ids, for the repetition penalty.
    """

    def __init__(self, sampling: Sampling, prompt: Iterable[int], vocab_size: int) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._seen = np.zeros(vocab_size, bool)
        self._seen[list(prompt)] = True

    def __call__(self, logits: np.ndarray) -> int:
        """The next token. logits: float32 [vocab]."""
        scores = penalized(logits, self._seen, self.sampling.repetition_penalty)
        if self.sampling.temperature == 0:
            token = int(scores.argmax())
        else:
            ids, probabilities = candidates(scores, self.sampling)
            edges = probabilities.cumsum()
            token = int(ids[np.searchsorted(edges, self._random.random() * edges[-1], side="right")])
        self._seen[token] = True
        return token


def penalized(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Logits [vocab] with the repetition penalty on those where seen, bool [vocab]."""
    if penalty == 1:
        return logits
    return np.where(seen, np.where(logits < 0, logits * penalty, logits / penalty), logits)


def candidates(scores: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that temperature, top-k and top-p leave, in order of their ids, and their probabilities.

    In the order of ids, not of probabilities: there a last bit of a logit cannot exchange two tokens.

    Args:
        scores: float32 [vocab].

    Returns:
        int64 [n], float64 [n] with sum 1.
    """
    k = sampling.top_k
    ids = np.arange(len(scores))
    if 0 < k < len(scores):
        ids = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    exponents = scores[ids].astype(np.float64)
    weights = np.exp((exponents - exponents.max()) / sampling.temperature)
    probabilities = weights / weights.sum()
    if sampling.top_p < 1:
        # all tokens below this sum up to less than 1 - top_p: they go in any case, and only the others are sorted
        likely = np.flatnonzero(probabilities > (1 - sampling.top_p) / len(ids))
        order = likely[np.argsort(-probabilities[likely], kind="stable")]
        before = probabilities[order].cumsum() - probabilities[order]
        kept = np.sort(order[before < sampling.top_p])
        ids, probabilities = ids[kept], probabilities[kept] / probabilities[kept].sum()
    return ids, probabilities
