"""Streamed text: whole characters only, nothing of a stop string, and all pieces together are the text."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizer_kinds
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from awq_trt.serve.text_stream import REPLACEMENT, TextStream

PROMPT = "Once upon a time, ça va 🙂"
BYTE_LEVEL = bytes_to_unicode()


TOKENIZERS = tokenizer_kinds.all_kinds()


def pieces_of(tokenizer: Any, prompt: list[int], tokens: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, prompt, stop)
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


def one_decode(tokenizer: Any, prompt: list[int], tokens: list[int]) -> str:
    """What the library `tokenizers` has after the prompt, without the incomplete character at the end."""
    before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + tokens))
    return whole[len(before.rstrip(REPLACEMENT)) :].rstrip(REPLACEMENT)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_pieces_are_one_decode_of_any_tokens(name: str, data: st.DataObject) -> None:
    """Bytes that are no UTF-8, characters begun in the prompt, special tokens between bytes."""
    tokenizer = TOKENIZERS[name]
    heads = "\xc3\xe2\xf0\x9f\x99\x82\xa9\xff"  # of characters of 2 to 4 bytes, their other bytes, and one that is none
    known = [tokenizer.convert_tokens_to_ids(t) for c in heads for t in (f"<0x{ord(c):02X}>", BYTE_LEVEL[ord(c)])]
    rare = [token for token in known if token not in (None, tokenizer.unk_token_id)] + list(tokenizer.all_special_ids)
    token = st.integers(0, len(tokenizer) - 1) | st.sampled_from(sorted(set(rare)))
    prompt, tokens = (data.draw(st.lists(token, max_size=most)) for most in (12, 30))
    assert "".join(pieces_of(tokenizer, prompt, tokens)) == one_decode(tokenizer, prompt, tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("🙂👩‍👩‍👧é日 \u0301"), max_size=40),
    at=st.floats(0, 1),
)
@settings(max_examples=80, deadline=None)
def test_pieces_are_the_text(name: str, text: str, at: float) -> None:
    """Wherever in it the prompt ends; whole characters only."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(PROMPT + text)["input_ids"]
    cut = round(at * len(ids))
    pieces = pieces_of(tokenizer, ids[:cut], ids[cut:])
    assert "".join(pieces) == one_decode(tokenizer, ids[:cut], ids[cut:])
    if REPLACEMENT not in tokenizer.decode(ids):
        assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_an_emoji_before_the_answer(name: str) -> None:
    """The last six tokens of the prompt begin inside the character."""
    tokenizer = TOKENIZERS[name]
    prompt, new = tokenizer("the 🙂🙂")["input_ids"], tokenizer("🙂 the")["input_ids"]
    assert "".join(pieces_of(tokenizer, prompt, new)).strip() == "🙂 the"


def test_a_character_comes_when_its_last_byte_does() -> None:
    tokenizer = TOKENIZERS["bytes"]
    tokens = tokenizer("a🙂b")["input_ids"]
    assert len(tokens) > 3
    pieces = pieces_of(tokenizer, [], tokens)
    assert [piece for piece in pieces if piece] == ["a", "🙂", "b"]


def test_a_space_after_the_prompt_stays() -> None:
    """Decoding the new tokens alone would lose it."""
    tokenizer = TOKENIZERS["llama"]
    prompt, new = tokenizer("the")["input_ids"], tokenizer("the")["input_ids"]
    assert tokenizer.decode(new) == "the"
    assert "".join(pieces_of(tokenizer, prompt, new)) == " the"


def test_half_a_character_at_the_end_is_left_out() -> None:
    tokenizer = TOKENIZERS["bytes"]
    assert "".join(pieces_of(tokenizer, [], tokenizer("ab🙂")["input_ids"][:-1])) == "ab"


def test_bytes_that_are_no_character_do_not_stop_the_text() -> None:
    tokenizer = TOKENIZERS["llama"]
    broken, good = tokenizer.convert_tokens_to_ids("<0xFF>"), tokenizer("the")["input_ids"]
    assert pieces_of(tokenizer, [], [broken, *good]) == ["", REPLACEMENT + " the", ""]
    assert "".join(pieces_of(tokenizer, [], [*[broken] * 200, *good])) == REPLACEMENT * 200 + " the"
    tokenizer = TOKENIZERS["bytes"]
    broken, good = tokenizer.convert_tokens_to_ids(BYTE_LEVEL[0xFF]), tokenizer("the")["input_ids"]
    assert "".join(pieces_of(tokenizer, [], [*[broken] * 200, *good])) == REPLACEMENT * 200 + "the"


@pytest.mark.parametrize("kind", ["<0xFF>", "special", "byte"])
def test_work_is_in_proportion_to_the_tokens(kind: str) -> None:
    """Also where no text ever comes of them."""
    tokenizer = TOKENIZERS["bytes" if kind == "byte" else "llama"]
    names = {"special": "</s>", "byte": BYTE_LEVEL[0xFF]}
    token, work, decode = tokenizer.convert_tokens_to_ids(names.get(kind, kind)), 0, tokenizer.decode

    class Counting:
        convert_ids_to_tokens = tokenizer.convert_ids_to_tokens

        def decode(self, ids: list[int], **options: Any) -> str:
            nonlocal work
            work += len(ids)
            return decode(ids, **options)

    pieces_of(Counting(), [], [token] * 4000)
    assert work < 40 * 4000


def test_special_tokens_have_no_text() -> None:
    tokenizer = TOKENIZERS["llama"]
    the = tokenizer("the")["input_ids"]
    tokens = [*the, tokenizer.eos_token_id, *the]
    assert "".join(pieces_of(tokenizer, the, tokens)) == " the the"


@given(
    text=st.text("ab🙂", max_size=60),
    stop=st.lists(
        st.text("ab", min_size=1, max_size=20) | st.text("ab🙂", min_size=1, max_size=5), min_size=1, max_size=4
    ),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings(text: str, stop: list[str]) -> None:
    """The first that is complete counts; of those that one token completes, the one that begins first."""
    tokenizer, expected = TOKENIZERS["bytes"], text
    tokens = tokenizer(text)["input_ids"]
    for n in range(len(tokens) + 1):
        so_far = tokenizer.decode(tokens[:n]).rstrip(REPLACEMENT)
        if ends := [so_far.find(s) for s in stop if s in so_far]:
            expected = so_far[: min(ends)]
            break
    assert "".join(pieces_of(tokenizer, [], tokens, tuple(stop))) == expected


def test_text_is_held_back_no_longer_than_needed() -> None:
    tokenizer = TOKENIZERS["bytes"]
    tokens = [tokenizer(letter)["input_ids"][0] for letter in "xSTOxSTOP"]
    stream = TextStream(tokenizer, [], ("STOP",))
    assert [stream.push(token) for token in tokens] == ["x", "", "", "", "STOx", "", "", "", ""]
    assert stream.stopped
    assert stream.finish() == ""
    stream = TextStream(tokenizer, [], ("STOP",))
    assert [stream.push(token) for token in tokens[:3]] == ["x", "", ""]
    assert stream.finish() == "ST"
