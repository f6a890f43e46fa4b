"""The layouts in which 4-bit linear layers are stored, each as tensors -> QuantizedLinear; two of them also back.

N outputs, K inputs, group size g, G = K / g. An int32 word holds 8 values, value i in bits 4i .. 4i+3.

AWQ (AutoAWQ 0.2, WQLinear_GEMM, WQLinear_GEMV, WQLinear_GEMVFast)
    gemm       qweight int32 [K, N/8]    word c holds outputs 8c + (0, 2, 4, 6, 1, 3, 5, 7)
               qzeros  int32 [G, N/8]    the same order              scales [G, N]
               (this package also stores an N that 8 does not divide: the last word is filled up with zeros)
    gemv       qweight int32 [N, K/8]    word c holds inputs 8c + (0 .. 7)
               qzeros  int32 [N, P/8]    groups in order, P = G rounded up to a multiple of 8 .. 32
               scales  [N, P]            columns G .. P-1 are padding
    gemv_fast  qweight int16 [N/4, K]    see `unpack_gemv_fast`
               qzeros  fp16 [P, N]       -zero * scale               scales fp16 [P, N]
GPTQ (AutoGPTQ 0.7, GPTQModel 7)
               qweight int32 [K/8, N]    word r holds inputs 8r + (0 .. 7)
               qzeros  int32 [G, N/8]    word c holds outputs 8c + (0 .. 7); v1 ("gptq") stores each word minus
                                         0x11111111, that is zero points minus 1; v2 ("gptq_v2") stores them
               scales [G, N]             g_idx int32 [K], the group of each input
compressed-tensors pack-quantized
               weight_packed int32 [N, K/8]          word c holds inputs 8c + (0 .. 7), each plus 8
               weight_zero_point int32 [ceil(N/8), G]  word r holds outputs 8r + (0 .. 7), each plus 8; not if symmetric
               weight_scale [N, G]                   weight_shape int64 [2] = (N, K)
ModelOpt W4A16_AWQ
               weight uint8 [N/2, K]     byte r holds outputs 2r (low) and 2r+1 (high), two's complement
               weight_scale fp32 [N, G]  pre_quant_scale [K], multiplies the input

A pre-scale is stored as `pre_scale` [K] by this package and as `pre_quant_scale` by ModelOpt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from awq_trt.errors import AwqTrtError
from awq_trt.layout import DTYPES, padded_features, unsupported_reason
from awq_trt.linear import SYMMETRIC_ZERO, QuantizedLinear, row_chunks

Parts = Mapping[str, torch.Tensor]
"""The tensors of one layer, by the last component of their names."""

IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GPTQ_V1_OFFSET = np.uint32(0x11111111)


def pack_nibbles(values: np.ndarray, order: Sequence[int] = IN_ORDER) -> np.ndarray:
    """uint8 [R, C], values 0..15 -> int32 [R, ceil(C/8)]; nibble i of a word is value order[i] of its eight."""
    rows, columns = values.shape
    words = np.zeros((rows, -(-columns // 8)), np.uint32)
    for some in row_chunks(rows, max(columns, 1)):
        piece, packed = values[some], words[some]
        for i, column in enumerate(order):
            nibble = piece[:, column::8].astype(np.uint32)
            packed[:, : nibble.shape[1]] |= nibble << np.uint32(4 * i)
    return words.view(np.int32)


def unpack_nibbles(words: np.ndarray, order: Sequence[int] = IN_ORDER) -> np.ndarray:
    """Inverse of `pack_nibbles`: int32 [R, C/8] -> uint8 [R, C]."""
    rows, columns = words.shape
    values = np.empty((rows, columns * 8), np.uint8)
    for some in row_chunks(rows, max(columns * 8, 1)):
        piece = words[some].view(np.uint32)
        for i, column in enumerate(order):
            values[some, column::8] = piece >> np.uint32(4 * i) & np.uint32(15)
    return values


def from_parts(format: str, name: str, parts: Parts, group_size: int | None = None) -> QuantizedLinear:
    """One layer of a checkpoint.

    Args:
        format: a key of FORMATS. name: of the layer, for messages. group_size: from the configuration (-1 for the whole
            row); only "awq-gemv" and "awq-gemv_fast" need it, because they pad the groups.

    Raises:
        AwqTrtError: tensors missing, of another dtype, not fitting each other; act-order; a shape no kernel can run.
    """
    try:
        if missing := [part for part in FORMATS[format].parts if part not in parts]:
            raise AwqTrtError(f"tensor {missing[0]} is missing; download the checkpoint again.")
        layer = FORMATS[format].read(parts, group_size)
        n, k = layer.q.shape
        if reason := unsupported_reason(padded_features(n), k, layer.group_size):
            raise AwqTrtError(f"{reason}. Start from the checkpoint before quantization: such layers stay in float.")
    except AwqTrtError as error:
        raise AwqTrtError(f"{name} ({format}): {error}") from error
    return layer


def to_parts(format: str, layer: QuantizedLinear) -> dict[str, torch.Tensor]:
    """Inverse of `from_parts`, for "awq-gemm" and "pack-quantized".

    Raises:
        AwqTrtError: a pre-scale, which pack-quantized cannot carry.
    """
    if format == "awq-gemm":
        zeros = torch.full(layer.scales.shape, SYMMETRIC_ZERO) if layer.zeros is None else layer.zeros
        parts = {
            "qweight": torch.from_numpy(pack_nibbles(layer.q.numpy().T, AWQ_ORDER)),
            "qzeros": torch.from_numpy(pack_nibbles(zeros.numpy().T, AWQ_ORDER)),
            "scales": layer.scales.t().contiguous(),
        }
        return parts if layer.pre_scale is None else parts | {"pre_scale": layer.pre_scale}
    if layer.pre_scale is not None:
        raise AwqTrtError(
            'compressed-tensors cannot carry a pre-scale; save with save_format="awq", or search without '
            "(pre_scale=False)."
        )
    parts = {
        "weight_packed": torch.from_numpy(pack_nibbles(layer.q.numpy())),
        "weight_scale": layer.scales,
        "weight_shape": torch.tensor(layer.q.shape),
    }
    if layer.zeros is not None:
        parts["weight_zero_point"] = torch.from_numpy(pack_nibbles(layer.zeros.numpy().T)).t().contiguous()
    return parts


def _from_awq_gemm(parts: Parts, group_size: int | None) -> QuantizedLinear:
    qweight, qzeros, scales = _matrices(parts, qweight=torch.int32, qzeros=torch.int32, scales=None)
    (k, words), (groups, n) = qweight.shape, scales.shape
    fits = words == -(-n // 8) and qzeros.shape == (groups, words) and k % groups == 0
    _fit(fits, parts, "[K, N/8], [K/g, N/8] and [K/g, N]")
    q, zeros = (_unpacked(words, AWQ_ORDER).T[:n] for words in (qweight, qzeros))
    return _layer(q, scales.t(), zeros, parts.get("pre_scale"))


def _from_awq_gemv(parts: Parts, group_size: int | None) -> QuantizedLinear:
    qweight, qzeros, scales = _matrices(parts, qweight=torch.int32, qzeros=torch.int32, scales=None)
    n, groups = len(qweight), _groups(qweight.shape[1] * 8, group_size)
    fits = len(scales) == len(qzeros) == n and min(scales.shape[1], qzeros.shape[1] * 8) >= groups
    _fit(fits, parts, f"[N, K/8], [N, at least {-(-groups // 8)}] and [N, at least {groups}]")
    return _layer(_unpacked(qweight), scales[:, :groups], _unpacked(qzeros)[:, :groups])


def _from_awq_gemv_fast(parts: Parts, group_size: int | None) -> QuantizedLinear:
    qweight, offsets, scales = _matrices(parts, qweight=torch.int16, qzeros=None, scales=None)
    n, k = len(qweight) * 4, qweight.shape[1]
    groups = _groups(k, group_size)
    fits = k % 64 == 0 and scales.shape == offsets.shape and scales.shape[1] == n and len(scales) >= groups
    _fit(fits, parts, f"[N/4, K], [at least {groups}, N] and the same")
    scales, offsets = scales[:groups].t(), offsets[:groups].t()
    zeros = torch.nan_to_num(-offsets.float() / scales.float(), nan=SYMMETRIC_ZERO).round()
    if not torch.equal(-(scales * zeros.to(scales.dtype)), offsets) or not bool(((zeros >= 0) & (zeros <= 15)).all()):
        raise AwqTrtError("qzeros are not -zero * scale for whole zero points 0..15, so the kernels cannot hold them.")
    return _layer(unpack_gemv_fast(qweight.numpy()), scales, zeros.to(torch.uint8).numpy())


def unpack_gemv_fast(packed: np.ndarray) -> np.ndarray:
    """int16 [N/4, K] -> uint8 [N, K].

    Rows n = 4i + r and columns k = 64 t + 32 h + 8 d + 2 a + p (r, d, a of 0..3; h, p of 0, 1). The values of a tile
    (i, t) are in the order (r, h, a, p, d); four at a time, so along d, they make a 16-bit word, the first one lowest.
    """
    rows, k = packed.shape
    words = packed.view(np.uint16).reshape(rows, k // 64, 4, 2, 4, 2)  # [i, t, r, h, a, p]
    shifts = np.arange(0, 16, 4, dtype=np.uint16)
    tiles = (words[..., None] >> shifts & np.uint16(15)).astype(np.uint8)  # [i, t, r, h, a, p, d]
    return tiles.transpose(0, 2, 1, 3, 6, 4, 5).reshape(rows * 4, k)


def _from_gptq(parts: Parts, group_size: int | None) -> QuantizedLinear:
    """v1. Zero points are read as GPTQModel and transformers do: the offset is added to a word as a whole, mod 2^32.

    AutoGPTQ differs for a stored 15 only, which it reads as 16; its own writer destroys the word of a zero point of 0.
    """
    (qzeros,) = _matrices(parts, qzeros=torch.int32)
    words = qzeros.numpy().view(np.uint32) + GPTQ_V1_OFFSET
    return _from_gptq_v2({**parts, "qzeros": torch.from_numpy(words.view(np.int32))}, group_size)


def _from_gptq_v2(parts: Parts, group_size: int | None) -> QuantizedLinear:
    qweight, qzeros, scales = _matrices(parts, qweight=torch.int32, qzeros=torch.int32, scales=None)
    k, (groups, n) = len(qweight) * 8, scales.shape
    fits = qweight.shape[1] == n and qzeros.shape == (groups, n // 8) and n % 8 == 0 and k % groups == 0
    _fit(fits, parts, "[K/8, N], [K/g, N/8] and [K/g, N]")
    _refuse_act_order("g_idx", parts.get("g_idx"), k, groups)
    return _layer(_unpacked(qweight.t()), scales.t(), _unpacked(qzeros).T)


def _from_pack_quantized(parts: Parts, group_size: int | None) -> QuantizedLinear:
    packed, scale = _matrices(parts, weight_packed=torch.int32, weight_scale=None)
    zero_point = parts.get("weight_zero_point")
    if parts["weight_shape"].shape != (2,):
        raise AwqTrtError(f"tensor weight_shape is {list(parts['weight_shape'].shape)}; it should hold N and K.")
    n, k = (int(size) for size in parts["weight_shape"])
    groups = scale.shape[1]
    fits = packed.shape == (n, -(-k // 8)) and len(scale) == n and k % groups == 0
    if zero_point is not None:  # int8 where an older compressed-tensors wrote it, not packed
        fits &= zero_point.shape == ((n, groups) if zero_point.dtype == torch.int8 else (-(-n // 8), groups))
    _fit(fits, parts, f"weight_shape {[n, k]}: [N, K/8], [N, K/g], [2] and, if there are zero points, [N/8, K/g]")
    _refuse_act_order("weight_g_idx", parts.get("weight_g_idx"), k, groups)
    zeros = None
    if zero_point is not None and zero_point.dtype == torch.int8:
        zeros = (zero_point + SYMMETRIC_ZERO).to(torch.uint8).numpy()
    elif zero_point is not None:
        (zero_point,) = _matrices(parts, weight_zero_point=torch.int32)
        zeros = _unpacked(zero_point.t()).T[:n]
    return _layer(_unpacked(packed)[:, :k], scale, zeros)


def _from_modelopt(parts: Parts, group_size: int | None) -> QuantizedLinear:
    weight, scale = _matrices(parts, weight=torch.uint8, weight_scale=None)
    n, k = len(weight) * 2, weight.shape[1]
    _fit(len(scale) == n and k % scale.shape[1] == 0, parts, "[N/2, K] and [N, K/g]")
    q = np.empty((n, k), np.uint8)
    q[::2], q[1::2] = weight.numpy() & 15, weight.numpy() >> 4
    return _layer(q ^ 8, scale, None, parts.get("pre_quant_scale"))  # two's complement plus 8


@dataclass(frozen=True)
class Format:
    """A layout of one layer."""

    read: Callable[[Parts, int | None], QuantizedLinear]  # from its tensors and the group size of the configuration
    parts: tuple[str, ...]  # what a layer always has; the first is one that no layer in float has
    optional: tuple[str, ...] = ()


_QZEROS = ("qweight", "qzeros", "scales")
FORMATS = {
    "awq-gemm": Format(_from_awq_gemm, _QZEROS, ("pre_scale",)),
    "awq-gemv": Format(_from_awq_gemv, _QZEROS),
    "awq-gemv_fast": Format(_from_awq_gemv_fast, _QZEROS),
    "gptq": Format(_from_gptq, _QZEROS, ("g_idx",)),
    "gptq_v2": Format(_from_gptq_v2, _QZEROS, ("g_idx",)),
    "pack-quantized": Format(
        _from_pack_quantized,
        ("weight_packed", "weight_scale", "weight_shape"),
        ("weight_zero_point", "weight_g_idx"),
    ),
    "modelopt": Format(_from_modelopt, ("weight_scale", "weight"), ("pre_quant_scale",)),
}


def _layer(
    q: np.ndarray, scales: torch.Tensor, zeros: np.ndarray | None, pre_scale: torch.Tensor | None = None
) -> QuantizedLinear:
    """A layer from [N, K], [N, G], [N, G], [K]. Zeros that are 8 everywhere are the symmetric layer they stand for."""
    groups = scales.shape[1]
    if scales.dtype not in (*DTYPES.values(), torch.float32) or not torch.isfinite(scales).all():
        raise AwqTrtError(f"scales are {scales.dtype} or hold NaN or Inf; download the checkpoint again.")
    if pre_scale is not None and pre_scale.shape != (q.shape[1],):
        raise AwqTrtError(
            f"the pre-scale is {list(pre_scale.shape)}, not [{q.shape[1]}]; download the checkpoint again."
        )
    if zeros is not None and (zeros == SYMMETRIC_ZERO).all():
        zeros = None
    return QuantizedLinear(
        torch.from_numpy(np.ascontiguousarray(q)),
        scales.contiguous(),
        None if zeros is None else torch.from_numpy(np.ascontiguousarray(zeros)),
        q.shape[1] // groups,
        pre_scale,
    )


def _refuse_act_order(part: str, g_idx: torch.Tensor | None, k: int, groups: int) -> None:
    """Input j must be in group j // g."""
    if g_idx is None:
        return
    if g_idx.shape != (k,):
        raise AwqTrtError(
            f"tensor {part} is {list(g_idx.shape)}, the other tensors say [{k}] with 4 bits; download it again, or "
            "start from the checkpoint before quantization."
        )
    if not torch.equal(g_idx.long(), torch.arange(k) // (k // groups)):
        raise AwqTrtError(
            "act-order (desc_act, actorder): the inputs of a group are scattered over the row, and the kernels take "
            "groups that lie together. Quantize again with desc_act=False or static groups, or start from the "
            "checkpoint before quantization."
        )


def _groups(k: int, group_size: int | None) -> int:
    """Groups in a row of k, for the formats whose tensors do not tell."""
    if group_size is None or (group_size != -1 and (group_size <= 0 or k % group_size)):
        raise AwqTrtError(f"group_size {group_size} of the configuration does not divide the {k} inputs.")
    return 1 if group_size == -1 else k // group_size


def _matrices(parts: Parts, **dtypes: torch.dtype | None) -> list[torch.Tensor]:
    """Tensors of a layer that must have two dimensions, none of them 0, and the dtype; None for any."""
    for part, dtype in dtypes.items():
        tensor = parts[part]
        if tensor.dim() != 2 or not tensor.numel():
            raise AwqTrtError(f"tensor {part} is {list(tensor.shape)}; two dimensions were expected.")
        if dtype is not None and tensor.dtype != dtype:
            wanted = str(dtype).removeprefix("torch.")
            raise AwqTrtError(f"tensor {part} is {tensor.dtype}, not {wanted} with 4-bit integers in it.")
    return [parts[part] for part in dtypes]


def _unpacked(words: torch.Tensor, order: Sequence[int] = IN_ORDER) -> np.ndarray:
    """int32 [R, C/8] -> uint8 [R, C]"""
    return unpack_nibbles(words.contiguous().numpy(), order)


def _fit(fits: bool, parts: Parts, expected: str) -> None:
    if not fits:
        shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
        raise AwqTrtError(f"{shapes} do not fit each other with 4 bits; expected {expected}.")
