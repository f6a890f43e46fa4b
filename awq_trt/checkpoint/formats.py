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

PARTS = {
    "awq-gemm": ("qweight", "qzeros", "scales"),
    "awq-gemv": ("qweight", "qzeros", "scales"),
    "awq-gemv_fast": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales"),
    "gptq_v2": ("qweight", "qzeros", "scales"),
    "pack-quantized": ("weight_packed", "weight_scale", "weight_shape"),
    "modelopt": ("weight", "weight_scale"),
}
"""Format -> what a layer of it always has; the one that no layer in float has comes first, for ModelOpt second."""

OPTIONAL_PARTS = {
    "awq-gemm": ("pre_scale",),
    "gptq": ("g_idx",),
    "gptq_v2": ("g_idx",),
    "pack-quantized": ("weight_zero_point", "weight_g_idx"),
    "modelopt": ("pre_quant_scale",),
}


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
        format: a key of PARTS. name: of the layer, for messages. group_size: from the configuration (-1 for the whole
            row); only "awq-gemv" and "awq-gemv_fast" need it, because they pad the groups.

    Raises:
        AwqTrtError: tensors missing, of another dtype, not fitting each other; act-order; a shape no kernel can run.
    """
    try:
        if missing := [part for part in PARTS[format] if part not in parts]:
            raise AwqTrtError(f"tensor {missing[0]} is missing; download the checkpoint again.")
        layer = READERS[format](parts, group_size)
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
    return _to_awq_gemm(layer) if format == "awq-gemm" else _to_pack_quantized(layer)


def _to_awq_gemm(layer: QuantizedLinear) -> dict[str, torch.Tensor]:
    zeros = layer.zeros if layer.zeros is not None else torch.full(layer.scales.shape, SYMMETRIC_ZERO)
    parts = {
        "qweight": torch.from_numpy(pack_nibbles(layer.q.numpy().T, AWQ_ORDER)),
        "qzeros": torch.from_numpy(pack_nibbles(zeros.numpy().T, AWQ_ORDER)),
        "scales": layer.scales.t().contiguous(),
    }
    return parts if layer.pre_scale is None else parts | {"pre_scale": layer.pre_scale}


def _to_pack_quantized(layer: QuantizedLinear) -> dict[str, torch.Tensor]:
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
        words = pack_nibbles(np.ascontiguousarray(layer.zeros.numpy().T)).T
        parts["weight_zero_point"] = torch.from_numpy(np.ascontiguousarray(words))
    return parts


def _from_awq_gemm(parts: Parts, group_size: int | None) -> QuantizedLinear:
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    groups, n = _two("scales", scales)
    k, _ = _two("qweight", qweight)
    fits = qweight.shape == (k, -(-n // 8)) and qzeros.shape == (groups, -(-n // 8)) and k % groups == 0
    _fit(fits, parts, "[K, N/8], [K/g, N/8] and [K/g, N]")
    q = unpack_nibbles(_int32("qweight", qweight), AWQ_ORDER).T[:n]
    return _layer(q, scales.t(), unpack_nibbles(_int32("qzeros", qzeros), AWQ_ORDER).T[:n], parts.get("pre_scale"))


def _from_awq_gemv(parts: Parts, group_size: int | None) -> QuantizedLinear:
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    n, k = _two("qweight", qweight)[0], qweight.shape[1] * 8
    groups = _groups(k, group_size)
    fits = (
        scales.dim() == qzeros.dim() == 2
        and len(scales) == len(qzeros) == n
        and min(scales.shape[1], qzeros.shape[1] * 8) >= groups
    )
    _fit(fits, parts, f"[N, K/8], [N, at least {-(-groups // 8)}] and [N, at least {groups}]")
    zeros = unpack_nibbles(_int32("qzeros", qzeros))[:, :groups]
    return _layer(unpack_nibbles(_int32("qweight", qweight)), scales[:, :groups], zeros)


def _from_awq_gemv_fast(parts: Parts, group_size: int | None) -> QuantizedLinear:
    qweight, scales = parts["qweight"], parts["scales"]
    n, k = _two("qweight", qweight)[0] * 4, qweight.shape[1]
    groups = _groups(k, group_size)
    offsets = parts["qzeros"]
    fits = k % 64 == 0 and scales.dim() == 2 and scales.shape == offsets.shape and scales.shape[1] == n
    _fit(fits and len(scales) >= groups, parts, f"[N/4, K], [at least {groups}, N] and the same")
    if qweight.dtype != torch.int16:
        raise AwqTrtError(f"tensor qweight is {qweight.dtype}, not int16.")
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
    words = _int32("qzeros", parts["qzeros"]).view(np.uint32) + GPTQ_V1_OFFSET
    return _from_gptq_v2({**parts, "qzeros": torch.from_numpy(words.view(np.int32))}, group_size)


def _from_gptq_v2(parts: Parts, group_size: int | None) -> QuantizedLinear:
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    groups, n = _two("scales", scales)
    k = _two("qweight", qweight)[0] * 8
    fits = qweight.shape[1] == n and qzeros.shape == (groups, n // 8) and n % 8 == 0 and k % groups == 0
    _fit(fits, parts, "[K/8, N], [K/g, N/8] and [K/g, N]")
    _refuse_act_order("g_idx", parts.get("g_idx"), k, groups)
    q = unpack_nibbles(np.ascontiguousarray(_int32("qweight", qweight).T))
    return _layer(q, scales.t(), unpack_nibbles(_int32("qzeros", qzeros)).T)


def _from_pack_quantized(parts: Parts, group_size: int | None) -> QuantizedLinear:
    packed, scale, zero_point = parts["weight_packed"], parts["weight_scale"], parts.get("weight_zero_point")
    if parts["weight_shape"].shape != (2,):
        raise AwqTrtError(f"tensor weight_shape is {list(parts['weight_shape'].shape)}; it should hold N and K.")
    n, k = (int(size) for size in parts["weight_shape"])
    groups = _two("weight_scale", scale)[1]
    fits = packed.shape == (n, -(-k // 8)) and len(scale) == n and k % groups == 0
    if zero_point is not None:  # int8 where an older compressed-tensors wrote it, not packed
        fits &= zero_point.shape == ((n, groups) if zero_point.dtype == torch.int8 else (-(-n // 8), groups))
    _fit(fits, parts, f"weight_shape {[n, k]}: [N, K/8], [N, K/g], [2] and, if there are zero points, [N/8, K/g]")
    _refuse_act_order("weight_g_idx", parts.get("weight_g_idx"), k, groups)
    zeros = None
    if zero_point is not None and zero_point.dtype == torch.int8:
        zeros = (zero_point + SYMMETRIC_ZERO).to(torch.uint8).numpy()
    elif zero_point is not None:
        words = np.ascontiguousarray(_int32("weight_zero_point", zero_point).T)
        zeros = unpack_nibbles(words).T[:n]
    return _layer(unpack_nibbles(_int32("weight_packed", packed))[:, :k], scale, zeros)


def _from_modelopt(parts: Parts, group_size: int | None) -> QuantizedLinear:
    weight, scale = parts["weight"], parts["weight_scale"]
    n, k = _two("weight", weight)[0] * 2, weight.shape[1]
    groups = _two("weight_scale", scale)[1]
    _fit(len(scale) == n and k % groups == 0, parts, "[N/2, K] and [N, K/g]")
    if weight.dtype != torch.uint8:
        raise AwqTrtError(f"tensor weight is {weight.dtype}, not uint8 (two 4-bit integers a byte).")
    q = np.empty((n, k), np.uint8)
    q[::2], q[1::2] = weight.numpy() & 15, weight.numpy() >> 4
    return _layer(q ^ 8, scale, None, parts.get("pre_quant_scale"))  # two's complement plus 8


READERS: dict[str, Callable[[Parts, int | None], QuantizedLinear]] = {
    "awq-gemm": _from_awq_gemm,
    "awq-gemv": _from_awq_gemv,
    "awq-gemv_fast": _from_awq_gemv_fast,
    "gptq": _from_gptq,
    "gptq_v2": _from_gptq_v2,
    "pack-quantized": _from_pack_quantized,
    "modelopt": _from_modelopt,
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
    symmetric = zeros is None or bool((zeros == SYMMETRIC_ZERO).all())
    return QuantizedLinear(
        torch.from_numpy(np.ascontiguousarray(q)),
        scales.contiguous(),
        None if symmetric or zeros is None else torch.from_numpy(np.ascontiguousarray(zeros)),
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


def _two(part: str, tensor: torch.Tensor) -> tuple[int, int]:
    """The shape of a tensor that must have two dimensions, none of them 0."""
    if tensor.dim() != 2 or not tensor.numel():
        raise AwqTrtError(f"tensor {part} is {list(tensor.shape)}; two dimensions were expected.")
    return tensor.shape[0], tensor.shape[1]


def _int32(part: str, tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype != torch.int32:
        raise AwqTrtError(f"tensor {part} is {tensor.dtype}, not int32 (eight 4-bit integers a word).")
    array: np.ndarray = tensor.contiguous().numpy()
    return array


def _fit(fits: bool, parts: Parts, expected: str) -> None:
    if not fits:
        shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
        raise AwqTrtError(f"{shapes} do not fit each other with 4 bits; expected {expected}.")
