"""Streamed text: whole characters only, nothing of a stop string, and all pieces together are the text."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_trt.serve.text_stream import PATIENCE, REPLACEMENT, TextStream

PROMPT = "Once upon a time, ça va 🙂"


def sentencepiece() -> transformers.PreTrainedTokenizerFast:
    """Built like Llama 2's: words begin with "▁", the text loses its first space, unknown characters become bytes."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *letters, "▁a", "▁t", "he", "▁the"]
    merges = [("▁", "a"), ("▁", "t"), ("h", "e"), ("▁t", "he")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bpe = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    bpe.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    decoders = tokenizers.decoders
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"bytes": tiny_models.tokenizer(), "sentencepiece": sentencepiece()}


def pieces_of(tokenizer: Any, prompt: list[int], tokens: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, prompt, stop)
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT), max_size=40))
@settings(max_examples=150, deadline=None)
def test_pieces_are_the_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    prompt, whole = tokenizer(PROMPT)["input_ids"], tokenizer(PROMPT + text)["input_ids"]
    if whole[: len(prompt)] != prompt:  # the text changes how the prompt is cut into tokens
        prompt, whole = [], tokenizer(text)["input_ids"]
    start = tokenizer.decode(prompt)
    pieces = pieces_of(tokenizer, prompt, whole[len(prompt) :])
    assert "".join(pieces) == tokenizer.decode(whole)[len(start) :]
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_a_character_comes_when_its_last_byte_does() -> None:
    tokenizer = TOKENIZERS["bytes"]
    tokens = tokenizer("a🙂b")["input_ids"]
    assert len(tokens) > 3
    pieces = pieces_of(tokenizer, [], tokens)
    assert [piece for piece in pieces if piece] == ["a", "🙂", "b"]


def test_a_space_after_the_prompt_stays() -> None:
    """Decoding the new tokens alone would lose it."""
    tokenizer = TOKENIZERS["sentencepiece"]
    prompt, new = tokenizer("the")["input_ids"], tokenizer("the")["input_ids"]
    assert tokenizer.decode(new) == "the"
    assert "".join(pieces_of(tokenizer, prompt, new)) == " the"


def test_half_a_character_at_the_end_is_left_out() -> None:
    tokenizer = TOKENIZERS["bytes"]
    assert "".join(pieces_of(tokenizer, [], tokenizer("ab🙂")["input_ids"][:-1])) == "ab"


def test_bytes_that_are_no_character_do_not_stop_the_text() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    broken, good = tokenizer.convert_tokens_to_ids("<0xFF>"), tokenizer("the")["input_ids"]
    text = "".join(pieces_of(tokenizer, [], [broken, *good]))
    assert text == REPLACEMENT + " the"
    pieces = pieces_of(tokenizer, [], [broken] * (2 * PATIENCE))  # never becomes one: at some point it is said
    assert any(pieces)


def test_special_tokens_have_no_text() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    the = tokenizer("the")["input_ids"]
    tokens = [*the, tokenizer.eos_token_id, *the]
    assert "".join(pieces_of(tokenizer, the, tokens)) == " the the"


@given(
    text=st.text("ab🙂", max_size=30),
    stop=st.lists(st.text("ab🙂", min_size=1, max_size=5), min_size=1, max_size=3),
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
