"""Which tensor of a quantized checkpoint is which parameter of the model; nothing in the file is passed over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from safetensors import safe_open

from awq_trt.checkpoint.formats import OPTIONAL_PARTS, PARTS
from awq_trt.checkpoint.model import persistent_buffers
from awq_trt.checkpoint.names import Place, StoredNames
from awq_trt.checkpoint.schemes import START_AGAIN
from awq_trt.checkpoint.submodels import Submodel
from awq_trt.errors import AwqTrtError


def match_layers(
    model: transformers.PreTrainedModel, files: Mapping[str, Path], format: str, source: str, submodel: Submodel
) -> dict[str, str]:
    """Quantized layer of the model -> its name in the file.

    Args:
        model: empty. files: tensor name -> file. format: a key of formats.PARTS. source: for messages.
        submodel: what of the file the model is.

    Raises:
        AwqTrtError: there is none; one is no linear layer of the model, or shares its weight with another parameter, or
            has tensors that the format does not know.
    """
    marker = PARTS[format][1 if format == "modelopt" else 0]
    files = {name: file for name, file in files.items() if submodel.name(name) is not None}
    stored = [name.removesuffix(f".{marker}") for name in files if name.endswith(f".{marker}")]
    if not stored:
        raise AwqTrtError(f"{source}: says it is quantized, but no tensor is called *.{marker}; download it again.")
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    names = StoredNames(model, submodel)
    layers: dict[str, str] = {}
    for name in stored:
        found = (names.parameter(f"{name}.weight") or "").removesuffix(".weight")
        if found not in linears:
            raise AwqTrtError(
                f"{source}: the quantized layer {name} is no linear layer of {type(model).__name__} as transformers "
                f"{transformers.__version__} builds it (fused projections or experts, or another model). {START_AGAIN}"
            )
        layers[found] = name
    _refuse_tied(model, layers, source)
    _refuse_unknown(files, set(layers.values()), format, source)
    return layers


def _refuse_tied(model: transformers.PreTrainedModel, layers: Mapping[str, str], source: str) -> None:
    """A quantized lm_head cannot be the embedding table too."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for tied in owners.values():
        both = [n for n in tied if n.removesuffix(".weight") in layers]
        if both and len(tied) > 1:
            raise AwqTrtError(
                f"{source}: {both[0]} is quantized, and it is the same parameter as "
                f"{next(n for n in tied if n != both[0])}. If the checkpoint holds both, set "
                '"tie_word_embeddings": false in its config.json; else start from the checkpoint before quantization.'
            )


def _refuse_unknown(files: Mapping[str, Path], layers: set[str], format: str, source: str) -> None:
    """Every tensor of a quantized layer is used (no input_scale is lost), every packed tensor is part of one."""
    parts = {*PARTS[format], *OPTIONAL_PARTS.get(format, ())}
    for name in files:
        layer, _, part = name.rpartition(".")
        if layer in layers and part not in parts | {"bias"}:
            raise AwqTrtError(f"{source}: tensor {name} has no meaning in {format}. {START_AGAIN}")
        if layer not in layers and part in parts - {"weight"}:
            raise AwqTrtError(f"{source}: tensor {name} belongs to no quantized linear layer. {START_AGAIN}")


def match_floats(
    model: transformers.PreTrainedModel,
    files: Mapping[str, Path],
    layers: Mapping[str, str],
    source: str,
    submodel: Submodel,
) -> dict[str, Place]:
    """Parameter or buffer that is stored in float -> where it is in the file.

    Args:
        layers: what `match_layers` gave.

    Raises:
        AwqTrtError: a parameter is missing; a layer has a bias that the model does not, other than the zeros that
            AutoGPTQ writes for every layer.
    """
    parameters = [n for n, _ in model.named_parameters() if n.removesuffix(".weight") not in layers]
    wanted = {*parameters, *persistent_buffers(model)}
    found = {n: place for n, place in StoredNames(model, submodel).find(files).items() if n in wanted}
    if missing := [n for n in parameters if n not in found]:
        raise AwqTrtError(f"{source}: the tensor {missing[0]} is missing; download the checkpoint again.")
    for layer, stored in layers.items():
        bias = f"{stored}.bias"
        if bias in files and f"{layer}.bias" not in found and not _is_zero(files[bias], bias):
            raise AwqTrtError(
                f"{source}: tensor {bias} is not zero, and {type(model).__name__} has no bias there: config.json and "
                "the weights belong to different models."
            )
    return found


def _is_zero(file: Path, name: str) -> bool:
    with safe_open(str(file), framework="pt") as handle:
        return not bool(handle.get_tensor(name).any())
