"""GGUF through gguf-py's memory map and transformers' table of names, each tensor dequantized when it is asked for.

transformers passes over keys and tensors that it does not know. Here each of them is either the same as what its
configuration says, or put into it (gguf_config.py), or refused.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

from awq_trt.checkpoint.config import check_numbers
from awq_trt.checkpoint.directory import load_tokenizer
from awq_trt.checkpoint.gguf_config import complete_config
from awq_trt.checkpoint.match import match_names
from awq_trt.checkpoint.model import empty_model
from awq_trt.checkpoint.reader import Checkpoint
from awq_trt.checkpoint.submodels import Submodel
from awq_trt.errors import AwqTrtError, brief
from awq_trt.schema import regular_file

PIECE = 1 << 20
"""Bytes of a file dequantized at once: gguf-py holds about ten times as much while it does."""
STRING, ARRAY = 8, 9
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Types of a header's values -> bytes of one."""
PLAIN = ("token_embd.weight", "output.weight", "position_embd.weight")
"""Tables that no converter of llama.cpp reorders, so that single rows can be read."""
ROPE_FREQS = "rope_freqs.weight"
"""What rotary frequencies are divided by, [head_dim / 2]: how llama.cpp stores the scaling of Llama 3.1 and later."""
OWN_HEAD = ("falcon", "bloom")
"""Architectures whose files hold the tied head a second time."""


@dataclass(frozen=True)
class GgufReader:
    """Reads one tensor of a GGUF file: dequantizes its rows in pieces, then `finish` undoes llama.cpp's reordering."""

    data: Any  # the blocks in the file, uint8 [rows, bytes of a row]
    kind: Any  # a gguf.GGMLQuantizationType
    finish: Callable[[Any], Any] | None  # see transformers' TensorProcessor; None where it is stored as it is
    size: int  # elements

    @property
    def dtype(self) -> torch.dtype:
        """The 16-bit dtype to compute in with it; what it gives is fp32.

        Only F16 says float16. Quantized and fp32 tensors say nothing of the activations, and nearly every model that
        there is in GGUF was trained in bfloat16; some of them (Gemma 3) overflow float16.
        """
        return torch.float16 if self.kind.name == "F16" else torch.bfloat16

    def __call__(self) -> torch.Tensor:
        from gguf import dequantize

        step = max(1, PIECE // max(self.data[:1].nbytes, 1))
        pieces = (dequantize(self.data[i : i + step], self.kind) for i in range(0, len(self.data), step))
        first = next(pieces)
        values = np.empty((len(self.data), *first.shape[1:]), np.float32)
        values[: len(first)] = first
        for i, piece in enumerate(pieces, 1):
            values[i * step : (i + 1) * step] = piece
        return torch.from_numpy(np.ascontiguousarray(self.finish(values) if self.finish else values))

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        from gguf import dequantize

        return self()[index] if self.finish else torch.from_numpy(dequantize(self.data[index.numpy()], self.kind))


def check_header(path: Path) -> None:
    """Walk over the header of a GGUF file: gguf-py believes its counts and lengths, and would follow them for ever.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    Raises:
        AwqTrtError: no GGUF file of version 2 or 3, or one that ends before its header does.
    """
    regular_file(path)
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _walk(data)
        except (struct.error, ValueError) as error:  # beyond the end; an empty file
            raise AwqTrtError(
                f"{path}: not a GGUF file that is whole and of version 2 or 3 ({error}). Download it again."
            ) from error


def _walk(data: mmap.mmap) -> None:
    magic, version, tensors, fields = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"magic {magic!r}, version {version}")
    at = 24

    def string() -> None:
        nonlocal at
        (length,) = struct.unpack_from("<Q", data, at)
        at += 8 + length
        if at > len(data):
            raise ValueError(f"a text of {length} bytes")

    def value(kind: int, count: int, depth: int) -> None:
        nonlocal at
        if kind == STRING:
            for _ in range(count):
                string()
        elif kind == ARRAY and depth < 4:
            for _ in range(count):
                inner, length = struct.unpack_from("<IQ", data, at)
                at += 12
                value(inner, length, depth + 1)
        elif kind in SCALARS:
            at += count * SCALARS[kind]
        else:
            raise ValueError(f"a value of the type {kind}")
        if at > len(data):
            raise ValueError(f"{count} values of the type {kind}")

    for _ in range(fields):
        string()
        (kind,) = struct.unpack_from("<I", data, at)
        at += 4
        value(kind, 1, 0)
    for _ in range(tensors):
        string()
        (dimensions,) = struct.unpack_from("<I", data, at)
        if dimensions > 8:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        at += 4 + 8 * dimensions + 12
        if at > len(data):
            raise ValueError(f"{tensors} tensors")


def parts_of_file(path: Path) -> tuple[Path, ...]:
    """The files that a GGUF model is split into, in order; mostly the one.

    Raises:
        AwqTrtError: one of them is missing.
    """
    found = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if found is None:
        return (path,)
    stem, _, count = found.groups()
    parts = [path.with_name(f"{stem}-{i + 1:05}-of-{count}.gguf") for i in range(int(count))]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise AwqTrtError(
            f"{path}: a part of a model in {int(count)} files, of which {missing[0]} is missing beside it. Download "
            "it, "
            "or merge them where they are all (llama-gguf-split --merge)."
        )
    return tuple(parts)


def drop_tokens_from(tokenizer: Any, count: int) -> None:
    """Take away what transformers adds to a file's `count` tokens ("<|endoftext|>" to those of BPE): no text means it,
    and the embedding has no row for it."""
    if tokenizer is None or len(tokenizer) <= count:
        return
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < count]
    tokenizer._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file, or one of the parts of a model, as the transformers model it was converted from.

    Raises:
        AwqTrtError: transformers cannot map it to a model; it holds an adapter, experts, tensors or keys that would be
            left out; a part of it is missing.
    """
    from gguf import GGUFReader
    from transformers.integrations.gguf import read_gguf_metadata
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    files = parts_of_file(path)
    path = files[0]
    for file in files:
        check_header(file)
    try:
        metadata, _ = read_gguf_metadata(str(path))
        _refuse_kind(path, metadata, len(files))
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        check_numbers(config.to_dict(), path)
        cls: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if cls is None:
            raise AwqTrtError(f"model_type {config.model_type!r}: transformers has no causal language model for it.")
        config.architectures = [cls.__name__]
        tokenizer = load_tokenizer(path.parent, gguf_file=path.name)
        drop_tokens_from(tokenizer, config.vocab_size)
        tensors: dict[str, Any] = {}
        for file in files:  # last: its fields take half a kilobyte for each token of the vocabulary
            reader = GGUFReader(file)
            reader.fields.clear()
            tensors |= {tensor.name: tensor for tensor in reader.tensors}
        architecture = metadata["general.architecture"]
        config.tie_word_embeddings = "output.weight" not in tensors or architecture in OWN_HEAD
        scaling = tensors.pop(ROPE_FREQS, None)
        complete_config(str(path), config, metadata, None if scaling is None else np.array(scaling.data))
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
        names = get_gguf_hf_weights_map(empty_model(config), processor)
    except AwqTrtError:
        raise
    except Exception as error:
        raise AwqTrtError(
            f"{path}: not a GGUF file that transformers {transformers.__version__} can map to a model: {brief(error)}"
        ) from error
    if stacked := [name for name in tensors if "_exps." in name]:
        raise AwqTrtError(
            f"{path}: a mixture of experts ({stacked[0]}); those are read from safetensors, not from GGUF."
        )

    def finish(name: str) -> Callable[[Any], Any] | None:
        def undo(weights: Any) -> Any:
            side: dict[str, Any] = {"tensors": {}}  # processors of mixtures of experts put merged tensors here
            result = processor.process(weights=weights, name=name, tensor_key_mapping=names, parsed_parameters=side)
            if side["tensors"] or result.name is None:
                raise AwqTrtError(f"{path}: tensor {name} is stored in parts; convert the model to safetensors.")
            return result.weights

        return None if name in PLAIN else undo

    readers = {
        names.get(name, name): GgufReader(t.data, t.tensor_type, finish(name), math.prod(int(n) for n in t.shape))
        for name, t in tensors.items()
    }
    return match_names(str(path), path, Submodel(config, config), readers, tokenizer, files)


def _refuse_kind(path: Path, metadata: dict[str, Any], files: int) -> None:
    """What is no whole model."""
    if metadata.get("general.type") == "adapter":
        raise AwqTrtError(f"{path}: a LoRA adapter, not a model; merge it into its model first (llama-export-lora).")
    if metadata.get("split.count", 1) not in (0, files):
        raise AwqTrtError(
            f"{path}: part {metadata.get('split.no', 0) + 1} of {metadata['split.count']} of a model. Keep the names "
            "that "
            "llama-gguf-split gave the parts (NAME-00001-of-00002.gguf), or merge them (llama-gguf-split --merge)."
        )
