"""Layouts of packed layers, each against the code of the tool that it is the layout of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from quantized_models import auto_gptq_linear, autoawq, autoawq_gemv, autoawq_gemv_fast, linear_of, zeros_of

from awq_trt import linear
from awq_trt.checkpoint.formats import AWQ_ORDER, IN_ORDER, Parts, from_parts, pack_nibbles, to_parts, unpack_nibbles
from awq_trt.errors import AwqTrtError
from awq_trt.linear import QuantizedLinear

N, K = 64, 256


def random_layer(
    group: int, symmetric: bool, dtype: torch.dtype = torch.float16, lowest_zero: int = 0
) -> QuantizedLinear:
    """Every value of q and of the zero points occurs."""
    generator = torch.Generator().manual_seed(group)
    q = torch.randint(0, 16, (N, K), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(N, K // group, generator=generator) * 0.02 + 0.001).to(dtype)
    zeros = torch.randint(lowest_zero, 16, (N, K // group), generator=generator, dtype=torch.uint8)
    return QuantizedLinear(q, scales, None if symmetric else zeros, group)


def same(a: QuantizedLinear, b: QuantizedLinear) -> bool:
    zeros = (a.zeros is None and b.zeros is None) or (
        a.zeros is not None and b.zeros is not None and torch.equal(a.zeros, b.zeros)
    )
    return torch.equal(a.q, b.q) and torch.equal(a.scales, b.scales) and zeros and a.group_size == b.group_size


@pytest.mark.parametrize("order", [IN_ORDER, AWQ_ORDER])
def test_nibbles_round_trip(order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in pieces, and with columns that 8 does not divide."""
    values = np.random.default_rng(0).integers(0, 16, (5, 48), dtype=np.uint8)
    words = pack_nibbles(values, order)
    np.testing.assert_array_equal(unpack_nibbles(words, order), values)
    monkeypatch.setattr(linear, "CHUNK", 100)
    np.testing.assert_array_equal(pack_nibbles(values, order), words)
    np.testing.assert_array_equal(unpack_nibbles(words, order), values)
    padded = np.pad(values[:, :45], ((0, 0), (0, 3)))
    np.testing.assert_array_equal(pack_nibbles(values[:, :45], order), pack_nibbles(padded, order))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, K])
class TestAutoAwq:
    def test_gemm(self, group: int, symmetric: bool) -> None:
        """Its packer's tensors are ours, bit for bit, both ways; its dequantizer gives our weight."""
        gemm = autoawq("gemm")
        layer = random_layer(group, symmetric)
        scales, zeros = layer.scales.t().contiguous(), zeros_of(layer).t().contiguous()
        theirs = gemm.WQLinear_GEMM.from_linear(linear_of(layer), 4, group, scales=scales, zeros=zeros)
        ours = to_parts("awq-gemm", layer)
        for part in ("qweight", "qzeros", "scales"):
            assert torch.equal(getattr(theirs, part), ours[part])
        assert same(from_parts("awq-gemm", "a", ours), layer)
        dequantized = gemm.dequantize_gemm(ours["qweight"], ours["qzeros"], ours["scales"], 4, group)
        assert torch.equal(dequantized.t(), layer.dequantize())

    def test_gemv(self, group: int, symmetric: bool) -> None:
        layer = random_layer(group, symmetric)
        assert same(from_parts("awq-gemv", "a", autoawq_gemv(layer), -1 if group == K else group), layer)

    def test_gemv_fast(self, group: int, symmetric: bool) -> None:
        layer = random_layer(group, symmetric)
        assert same(from_parts("awq-gemv_fast", "a", autoawq_gemv_fast(layer), group), layer)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 128, K])
def test_auto_gptq(group: int, symmetric: bool) -> None:
    """AutoGPTQ's packer and dequantizer. It cannot store a zero point of 0."""
    layer = random_layer(group, symmetric, lowest_zero=1)
    theirs = auto_gptq_linear(layer)
    parts = {part: getattr(theirs, part) for part in ("qweight", "qzeros", "scales", "g_idx")}
    read = from_parts("gptq", "a", parts)
    assert same(read, layer)
    assert torch.equal(theirs(torch.eye(K, dtype=torch.float16)).t(), read.dequantize())
    v2 = {**parts, "qzeros": torch.from_numpy(pack_nibbles(zeros_of(layer).numpy().T))}
    del v2["g_idx"]
    assert same(from_parts("gptq_v2", "a", v2), layer)


def scheme(group: int, symmetric: bool) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=4,
        symmetric=symmetric,
        strategy="channel" if group == K else "group",
        group_size=None if group == K else group,
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 128, K])
def test_compressed_tensors(group: int, symmetric: bool, dtype: torch.dtype) -> None:
    layer = random_layer(group, symmetric, dtype)
    state = {"weight": layer.dequantize(), "weight_scale": layer.scales}
    if not symmetric:
        state["weight_zero_point"] = (zeros_of(layer).to(torch.int16) - 8).to(torch.int8)
    theirs = PackedQuantizationCompressor.compress(state, scheme(group, symmetric))
    ours = to_parts("pack-quantized", layer)
    assert ours.keys() == theirs.keys()
    for part, tensor in ours.items():
        assert tensor.dtype == theirs[part].dtype
        assert torch.equal(tensor, theirs[part])
    assert same(from_parts("pack-quantized", "a", theirs), layer)
    decompressed = PackedQuantizationCompressor.decompress(ours, scheme(group, symmetric))
    assert torch.equal(decompressed["weight"], layer.dequantize())
    if not symmetric:  # as older versions stored it
        assert same(from_parts("pack-quantized", "a", {**ours, "weight_zero_point": state["weight_zero_point"]}), layer)


def gptq() -> Parts:
    layer = random_layer(32, False, lowest_zero=1)
    words = torch.from_numpy(pack_nibbles(zeros_of(layer).numpy().T - 1))
    rows = torch.from_numpy(np.ascontiguousarray(pack_nibbles(layer.q.numpy()).T))
    return {"qweight": rows, "qzeros": words, "scales": layer.scales.t(), "g_idx": torch.arange(K) // 32}


def ones(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


GEMV: Parts = {
    "qweight": ones(torch.int32, N, K // 8),
    "qzeros": ones(torch.int32, N, 4),
    "scales": ones(torch.float16, N, 32),
}
GEMV_FAST: Parts = {
    "qweight": ones(torch.int16, N // 4, K),
    "qzeros": -ones(torch.float16, 32, N),
    "scales": ones(torch.float16, 32, N),
}
MODELOPT: Parts = {"weight": ones(torch.uint8, N // 2, K), "weight_scale": ones(torch.float32, N, K // 32)}
EXAMPLES: dict[str, Parts] = {
    "awq-gemm": to_parts("awq-gemm", random_layer(32, False)),
    "awq-gemv": GEMV,
    "awq-gemv_fast": GEMV_FAST,
    "gptq": gptq(),
    "gptq_v2": gptq(),
    "pack-quantized": to_parts("pack-quantized", random_layer(32, False)),
    "modelopt": MODELOPT,
}


def shuffled(g_idx: torch.Tensor) -> torch.Tensor:
    return g_idx[torch.randperm(K, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    ("format", "part", "change", "message"),
    [
        ("awq-gemm", "qzeros", None, "a .awq-gemm.: tensor qzeros is missing"),
        ("awq-gemm", "scales", lambda t: t[:, :8], r"qweight \[256, 8\], qzeros .* scales \[8, 8\] do not fit"),
        ("awq-gemm", "qweight", lambda t: t.long(), "qweight is torch.int64, not int32"),
        ("awq-gemm", "qweight", lambda t: t[:, :4].repeat(1, 4), "do not fit each other with 4 bits"),
        ("awq-gemm", "qweight", lambda t: t[0], "two dimensions"),
        ("awq-gemm", "scales", lambda t: t * float("nan"), "scales .* hold NaN"),
        ("awq-gemm", "pre_scale", lambda t: torch.ones(3), r"pre-scale is \[3\], not \[256\]"),
        ("awq-gemv", "scales", lambda t: t[:, :4], "do not fit each other"),
        ("awq-gemv_fast", "qzeros", lambda t: t * 0.5, "not -zero . scale"),
        ("awq-gemv_fast", "qzeros", lambda t: t * 16, "not -zero . scale"),
        ("awq-gemv_fast", "qweight", lambda t: t.int(), "qweight is torch.int32, not int16"),
        ("gptq", "g_idx", shuffled, "act-order .desc_act, actorder.*desc_act=False or static groups"),
        ("gptq", "g_idx", lambda t: t[:128], r"g_idx is \[128\], the other tensors say \[256\] with 4 bits"),
        ("gptq", "qweight", lambda t: t.repeat(2, 1), r"g_idx is \[256\], .* \[512\] with 4 bits"),
        ("gptq_v2", "qweight", lambda t: t[:, :-8], "do not fit each other"),
        ("pack-quantized", "weight_zero_point", lambda t: t[:-1], "do not fit each other"),
        ("pack-quantized", "weight_shape", lambda t: t[:1], r"weight_shape is \[1\]; it should hold N and K"),
        ("pack-quantized", "weight_shape", lambda t: -t, "do not fit each other"),
        ("pack-quantized", "weight_packed", lambda t: t.repeat(1, 2), "do not fit each other with 4 bits"),
        ("pack-quantized", "weight_scale", lambda t: t[:, :7], "do not fit each other"),
        ("pack-quantized", "weight_g_idx", lambda t: shuffled(torch.arange(K) // 32), "act-order"),
        ("modelopt", "weight", lambda t: t.to(torch.float8_e4m3fn), "not uint8"),
        ("modelopt", "weight_scale", lambda t: t[1:], "do not fit each other"),
        ("modelopt", "pre_quant_scale", lambda t: torch.ones(7), r"pre-scale is \[7\], not \[256\]"),
        ("modelopt", "weight_scale", lambda t: torch.ones(N, 16), "group size 16 is not 32, 64, 128"),
    ],
)
def test_bad_tensors(
    format: str,
    part: str,
    change: Callable[[torch.Tensor | None], torch.Tensor] | None,
    message: str,
) -> None:
    parts = dict(EXAMPLES[format])
    from_parts(format, "a", parts, 32)
    if change is None:
        del parts[part]
    else:
        parts[part] = change(parts.get(part))
    with pytest.raises(AwqTrtError, match=message):
        from_parts(format, "a", parts, 32)


def test_padded_groups_need_a_group_size() -> None:
    for group_size in (None, 48, 0):
        with pytest.raises(AwqTrtError, match=f"a .awq-gemv.: group_size {group_size} of the configuration"):
            from_parts("awq-gemv", "a", GEMV, group_size)


def test_pre_scales() -> None:
    scale = torch.rand(K).half() + 0.5
    parts = {**MODELOPT, "pre_quant_scale": scale}
    assert torch.equal(from_parts("modelopt", "a", parts).pre_scale, scale)
    layer = QuantizedLinear(**{**vars(random_layer(32, False)), "pre_scale": scale})
    assert torch.equal(from_parts("awq-gemm", "a", to_parts("awq-gemm", layer)).pre_scale, scale)
    with pytest.raises(AwqTrtError, match="cannot carry a pre-scale.*save_format=.awq..*pre_scale=False"):
        to_parts("pack-quantized", layer)


def test_gptq_v1_offset_carries_over_nibbles_as_in_gptqmodel() -> None:
    """GPTQModel writes v1 by subtracting 0x11111111 from the word, so a zero point of 0 borrows from its neighbour."""
    layer = random_layer(32, False)
    words = pack_nibbles(zeros_of(layer).numpy().T).view(np.uint32)
    assert (zeros_of(layer) == 0).any()
    v1 = torch.from_numpy((words - np.uint32(0x11111111)).view(np.int32))
    rows = torch.from_numpy(np.ascontiguousarray(pack_nibbles(layer.q.numpy()).T))
    assert same(from_parts("gptq", "a", {"qweight": rows, "qzeros": v1, "scales": layer.scales.t()}), layer)
