"""Rows as awq_trt.json holds them under "layers"."""

from __future__ import annotations

from typing import Any


def layer(name: str, **changes: Any) -> dict[str, Any]:
    """One row of awq_trt.json."""
    row = {
        "name": name,
        "alpha": 0.5,
        "folded_into": "model.layers.0.norm",
        "error_rounding": 0.2,
        "error": 0.1,
        "clip": 0.9,
        "tokens": 4096,
        "largest_activation": 10.0,
    }
    return {**row, **changes}


MODEL = [
    layer(f"model.layers.{i}.{n}", error=0.1 + 0.01 * i, alpha=i / 10) for i in range(4) for n in ("q_proj", "up_proj")
]
