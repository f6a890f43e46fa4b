"""Every parameter of the model has its tensor in the file, and every tensor of the file is a parameter of the model.

Both as transformers' `from_pretrained` would have it, which only reports what it does not use. What it lists as
ignorable is ignored here, too, and so are heads of other tasks, which are noted. Anything else that is left over (a
bias, a layer, scales of quantized weights) means that the model would compute something else than the one stored.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from awq_trt.checkpoint.model import empty_model, transposed_weights
from awq_trt.checkpoint.names import Place, StoredNames, parameter_readers
from awq_trt.checkpoint.reader import Checkpoint, Reader
from awq_trt.checkpoint.safetensors import SafetensorsReader
from awq_trt.checkpoint.submodels import Submodel
from awq_trt.errors import AwqTrtError, brief
from awq_trt.layout import DTYPES

OLD_MASKS = re.compile(r"\.(attn|attention|self_attention)\.(bias|masked_bias|causal_mask)$")
"""Causal masks, [1, 1, n, n], and what stood in their place, a scalar: transformers stored them in some families. Not
biases, which have one dimension."""

PEFT = re.compile(r"^base_model\.model\.|\.base_layer\.|\.lora_(A|B|embedding_A|embedding_B)\.|\.modules_to_save\.")
"""In the names of a model that PEFT has wrapped."""


@dataclass(frozen=True)
class Match:
    """A model and the tensors of a file that are its parameters."""

    model: transformers.PreTrainedModel  # empty
    submodel: Submodel  # with the configuration of this model: untied, where the file holds two different tensors
    names: StoredNames
    found: Mapping[str, Place]  # parameter or buffer -> where it is


def match(source: str, submodel: Submodel, stored: Mapping[str, Reader]) -> Match:
    """Match the names in a file with the parameters of a model. Some may be missing.

    Parameters that share their weight are read from whichever of them is stored. Where two of them are stored with
    different values, transformers does not tie them (`PreTrainedModel.tie_weights`), whatever config.json says, and
    neither does this.

    Raises:
        AwqTrtError: names of a model that PEFT has wrapped; two tensors for what can only be one parameter.
    """
    if wrapped := [key for key in stored if PEFT.search(key)]:
        raise AwqTrtError(
            f"{source}: tensor {wrapped[0]} is of a model that PEFT has wrapped, with its adapter beside it or lost. "
            "Load it with PEFT, call merge_and_unload() and save_pretrained(), and take what that saves."
        )
    model = empty_model(submodel.config)
    names = StoredNames(model, submodel)
    found = names.find(stored)
    tied = _tied(model)
    if pair := _different(tied, found, stored):
        config = copy.deepcopy(submodel.config)
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
        submodel = replace(submodel, config=config)
        model = empty_model(config)
        names = StoredNames(model, submodel)
        found = names.find(stored)
        if any(set(pair) <= set(group) for group in _tied(model)):
            first, second = (found[name][0] for name in pair)
            raise AwqTrtError(
                f"{source}: {first} and {second} are one parameter of {type(model).__name__}, and the file holds two "
                "different tensors for it; one of the two is of another model."
            )
    for group in tied:
        there = next((name for name in group if name in found), None)
        found |= {} if there is None else {name: found[there] for name in group if name not in found}
    return Match(model, submodel, names, found)


def _tied(model: nn.Module) -> list[list[str]]:
    """Names of one and the same parameter, where it has several."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _different(
    tied: list[list[str]], found: Mapping[str, Place], stored: Mapping[str, Reader]
) -> tuple[str, str] | None:
    """Two names of one parameter that are stored with different values."""
    for group in tied:
        there = [name for name in group if name in found and found[name][1] is None]
        for name in there[1:]:
            if not _equal(stored[found[there[0]][0]], stored[found[name][0]]):
                return there[0], name
    return None


def _equal(a: Reader, b: Reader) -> bool:
    """Whether two tensors have the same values; as little of them is read as it takes to see that they have not."""
    if a is b:
        return True
    first, second = a(), b()
    if first.shape != second.shape:
        return False
    step = max(1, (1 << 22) // max(first[:1].numel(), 1)) if first.dim() else 1
    pieces = zip(first.split(step), second.split(step), strict=True) if first.dim() else [(first, second)]
    return all(torch.equal(x.float(), y.float()) for x, y in pieces)


def unexpected(match: Match, stored: Mapping[str, Reader], keys: Iterable[str]) -> tuple[list[str], list[str]]:
    """Of keys of a file, those that are no parameter of the model.

    Left out are: what transformers itself ignores (`_keys_to_ignore_on_load_unexpected` of the class, rotary
    frequencies, position ids, buffers); causal masks that old versions of it stored; of a part, the rest of the whole.

    Returns:
        Those that nothing reads; those that only another class of the family reads (a pooler, another task's head).
    """
    whole = match.names.whole
    used = {key for key, _ in whole.find(stored).values()}
    rest = sorted(key for key in keys if key not in used)
    ignored = set(whole.model._keys_to_ignore_on_load_unexpected or ())
    ignored |= set(match.model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in whole.model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        ignored.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        ignored.add(r"(^|\.)position_ids$")
    rest = [k for k in rest if not any(re.search(p, whole.renamed(k)) for p in ignored) and not _is_mask(k, stored[k])]
    once = [key for key in rest if not whole.find([key])]  # not a second tensor for a parameter
    elsewhere: set[str] = set()
    for names in _relatives(match.submodel.whole, type(whole.model)) if once else ():
        elsewhere |= {key for key, _ in names.find(once).values()}
    return [key for key in rest if key not in elsewhere], sorted(elsewhere)


def _is_mask(key: str, read: Reader) -> bool:
    shape = read.shape if isinstance(read, SafetensorsReader) else None
    return shape is not None and len(shape) in (0, 4) and OLD_MASKS.search(f".{key}") is not None


def _relatives(config: transformers.PretrainedConfig, cls: type) -> Iterable[StoredNames]:
    """The classes that transformers builds from a configuration besides `cls`: the base model, those of other tasks."""
    for name, other in inspect.getmembers(sys.modules[cls.__module__], inspect.isclass):
        if not issubclass(other, transformers.PreTrainedModel) or name.endswith("PreTrainedModel"):
            continue
        if other.config_class is type(config) and other is not cls:
            config = copy.deepcopy(config)
            config.architectures = [name]
            try:
                yield StoredNames(empty_model(config))
            except Exception:  # a class that needs more than a configuration
                continue


def refuse_unexpected(source: str, match: Match, stored: Mapping[str, Reader], keys: Iterable[str]) -> str:
    """Stop where tensors are left over.

    Returns:
        What to note of tensors that only another class of the family reads; "" where there are none.

    Raises:
        AwqTrtError: `unexpected` tensors.
    """
    nobody, elsewhere = unexpected(match, stored, keys)
    name = type(match.names.whole.model).__name__
    if nobody:
        raise AwqTrtError(
            f"{source}: {len(nobody)} of the stored tensors would be left out, because {name} has no place for them as "
            f"config.json describes it: {_few(nobody)}. Without them this is another model. Most likely config.json is "
            "of another model, or lacks what announces them (attention_bias, num_hidden_layers, quantization_config); "
            "get the config.json that belongs to these files. Tensors that are of no use have to be taken out of the "
            "file."
        )
    return f"{_few(elsewhere)}: of another task than {name}, left out" if elsewhere else ""


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def match_names(
    source: str, path: Path, submodel: Submodel, stored: Mapping[str, Reader], tokenizer: Any, files: tuple[Path, ...]
) -> Checkpoint:
    """A checkpoint in float.

    Raises:
        AwqTrtError: a tensor is missing or left over, or has not the shape that the configuration says; the tokenizer
            has more tokens than the model.
    """
    found = match(source, submodel, stored)
    model, submodel = found.model, found.submodel
    parameters = [n for n, _ in model.named_parameters()]
    if missing := [n for n in parameters if n not in found.found]:
        stored = _converted_by_transformers(source, path, found, stored, missing[0])
        found = replace(found, found=found.names.find(stored, loaded=True))
        note = ""
    else:
        note = refuse_unexpected(source, found, stored, stored)
    if missing := [n for n in parameters if n not in found.found]:
        raise AwqTrtError(f"{source}: the tensor {missing[0]} is not in the checkpoint; download it again.")
    readers = parameter_readers(source, model, found.found, stored)
    if model.main_input_name != "input_ids":
        tokenizer = None  # it is of another part, or of the outputs
    if path.is_dir():  # a GGUF file's vocabulary is what says how large the embedding is
        check_tokenizer(source, model, tokenizer)
    return Checkpoint(
        source,
        submodel.config,
        activation_dtype(submodel.config, model, found.found, stored),
        readers,
        tokenizer,
        transposed_weights(model),
        files,
        {name: key for name in sorted(found.names.names) if (key := found.names.key(name)) != name},
        "; ".join(text for text in (submodel.note, note) if text),
    )


def activation_dtype(
    config: transformers.PretrainedConfig,
    model: nn.Module,
    found: Mapping[str, Place],
    stored: Mapping[str, Reader],
) -> torch.dtype:
    """The dtype that the engine computes in: what config.json says the model runs in, else what most of the weights of
    its linear layers are stored in, if that is a 16-bit one; else float16."""
    sizes: Counter[torch.dtype] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in found:
            read = stored[found[f"{name}.weight"][0]]
            sizes[getattr(read, "dtype", None) or read().dtype] += module.weight.numel()
    candidates: tuple[Any, ...] = (config.dtype, *(dtype for dtype, _ in sizes.most_common(1)))
    return next((dtype for dtype in candidates if dtype in DTYPES.values()), torch.float16)


def check_tokenizer(source: str, model: Any, tokenizer: Any) -> None:
    """Every token has a row in the embedding; it may have more rows than there are tokens.

    A placeholder of images or sound ("<image_soft_token>" of Gemma 3, whose text models have no row for it) is none
    that a text holds, nor is padding; and transformers gives a tokenizer of bytes, which knows every text, a token for
    what it does not know.

    Raises:
        AwqTrtError: a token has none.
    """
    rows = len(model.get_input_embeddings().weight) if tokenizer is not None else 0
    if tokenizer is None or len(tokenizer) <= rows:
        return
    special = tokenizer.special_tokens_map.items()
    unread = {text for key, text in special if re.match("(image|audio|video|boi|eoi|boa|eoa|pad|unk)_", key)}
    beyond = {text: i for text, i in tokenizer.get_vocab().items() if i >= rows and text not in unread}
    if beyond:
        token, index = min(beyond.items(), key=lambda item: item[1])
        raise AwqTrtError(
            f"{source}: the tokenizer has {len(beyond)} tokens that the model has no embedding for (token {token!r} is "
            f"number {index}, the embedding has {rows} rows). The tokenizer is of another model, or tokens were added "
            "without resize_token_embeddings; put the tokenizer that belongs to this model beside it."
        )


def _converted_by_transformers(
    source: str, path: Path, match: Match, stored: Mapping[str, Reader], first_missing: str
) -> dict[str, Reader]:
    """Readers for a checkpoint that transformers computes something of while loading (transposes, say): in memory."""
    trouble = f"{source}: the tensor {first_missing} is not in the checkpoint; download it again"
    if not path.is_dir():
        raise AwqTrtError(f"{trouble}.")
    cls: Any = type(match.names.whole.model)
    config = match.submodel.whole if match.submodel.prefixes else match.submodel.config
    dtypes = {read.dtype for read in stored.values() if isinstance(read, SafetensorsReader)} & set(DTYPES.values())
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    try:
        model, info = cls.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
    except Exception as error:
        raise AwqTrtError(f"{trouble} (transformers could not load it either: {brief(error)}).") from error
    if info["missing_keys"]:
        raise AwqTrtError(f"{trouble} ({len(info['missing_keys'])} tensors are missing).")
    if info["unexpected_keys"]:
        left = sorted(info["unexpected_keys"])
        raise AwqTrtError(
            f"{source}: {len(left)} of the stored tensors would be left out, because {cls.__name__} has no place for "
            f"them as config.json describes it: {_few(left)}. Get the config.json that belongs to these files."
        )
    parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return {name: tensor.detach for name, tensor in parameters.items()}
