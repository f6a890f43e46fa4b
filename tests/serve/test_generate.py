"""`generate` and its prompts; and real files in ONNX Runtime against transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import tokenizer_kinds
import torch
from decoders import EOS, FakeDecoder, continuation, eager, greedy, prompt_of

import awq_trt
from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.quantize import quantize
from awq_trt.checkpoint.directory import load_tokenizer
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.errors import AwqTrtError
from awq_trt.export.export import DecoderOptions, export_onnx
from awq_trt.serve.generate import encode, generate, open_tokenizer
from awq_trt.serve.open import open_decoder
from awq_trt.serve.sampling import Sampling

TOKENIZER = tiny_models.tokenizer()


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


@pytest.mark.parametrize("prefix", ["\N{NO-BREAK SPACE}", "\N{NO-BREAK SPACE}" * 3])
def test_a_tokenizer_that_makes_the_library_panic(
    tmp_path: Path, prefix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is cut off from a merge ends inside a character, or beyond it: a stack trace, or the end of the process."""
    tokenizer = tokenizer_kinds.byte_fallback(strip=True)
    tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["continuing_subword_prefix"] = prefix
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(AwqTrtError, match=r"tokenizer\.json: the tokenizer could not be loaded: the process .* index"):
        load_tokenizer(tmp_path)
    assert "panicked" not in capfd.readouterr().err


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
