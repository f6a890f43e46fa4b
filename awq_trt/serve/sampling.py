"""From logits to the next token: repetition penalty, temperature, top-k, top-p, in this order, as in transformers.

Only numpy, one row at a time: every request has settings and a random generator of its own, so its tokens do not depend
on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from numbers import Integral, Real
from typing import Any

import numpy as np

from awq_trt.errors import AwqTrtError

MOST_STOPS, LONGEST_STOP = 64, 1024
"""Stop strings of a request, and characters of one. Every new token is compared with all of them."""

LARGEST = (1 << 31) - 1
"""Of a count: an INT32, as Triton's fields have it."""

NOT_FINITE = 'the output is NaN or Inf: activations left the range of float16; export with dtype="bfloat16".'


@dataclass(frozen=True)
class Sampling:
    """How to continue one request.

    Raises:
        AwqTrtError: a value out of its range, which is beside each field.
    """

    max_tokens: int | None = 256  # 1 to 2^31 - 1, most tokens to generate; None as many as the cache has room for
    temperature: float = 0.0  # 0 to 100, logits are divided by it; 0 always takes the most likely token (greedy)
    top_k: int = 0  # 0 to 2^31 - 1, only the k most likely tokens (and those as likely as the last); 0 for all
    top_p: float = 1.0  # above 0, to 1, only the most likely tokens with this sum (nucleus, Holtzman et al. 2020)
    # 0.01 to 100, positive logits of tokens that occurred, in the prompt too, are divided by it, negative ones
    # multiplied (CTRL, Keskar et al. 2019)
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()  # up to 64 of 1 to 1024 characters that end the text, not part of it; or special tokens
    seed: int | None = None  # 0 to 2^64 - 1, of the random numbers; None for others every time
    ignore_eos: bool = False  # go on after an end-of-sequence token

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        stop = tuple(islice(stop, MOST_STOPS + 1)) if isinstance(stop, Iterable) else stop
        object.__setattr__(self, "stop", stop)
        strings = isinstance(stop, tuple) and all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in stop)
        for name, valid, wanted in (
            ("max_tokens", _whole(self.max_tokens, 1, LARGEST, none=True), f"a whole number, 1 to {LARGEST}, or None"),
            ("temperature", _real(self.temperature, 0, 100), "a number from 0 (greedy) to 100"),
            ("top_k", _whole(self.top_k, 0, LARGEST), f"a whole number from 0 (all tokens) to {LARGEST}"),
            ("top_p", _real(self.top_p, 0, 1) and self.top_p > 0, "above 0 and at most 1"),
            ("repetition_penalty", _real(self.repetition_penalty, 0.01, 100), "a number from 0.01 to 100"),
            ("stop", strings, f"strings of 1 to {LONGEST_STOP} characters"),
            ("stop", strings and len(stop) <= MOST_STOPS, f"at most {MOST_STOPS} strings"),
            ("seed", _whole(self.seed, 0, (1 << 64) - 1, none=True), "a whole number, 0 to 2^64 - 1, or None"),
            ("ignore_eos", isinstance(self.ignore_eos, (bool, np.bool_)), "True or False"),
        ):
            if not valid:
                raise AwqTrtError(f"{name} is {_shown(getattr(self, name))}; it must be {wanted}.")
        for name, plain in (("temperature", float), ("top_k", int), ("top_p", float), ("repetition_penalty", float)):
            object.__setattr__(self, name, plain(getattr(self, name)))  # not numpy's, nor a Fraction


def _whole(value: object, least: int, most: int, none: bool = False) -> bool:
    if value is None:
        return none
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most


def _real(value: object, least: float, most: float) -> bool:
    number: Any = value  # compared, not converted: an int may be too large for a float
    return isinstance(value, Real) and not isinstance(value, bool) and least <= number <= most  # NaN is in no range


def _shown(value: object) -> str:
    """A value for a message, which may be that of a hostile client."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}…"


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
        """The next token. logits: float32 [vocab].

        Raises:
            AwqTrtError: NaN or Inf among the logits, or no finite one. Others always give a token.
        """
        if not np.isfinite(logits.max()):  # a few of -Inf are tokens that cannot be
            raise AwqTrtError(NOT_FINITE)
        scores = penalized(logits, self._seen, self.sampling.repetition_penalty)
        if self.sampling.temperature == 0:
            token = int(scores.argmax())
        else:
            ids, probabilities = candidates(scores, self.sampling)
            edges = probabilities.cumsum()
            at = np.searchsorted(edges, self._random.random() * edges[-1], side="right")
            token = int(ids[min(at, len(ids) - 1)])  # the product may be rounded up to the last edge
        self._seen[token] = True
        return token


def penalized(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Logits [vocab] with the repetition penalty on those where seen, bool [vocab]; what leaves float32 is clipped."""
    if penalty == 1:
        return logits
    most = np.finfo(np.float32).max
    with np.errstate(over="ignore"):
        changed = np.where(logits < 0, logits * penalty, logits / penalty)
    return np.where(seen & np.isfinite(logits), np.clip(changed, -most, most), logits)


def candidates(scores: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that temperature, top-k and top-p leave, at least one, in order of their ids, and their probabilities.

    In the order of ids, not of probabilities: there a last bit of a logit cannot exchange two tokens.

    Args:
        scores: float32 [vocab], the largest of them finite.

    Returns:
        int64 [n], float64 [n] with sum 1.
    """
    k = sampling.top_k
    ids = np.arange(len(scores))
    if 0 < k < len(scores):
        ids = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    exponents = scores[ids].astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature: -Inf, and 0 for the largest
        weights = np.exp((exponents - exponents.max()) / float(sampling.temperature))
    probabilities = weights / weights.sum()
    if sampling.top_p < 1:
        # all tokens below this sum up to less than 1 - top_p: they go in any case, and only the others are sorted
        least = min((1 - sampling.top_p) / len(ids), probabilities.max())
        likely = np.flatnonzero(probabilities >= least)
        order = likely[np.argsort(-probabilities[likely], kind="stable")]
        before = probabilities[order].cumsum() - probabilities[order]
        before[0] = 0  # the most likely one always stays
        kept = np.sort(order[before < sampling.top_p])
        ids, probabilities = ids[kept], probabilities[kept] / probabilities[kept].sum()
    return ids, probabilities
