"""What lies in a checkpoint's directory: configuration files, tokenizer, safetensors and their index."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from awq_trt.checkpoint.config import AdapterConfig, GenerationConfig, Index, check_directory, config_json
from awq_trt.checkpoint.safetensors import SafetensorsReader, open_safetensors
from awq_trt.errors import AwqTrtError, brief
from awq_trt.files import inside
from awq_trt.schema import read_json

GENERATION = "generation_config.json"
"""Beside config.json: how transformers generates with the model, and which tokens end a text."""

ADAPTER = "adapter_config.json"
"""What PEFT writes beside an adapter. transformers applies the adapter where it finds this file and PEFT is there."""

VOCABULARIES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json", "merges.txt",
                "spiece.model", "sentencepiece.bpe.model", "tekken.json", "*.tiktoken")  # fmt: skip
"""Files of a tokenizer, one of which transformers needs to load it."""

TOKENIZER = (*VOCABULARIES, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
             "additional_chat_templates/*.jinja")  # fmt: skip
"""All files of a tokenizer."""


def local_path(model: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Where a checkpoint is. Of a hub id the parts that are needed are fetched: configuration, tokenizer, and those
    safetensors that `stored_tensors` reads.

    Args:
        trust_remote_code: fetch Python code, too.

    Raises:
        AwqTrtError: there is no such path, nor such a repository.
    """
    from huggingface_hub import snapshot_download

    if Path(model).exists():
        return Path(model)
    model_id = str(model)
    if model_id.startswith((".", "/", "~")) or model_id.count("/") > 1 or model_id.endswith(".gguf"):
        raise AwqTrtError(f"{model_id}: no such file or directory.")
    patterns = ["*.json", "*.txt", *TOKENIZER, *(["*.py"] if trust_remote_code else [])]
    try:
        path = Path(snapshot_download(model_id, allow_patterns=patterns))
        named = [name for stem in STEMS for name in weight_names(path, model_id, stem)[1]]
        return Path(
            snapshot_download(model_id, allow_patterns=[*patterns, *named, *(f"{s}.safetensors" for s in STEMS)])
        )
    except AwqTrtError:
        raise
    except Exception as error:
        raise AwqTrtError(
            f"{model_id}: no such directory here, and the Hugging Face hub did not give it: "
            f"{brief(error)} "
            "Check the spelling and the connection, or pass a local directory."
        ) from error


def read_config(path: Path, source: str, trust_remote_code: bool = False) -> transformers.PretrainedConfig:
    """What config.json says, as transformers understands it.

    Raises:
        AwqTrtError: an unknown architecture, or one that brings code and `trust_remote_code` is False.
    """
    raw = config_json(path / "config.json")
    check_directory(path)
    try:
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        kind = f"model_type {raw.get('model_type')!r}"
        if not trust_remote_code and "AutoConfig" in (raw.get("auto_map") or ()):
            raise AwqTrtError(f"{source}: the model ({kind}) brings Python code of its own, {UNTRUSTED}") from error
        raise AwqTrtError(
            f"{source}: transformers {transformers.__version__} does not know this architecture ({kind}): "
            f"{brief(error)}"
        ) from error


def refuse_adapter(path: Path, source: str) -> None:
    """A model with an adapter is another model than without it, so that it has to be merged first.

    Raises:
        AwqTrtError: an adapter of PEFT lies in the directory.
    """
    if not (path / ADAPTER).is_file():
        return
    adapter = read_json(path / ADAPTER, AdapterConfig)
    kind, base = adapter.get("peft_type", "PEFT"), adapter.get("base_model_name_or_path")
    merge = (
        'Merge it into its model first:\n  python -c "from peft import AutoPeftModelForCausalLM as A; '
        f"A.from_pretrained('{path}').merge_and_unload().save_pretrained('{path}-merged')\"\n"
        f"and take {path}-merged, with the tokenizer's files beside it"
    )
    if (path / "config.json").is_file() and any(path.glob("model*.safetensors")):
        raise AwqTrtError(
            f"{source}: an adapter ({kind}) lies beside the model ({ADAPTER}), and transformers applies it where "
            f"PEFT is installed. {merge}; or, to have the model without it, move {ADAPTER} elsewhere."
        )
    raise AwqTrtError(f"{source}: this is an adapter ({kind}) of {base}, not a model. {merge}.")


STEMS = ("model", "awq_trt")
"""How the names of files with weights begin: in checkpoints that transformers reads, and in those that only this
package does (writer.py)."""


def weight_names(path: Path, source: str, stem: str = "model") -> tuple[str | None, list[str]]:
    """The files of a directory that hold the weights, as transformers' `from_pretrained` chooses them: the one that
    config.json names as `transformers_weights`, else <stem>.safetensors, else the shards that
    <stem>.safetensors.index.json names. Nothing else that lies there is opened.

    Returns:
        The index, None where there is none; the files, in the order in which transformers reads them.

    Raises:
        AwqTrtError: an index without a table of files, or with a file outside of the directory.
    """
    config = config_json(path / "config.json") if stem == "model" and (path / "config.json").is_file() else {}
    names = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    if (chosen := config.get("transformers_weights")) is not None:
        inside(path, chosen, str(path / "config.json"))
        names = [chosen]
    found = next((name for name in names if (path / name).is_file()), None)
    if found is None or not found.endswith(".index.json"):
        return None, [] if found is None else [found]
    weight_map = _weight_map(path / found)
    return found, sorted(set(weight_map.values()))


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, of an index of shards."""
    weight_map: dict[str, str] = read_json(index, Index)["weight_map"]
    for name in weight_map.values():
        inside(index.parent, name, str(index))
    return weight_map


def stored_tensors(path: Path, source: str, stem: str = "model") -> dict[str, SafetensorsReader]:
    """Tensor name -> what reads it, in the files that `weight_names` says.

    Raises:
        AwqTrtError: no safetensors (pickles are refused), a shard missing or truncated, a tensor missing in its shard.
    """
    index, names = weight_names(path, source, stem)
    if not names:
        raise AwqTrtError(_no_weights(path, source, stem))
    found: dict[str, SafetensorsReader] = {}
    for name in names:
        file = path / name
        if not file.exists():
            raise AwqTrtError(f"{source}: shard {name} is missing (named in {index}); download it again.")
        found |= sorted(open_safetensors(file, source).items())
    weight_map = {} if index is None else _weight_map(path / index)
    if missing := sorted(set(weight_map) - set(found)):
        raise AwqTrtError(f"{source}: tensor {missing[0]} is not in shard {weight_map[missing[0]]}; download it again.")
    return found


def _no_weights(path: Path, source: str, stem: str) -> str:
    """What to say of a directory without <stem>.safetensors and without an index."""
    wanted = f"{stem}.safetensors or the shards of {stem}.safetensors.index.json"
    others, ggufs = (sorted(f.name for f in path.glob(f"*.{kind}")) for kind in ("safetensors", "gguf"))
    if list(path.glob("*.bin")) or list(path.glob("*.pt*")):
        stray = f" Of {', '.join(others[:3])} transformers would read nothing, either." if others else ""
        return (
            f"{source}: only pickled weights (.bin) here, which can run code when opened, so they are not read.{stray} "
            "Convert them where you trust them:\n  python -c \"import transformers as t; m='"
            f"{path}'; c=t.AutoConfig.from_pretrained(m); getattr(t, c.architectures[0])"
            ".from_pretrained(m, dtype='auto').save_pretrained(m + '-safetensors')\"\n"
            "and copy the tokenizer's files there."
        )
    if any(name.startswith(f"{stem}-") and "-of-" in name for name in others):
        return (
            f"{source}: there are shards ({others[0]}), but no {stem}.safetensors.index.json, which says what belongs "
            "to the model; download it, too."
        )
    if others:
        return (
            f"{source}: the weights are looked for in {wanted}, as transformers does, and there is only "
            f"{', '.join(others[:3])}. If that is the whole model, with the names that transformers gives its tensors, "
            f"rename it to {stem}.safetensors; else download the model's other files."
        )
    if ggufs:
        return f"{source}: no .safetensors file here; to take {ggufs[0]}, pass the path of that file."
    return f"{source}: no .safetensors file here; download the checkpoint again ({wanted})."


def load_tokenizer(
    path: Path, *, gguf_file: str | None = None, trust_remote_code: bool = False, required: bool = False
) -> Any:
    """The tokenizer beside a checkpoint; None where there is none and it is not required.

    Raises:
        AwqTrtError: there is none, or it cannot be loaded, or it brings code and `trust_remote_code` is False.
    """
    there = gguf_file is not None or any(True for pattern in VOCABULARIES for _ in path.glob(pattern))
    if not there and not required:
        return None
    file = {} if gguf_file is None else {"gguf_file": gguf_file}
    check_directory(path)
    if gguf_file is None and (path / "tokenizer.json").exists():
        _open_elsewhere(path / "tokenizer.json")
    with _by_tokenizers(f"{path}: the tokenizer could not be loaded"):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **file)
        except Exception as error:
            if "trust_remote_code" in str(error):
                raise AwqTrtError(f"{path}: the tokenizer brings Python code of its own, {UNTRUSTED}") from error
            raise
        tokenizer.decode(tokenizer("a")["input_ids"])  # settings of a wrong type are noticed in use only
    return tokenizer


def _open_elsewhere(file: Path) -> None:
    """Open a tokenizer in a process of its own first: some files make the Rust library panic, as where a BPE merge is
    cut inside a character. That prints a stack trace, and may end the process.

    Raises:
        AwqTrtError: this is such a file. One that is only refused is none.
    """
    words = "import sys, tokenizers; tokenizers.Tokenizer.from_file(sys.argv[1])"
    command = [sys.executable, "-c", words, str(file.absolute())]
    opened = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, cwd="/")  # imports nothing of here
    panic = re.search(rb" panicked at [^\n]*\n([^\n]*)", opened.stderr)
    if opened.returncode < 0 or panic:
        why = panic[1].decode(errors="replace") if panic else signal.Signals(-opened.returncode).name
        raise AwqTrtError(
            f"{file}: the tokenizer could not be loaded: the process that opens it fails ({why}). Download the "
            "tokenizer's files again."
        )


def token_ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """The tokens of a text.

    Raises:
        AwqTrtError: the tokenizer, which comes with a checkpoint, does not take it.
    """
    with _by_tokenizers(f"{getattr(tokenizer, 'name_or_path', '')}: the tokenizer does not read this text"):
        return list(tokenizer(text, **options)["input_ids"])


@contextmanager
def _by_tokenizers(trouble: str) -> Iterator[None]:
    """What happens inside is another library's work on another's files. Rust's panics are no Exception."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, AwqTrtError) or not (isinstance(error, Exception) or "Panic" in type(error).__name__):
            raise
        raise AwqTrtError(f"{trouble}: {brief(error)} Download the tokenizer's files again.") from error


UNTRUSTED = "which is not run unless you trust it and say so with trust_remote_code=True."


def generation_config(path: Path) -> dict[str, Any]:
    """What generation_config.json says; {} where there is none.

    Raises:
        AwqTrtError: it is not readable.
    """
    return read_json(path / GENERATION, GenerationConfig) if (path / GENERATION).exists() else {}


def special_tokens(path: Path, config: transformers.PretrainedConfig, tokenizer: Any) -> dict[str, Any]:
    """{"eos_token_id": [ids that end a text], "bos_token_id": id or None, "pad_token_id": id or None}.

    generation_config.json knows best (chat models end turns with a token of their own), then config.json, then the
    tokenizer.
    """
    stored = generation_config(path)

    def find(key: str) -> Any:
        places = (stored.get(key), getattr(config, key, None), getattr(tokenizer, key, None))
        return next((value for value in places if value is not None), None)

    eos = find("eos_token_id")
    ids = [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [eos]
    return {"eos_token_id": ids, "bos_token_id": find("bos_token_id"), "pad_token_id": find("pad_token_id")}
