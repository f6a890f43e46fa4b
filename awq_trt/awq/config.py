"""How to quantize, as a user says it: one frozen set of options with defaults."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from awq_trt.checkpoint.writer import CARRY_PRE_SCALES, SAVE_FORMATS
from awq_trt.errors import AwqTrtError
from awq_trt.layout import GROUP_SIZES, padded_features, unsupported_reason

EFFORTS = {
    "fast": {"calibration_samples": 8, "clip": True, "error_compensation": False},
    "default": {"calibration_samples": 16, "clip": True, "error_compensation": True},
    "best": {"calibration_samples": 64, "clip": True, "error_compensation": True},
}
"""What fields of the configuration are where it does not say; windows, if there are as many."""


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """What `quantize` is told. What is None follows from `effort`, or from the model."""

    method: str = "awq"  # "awq" searches scales on calibration inputs; "rtn" rounds to nearest and needs none
    effort: str = "default"  # "fast", "default" or "best": EFFORTS
    clip: bool | None = None  # search the range of every group (None: as the effort says)
    error_compensation: bool | None = None  # round column by column, GPTQ (None: as the effort says)
    refit: bool = False  # with error compensation: least-squares scales after rounding; fits the calibration text only
    group_size: int | None = None  # 32, 64, 128, -1 for the whole row; None: the largest that divides every in_features
    symmetric: bool = False  # no zero points
    pre_scale: bool = True  # allow scales that no operator before the layer can absorb, if `save_format` carries them
    lm_head: str = "float"  # "int4" quantizes the layer that makes logits too, untied from the embedding
    save_format: str = "awq"  # a key of writer.SAVE_FORMATS
    calibration: str | Path | None = None  # text file, directory, `datasets` id, .npz; None: the text in the package
    calibration_samples: int | None = None  # windows (None: as the effort says)
    calibration_length: int = 512  # tokens of a window
    device: str = "auto"  # "cpu", "cuda", or "auto": the GPU where there is one
    compute_dtype: torch.dtype = torch.float32  # of the calibration forward, or bfloat16; Hessians are fp32 always

    def resolved(self) -> QuantizeConfig:
        """The same, with what `effort` and `save_format` decide filled in; `group_size` may still be None.

        Raises:
            AwqTrtError: a value that is not allowed.
        """
        allowed = {
            "method": ("awq", "rtn"),
            "effort": tuple(EFFORTS),
            "group_size": (None, -1, *GROUP_SIZES),
            "lm_head": ("float", "int4"),
            "save_format": tuple(SAVE_FORMATS),
            "compute_dtype": (torch.float32, torch.bfloat16),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise AwqTrtError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, values))}.")
        if self.device != "auto" and self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise AwqTrtError(f"device={self.device!r} is not 'auto', 'cpu' or 'cuda'.")
        for name in ("calibration_samples", "calibration_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise AwqTrtError(f"{name}={value}: at least 1, please.")
        decided: dict[str, Any] = {n: v for n, v in EFFORTS[self.effort].items() if getattr(self, n) is None}
        return replace(self, **decided, pre_scale=self.pre_scale and self.save_format in CARRY_PRE_SCALES)

    def group(self, in_features: int) -> int:
        """Columns per scale for a layer with `in_features` columns."""
        return in_features if self.group_size in (None, -1) else self.group_size

    def unsupported_reason(self, linear: nn.Linear, dtype: torch.dtype, *, padded: bool = False) -> str | None:
        """None where the layer can be INT4 with activations of `dtype`; `padded`: out_features may be rounded up."""
        n = padded_features(linear.out_features) if padded else linear.out_features
        k = linear.in_features
        return unsupported_reason(n, k, self.group(k), str(dtype).removeprefix("torch."))
