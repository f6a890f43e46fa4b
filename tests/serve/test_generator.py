"""Continuous batching: whatever happens beside it, every request gets what it would get alone.

They run on FakeDecoder, whose cache holds the tokens themselves; test_generate.py has real files.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
from decoders import EOS, VOCABULARY, FakeDecoder, continuation, prompt_of
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_trt.errors import AwqTrtError
from awq_trt.serve.generator import SHARED_PREFILL, Event, Generator
from awq_trt.serve.sampling import Sampling

TOKENIZER = tiny_models.tokenizer()
MOST_STEPS = 1000  # more than any of these tests needs


def drain(generator: Generator) -> dict[int, list[Event]]:
    """Step until all is done; events by request."""
    found: dict[int, list[Event]] = {}
    for _ in range(MOST_STEPS):
        for event in generator.step():
            found.setdefault(event.id, []).append(event)
        if not generator.busy:
            return found
    raise AssertionError("there is no end")


def tokens_of(events: list[Event]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def check(decoder: FakeDecoder, events: list[Event], prompt: list[int], sampling: Sampling) -> None:
    """The request had the tokens that it has alone; exactly its last event says why it ended."""
    tokens, reason = continuation(prompt, sampling, EOS, decoder.capacity, decoder.window)
    assert tokens_of(events) == tokens
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + [reason]


def check_all(generator: Generator, prompts: list[list[int]], sampling: Sampling) -> list[list[Event]]:
    """Run prompts together: each has what it has alone. The events of each."""
    requests = [generator.add(prompt, sampling) for prompt in prompts]
    found = drain(generator)
    for request, prompt in zip(requests, prompts, strict=True):
        check(generator.decoder, found[request], prompt, sampling)  # type: ignore[arg-type]
    return [found[request] for request in requests]


requests = st.lists(
    st.tuples(
        st.integers(1, 40),  # length of the prompt
        st.integers(0, 6),  # steps before the next request comes
        st.builds(
            Sampling,
            max_tokens=st.one_of(st.none(), st.integers(1, 12)),
            temperature=st.sampled_from([0.0, 1.0]),
            repetition_penalty=st.sampled_from([1.0, 1.2]),
            seed=st.integers(0, 9),
        ),
        st.one_of(st.none(), st.integers(0, 8)),  # steps after which it is cancelled
    ),
    min_size=1,
    max_size=8,
)


@given(plan=requests, rows=st.integers(1, 5), chunk=st.sampled_from([4, 8, 48]), widen=st.booleans(), data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_schedule(plan: list[Any], rows: int, chunk: int, widen: bool, data: st.DataObject) -> None:
    """Requests come and go at any time; FakeDecoder checks the rules of every call, `check` every token."""
    window = data.draw(st.sampled_from([None, 4, 8]))
    decoder = FakeDecoder(max_batch=rows, capacity=48, chunk=chunk, window=window, widen=widen)
    generator = Generator(decoder, TOKENIZER)
    found: dict[int, list[Event]] = {}
    prompts, cancels, step = {}, {}, 0

    def advance() -> None:
        nonlocal step
        for request in [r for r, at in cancels.items() if at == step]:
            generator.cancel(request)
        for event in generator.step():
            found.setdefault(event.id, []).append(event)
        step += 1
        assert generator.active <= rows
        assert step < MOST_STEPS

    for length, pause, sampling, cancel in plan:
        prompt = prompt_of(length, seed=length % 3)
        request = generator.add(prompt, sampling)
        prompts[request] = (prompt, sampling)
        if cancel is not None:
            cancels[request] = step + cancel
        for _ in range(pause):
            advance()
    while generator.busy:
        advance()
    for request, (prompt, sampling) in prompts.items():
        events = found[request]
        if events[-1].finish_reason == "cancelled":
            alone, _ = continuation(prompt, sampling, EOS, 48, window)
            assert tokens_of(events) == alone[: len(tokens_of(events))]
            assert request in cancels
        else:
            check(decoder, events, prompt, sampling)
    assert (generator.active, generator.waiting) == (0, 0)


def test_first_come_first_served_and_rows_are_given_on() -> None:
    def order(*most: int) -> list[int]:
        generator = Generator(FakeDecoder(max_batch=2), TOKENIZER)
        for i, tokens in enumerate(most):
            generator.add(prompt_of(3, i), Sampling(max_tokens=tokens, ignore_eos=True))
        assert generator.waiting == len(most)
        ended = [e.id for e in generator.step() if e.finish_reason]
        assert (generator.active, generator.waiting) == (2, len(most) - 2)
        ended += [e.id for _ in range(40) for e in generator.step() if e.finish_reason]
        assert not generator.busy
        return ended

    assert order(4, 4, 4, 4, 4) == [0, 1, 2, 3, 4]
    assert order(30, 2, 2) == [1, 2, 0]  # while others decode


def test_a_long_prompt_does_not_stop_those_who_decode() -> None:
    decoder = FakeDecoder(max_batch=2, capacity=2048, chunk=1024)
    generator = Generator(decoder, TOKENIZER)
    generator.add(prompt_of(2), Sampling(max_tokens=None, ignore_eos=True))
    generator.step()
    generator.add(prompt_of(1500), Sampling(max_tokens=1))
    decoder.calls.clear()
    for _ in range(7):
        tokens = tokens_of([e for e in generator.step() if e.id == 0])
        assert len(tokens) == 1  # one in every step, whatever the other does
    widths = [s for _, s, _, _ in decoder.calls if s > 1]
    assert sum(widths) == 1500
    assert max(widths) == SHARED_PREFILL
    assert [s for _, s, _, _ in decoder.calls][:4] == [1, SHARED_PREFILL, 1, SHARED_PREFILL]


def test_prompts_of_similar_length_share_a_prefill_call() -> None:
    def first_call(lengths: list[int], chunk: int = 64) -> tuple[int, int, list[int]]:
        decoder = FakeDecoder(max_batch=8, capacity=256, chunk=chunk)
        generator = Generator(decoder, TOKENIZER)
        for i, length in enumerate(lengths):
            generator.add(prompt_of(length, i), Sampling(max_tokens=1))
        generator.step()
        row, width, _, counts = decoder.calls[0]
        return row, width, counts

    assert first_call([10, 9, 11]) == (0, 11, [10, 9, 11])
    assert first_call([4, 30, 3]) == (0, 4, [4])  # with the second, more than a third would be padding
    assert first_call([30, 20, 3]) == (0, 30, [30, 20])
    assert first_call([30, 30, 30]) == (0, 30, [30, 30])  # in all no more than a chunk
    assert first_call([200, 20]) == (0, 64, [64])


def test_padding_stays_within_the_cache() -> None:
    """A row near its end cannot take part in a wider call."""
    generator = Generator(FakeDecoder(max_batch=2, capacity=32, chunk=32), TOKENIZER)
    prompt = prompt_of(24)
    check_all(generator, [prompt], Sampling(max_tokens=1))
    check_all(generator, [[*prompt, *prompt_of(6)], prompt_of(10, seed=5)], Sampling(max_tokens=1))


@pytest.mark.parametrize("length", [1, 20, 31])
def test_the_end_of_the_cache(length: int) -> None:
    generator = Generator(FakeDecoder(max_batch=2, capacity=32), TOKENIZER)
    sampling = Sampling(max_tokens=None, ignore_eos=True)
    (events,) = check_all(generator, [prompt_of(length)], sampling)
    assert len(tokens_of(events)) == 32 - length + 1  # the last one need not be cached
    check_all(generator, [prompt_of(3), prompt_of(4)], sampling)  # beside a row that is full


def test_a_full_row_among_those_that_decode() -> None:
    """It takes part in their calls, which must not write behind its end."""
    decoder = FakeDecoder(max_batch=3, capacity=32, chunk=32)
    prompts = [prompt_of(4), prompt_of(31), prompt_of(5)]
    found = check_all(Generator(decoder, TOKENIZER), prompts, Sampling(max_tokens=20, ignore_eos=True))
    assert len(found[1]) == 2
    assert any(past[1:2] == [31] and new == [1, 0, 1] for _, _, past, new in decoder.calls)


def test_end_of_sequence_tokens() -> None:
    """Of the model, of the tokenizer, and special tokens named as stop strings."""
    prompt = prompt_of(5)
    tokens, _ = continuation(prompt, Sampling(max_tokens=12), frozenset(), 64)
    at = next(i for i in range(2, 12) if tokens[i] not in tokens[:i])

    def run(**changes: Any) -> list[Event]:
        decoder = FakeDecoder()
        decoder.facts["generation"]["eos_token_id"] = changes.pop("model", [])
        tokenizer = tiny_models.tokenizer()
        if "tokenizer" in changes:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(changes.pop("tokenizer"))
        generator = Generator(decoder, tokenizer)
        generator.add(prompt, Sampling(max_tokens=12, **changes))
        return drain(generator)[0]

    for changes in ({"model": [0, tokens[at]]}, {"tokenizer": tokens[at]}):
        events = run(**changes)
        assert tokens_of(events) == tokens[: at + 1]
        assert events[-1].finish_reason == "stop"
        assert "".join(e.text for e in events) == TOKENIZER.decode(tokens[:at])
        assert tokens_of(run(**changes, ignore_eos=True)) == tokens
    assert len(tokens_of(run())) == 12

    special = tiny_models.tokenizer()
    special.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    special.convert_tokens_to_ids = None
    generator = Generator(FakeDecoder(), special)
    special.get_added_vocab = lambda: {"<|end|>": tokens[at]}
    generator.add(prompt, Sampling(max_tokens=12, stop=("<|end|>",), ignore_eos=True))
    assert tokens_of(drain(generator)[0]) == tokens[: at + 1]


def test_stop_strings_across_tokens() -> None:
    prompt = prompt_of(5)
    tokens, _ = continuation(prompt, Sampling(max_tokens=20), frozenset(), 64)
    text = TOKENIZER.decode(tokens)
    stop = text[6:9]
    generator = Generator(FakeDecoder(), TOKENIZER)
    generator.add(prompt, Sampling(max_tokens=20, stop=(stop,), ignore_eos=True))
    events = drain(generator)[0]
    assert "".join(e.text for e in events) == text[: text.index(stop)]
    assert events[-1].finish_reason == "stop"
    assert len(tokens_of(events)) < 20
    whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
    for reason, most in (("length", 20), ("cancelled", 30)):  # what was held back is said at the end
        sampling = Sampling(max_tokens=most, stop=(whole[-3:] + "and more",), ignore_eos=True)
        request = generator.add(prompt, sampling)
        events = [event for _ in range(20) for event in generator.step()]
        assert generator.cancel(request) == (reason == "cancelled")
        events += generator.step()
        assert "".join(e.text for e in events) == whole
        assert events[-1].finish_reason == reason


def test_cancel() -> None:
    generator = Generator(FakeDecoder(max_batch=1), TOKENIZER)
    sampling = Sampling(max_tokens=30, ignore_eos=True)
    first, second = generator.add(prompt_of(3), sampling, id=7), generator.add(prompt_of(3), sampling)
    assert (first, second) == (7, 8)
    generator.step()
    # one waits, one runs, then it has ended
    assert [generator.cancel(id) for id in (second, first, first, 99)] == [True, True, False, False]
    assert generator.busy
    ended = {e.id: e.finish_reason for e in generator.step()}
    assert ended == {first: "cancelled", second: "cancelled"}
    assert not generator.busy
    assert generator.step() == []


def test_a_row_of_nan_ends_alone_and_is_cleaned() -> None:
    decoder, sampling = FakeDecoder(max_batch=2), Sampling(max_tokens=8, ignore_eos=True)
    generator = Generator(decoder, TOKENIZER)
    decoder.broken.add(0)
    for i in range(3):
        generator.add(prompt_of(5, i), sampling)
    found = drain(generator)
    assert found[0][-1].finish_reason == "error"
    assert "bfloat16" in str(found[0][-1].error)
    assert tokens_of(found[0]) == []
    for i in (1, 2):
        check(decoder, found[i], prompt_of(5, i), sampling)


class Panic(BaseException):
    """As the library `tokenizers` raises, which is written in Rust."""


@pytest.mark.parametrize("part", ["sampler", "text"])
@pytest.mark.parametrize("error", [IndexError("out of range"), RecursionError("too deep"), Panic("a bug")])
def test_an_error_in_one_request_ends_it_alone(part: str, error: BaseException) -> None:
    decoder, sampling = FakeDecoder(max_batch=3), Sampling(max_tokens=8, ignore_eos=True)
    generator = Generator(decoder, TOKENIZER)

    def fail(*_: object) -> None:
        raise error

    for i in range(4):
        generator.add(prompt_of(5, i), sampling)
    request = generator._queue[1]
    if part == "sampler":
        request.sampler = fail  # type: ignore[assignment]
    else:
        request.text.push = fail  # type: ignore[assignment,method-assign]
    found = drain(generator)
    assert [(e.finish_reason, e.error) for e in found[1]] == [("error", f"{type(error).__name__}: {error}")]
    for i in (0, 2, 3):
        check(decoder, found[i], prompt_of(5, i), sampling)
    assert (generator.active, generator.waiting) == (0, 0)
    check_all(generator, [prompt_of(5, 1)], sampling)
    cancelled = generator.add(prompt_of(5), sampling)
    generator._queue[0].text.finish = fail  # type: ignore[method-assign]
    generator.step()
    assert generator.cancel(cancelled)
    assert [(e.id, e.finish_reason) for e in generator.step()] == [(cancelled, "cancelled")]


@pytest.mark.parametrize("window", [None, 4])
def test_the_next_turn_goes_on_from_the_cache(window: int | None) -> None:
    """Not where a layer has a window, whose ring has lost the tokens before."""
    generator = Generator(FakeDecoder(max_batch=3, window=window), TOKENIZER)
    sampling = Sampling(max_tokens=6, ignore_eos=True)
    prompt = prompt_of(20)
    found = check_all(generator, [prompt_of(9, 7), prompt], sampling)
    history = [*prompt, *tokens_of(found[1])]
    generator.speed.prompt_tokens = 0
    follow = [*history, *prompt_of(4, 3)]
    check_all(generator, [follow], sampling)
    computed = generator.speed.prompt_tokens
    assert computed == (len(follow) if window else len(follow) - len(history) + 1)  # the last token was not cached
    changed = [*follow[:10], VOCABULARY - 1, *follow[11:]]  # another conversation from there on
    for _ in range(2):  # the second is the very same prompt
        check_all(generator, [changed], sampling)


def test_a_cached_beginning_survives_the_decoding_of_others() -> None:
    decoder = FakeDecoder(max_batch=4, widen=True)
    generator = Generator(decoder, TOKENIZER)
    prompts = [prompt_of(10, i) for i in range(4)]
    check_all(generator, prompts, Sampling(max_tokens=5, ignore_eos=True))
    # widened to row 3, past rows 0 and 1
    check_all(generator, [[*prompts[2], 5]], Sampling(max_tokens=20, ignore_eos=True))
    for row, prompt in enumerate(prompts):
        assert decoder.cache[row, : len(prompt)].tolist() == prompt


def test_prompts_that_cannot_be_run() -> None:
    generator = Generator(FakeDecoder(capacity=32), TOKENIZER)
    with pytest.raises(AwqTrtError, match="no tokens"):
        generator.add([])
    with pytest.raises(AwqTrtError, match="32 tokens; .* for 32, so 31 is the most"):
        generator.add([1] * 32)
    for ids in ([VOCABULARY], [-1]):
        with pytest.raises(AwqTrtError, match=f"vocabulary of {VOCABULARY}"):
            generator.add(ids)
    assert not generator.busy
