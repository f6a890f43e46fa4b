"""config.json and the files beside it, looked at before transformers reads them: types, and numbers of real models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import transformers
from pydantic import Field
from typing_extensions import TypedDict

from awq_trt.errors import AwqTrtError, brief
from awq_trt.schema import Name, Size, read_json, regular_file

T = TypeVar("T")

TEXTS, MAX_TEXT = (".json", ".jsonl", ".jinja", ".txt", ".model", ".py"), 128 << 20
"""Suffixes of what transformers reads whole, and the most bytes of one: the largest tokenizers have 40 MB."""

LIMITS = (
    (r"layers|n_layer$|depth|num_blocks|n_blocks", 1024),
    (r"experts$|num_local_experts|n_routed", 4096),
    (r"vocab|position|n_ctx|seq_?len", 1 << 24),
    (r"hidden|intermediate|_dim$|^dim$|heads|embd|embed|d_model|d_ff|d_kv|inner|rank|channels|bins|labels", 1 << 20),
    (r"image_size|patch_size|kernel|conv", 1 << 14),
    (r"", 2**53),
)
"""Name of a key -> the largest whole number there. The largest models have 128 layers, 512 experts, 2^18 tokens and
10^7 positions; what is beyond would take hours and all memory to build before anything could be said of it."""


class Config(TypedDict, total=False):
    """config.json: what this package reads of it; the rest is for transformers."""

    architectures: list[Name] | None
    model_type: Name
    quantization_config: dict[str, Any] | None
    dtype: Name | None
    torch_dtype: Name | None
    transformers_weights: Name | None


class AdapterConfig(TypedDict, total=False):
    """adapter_config.json of PEFT."""

    peft_type: Name | None
    base_model_name_or_path: Name | None


class Index(TypedDict):
    """model.safetensors.index.json."""

    weight_map: Annotated[dict[Name, Name], Field(min_length=1)]  # tensor -> file


class GenerationConfig(TypedDict, total=False):
    """generation_config.json."""

    eos_token_id: Size | list[Size] | None
    bos_token_id: Size | None
    pad_token_id: Size | None


def check_directory(path: Path) -> None:
    """Before transformers opens whatever it likes in a directory: no pipe would keep it waiting, no file fill memory.

    Raises:
        AwqTrtError: an entry that is neither file nor directory, or a text that is too large.
    """
    for entry in sorted(path.iterdir()):
        if entry.exists() and not entry.is_dir():
            size = regular_file(entry).stat().st_size
            if entry.suffix in TEXTS and size > MAX_TEXT:
                raise AwqTrtError(f"{entry}: {size} bytes; at most {MAX_TEXT} are read. Download it again.")


def config_json(path: Path) -> dict[str, Any]:
    """The content of a config.json.

    Raises:
        AwqTrtError: it is not readable, or says what no model is.
    """
    config: dict[str, Any] = read_json(path, Config)
    check_numbers(config, path)
    return config


def check_numbers(config: dict[str, Any], path: Path) -> None:
    """Refuse a configuration with sizes that no model has.

    Raises:
        AwqTrtError: with one of them; `path` begins the message.
    """
    for key, value in _numbers(config, ""):
        most = next(most for pattern, most in LIMITS if re.search(pattern, key.rpartition(".")[2]))
        if abs(value) > most:
            shown = value if abs(value) < 2**64 else f"beyond {'-' * (value < 0)}2^64"
            raise AwqTrtError(f"{path}: {key} is {shown}; at most {most} is read. Download it again.")


def _numbers(value: Any, key: str) -> Iterator[tuple[str, int]]:
    """Every whole number of a JSON value, and where it is."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value


def by_transformers(what: str, make: Callable[[], T]) -> T:
    """What transformers makes of a configuration; it raises whatever a wrong value leads to.

    Raises:
        AwqTrtError: it cannot; `what` begins the message.
    """
    try:
        return make()
    except AwqTrtError:
        raise
    except Exception as error:
        raise AwqTrtError(
            f"{what}: transformers {transformers.__version__} cannot build the model that config.json describes: "
            f"{brief(error)} Download config.json again."
        ) from error
