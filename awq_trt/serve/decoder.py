"""The interface of an exported decoder, whether it runs in ONNX Runtime on a CPU or in TensorRT on a GPU.

A decoder holds the KV cache of `max_batch` rows, each with its own length. A call runs some adjacent rows on new
tokens. Which request has which row is the business of generator.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from awq_trt.errors import AwqTrtError


class Decoder:
    """A model and its KV cache; `open_decoder` (open.py) makes one. Not for several threads at once."""

    cache_itemsize = 2  # bytes of a number in the cache

    def __init__(self, path: Path, facts: dict[str, Any], max_batch: int) -> None:
        cache = fixed_cache(path, facts)
        if max_batch < 1:
            raise AwqTrtError(f"max_batch is {max_batch}; it must be at least 1.")
        self.path = path
        self.facts = facts  # what the exporter wrote about the model: kv_cache, generation, tokenizer and so on
        self.max_batch = max_batch  # rows of the cache
        self.capacity: int = cache["capacity"]  # tokens that a row holds
        self.prefill_chunk: int = cache["prefill_chunk"]  # most new tokens of a row in a call
        self.vocab_size: int = facts["vocab_size"]  # logits per token
        self.every_logit = facts.get("logits") == "all"  # whether the graph has logits of every new token
        self.cache_shapes = {  # name after "past_key_values." or "present." -> [kv_heads, slots, head_dim] of one row
            f"{i}.{part}": (layer["kv_heads"], layer["slots"], layer[width])
            for i, layer in enumerate(cache["layers"])
            for part, width in (("key", "head_dim"), ("value", "value_head_dim"))
        }
        self.cache_bytes = max_batch * self.cache_itemsize * sum(map(math.prod, self.cache_shapes.values()))
        self.closed = False

    def check_inputs(self, shapes: Mapping[str, Sequence[Any]]) -> None:
        """Before memory is taken for the cache: whether the model has the inputs that its facts describe.

        Args:
            shapes: of its inputs and outputs, by name; what is not a number may be anything.

        Raises:
            AwqTrtError: it has not.
        """
        kinds = ("past_key_values.", "present.")
        wanted = {kind + name: list(shape) for kind in kinds for name, shape in self.cache_shapes.items()}
        found = {name: list(shape)[1:] for name, shape in shapes.items() if name.startswith(kinds)}
        if found != wanted or list(shapes.get("logits", ()))[-1:] != [self.vocab_size]:
            raise AwqTrtError(
                f"{self.path}: what is said of its cache and vocabulary does not fit its inputs and outputs. Export it "
                "again."
            )

    def run(self, row: int, input_ids: np.ndarray, past_length: np.ndarray, input_length: np.ndarray) -> np.ndarray:
        """Run new tokens of the rows row .. row + b - 1; their cache is written in place.

        Args:
            input_ids: int64 [b, s], the new tokens of each row, then padding of any id.
            past_length: int64 [b], tokens that the row's cache holds already.
            input_length: int64 [b], how many of the new tokens are real; 0 for a row that has none in this call.

        Returns:
            Logits float32 [b, vocab_size] after the last real token of each row; undefined for a row without any.

        Raises:
            AwqTrtError: rows, tokens or lengths outside of what the model was exported for, or the runtime failed.
        """
        if self.closed:
            raise AwqTrtError(f"{self.path}: the decoder is closed; open it again.")
        ids, past, new = (np.ascontiguousarray(a, np.int64) for a in (input_ids, past_length, input_length))
        (b, s), chunk = ids.shape, self.prefill_chunk
        if row < 0 or b < 1 or row + b > self.max_batch or past.shape != (b,) or new.shape != (b,):
            raise AwqTrtError(
                f"{b} rows from {row} with {past.size} and {new.size} lengths; the cache has {self.max_batch} rows."
            )
        if not 1 <= s <= chunk or (new < 0).any() or (new > np.minimum(s, chunk - past % chunk)).any():
            raise AwqTrtError(
                f"{s} new tokens, of them {new.tolist()} real, after {past.tolist()}: at most {chunk} in a call, and "
                f"the real tokens of a row may not cross a multiple of {chunk}."
            )
        if (past < 0).any() or (past + s > self.capacity).any():
            raise AwqTrtError(f"{s} new tokens after {past.tolist()}; the cache holds {self.capacity} per row.")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise AwqTrtError(f"token {ids.min()} or {ids.max()} is not in the vocabulary of {self.vocab_size}.")
        return self._run(row, ids, past, new)

    def decode_rows(self, first: int, last: int) -> tuple[int, int]:
        """(row, batch) of the fastest call that decodes the rows first .. last (included) and maybe more."""
        return first, last - first + 1

    def clear(self, row: int) -> None:
        """Fill a row's cache with zeros: a NaN in it would outlive the sequence that made it."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the memory; the decoder cannot be used afterwards."""
        raise NotImplementedError

    def _run(self, row: int, ids: np.ndarray, past: np.ndarray, new: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tokenizer_folder(path: Path, facts: dict[str, Any], given: str | Path | None) -> Path:
    """The directory of a model's tokenizer: the one that is given, or the one that the model's facts name.

    Raises:
        AwqTrtError: there is none.
    """
    named = facts.get("tokenizer")
    if given is None and named is None:
        raise AwqTrtError(f"{path} names no tokenizer; say where its files are (tokenizer).")
    folder = path.parent / str(named) if given is None else Path(given)
    if not folder.is_dir():
        raise AwqTrtError(
            f"{folder}: no such directory. It should hold the tokenizer of {path}; give another (tokenizer)."
        )
    return folder


def fixed_cache(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The description of a model's fixed KV cache (capacity, prefill_chunk, layers), from the facts about the model.

    Raises:
        AwqTrtError: the model has no such cache; says what it is instead.
    """
    cache = facts.get("kv_cache")
    if not facts:
        why = "it was not exported by awq_trt"
    elif "kv_cache" not in facts:
        why = "it was exported by an older version"
    elif cache is None:
        why = f"a model of type {facts.get('model_type')} is an encoder and generates no text"
    elif cache.get("kind") != "fixed":
        why = 'its cache grows with every token (kv_cache="dynamic")'
    else:
        layers = cache.get("layers") or [{}]
        sizes = [facts.get("vocab_size"), cache.get("capacity"), cache.get("prefill_chunk")]
        sizes += [layer.get(k) for layer in layers for k in ("kv_heads", "slots", "head_dim", "value_head_dim")]
        if all(isinstance(size, int) and size > 0 for size in sizes):
            return cache
        why = "the description of its cache is incomplete"
    raise AwqTrtError(f'{path}: {why}. Text is generated by decoders exported with kv_cache="fixed", the default.')
