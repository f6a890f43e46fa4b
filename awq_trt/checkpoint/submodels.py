"""One model of a checkpoint that holds several: a tower of CLIP, the encoder of Whisper, the language model of a
vision-language model. Each is quantized and exported for itself, as the transformers class that it is.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from typing import Any

import transformers

from awq_trt.errors import AwqTrtError

Prefixes = tuple[tuple[str, str], ...]

PARTS: dict[str, dict[str, tuple[str, Prefixes]]] = {
    "CLIPModel": {
        "text": ("CLIPTextModelWithProjection", ()),
        "vision": ("CLIPVisionModelWithProjection", ()),
    },
    "WhisperForConditionalGeneration": {"encoder": ("WhisperEncoder", (("model.encoder.", ""),))},
    "WhisperModel": {"encoder": ("WhisperEncoder", (("encoder.", ""), ("model.encoder.", "")))},
}
"""Architecture -> part -> its transformers class, and what stands before its names in the file (see `Submodel`)."""

LANGUAGE: Prefixes = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("lm_head.", "lm_head."),
)
"""Where the files of vision-language models have the names of their language model."""


@dataclass(frozen=True)
class Submodel:
    """What is taken of a checkpoint."""

    config: transformers.PretrainedConfig  # of the part, or of the whole
    prefixes: Prefixes = ()  # how names begin in the file, and in the part; () where they are the same
    note: str = ""  # what was left out, for people

    def name(self, key: str) -> str | None:
        """A name of the file as the part has it; None for what is not of the part."""
        if not self.prefixes:
            return key
        return next((new + key.removeprefix(old) for old, new in self.prefixes if key.startswith(old)), None)


def model_class(config: transformers.PretrainedConfig) -> Any:
    """The transformers class of a configuration's architecture; it need not be one of those that transformers lists.

    Raises:
        AwqTrtError: there is none.
    """
    name = config.architectures[0] if config.architectures else None
    found = getattr(transformers, name or "", None)
    if found is None and name is not None:
        module = type(config).__module__.replace("configuration_", "modeling_")
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            found = None
    if found is None:
        raise AwqTrtError(
            f"architecture {name!r} (model_type {config.model_type!r}) is not one that transformers "
            f"{transformers.__version__} has; update transformers, or convert the model to a known architecture."
        )
    return found


def choose(config: transformers.PretrainedConfig, source: str, part: str | None = None) -> Submodel:
    """What to take of a checkpoint with this configuration.

    Args:
        source: for messages. part: "text", "vision", "encoder"; None where the checkpoint holds one model, or one that
            can be exported.

    Raises:
        AwqTrtError: there is a choice and none was made; no such part; no class for the part.
    """
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
        parts = {"text": (cls.__name__, LANGUAGE)}
    if part is None and len(parts) > 1:
        raise AwqTrtError(
            f"{source}: {name} is several models, and an engine is made of one: choose with "
            f"{' or '.join(f'part={part!r}' for part in parts)}."
        )
    if part is not None and part not in parts:
        raise AwqTrtError(f"{source}: {name} has no part {part!r}{': it has ' if parts else ''}{', '.join(parts)}.")
    if not parts:
        return Submodel(_own(config, name) if name else config)
    chosen = part or next(iter(parts))
    architecture, prefixes = parts[chosen]
    own = _own(config, architecture)
    return Submodel(own, prefixes, f"the {chosen} part of {name}, as {architecture}; the rest is left out")


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
