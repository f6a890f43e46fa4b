"""How to quantize, as a user says it: one frozen set of options with defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """What `quantize` is told. What is None follows from `effort`, or from the model."""

    method: str = "awq"  # "awq" searches scales on calibration inputs; "rtn" rounds to nearest and needs none
    effort: str = "default"  # "fast", "default" or "best": search.EFFORTS
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
