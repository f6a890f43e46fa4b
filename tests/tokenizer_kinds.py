"""A small tokenizer of each kind that language models have, built with the library `tokenizers`."""

from __future__ import annotations

import string

import tiny_models
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers

SPECIAL = ("<unk>", "<s>", "</s>")
PIECES = ("▁", *string.ascii_lowercase, "▁a", "▁t", "he", "▁the", "日", "é", "\N{REPLACEMENT CHARACTER}")


def wrapped(tokenizer: tokenizers.Tokenizer, **options: object) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **options
    )


def byte_level() -> transformers.PreTrainedTokenizerFast:
    """GPT-2, Llama 3, Qwen: bytes as letters, with an end-of-sequence token."""
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    return tokenizer


def byte_fallback(strip: bool) -> transformers.PreTrainedTokenizerFast:
    """Llama 2 (the text loses its first space), or Gemma: unknown characters become bytes, "▁" is a space."""
    tokens = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *PIECES]
    merges = [("▁", "a"), ("▁", "t"), ("h", "e"), ("▁t", "he")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bpe = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    space = normalizers.Replace(" ", "▁")
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if strip else space
    first = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence([*first, decoders.Strip(" ", 1, 0)] if strip else first)
    return wrapped(bpe)


def word_piece() -> transformers.PreTrainedTokenizerFast:
    """BERT: words, and parts of words that begin with "##"."""
    tokens = [
        *SPECIAL,
        "the",
        "a",
        "n't",
        "!",
        ",",
        *string.ascii_lowercase,
        *(f"##{c}" for c in string.ascii_lowercase),
    ]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    words = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=True)
    return wrapped(words)


def unigram() -> transformers.PreTrainedTokenizerFast:
    """T5, and with byte fallback: the likeliest pieces."""
    scores = [(token, 0.0) for token in SPECIAL] + [(token, -float(i)) for i, token in enumerate(PIECES)]
    pieces = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return wrapped(pieces)


def all_kinds() -> dict[str, transformers.PreTrainedTokenizerFast]:
    """By name."""
    return {
        "bytes": byte_level(),
        "llama": byte_fallback(strip=True),
        "gemma": byte_fallback(strip=False),
        "word_piece": word_piece(),
        "unigram": unigram(),
    }
