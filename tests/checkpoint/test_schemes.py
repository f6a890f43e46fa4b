"""Which configurations are read as what, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest

from awq_trt.checkpoint.schemes import Scheme, read_scheme
from awq_trt.errors import AwqTrtError

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
MODELOPT_AWQ = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 128}


def packed(**group: Any) -> dict[str, Any]:
    return PACKED | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4} | group}}


@pytest.mark.parametrize(
    ("quantization", "scheme"),
    [
        (AWQ, Scheme("awq", "awq-gemm", 64)),
        (AWQ | {"version": "GEMV_FAST"}, Scheme("awq", "awq-gemv_fast", 64)),
        (AWQ | {"checkpoint_format": "gemv"}, Scheme("awq", "awq-gemv", 64)),
        (GPTQ, Scheme("gptq", "gptq", 64)),
        (GPTQ | {"checkpoint_format": "gptq_v2", "desc_act": True}, Scheme("gptq", "gptq_v2", 64)),
        (GPTQ | {"dynamic": {"-:lm_head": {}, "+:.*down.*": {"group_size": 32}}}, Scheme("gptq", "gptq", 64)),
        (packed(), Scheme("compressed-tensors", "pack-quantized", None)),
        (PACKED | {"config_groups": {"W4A16": ["Linear"]}}, Scheme("compressed-tensors", "pack-quantized", None)),
        (
            packed(format="pack-quantized") | {"format": "mixed-precision"},
            Scheme("compressed-tensors", "pack-quantized", None),
        ),
        (MODELOPT_AWQ, Scheme("modelopt", "modelopt", 128)),
        (
            {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": MODELOPT_AWQ}},
            Scheme("modelopt", "modelopt", None),
        ),
    ],
)
def test_schemes(quantization: dict[str, Any], scheme: Scheme) -> None:
    assert read_scheme(quantization) == scheme


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "quant_method 'bitsandbytes' is not read; awq, gptq, .* before quant",
        ),
        ({"bits": 4}, "quant_method 'None' is not read"),
        (AWQ | {"bits": 8}, "awq: 8 bits; the kernels take 4. Start from the checkpoint before quantization"),
        (AWQ | {"version": "marlin"}, "AWQ in the layout 'marlin'; gemm, gemv and gemv_fast are read"),
        (GPTQ | {"bits": 3}, "gptq: 3 bits"),
        (GPTQ | {"dynamic": {"+:.*gate.*": {"bits": 8}}}, "gptq, layers .*gate.* .dynamic.: 8 bits"),
        (GPTQ | {"checkpoint_format": "bitblas"}, "GPTQ in the layout 'bitblas'"),
        (GPTQ | {"is_marlin_format": True}, "GPTQ in the layout 'marlin'"),
        (GPTQ | {"adapter": {"rank": 32}}, "GPTQ with an adapter"),
        (packed(weights=INT4 | {"num_bits": 8}), "compressed-tensors, config group 'group_0': 8 bits"),
        (packed(weights=INT4 | {"type": "float"}), "weights of type 'float'"),
        (packed(weights=None), "config group 'group_0': None bits"),
        (packed(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'; pack-quantized is read"),
        (packed() | {"format": "float-quantized"}, "format 'float-quantized'"),
        (packed(input_activations={"num_bits": 8}), "quantizes input_activations; the kernels take 16-bit"),
        (packed() | {"kv_cache_scheme": {"num_bits": 8}}, "KV cache is quantized too .*Remove kv_cache_scheme"),
        (packed() | {"transform_config": {"config_groups": {"u": {}}}}, "rotations .u."),
        (PACKED | {"config_groups": {"W8A8": ["Linear"]}}, "config group 'W8A8': W8A8 bits"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "quant_algo 'FP8' .every layer. is not read; W4A16_AWQ is"),
        (MODELOPT_AWQ | {"quantized_layers": {"a.b": {"quant_algo": "NVFP4"}}}, "'NVFP4' .a.b. is not read"),
        (MODELOPT_AWQ | {"kv_cache_quant_algo": "FP8"}, "KV cache is quantized too .kv_cache_quant_algo FP8"),
    ],
)
def test_schemes_that_are_refused(quantization: dict[str, Any], message: str) -> None:
    with pytest.raises(AwqTrtError, match=message):
        read_scheme(quantization)
