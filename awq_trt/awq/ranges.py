"""How large the values of a model become, because float16 ends at 65504 and bfloat16 does not.

The calibration computes in fp32 and notices nothing; ONNX Runtime computes a float16 graph in fp32 on a CPU and notices
nothing either; TensorRT gives NaN. So what every layer and norm reads and gives is looked at: sums of a residual stream
are what norms read and blocks give, products of a gate are what the next layer reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from awq_trt.errors import AwqTrtError

LARGEST_FLOAT16 = 65504.0
NEAR = 0.25
"""Part of the float16 range from which on a value is near its end: other texts than this one reach further."""


@dataclass
class Ranges:
    """The largest |value| seen so far, and where."""

    largest: float = 0.0
    module: str = ""  # that read it or gave it

    @contextmanager
    def watching(self, root: nn.Module, prefix: str = "") -> Iterator[None]:
        """Inside, `root` and every module in it that has parameters of its own are looked at when they are called.

        Args:
            prefix: what stands before the names of its modules, "model.layers.3." say.
        """
        modules = {f"{prefix}{name}".rstrip("."): m for name, m in root.named_modules() if m is root or m._parameters}
        hooks = [module.register_forward_hook(partial(self._look, name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def refuse_float16(self, source: str, dtype: torch.dtype | str) -> None:
        """Where the activations of the engine are float16 and a value is beyond its end, say so.

        Raises:
            AwqTrtError: it is.
        """
        if str(dtype).removeprefix("torch.") == "float16" and self.largest > LARGEST_FLOAT16:
            raise AwqTrtError(
                f"{source}: activations reach {self.largest:.4g} in {self.module}, and float16 ends at "
                f'{LARGEST_FLOAT16:.0f}: the engine would give NaN. Use dtype="bfloat16".'
            )

    def _look(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The forward hook: of several values a module reads or gives, the first is the hidden states. NaN is left out:
        what it came from was Inf."""
        for value in (*args[:1], output[0] if isinstance(output, tuple) and output else output):
            if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.is_meta:
                continue
            value = value.detach()
            if value.isnan().any():
                value = value[~value.isnan()]
            if value.numel():
                largest = max(abs(float(bound)) for bound in value.aminmax())
                if largest > self.largest:
                    self.largest, self.module = largest, name


def refuse_large_weights(block: nn.Module, prefix: str, source: str, dtype: torch.dtype) -> None:
    """Where weights are to become float16, look whether they fit.

    Args:
        prefix: what stands before the names of the block's parameters. dtype: of the engine.

    Raises:
        AwqTrtError: one of them does not.
    """
    for name, weight in block.named_parameters() if dtype == torch.float16 else ():
        largest = max(abs(float(bound)) for bound in weight.detach().aminmax()) if weight.numel() else 0.0
        if largest > LARGEST_FLOAT16:
            raise AwqTrtError(
                f"{source}: the weight {prefix}{name} holds {largest:.4g} itself, and float16 ends at "
                f'{LARGEST_FLOAT16:.0f}. Use dtype="bfloat16".'
            )
