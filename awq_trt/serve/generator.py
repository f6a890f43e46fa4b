"""Generating text with a decoder: many requests at once, each with settings, a seed and a length of its own.

Continuous batching (Yu et al. 2022, Orca): the decoder's cache has rows, a request takes a free one, and rows begin
and end at any time. A step is one decode call, a new token for every row that is past its prompt, and one prefill call,
a part of the prompts that wait. So long prompts do not stop the others. A row in the middle of its prompt takes part in
the decode calls with no real token.

A row remembers whose tokens its cache holds. A request whose prompt begins with them, the next turn of a chat, goes on
from there. (Not where a layer has a sliding window: its ring has overwritten the tokens before the window.)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from awq_trt.errors import AwqTrtError
from awq_trt.serve.decoder import Decoder
from awq_trt.serve.sampling import Sampler, Sampling
from awq_trt.serve.text_stream import TextStream

SHARED_PREFILL = 256
"""Most tokens of a prefill call while other rows decode, because their next tokens wait for it."""


@dataclass(frozen=True)
class Event:
    """What happened to a request. Those of one request come in order; the last has a finish_reason."""

    id: int  # of the request
    token_ids: tuple[int, ...] = ()  # new tokens, the end-of-sequence token that ended it too
    text: str = ""  # new text, often "" while it is not certain yet (text_stream.py)
    # None, or "stop" (end-of-sequence token or stop string), "length" (max_tokens, or the cache is full), "cancelled",
    # or "error"
    finish_reason: str | None = None
    error: str | None = None  # the reason of "error"


@dataclass
class Speed:
    """Where time went."""

    prompt_tokens: int = 0  # tokens of prompts, in prefill calls
    prompt_seconds: float = 0.0
    tokens: int = 0  # new tokens, in decode calls
    seconds: float = 0.0


@dataclass(eq=False)
class _Request:
    id: int
    ids: list[int]  # prompt, then what was generated
    prompt: int  # tokens of the prompt
    sampling: Sampling
    sampler: Sampler
    text: TextStream
    ends: frozenset[int]  # tokens that end it


@dataclass(eq=False)
class _Row:
    """A row of the cache."""

    cached: list[int] = field(default_factory=list)  # the tokens it holds, of this request or of the one before
    request: _Request | None = None

    @property
    def pending(self) -> int:
        """Tokens of the request that are not in the cache yet; 1 while it decodes."""
        return 0 if self.request is None else len(self.request.ids) - len(self.cached)


class Generator:
    """Runs requests on the rows of a decoder. Call `step` as long as `busy`; not for several threads at once.

    Args:
        decoder: its rows are this generator's alone. tokenizer: of the model, from transformers.
    """

    def __init__(self, decoder: Decoder, tokenizer: Any) -> None:
        self.decoder, self.tokenizer = decoder, tokenizer
        self.speed = Speed()  # of all steps so far
        self._rows = [_Row() for _ in range(decoder.max_batch)]
        self._queue: deque[_Request] = deque()
        self._events: list[Event] = []
        self._next_id = 0
        known = (decoder.facts.get("generation") or {}).get("eos_token_id") or []
        self._eos = frozenset([*known, tokenizer.eos_token_id]) - {None}
        self._reuse = all(layer["window"] is None for layer in decoder.facts["kv_cache"]["layers"])

    @property
    def active(self) -> int:
        """Requests that have a row."""
        return sum(row.request is not None for row in self._rows)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._queue)

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do or to report."""
        return bool(self._queue or self._events or self.active)

    def add(self, prompt: Sequence[int], sampling: Sampling | None = None, id: int | None = None) -> int:
        """Queue a request; it starts in the next `step` if a row is free, first come, first served.

        Args:
            prompt: token ids, at least one; `encode` makes them of text. sampling: None is greedy, `Sampling()`.
            id: of the request, which no other has; None is the next number.

        Returns:
            Its id.

        Raises:
            AwqTrtError: an empty prompt, ids outside of the vocabulary, or more than capacity - 1 of them.
        """
        ids, sampling, capacity = [int(i) for i in prompt], sampling or Sampling(), self.decoder.capacity
        if not ids:
            raise AwqTrtError("the prompt has no tokens; give at least one.")
        if not all(0 <= i < self.decoder.vocab_size for i in ids):
            raise AwqTrtError(f"the prompt has tokens outside of the vocabulary of {self.decoder.vocab_size}.")
        if len(ids) >= capacity:
            raise AwqTrtError(
                f"the prompt has {len(ids)} tokens; the model was exported with a cache for {capacity}, "
                f"so {capacity - 1} is the most. Shorten it, or export with a larger capacity."
            )
        special = self.tokenizer.get_added_vocab() if sampling.stop else {}
        ends = {special[text] for text in sampling.stop if text in special}  # these have no text to search for
        id = self._next_id if id is None else id
        self._next_id = id + 1
        self._queue.append(
            _Request(
                id=id,
                ids=ids,
                prompt=len(ids),
                sampling=sampling,
                sampler=Sampler(sampling, ids, self.decoder.vocab_size),
                text=TextStream(self.tokenizer, ids, sampling.stop),
                ends=frozenset(ends if sampling.ignore_eos else ends | self._eos),
            )
        )
        return id

    def cancel(self, id: int) -> bool:
        """Stop a request; its last event, "cancelled", comes with the next `step`. False if it has ended already."""
        for request in self._queue:
            if request.id == id:
                self._queue.remove(request)
                self._events.append(Event(id, finish_reason="cancelled"))
                return True
        for row in self._rows:
            if row.request is not None and row.request.id == id:
                text, row.request = row.request.text, None
                self._events.append(Event(id, text=_rest_of(text), finish_reason="cancelled"))
                return True
        return False

    def step(self) -> list[Event]:
        """One decode call and one prefill call, as far as there is something to do; what came of them."""
        self._admit()
        self._decode()
        self._prefill()
        events, self._events = self._events, []
        return events

    def _admit(self) -> None:
        """Give the oldest waiting requests free rows: the row that holds most of the prompt's beginning already."""
        while self._queue and (free := [row for row in self._rows if row.request is None]):
            request = self._queue.popleft()
            row = max(free, key=lambda row: self._common(row, request))
            del row.cached[self._common(row, request) :]
            row.request = request

    def _common(self, row: _Row, request: _Request) -> int:
        """Tokens at the beginning of a prompt that a row holds already; never all, the last gives the first logits."""
        most = min(len(row.cached), request.prompt - 1) if self._reuse else 0
        return next((i for i in range(most) if row.cached[i] != request.ids[i]), most)

    def _decode(self) -> None:
        ready = [i for i, row in enumerate(self._rows) if row.pending == 1]
        if ready:
            first, batch = self.decoder.decode_rows(ready[0], ready[-1])
            rows = range(first, first + batch)
            self.speed.seconds += self._run(rows, [int(self._rows[i].pending == 1) for i in rows])
            self.speed.tokens += len(ready)

    def _prefill(self) -> None:
        """Run the oldest request's prompt on, and with it rows beside it that have about as many tokens to run, so
        that no more than a third is padding; in all no more than a chunk."""
        chunk, capacity = self.decoder.prefill_chunk, self.decoder.capacity
        most = min(chunk, SHARED_PREFILL) if any(row.pending == 1 for row in self._rows) else chunk
        counts = [
            min(row.pending, most, chunk - len(row.cached) % chunk) if row.pending > 1 else 0 for row in self._rows
        ]
        ages = {row.request.id: i for i, row in enumerate(self._rows) if row.request is not None and counts[i]}
        if not ages:
            return
        oldest = ages[min(ages)]
        rows = range(oldest, oldest + 1)

        def fits(rows: range) -> bool:
            if rows.start < 0 or rows.stop > len(counts) or not all(counts[i] for i in rows):
                return False
            width = max(counts[i] for i in rows)
            room = all(len(self._rows[i].cached) + width <= capacity for i in rows)
            return room and width * len(rows) <= min(most, 1.5 * sum(counts[i] for i in rows))

        while fits(wider := range(rows.start, rows.stop + 1)) or fits(wider := range(rows.start - 1, rows.stop)):
            rows = wider
        self.speed.prompt_seconds += self._run(rows, [counts[i] for i in rows])
        self.speed.prompt_tokens += sum(counts[i] for i in rows)

    def _run(self, rows: range, counts: list[int]) -> float:
        """One call for the next `count` tokens of each row; rows whose tokens are all cached then get another one.

        Returns the seconds that it took.
        """
        started = time.monotonic()
        for row in (self._rows[i] for i in rows):
            if row.request is None:  # padding is written behind its tokens, and there must be room for it
                del row.cached[self.decoder.capacity - 1 :]
        past = [len(self._rows[i].cached) for i in rows]
        ids = np.zeros((len(rows), max(counts)), np.int64)
        for line, i, start, count in zip(ids, rows, past, counts, strict=True):
            if (request := self._rows[i].request) is not None:
                line[:count] = request.ids[start : start + count]
        logits = self.decoder.run(rows[0], ids, np.array(past), np.array(counts))  # [rows, vocab]
        for line, i, count, of_row in zip(ids, rows, counts, logits, strict=True):
            self._rows[i].cached += line[:count].tolist()
            if count and self._rows[i].pending == 0:
                self._sample(i, of_row)
        return time.monotonic() - started

    def _sample(self, i: int, logits: np.ndarray) -> None:
        """Choose a row's next token and report it; where it was the last, the row is free.

        Whatever goes wrong with a request ends it alone: the others of this step go on.
        """
        row, request = self._rows[i], self._rows[i].request
        assert request is not None
        try:
            token = request.sampler(logits)
            request.ids.append(token)
            text = "" if token in request.ends else request.text.push(token)
            generated, reason = len(request.ids) - request.prompt, None
            if token in request.ends or request.text.stopped:
                reason = "stop"
            elif generated == request.sampling.max_tokens or len(row.cached) == self.decoder.capacity:
                reason = "length"
            if reason is not None:
                text += request.text.finish()
                reason = "stop" if request.text.stopped else reason
                row.request = None
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in the library tokenizers is no Exception
            self.decoder.clear(i)  # of NaN, which would outlive the request
            row.cached, row.request = [], None
            why = str(error) if isinstance(error, AwqTrtError) else f"{type(error).__name__}: {error}"
            self._events.append(Event(request.id, finish_reason="error", error=why))
        else:
            self._events.append(Event(request.id, (token,), text, reason))


def _rest_of(text: TextStream) -> str:
    """What is left of a text that ends now; nothing where the tokenizer fails."""
    try:
        return text.finish()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # see `_sample`
        return ""
