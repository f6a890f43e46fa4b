"""What lies in a checkpoint's directory: configuration files, tokenizer, safetensors and their index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from awq_trt.checkpoint.safetensors import SafetensorsReader, open_safetensors
from awq_trt.errors import AwqTrtError

GENERATION = "generation_config.json"
"""Beside config.json: how transformers generates with the model, and which tokens end a text."""


def local_path(model: str | Path) -> Path:
    """Where a checkpoint is; of a hub id the parts that are needed (safetensors, configuration, tokenizer) are fetched.

    Raises:
        AwqTrtError: there is no such path, nor such a repository.
    """
    from huggingface_hub import snapshot_download

    if Path(model).exists():
        return Path(model)
    model_id = str(model)
    if model_id.startswith((".", "/", "~")) or model_id.count("/") > 1 or model_id.endswith(".gguf"):
        raise AwqTrtError(f"{model_id}: no such file or directory.")
    try:
        return Path(snapshot_download(model_id, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.py"]))
    except Exception as error:
        raise AwqTrtError(
            f"{model_id}: no such directory here, and the Hugging Face hub did not give it: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} "
            "Check the spelling and the connection, or pass a local directory."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file as a dict.

    Raises:
        AwqTrtError: missing or not JSON.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise AwqTrtError(f"{path}: not readable as JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise AwqTrtError(f"{path}: a JSON object was expected.")
    return value


def stored_tensors(path: Path, source: str, stem: str = "model") -> dict[str, SafetensorsReader]:
    """Tensor name -> what reads it, for <stem>.safetensors or its shards.

    Raises:
        AwqTrtError: no safetensors (pickles are refused), a shard missing or truncated, a tensor missing in its shard.
    """
    index = path / f"{stem}.safetensors.index.json"
    if index.exists():
        weight_map: dict[str, str] = read_json(index).get("weight_map", {})
        files = {name: path / name for name in sorted(set(weight_map.values()))}
    else:
        weight_map, files = {}, {f.name: f for f in sorted(path.glob("*.safetensors"))}
    if not files:
        if list(path.glob("*.bin")) or list(path.glob("*.pt*")):
            raise AwqTrtError(
                f"{source}: only pickled weights (.bin) here, which can run code when opened, so they are not read. "
                "Convert them where you trust them:\n  python -c \"import transformers as t; m='"
                f"{path}'; t.AutoModel.from_pretrained(m).save_pretrained(m + '-safetensors')\""
            )
        raise AwqTrtError(f"{source}: no .safetensors file here; download the checkpoint again.")
    found: dict[str, SafetensorsReader] = {}
    for name, file in files.items():
        if not file.exists():
            raise AwqTrtError(f"{source}: shard {name} is missing (named in {index.name}); download it again.")
        found |= sorted(open_safetensors(file, source).items())
    if missing := sorted(set(weight_map) - set(found)):
        raise AwqTrtError(f"{source}: tensor {missing[0]} is not in shard {weight_map[missing[0]]}; download it again.")
    return found


def load_tokenizer(path: Path, **kwargs: Any) -> Any:
    """The tokenizer beside a checkpoint, or None where there is none."""
    if not kwargs and not any(
        (path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
    ):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(path, **kwargs)
    except Exception as error:
        raise AwqTrtError(f"{path}: the tokenizer could not be loaded: {error}") from error


def special_tokens(path: Path, config: transformers.PretrainedConfig, tokenizer: Any) -> dict[str, Any]:
    """{"eos_token_id": [ids that end a text], "bos_token_id": id or None, "pad_token_id": id or None}.

    generation_config.json knows best (chat models end turns with a token of their own), then config.json, then the
    tokenizer.
    """
    stored = read_json(path / GENERATION) if (path / GENERATION).is_file() else {}

    def find(key: str) -> Any:
        places = (stored.get(key), getattr(config, key, None), getattr(tokenizer, key, None))
        return next((value for value in places if value is not None), None)

    eos = find("eos_token_id")
    ids = [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [eos]
    return {"eos_token_id": ids, "bos_token_id": find("bos_token_id"), "pad_token_id": find("pad_token_id")}
