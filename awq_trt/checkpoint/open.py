"""Opening a checkpoint in float: a local Hugging Face directory, a hub id or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from awq_trt.checkpoint.directory import (
    generation_config,
    load_tokenizer,
    local_path,
    read_config,
    refuse_adapter,
    stored_tensors,
)
from awq_trt.checkpoint.gguf import open_gguf, parts_of_file
from awq_trt.checkpoint.match import match_names
from awq_trt.checkpoint.reader import Checkpoint
from awq_trt.checkpoint.schemes import find_quantization
from awq_trt.checkpoint.submodels import choose
from awq_trt.errors import AwqTrtError


def open_checkpoint(model: str | Path, *, trust_remote_code: bool = False, part: str | None = None) -> Checkpoint:
    """Open a checkpoint without reading its weights.

    Args:
        model: directory with config.json and safetensors, a .gguf file, or a Hugging Face hub id.
        trust_remote_code: run Python code that the checkpoint brings along (off unless asked for).
        part: of a checkpoint that holds several models, see submodels.py.

    Raises:
        AwqTrtError: not a checkpoint, pickled weights, a missing or truncated shard, an unknown architecture or part.
    """
    path, source = local_path(model, trust_remote_code=trust_remote_code), str(model)
    refuse_adapter(path, source)
    if path.is_dir() and not (path / "config.json").exists():
        gguf_files = sorted(path.glob("*.gguf"))
        if not gguf_files or parts_of_file(gguf_files[0]) != tuple(gguf_files):
            several = f", and of {len(gguf_files)} .gguf files it is not clear which one is meant" if gguf_files else ""
            raise AwqTrtError(
                f"{model}: no config.json here{several}; a Hugging Face directory or a .gguf file was expected."
            )
        path = gguf_files[0]
    if path.is_file() and path.suffix != ".gguf":
        raise AwqTrtError(f"{model}: a file, but not a .gguf; a directory, a .gguf file or a hub id was expected.")
    if path.is_file() and part is not None:
        raise AwqTrtError(f"{model}: a GGUF file is one model, without a part {part!r}.")
    if path.is_file():
        return open_gguf(path)
    if quantization := find_quantization(path):
        method = quantization.get("quant_method", "unknown")
        raise AwqTrtError(
            f"{source}: already quantized (quant_method {method!r}), so there is nothing to quantize; export it as it "
            "is, or pass the original checkpoint."
        )
    config = read_config(path, source, trust_remote_code)
    generation_config(path)
    stored = stored_tensors(path, source)
    files = (*sorted({reader.file for reader in stored.values()}), path / "config.json")
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    return match_names(source, path, choose(config, source, part), stored, tokenizer, files)
