"""One model of a checkpoint that holds several: a tower of CLIP, the encoder of Whisper, the language model of a
vision-language model. Each is quantized and exported for itself, as the transformers class that it is.

Its tensors are found by way of the whole: transformers' own class of the whole model says which tensor of the file is
which parameter of it (names.py), and which of its modules the part is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn

from awq_trt.checkpoint.model import empty_model, model_class, name_architecture
from awq_trt.errors import AwqTrtError, brief

Prefixes = tuple[tuple[str, str], ...]

PARTS: dict[str, dict[str, tuple[str, Prefixes]]] = {
    "CLIPModel": {
        "text": (
            "CLIPTextModelWithProjection",
            (("text_model.", "text_model."), ("text_projection.", "text_projection.")),
        ),
        "vision": (
            "CLIPVisionModelWithProjection",
            (("vision_model.", "vision_model."), ("visual_projection.", "visual_projection.")),
        ),
    },
    "WhisperForConditionalGeneration": {"encoder": ("WhisperEncoder", (("model.encoder.", ""),))},
    "WhisperModel": {"encoder": ("WhisperEncoder", (("encoder.", ""),))},
}
"""Architecture -> part -> its transformers class, and how its names begin in the whole model and in the part."""


@dataclass(frozen=True)
class Submodel:
    """What is taken of a checkpoint."""

    config: transformers.PretrainedConfig  # of the part, or of the whole
    whole: transformers.PretrainedConfig  # what config.json says, of the whole model
    prefixes: Prefixes = ()  # how names begin in the whole model, and in the part; () where they are the same
    note: str = ""  # what was left out, for people

    def name(self, whole: str) -> str | None:
        """The part's name of a parameter of the whole model; None for what is not of the part."""
        if not self.prefixes:
            return whole
        return next((new + whole.removeprefix(old) for old, new in self.prefixes if whole.startswith(old)), None)


def choose(config: transformers.PretrainedConfig, source: str, part: str | None = None) -> Submodel:
    """What to take of a checkpoint with this configuration.

    Args:
        source: for messages. part: "text", "vision", "encoder"; None where the checkpoint holds one model, or one that
            can be exported.

    Raises:
        AwqTrtError: there is a choice and none was made; no such part; no class for the part.
    """
    name_architecture(config)
    name = config.architectures[0] if config.architectures else ""
    parts = PARTS.get(name, {})
    text = getattr(config, "text_config", None)
    others = hasattr(config, "vision_config") or hasattr(config, "audio_config")
    if not parts and text is not None and others and isinstance(config, model_class(config).config_class):
        cls: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
        if cls is None or cls.__name__ == name:
            raise AwqTrtError(
                f"{source}: {name} is more than one model, and transformers {transformers.__version__} has no class "
                "for its language model alone, which is what could be exported."
            )
        parts = {"text": (cls.__name__, ())}
    if part is None and len(parts) > 1:
        raise AwqTrtError(
            f"{source}: {name} is several models, and an engine is made of one: choose with "
            f"{' or '.join(f'part={part!r}' for part in parts)}."
        )
    if part is not None and part not in parts:
        raise AwqTrtError(f"{source}: {name} has no part {part!r}{': it has ' if parts else ''}{', '.join(parts)}.")
    if not parts:
        return Submodel(_own(config, name) if name else config, config)
    chosen = part or next(iter(parts))
    architecture, prefixes = parts[chosen]
    own = _own(config, architecture)
    note = f"the {chosen} part of {name}, as {architecture}; the rest is left out"
    return Submodel(own, config, prefixes or _language_model(config, own, source), note)


def _language_model(whole: transformers.PretrainedConfig, text: transformers.PretrainedConfig, source: str) -> Prefixes:
    """How the names of a vision-language model's language model begin in the whole, and in its own class.

    The whole has the language model's base (LlamaModel) or all of it (LlamaForCausalLM) as a module of the same class,
    somewhere, and a head.

    Raises:
        AwqTrtError: transformers cannot build the whole, or there is not just one such module.
    """
    part = empty_model(text)
    try:
        model = empty_model(whole)
    except Exception as error:  # a vision tower that another package has
        raise AwqTrtError(
            f"{source}: transformers cannot build {(whole.architectures or ['the model'])[0]}: {brief(error)}"
        ) from error
    name = part.base_model_prefix
    bases = [n for n, m in model.named_modules() if type(m) is type(getattr(part, name, None))]
    heads = [_path(model, model.get_output_embeddings()), _path(part, part.get_output_embeddings())]
    if len(bases) != 1 or None in heads:
        raise AwqTrtError(
            f"{source}: {type(model).__name__} has {len(bases)} modules that could be the language model "
            f"{type(part).__name__} alone, which is what could be exported."
        )
    return ((f"{bases[0]}.", f"{name}."), (f"{heads[0]}.", f"{heads[1]}."))


def _path(model: nn.Module, module: Any) -> str | None:
    return next((n for n, m in model.named_modules() if m is module and n), None)


def _own(config: transformers.PretrainedConfig, architecture: str) -> transformers.PretrainedConfig:
    """The configuration that an architecture is built from: this one, or the one in it that is of its type."""
    whole = copy.deepcopy(config)
    whole.architectures = [architecture]
    wanted = model_class(whole).config_class
    if isinstance(config, wanted):
        whole.is_encoder_decoder = whole.is_encoder_decoder and not architecture.endswith("Encoder")
        return whole
    parts = [getattr(whole, key) for key in config.sub_configs]
    own = next((part for part in parts if isinstance(part, wanted)), None)
    if own is None:
        return config
    own.architectures = [architecture]
    own.dtype = config.dtype
    for key in ("tie_word_embeddings", "projection_dim"):
        if key in config.__dict__ and key in own.__dict__:
            setattr(own, key, getattr(config, key))
    return own
