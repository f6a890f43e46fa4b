"""Decoders for tests: one whose cache holds tokens, which shows every mistake, and the eager model of a real one."""

from __future__ import annotations

import string
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

from awq_trt.checkpoint.quantized import open_quantized
from awq_trt.serve.decoder import Decoder
from awq_trt.serve.sampling import Sampler, Sampling

VOCABULARY = 61
EOS = frozenset([0])


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Random token ids, none of them EOS."""
    return np.random.default_rng([length, seed]).integers(1, VOCABULARY, length).tolist()


def logits_of(tokens: np.ndarray) -> np.ndarray:
    """Logits that depend on every token before, and on their order."""
    random = np.random.default_rng(zlib.crc32(tokens.astype(np.int32).tobytes()))
    return (random.standard_normal(VOCABULARY) * 3).astype(np.float32)


def continuation(
    prompt: list[int], sampling: Sampling, ends: frozenset[int], capacity: int, window: int | None = None
) -> tuple[list[int], str]:
    """What FakeDecoder must generate, one request alone: (tokens, finish_reason)."""
    sampler, ids = Sampler(sampling, prompt, VOCABULARY), list(prompt)
    while True:
        ids.append(sampler(logits_of(np.array(ids[-window:] if window else ids))))
        tokens = ids[len(prompt) :]
        if ids[-1] in ends and not sampling.ignore_eos:
            return tokens, "stop"
        if len(tokens) == sampling.max_tokens or len(ids) > capacity:
            return tokens, "length"


class FakeDecoder(Decoder):
    """Its cache holds the tokens themselves, and logits are a hash of those in a row, or of its window's.

    With a window the cache is a ring, as kv_cache.py has it: slot j is that of the positions j, j + ring and so on; a
    call writes straight on from the slot of its first token; behind the ring is room for a chunk of padding.

    `calls` are (row, new tokens with padding, past_length, input_length). Rows in `broken` give NaN.
    """

    def __init__(
        self, max_batch: int = 3, capacity: int = 64, chunk: int = 8, window: int | None = None, widen: bool = False
    ) -> None:
        self.window = window
        self.ring = capacity if window is None else (-(-window // chunk) + 1) * chunk
        slots = min(capacity, self.ring + chunk)
        self.ring = capacity if slots == capacity else self.ring
        layer = {"kv_heads": 1, "head_dim": 1, "value_head_dim": 1, "slots": slots, "window": window}
        cache = {"kind": "fixed", "capacity": capacity, "prefill_chunk": chunk, "dtype": "float16", "layers": [layer]}
        generation = {"eos_token_id": [0], "bos_token_id": None, "pad_token_id": None}
        facts = {"kv_cache": cache, "vocab_size": VOCABULARY, "generation": generation, "logits": "last"}
        super().__init__(Path("fake.onnx"), facts, max_batch)
        self.cache = np.zeros((max_batch, slots), np.int64)
        self.calls: list[tuple[int, int, list[int], list[int]]] = []
        self.broken: set[int] = set()
        self.widen = widen

    def decode_rows(self, first: int, last: int) -> tuple[int, int]:
        return (0, min(self.max_batch, 1 << last.bit_length())) if self.widen else super().decode_rows(first, last)

    def _run(self, row: int, ids: np.ndarray, past: np.ndarray, new: np.ndarray) -> np.ndarray:
        self.calls.append((row, ids.shape[1], past.tolist(), new.tolist()))
        logits = np.full((len(ids), self.vocab_size), np.nan, np.float32)
        for i, (line, start, count) in enumerate(zip(ids, past, new, strict=True)):
            at = start % self.ring
            assert at + len(line) <= self.cache.shape[1]
            self.cache[row + i, at : at + len(line)] = line  # padding is written too
            if count and row + i not in self.broken:
                end = start + count
                positions = np.arange(max(0, end - self.window) if self.window else 0, end)
                logits[i] = logits_of(self.cache[row + i, positions % self.ring])
        return logits

    def clear(self, row: int) -> None:
        self.cache[row] = 0
        self.broken.discard(row)

    def close(self) -> None:
        pass


def eager(awq_dir: Path) -> transformers.PreTrainedModel:
    """The model of a quantized checkpoint in fp32, with the weights (q - zero) * scale."""
    source = open_quantized(awq_dir)
    model = transformers.AutoModelForCausalLM.from_config(source.config, attn_implementation="eager").float().eval()
    weights: dict[str, Any] = {name: source.tensor(name).float() for name, _ in model.named_parameters()}
    for name, linear in source.linears.items():
        exact = replace(linear, scales=linear.scales.float())
        weights[f"{name}.weight"] = exact.dequantize()
        if linear.pre_scale is not None:
            weights[f"{name}.weight"] *= linear.pre_scale.float()
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model


@torch.inference_mode()
def greedy(model: transformers.PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    """Greedy tokens by transformers, with its own cache, end-of-sequence tokens ignored."""
    ids = torch.tensor([prompt])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                           do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip
    return found[0, len(prompt) :].tolist()


def letters() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of 64 characters, one token each, with a chat template."""
    characters = "\n :?" + string.ascii_lowercase + string.digits + string.ascii_uppercase[:24]
    vocabulary = {character: i for i, character in enumerate(characters)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    words.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    return tokenizer


def call(decoder: Any, row: int, ids: list[list[int]], past: list[int], new: list[int]) -> np.ndarray:
    """`Decoder.run` with lists."""
    return decoder.run(row, np.array(ids), np.array(past), np.array(new))
