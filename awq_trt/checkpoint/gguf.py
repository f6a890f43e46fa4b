"""GGUF through gguf-py's memory map and transformers' table of names, each tensor dequantized when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from awq_trt.checkpoint.directory import load_tokenizer
from awq_trt.checkpoint.match import match_names
from awq_trt.checkpoint.model import empty_model
from awq_trt.checkpoint.reader import Checkpoint
from awq_trt.checkpoint.submodels import Submodel
from awq_trt.errors import AwqTrtError

PIECE = 1 << 20
"""Bytes of a file dequantized at once: gguf-py holds about ten times as much while it does."""
PLAIN = ("token_embd.weight", "output.weight", "position_embd.weight")
"""Tables that no converter of llama.cpp reorders, so that single rows can be read."""


@dataclass(frozen=True)
class GgufReader:
    """Reads one tensor of a GGUF file: dequantizes its rows in pieces, then `finish` undoes llama.cpp's reordering."""

    data: Any  # the blocks in the file, uint8 [rows, bytes of a row]
    kind: Any  # a gguf.GGMLQuantizationType
    finish: Callable[[Any], Any] | None  # see transformers' TensorProcessor; None where it is stored as it is
    dtype = torch.float32  # of what it gives

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


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file as the transformers model it was converted from.

    Raises:
        AwqTrtError: transformers cannot map it to a model, or it holds fused experts in parts.
    """
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        read_field,
    )

    try:
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        cls: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if cls is None:
            raise AwqTrtError(f"model_type {config.model_type!r}: transformers has no causal language model for it.")
        config.architectures = [cls.__name__]
        tokenizer = load_tokenizer(path.parent, gguf_file=path.name)
        reader = GGUFReader(path)  # last: its fields take half a kilobyte for each token of the vocabulary
        architecture = read_field(reader, "general.architecture")[0]
        reader.fields.clear()
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
        names = get_gguf_hf_weights_map(empty_model(config), processor)
    except AwqTrtError:
        raise
    except Exception as error:
        raise AwqTrtError(
            f"{path}: not a GGUF file that transformers {transformers.__version__} can map to a model: "
            f"{type(error).__name__}: {error}"
        ) from error

    def finish(name: str) -> Callable[[Any], Any] | None:
        def undo(weights: Any) -> Any:
            side: dict[str, Any] = {"tensors": {}}  # processors of mixtures of experts put merged tensors here
            result = processor.process(weights=weights, name=name, tensor_key_mapping=names, parsed_parameters=side)
            if side["tensors"] or result.name is None:
                raise AwqTrtError(f"{path}: tensor {name} is stored in parts; convert the model to safetensors.")
            return result.weights

        return None if name in PLAIN else undo

    known = [t for t in reader.tensors if t.name in names]
    readers = {names[t.name]: GgufReader(t.data, t.tensor_type, finish(t.name)) for t in known}
    return match_names(str(path), path, Submodel(config, config), readers, tokenizer, (path,))
