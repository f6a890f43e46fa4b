"""Reading checkpoints: a local Hugging Face directory, a hub id or a GGUF file, one tensor at a time.

A `Checkpoint` is a table of functions, one per parameter, that read that parameter and nothing else. Models are built
from their configuration with empty parameters (`empty_model`), so that no stage ever holds more than it asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers.pytorch_utils import Conv1D

from awq_trt.checkpoint.experts import Part, split_experts
from awq_trt.checkpoint.names import StoredNames
from awq_trt.checkpoint.safetensors import read_header
from awq_trt.checkpoint.submodels import Submodel, choose, model_class
from awq_trt.errors import AwqTrtError

Reader = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """One model on disk.

    Attributes:
        source: what the user named (path or hub id), for messages.
        config: its transformers configuration.
        dtype: the dtype its activations will have in the engine: the checkpoint's own if 16-bit, else float16.
        readers: parameter name (of `empty_model`) -> function that reads it, in the orientation of `empty_model`.
        tokenizer: the model's tokenizer, or None (vision models).
        transposed: parameters that are stored as [in, out] (GPT-2's Conv1D) and read as [out, in].
        files: everything on disk that the weights come from.
        keys: parameter -> what transformers, and so other tools, call it in a file, where that is another name.
        note: what of the checkpoint is left out, for people; "" where nothing is.
    """

    source: str
    config: transformers.PretrainedConfig
    dtype: torch.dtype
    readers: Mapping[str, Reader]
    tokenizer: Any = None
    transposed: frozenset[str] = field(default_factory=frozenset)
    files: tuple[Path, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def tensor(self, name: str) -> torch.Tensor:
        """Read one parameter, in the dtype of the file; from safetensors it is a memory map of the file, not a copy.

        Raises:
            AwqTrtError: it is missing, or holds NaN or Inf.
        """
        if name not in self.readers:
            raise AwqTrtError(f"{self.source}: the tensor {name} is missing; download the checkpoint again.")
        return self._finite(name, self.readers[name]())

    def rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """Some rows of a parameter (int64 [R] -> [R, ...]), reading no more than them where the file allows it.

        Raises:
            AwqTrtError: they hold NaN or Inf.
        """
        reader = self.readers[name]
        return self._finite(name, reader.rows(index)) if isinstance(reader, RowReader) else self.tensor(name)[index]

    def _finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if bad := not_finite(tensor):
            raise AwqTrtError(
                f"{self.source}: tensor {name} holds {bad} NaN or Inf values; such a model cannot be quantized. "
                "Download it again, or save it in a dtype that can hold its weights."
            )
        return tensor


@runtime_checkable
class RowReader(Protocol):
    """A reader that can also give single rows."""

    def __call__(self) -> torch.Tensor:
        """The whole tensor."""

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """The rows int64 [R] of it."""


def not_finite(tensor: torch.Tensor) -> int:
    """How many values are NaN or Inf; looks at 2^22 values at a time, because a mask of all of them is large."""
    if not tensor.is_floating_point():
        return 0
    rows = tensor.unsqueeze(0) if tensor.dim() == 0 else tensor
    pieces = rows.split(max(1, (1 << 22) // max(rows[:1].numel(), 1)))
    return sum(
        int((~torch.isfinite(p)).sum())
        for p in pieces
        if p.numel() and not all(torch.isfinite(bound) for bound in p.aminmax())
    )


def open_checkpoint(model: str | Path, *, trust_remote_code: bool = False, part: str | None = None) -> Checkpoint:
    """Open a checkpoint without reading its weights.

    Args:
        model: directory with config.json and safetensors, a .gguf file, or a Hugging Face hub id.
        trust_remote_code: run Python code that the checkpoint brings along (off unless asked for).
        part: of a checkpoint that holds several models, see submodels.py.

    Raises:
        AwqTrtError: not a checkpoint, pickled weights, a missing or truncated shard, an unknown architecture or part.
    """
    path = local_path(model)
    if path.is_dir() and not (path / "config.json").exists():
        gguf_files = sorted(path.glob("*.gguf"))
        if len(gguf_files) != 1:
            raise AwqTrtError(f"{model}: no config.json here; --model wants a Hugging Face directory or a .gguf file.")
        path = gguf_files[0]
    if path.is_file() and path.suffix != ".gguf":
        raise AwqTrtError(f"{model}: a file, but not a .gguf; --model wants a directory, a .gguf file or a hub id.")
    if path.is_file() and part is not None:
        raise AwqTrtError(f"{model}: a GGUF file is one model, without a part {part!r}.")
    if path.is_file():
        from awq_trt.checkpoint.gguf import open_gguf

        return open_gguf(path)
    return _open_directory(path, str(model), trust_remote_code, part)


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


def _open_directory(path: Path, source: str, trust_remote_code: bool, part: str | None) -> Checkpoint:
    from awq_trt.checkpoint.schemes import find_quantization

    raw = read_json(path / "config.json")
    if quantization := find_quantization(path):
        method = quantization.get("quant_method", "unknown")
        raise AwqTrtError(
            f"{source}: already quantized (quant_method {method!r}), so there is nothing to quantize; export it as it "
            "is, or pass the original checkpoint."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise AwqTrtError(
            f"{source}: transformers {transformers.__version__} does not know this architecture "
            f"(model_type {raw.get('model_type')!r}): {str(error).splitlines()[0]} "
            "If it ships its own code and you trust it, pass --trust-remote-code."
        ) from error
    keys = safetensors_index(path, source)
    headers = {file: read_header(file) for file in sorted(set(keys.values()))}
    readers: dict[str, Reader] = {k: SafetensorsReader(file, k, headers[file][k].shape) for k, file in keys.items()}
    files = (*headers, path / "config.json")
    return match_names(source, path, choose(config, source, part), readers, load_tokenizer(path), files)


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


def safetensors_index(path: Path, source: str, stem: str = "model") -> dict[str, Path]:
    """Tensor name -> file, for <stem>.safetensors or its shards. Every file's header is checked against its length.

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
    found: dict[str, Path] = {}
    for name, file in files.items():
        if not file.exists():
            raise AwqTrtError(f"{source}: shard {name} is missing (named in {index.name}); download it again.")
        try:
            with safe_open(str(file), framework="pt") as handle:
                found.update(dict.fromkeys(handle.keys(), file))
        except SafetensorError as error:
            raise AwqTrtError(
                f"{source}: shard {name} is truncated or damaged ({error}); download it again."
            ) from error
    if missing := sorted(set(weight_map) - set(found)):
        raise AwqTrtError(f"{source}: tensor {missing[0]} is not in shard {weight_map[missing[0]]}; download it again.")
    return found


@dataclass(frozen=True)
class SafetensorsReader:
    """Reads one tensor of a file, of this shape, through a memory map, which lives as long as the tensor."""

    file: Path
    key: str
    shape: tuple[int, ...]

    def __call__(self) -> torch.Tensor:
        with safe_open(str(self.file), framework="pt") as handle:
            tensor: torch.Tensor = handle.get_tensor(self.key)
        return tensor

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        return self()[index]

    def item(self, i: int) -> torch.Tensor:
        """tensor[i], reading nothing else."""
        with safe_open(str(self.file), framework="pt") as handle:
            tensor: torch.Tensor = handle.get_slice(self.key)[i]
        return tensor


@dataclass(frozen=True)
class PartReader:
    """Reads one expert's part of a fused parameter."""

    read: Reader
    part: Part

    def __call__(self) -> torch.Tensor:
        expert = self.part.expert
        return self.part.of(self.read.item(expert) if isinstance(self.read, SafetensorsReader) else self.read()[expert])


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


GENERATION = "generation_config.json"
"""Beside config.json: how transformers generates with the model, and which tokens end a text."""


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


def match_names(
    source: str,
    path: Path,
    submodel: Submodel,
    stored: Mapping[str, Reader],
    tokenizer: Any,
    files: tuple[Path, ...],
    dtype: torch.dtype | None = None,
) -> Checkpoint:
    """Match the names in the file with the model's parameters and turn Conv1D weights round.

    Args:
        dtype: of the values that the readers give; None looks at the first.

    Raises:
        AwqTrtError: a tensor is missing, or has not the shape that the configuration says.
    """
    config = submodel.config
    model = empty_model(config)
    transposed = transposed_weights(model)
    parameters = dict(model.named_parameters())
    names = [*parameters, *(buffers := persistent_buffers(model))]
    stored_names = StoredNames(model, submodel)
    found = stored_names.find(stored)
    if missing := [n for n in parameters if n not in found]:
        stored = _converted_by_transformers(source, path, type(model), missing[0])
        found = stored_names.find_loaded(stored)
    if missing := [n for n in parameters if n not in found]:
        raise AwqTrtError(f"{source}: the tensor {missing[0]} is not in the checkpoint; download it again.")
    readers: dict[str, Reader] = {}
    for name in names:
        if name not in found:
            continue
        place = found[name]
        read = stored[place.key]
        if isinstance(read, SafetensorsReader) and name not in buffers:
            shape = parameters[name].shape if place.part is None else place.part.shape
            expected = tuple(shape)[::-1] if name in transposed else tuple(shape)
            if read.shape != expected:
                raise AwqTrtError(
                    f"{source}: tensor {place.key} has shape {list(read.shape)}, config.json says {list(expected)}; "
                    "one of the two is of another model."
                )
        whole = _transposing(read) if name in transposed else read
        readers[name] = whole if place.part is None else PartReader(read, place.part)
    first = readers[names[0]]().dtype if dtype is None and names else dtype
    activations = first if first in (torch.float16, torch.bfloat16) else torch.float16
    if model.main_input_name != "input_ids":
        tokenizer = None  # of another part, or of what the model's outputs are made into
    keys = stored_names.other_keys
    return Checkpoint(source, config, activations, readers, tokenizer, transposed, files, keys, submodel.note)


def _converted_by_transformers(source: str, path: Path, cls: Any, first_missing: str) -> dict[str, Reader]:
    """Readers for a checkpoint that transformers computes something of while loading (transposes, say): in memory.

    Raises:
        AwqTrtError: tensors are missing even so.
    """
    trouble = f"{source}: the tensor {first_missing} is not in the checkpoint; download it again"
    if not path.is_dir():
        raise AwqTrtError(f"{trouble}.")
    try:
        model, info = cls.from_pretrained(path, dtype="auto", output_loading_info=True)
    except Exception as error:
        raise AwqTrtError(f"{trouble} (transformers could not load it either: {error}).") from error
    if info["missing_keys"]:
        raise AwqTrtError(f"{trouble} ({len(info['missing_keys'])} tensors are missing).")
    parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return {name: tensor.detach for name, tensor in parameters.items()}


def _transposing(read: Reader) -> Reader:
    return lambda: read().t().contiguous()


def transposed_weights(model: torch.nn.Module) -> frozenset[str]:
    """Weights that a file holds as [in, out] and `empty_model` as [out, in]."""
    return frozenset(f"{n}.weight" for n, m in model.named_modules() if getattr(m, "was_conv1d", False))


def persistent_buffers(model: torch.nn.Module) -> list[str]:
    """Names of the buffers that a state dict holds."""
    kept = model.state_dict(keep_vars=True)
    return [name for name, _ in model.named_buffers() if name in kept]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, every new parameter goes to the meta device at once; buffers (rotary tables) are computed for real.

    Parameters are given no first values: on the meta device that takes a second for 30 blocks and does nothing.
    """
    register = torch.nn.Module.register_parameter
    initialize = transformers.PreTrainedModel.initialize_weights

    def on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a parameter that is already there is a tied one: keep it
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    transformers.PreTrainedModel.initialize_weights = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        transformers.PreTrainedModel.initialize_weights = initialize  # type: ignore[method-assign]
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def empty_model(
    config: transformers.PretrainedConfig, *, attn_implementation: str | None = None
) -> transformers.PreTrainedModel:
    """The model of a configuration in eval mode: fp32 parameters on the meta device, buffers with their values.

    Conv1D layers (GPT-2) become nn.Linear; such a Linear carries the mark `was_conv1d`. Fused experts become a
    nn.Linear for each expert and projection (experts.py).

    Raises:
        AwqTrtError: transformers has no class for the architecture.
    """
    cls = model_class(config)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with _parameters_on_meta():
        model = cls._from_config(config, dtype=torch.float32, **options)
        for parent in list(model.modules()):
            for child_name, child in list(parent.named_children()):
                if isinstance(child, Conv1D):
                    linear = torch.nn.Linear(child.nx, child.nf, bias=True)
                    linear.was_conv1d = True  # type: ignore[assignment]
                    setattr(parent, child_name, linear)
        split_experts(model)
    return model.eval()
