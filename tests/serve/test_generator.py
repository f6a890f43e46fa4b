"""Continuous batching: whatever happens beside it, every request gets what it would get alone.

Most tests run on FakeDecoder, whose cache holds the tokens themselves; the last ones on real files in ONNX Runtime.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from decoders import VOCABULARY, FakeDecoder, continuation, eager, greedy
from hypothesis import given, settings
from hypothesis import strategies as st

import awq_trt
from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.quantize import quantize
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.errors import AwqTrtError
from awq_trt.export.export import DecoderOptions, export_onnx
from awq_trt.serve.generate import encode, generate, open_tokenizer
from awq_trt.serve.generator import SHARED_PREFILL, Event, Generator
from awq_trt.serve.open import open_decoder
from awq_trt.serve.sampling import Sampling

TOKENIZER = tiny_models.tokenizer()
EOS = frozenset([0])
MOST_STEPS = 1000
"""More than any of these tests needs."""


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([length, seed]).integers(1, VOCABULARY, length).tolist()


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


def test_more_requests_than_rows_are_first_come_first_served() -> None:
    generator = Generator(FakeDecoder(max_batch=2), TOKENIZER)
    ids = [generator.add(prompt_of(3, i), Sampling(max_tokens=4, ignore_eos=True)) for i in range(5)]
    generator.step()
    assert (generator.active, generator.waiting) == (2, 3)
    ended = [e.id for _ in range(40) for e in generator.step() if e.finish_reason]
    assert ended == ids
    assert not generator.busy


def test_a_row_is_given_on_while_others_decode() -> None:
    decoder = FakeDecoder(max_batch=2)
    generator = Generator(decoder, TOKENIZER)
    long = generator.add(prompt_of(4), Sampling(max_tokens=30, ignore_eos=True))
    short = generator.add(prompt_of(5), Sampling(max_tokens=2, ignore_eos=True))
    later = generator.add(prompt_of(6), Sampling(max_tokens=2, ignore_eos=True))
    ended = [e.id for _ in range(40) for e in generator.step() if e.finish_reason]
    assert ended == [short, later, long]


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
    decoder = FakeDecoder(max_batch=2, capacity=32, chunk=32)
    generator = Generator(decoder, TOKENIZER)
    prompt = prompt_of(24)
    generator.add(prompt, Sampling(max_tokens=1))
    drain(generator)
    both = [[*prompt, *prompt_of(6)], prompt_of(10, seed=5)]
    generator.add(both[0], Sampling(max_tokens=1))
    generator.add(both[1], Sampling(max_tokens=1))
    for (request, events), ids in zip(drain(generator).items(), both, strict=True):
        check(decoder, events, ids, Sampling(max_tokens=1))
        assert request in (1, 2)


@pytest.mark.parametrize("length", [1, 20, 31])
def test_the_end_of_the_cache(length: int) -> None:
    decoder = FakeDecoder(max_batch=2, capacity=32)
    generator = Generator(decoder, TOKENIZER)
    sampling = Sampling(max_tokens=None, ignore_eos=True)
    generator.add(prompt_of(length), sampling)
    (events,) = drain(generator).values()
    assert len(tokens_of(events)) == 32 - length + 1  # the last one need not be cached
    check(decoder, events, prompt_of(length), sampling)
    generator.add(prompt_of(3), sampling)  # beside a row that is full
    generator.add(prompt_of(4), sampling)
    for request, events in drain(generator).items():
        check(decoder, events, prompt_of(request + 2), sampling)


def test_a_full_row_among_those_that_decode() -> None:
    """It takes part in their calls, which must not write behind its end."""
    decoder = FakeDecoder(max_batch=3, capacity=32, chunk=32)
    generator = Generator(decoder, TOKENIZER)
    sampling = Sampling(max_tokens=20, ignore_eos=True)
    prompts = [prompt_of(4), prompt_of(31), prompt_of(5)]
    for prompt in prompts:
        generator.add(prompt, sampling)
    found = drain(generator)
    for i, prompt in enumerate(prompts):
        check(decoder, found[i], prompt, sampling)
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
    first, second = (generator.add(prompt_of(3), Sampling(max_tokens=30, ignore_eos=True)) for _ in range(2))
    generator.step()
    assert generator.cancel(second)  # waits
    assert generator.cancel(first)  # runs
    assert not generator.cancel(first)
    assert not generator.cancel(99)
    assert generator.busy
    ended = {e.id: e.finish_reason for e in generator.step()}
    assert ended == {first: "cancelled", second: "cancelled"}
    assert not generator.busy
    assert generator.step() == []


def test_a_row_of_nan_ends_alone_and_is_cleaned() -> None:
    decoder = FakeDecoder(max_batch=2)
    generator = Generator(decoder, TOKENIZER)
    sampling = Sampling(max_tokens=8, ignore_eos=True)
    decoder.broken.add(0)
    for i in range(3):
        generator.add(prompt_of(5, i), sampling)
    found = drain(generator)
    assert found[0][-1].finish_reason == "error"
    assert "bfloat16" in str(found[0][-1].error)
    assert tokens_of(found[0]) == []
    for i in (1, 2):
        check(decoder, found[i], prompt_of(5, i), sampling)


@pytest.mark.parametrize("window", [None, 4])
def test_the_next_turn_goes_on_from_the_cache(window: int | None) -> None:
    """Not where a layer has a window, whose ring has lost the tokens before."""
    decoder = FakeDecoder(max_batch=3, window=window)
    generator = Generator(decoder, TOKENIZER)
    sampling = Sampling(max_tokens=6, ignore_eos=True)
    other, prompt = prompt_of(9, 7), prompt_of(20)
    generator.add(other, sampling)
    generator.add(prompt, sampling)
    found = drain(generator)
    history = [*prompt, *tokens_of(found[1])]
    generator.speed.prompt_tokens = 0
    follow = [*history, *prompt_of(4, 3)]
    again = generator.add(follow, sampling)
    check(decoder, drain(generator)[again], follow, sampling)
    computed = generator.speed.prompt_tokens
    assert computed == (len(follow) if window else len(follow) - len(history) + 1)  # the last token was not cached
    changed = [*follow[:10], VOCABULARY - 1, *follow[11:]]  # another conversation from there on
    again = generator.add(changed, sampling)
    check(decoder, drain(generator)[again], changed, sampling)
    again = generator.add(changed, sampling)  # the very same prompt
    check(decoder, drain(generator)[again], changed, sampling)


def test_a_cached_beginning_survives_the_decoding_of_others() -> None:
    decoder = FakeDecoder(max_batch=4, widen=True)
    generator = Generator(decoder, TOKENIZER)
    sampling = Sampling(max_tokens=5, ignore_eos=True)
    prompts = [prompt_of(10, i) for i in range(4)]
    for prompt in prompts:
        generator.add(prompt, sampling)
    drain(generator)
    generator.add([*prompts[2], 5], Sampling(max_tokens=20, ignore_eos=True))  # widened to row 3, past rows 0 and 1
    drain(generator)
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


def test_kinds_of_prompts() -> None:
    tokenizer = tiny_models.tokenizer()
    assert encode(tokenizer, "some text") == tokenizer("some text")["input_ids"]
    assert encode(tokenizer, [3, np.int64(4)]) == [3, 4]  # type: ignore[list-item]
    chat = [{"role": "user", "content": "hi"}]
    with pytest.raises(AwqTrtError, match="no chat template"):
        encode(tokenizer, chat)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert tokenizer.decode(encode(tokenizer, chat)) == "<user>hi<assistant>"
    with pytest.raises(AwqTrtError, match="no such role"):
        encode(tokenizer, [{"role": "bad", "content": ""}])
    for bad in ("ab\ud800", [{"role": "user", "content": "ab\ud800"}]):
        with pytest.raises(AwqTrtError, match="is not Unicode"):
            encode(tokenizer, bad)  # type: ignore[arg-type]
    with pytest.raises(AwqTrtError, match="not .*'a'"):
        encode(tokenizer, ["a", "b"])  # type: ignore[list-item]


def test_generate() -> None:
    """One result per prompt, in their order; streamed pieces are the text; settings for all or for each."""
    prompts = [prompt_of(length) for length in (3, 17, 1, 9, 9)]
    pieces = [""] * 5

    def stream(number: int, piece: str) -> None:
        pieces[number] += piece

    decoder = FakeDecoder(max_batch=2)
    settings = [Sampling(max_tokens=i + 3, temperature=1, seed=i) for i in range(5)]
    found = generate(decoder, prompts, settings, tokenizer=TOKENIZER, stream=stream)
    for prompt, sampling, got in zip(prompts, settings, found, strict=True):
        tokens, reason = continuation(prompt, sampling, EOS, 64)
        assert (list(got.token_ids), got.finish_reason, got.prompt_tokens) == (tokens, reason, len(prompt))
        text = TOKENIZER.decode(tokens[:-1] if reason == "stop" else tokens)
        assert got.text == text.rstrip("\N{REPLACEMENT CHARACTER}")
    assert pieces == [got.text for got in found]
    assert generate(decoder, [], tokenizer=TOKENIZER) == []
    assert generate(decoder, [prompts[0]], Sampling(max_tokens=4), tokenizer=TOKENIZER) == generate(
        decoder, [prompts[0]], [Sampling(max_tokens=4)], tokenizer=TOKENIZER
    )
    with pytest.raises(AwqTrtError, match="5 prompts, but 2 settings"):
        generate(decoder, prompts, settings[:2], tokenizer=TOKENIZER)
    decoder.broken.add(0)
    with pytest.raises(AwqTrtError, match="prompt 0: the output is NaN"):
        generate(decoder, prompts, tokenizer=TOKENIZER)


def test_tokenizers(tmp_path: Path) -> None:
    decoder = FakeDecoder()
    with pytest.raises(AwqTrtError, match="names no tokenizer"):
        open_tokenizer(decoder)
    decoder.path, decoder.facts["tokenizer"] = tmp_path / "m.onnx", "there"
    with pytest.raises(AwqTrtError, match="there: no such directory"):
        open_tokenizer(decoder)
    (tmp_path / "there").mkdir()
    with pytest.raises(AwqTrtError, match="could not be loaded"):
        open_tokenizer(decoder)
    TOKENIZER.save_pretrained(tmp_path / "there")
    assert open_tokenizer(decoder).get_vocab() == TOKENIZER.get_vocab()
    assert open_tokenizer(decoder, tmp_path / "there").get_vocab() == TOKENIZER.get_vocab()


# A real file: a tiny Llama in bfloat16 with a cache of 96 tokens, prefilled 16 at a time.

PROMPTS = ["Once upon a time", "The", "It was the best of times, it was the worst of times, it was", "Why? " * 9]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with llama.awq and llama.onnx."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.llama(folder / "llama", initializer_range=0.2)  # with less, it says one word over and over
    checkpoint = replace(open_checkpoint(folder / "llama"), dtype=torch.bfloat16)
    quantize(checkpoint, folder / "llama.awq", QuantizeConfig(method="rtn", group_size=32))
    sizes = DecoderOptions(capacity=96, prefill_chunk=16)
    export_onnx(folder / "llama.awq", folder / "llama.onnx", decoder=sizes)
    return folder


def test_a_ragged_batch_equals_transformers(llama: Path) -> None:
    """Greedy tokens of the eager model in fp32; in one batch, and one after the other in one row."""
    model, tokenizer = eager(llama / "llama.awq"), tiny_models.tokenizer()
    sampling = Sampling(max_tokens=40, ignore_eos=True)
    together = awq_trt.generate(llama / "llama.onnx", PROMPTS, sampling, max_batch=4, threads=1)
    alone = awq_trt.generate(llama / "llama.onnx", PROMPTS, sampling, max_batch=1, threads=1)
    for prompt, one, other in zip(PROMPTS, together, alone, strict=True):
        expected = greedy(model, tokenizer(prompt)["input_ids"], 40)
        assert list(one.token_ids) == expected
        assert list(other.token_ids) == expected
        assert len(set(expected)) > 5
    assert max(one.prompt_tokens for one in together) > 32  # more than two chunks


def test_a_prompt_in_parts_equals_the_whole(llama: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 384, 45)
    with torch.inference_mode():
        expected = eager(llama / "llama.awq")(torch.from_numpy(ids)[None]).logits[0, -1].numpy()
    with open_decoder(llama / "llama.onnx", threads=1) as decoder:
        assert decoder.facts["dtype"] == "bfloat16"
        for row, parts in enumerate(([16, 16, 13], [1] * 45, [7, 9, 3, 13, 13])):
            for start, part in zip(np.cumsum([0, *parts]), parts, strict=False):
                logits = decoder.run(row, ids[None, start : start + part], np.array([start]), np.array([part]))
            np.testing.assert_allclose(logits[0], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_sampled_text_does_not_depend_on_the_batch(llama: Path) -> None:
    settings = [Sampling(max_tokens=20, temperature=1.0, top_p=0.9, seed=i) for i in range(4)]
    with open_decoder(llama / "llama.onnx", threads=1) as decoder:
        together = generate(decoder, PROMPTS, settings)
        alone = [generate(decoder, [prompt], one)[0] for prompt, one in zip(PROMPTS, settings, strict=True)]
    assert together == alone
    assert len({one.text for one in together}) == 4
