"""The packed layout of `W4A16Gemm`: one layout for every kernel, and the table of what the kernels can do.

Weights are the A operand of `mma.m16n8k16` (rows are output features n, columns are k), tokens the n8 side. The same
fragment is what a warp holds of `wgmma` with A from registers, so one layout serves decode, tensor-core and Hopper
kernels. A tile of 16 n x 64 k takes 512 bytes, one 16-byte load per lane; tiles run along K first, so a warp that owns
16 output features streams contiguous memory.

    qweight[tn, tk, lane, step]   one 32-bit word: k-step `step` (16 columns) of the tile, as lane `lane` needs it
                                  g = lane / 4, t = lane % 4, n0 = 16 tn, k0 = 64 tk + 16 step

      bit 31 ........................... 16  15 ............................ 0
          |  a7  |  a5  |  a3  |  a1  |      |  a6  |  a4  |  a2  |  a0  |

      a0, a1 : row n0+g    columns k0+2t, k0+2t+1        register 0 of the A fragment
      a2, a3 : row n0+g+8  columns k0+2t, k0+2t+1        register 1
      a4, a5 : row n0+g    columns k0+2t+8, k0+2t+9      register 2
      a6, a7 : row n0+g+8  columns k0+2t+8, k0+2t+9      register 3

    so `(word >> 4j) & 0x000f000f` is register j as two integers, ready for `lop3` with the exponent of 1024 (fp16)
    or 128 (bf16). Source of the fragment: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".

    scales[tn, group, i, h] = scale of row n0 + i + 8h     a lane's two rows in one 4-byte load, i = lane / 4
    zeros [tn, group, w]    : little-endian bytes i = 4w .. 4w+3, each  zero(n0+i) | zero(n0+i+8) << 4

Layers fused into one node (fusion.py) are packed as one, their rows one after the other; N is their sum.
Padding (rows n >= N, columns k >= K) is q = 0, scale = 0, zero = 0; kernels read X as 0 for k >= K.
"""

from __future__ import annotations

import torch

TILE_N, TILE_K = 16, 64
GROUP_SIZES = (32, 64, 128)
STORED = 8
"""Output features that the kernels store at once (16 bytes): N is a multiple of it."""

MAX_FEATURES = 1 << 20
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def unsupported_reason(n: int, k: int, group_size: int, dtype: str = "float16", sm: int = 80) -> str | None:
    """The capability table: None where the kernels can run this layer, else the reason, for people.

    Args:
        n: output features; of a fused node, the sum. k: input features.
        group_size: columns per scale, `k` for one scale per row.
        dtype: of the activations, "float16" or "bfloat16". sm: compute capability times ten.
    """
    if dtype not in DTYPES:
        return f"activations are {dtype}; the kernels take float16 or bfloat16"
    if sm < 80:
        return f"compute capability {sm / 10:.1f}; the kernels need 8.0 or newer"
    if n % STORED or not STORED <= n <= MAX_FEATURES:
        return f"out_features {n} is not a multiple of {STORED} between {STORED} and {MAX_FEATURES}"
    if k % 32 or not 32 <= k <= MAX_FEATURES:
        return f"in_features {k} is not a multiple of 32 between 32 and {MAX_FEATURES}"
    if group_size != k and group_size not in GROUP_SIZES:
        return f"group size {group_size} is not 32, 64, 128 or the whole row"
    if k % group_size:
        return f"in_features {k} is not a multiple of the group size {group_size}"
    return None


def padded_features(n: int) -> int:
    """The out_features of the node for a layer of n: rounded up to what the kernels store at once, by rows of zeros."""
    return -(-n // STORED) * STORED


def supports(n: int, k: int, group_size: int, dtype: str = "float16", sm: int = 80) -> bool:
    """True where `unsupported_reason` has nothing to say."""
    return unsupported_reason(n, k, group_size, dtype, sm) is None


def pack_qweight(q: torch.Tensor) -> torch.Tensor:
    """Pack q, uint8 [N, K] with values 0..15, into int32 [ceil(N/16), ceil(K/64), 32, 4], on the device of q."""
    n, k = q.shape
    tn, tk = -(-n // TILE_N), -(-k // TILE_K)
    padded = q
    if q.shape != (tn * TILE_N, tk * TILE_K):
        padded = q.new_zeros(tn * TILE_N, tk * TILE_K)
        padded[:n, :k] = q
    # n = (tn, row half h, g), k = (tk, step, column half c, t, parity p); register j = h + 2c, its nibble at 4j + 16p
    halves = padded.reshape(tn, 2, 8, tk, 4, 2, 4, 2).permute(1, 0, 3, 2, 6, 4, 7, 5)  # [h, tn, tk, g, t, step, p, c]
    return (halves[0] | halves[1] << 4).flatten().view(torch.int32).reshape(tn, tk, 32, 4)


def unpack_qweight(qweight: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Inverse of `pack_qweight`: int32 [ceil(N/16), ceil(K/64), 32, 4] to uint8 [N, K]."""
    tn, tk = qweight.shape[:2]
    both = qweight.flatten().view(torch.uint8).reshape(tn, tk, 8, 4, 4, 2, 2)  # [tn, tk, g, t, step, p, c]
    halves = torch.stack([both & 15, both >> 4], dim=1)  # [tn, h, tk, g, t, step, p, c]
    return halves.permute(0, 1, 3, 2, 5, 7, 4, 6).reshape(tn * TILE_N, tk * TILE_K)[:n, :k]


def pack_scales(scales: torch.Tensor) -> torch.Tensor:
    """Pack scales [N, G] (fp16 or bf16) into [ceil(N/16), G, 8, 2], same dtype."""
    n, groups = scales.shape
    tn = -(-n // TILE_N)
    padded = scales.new_zeros(tn * TILE_N, groups)
    padded[:n] = scales
    return padded.reshape(tn, 2, 8, groups).permute(0, 3, 2, 1).contiguous()


def unpack_scales(packed: torch.Tensor, n: int) -> torch.Tensor:
    """Inverse of `pack_scales`: [ceil(N/16), G, 8, 2] to [N, G]."""
    tn, groups = packed.shape[:2]
    return packed.permute(0, 3, 2, 1).reshape(tn * TILE_N, groups)[:n].contiguous()


def pack_zeros(zeros: torch.Tensor) -> torch.Tensor:
    """Pack zeros, uint8 [N, G] with values 0..15, into int32 [ceil(N/16), G, 2]."""
    n, groups = zeros.shape
    tn = -(-n // TILE_N)
    padded = zeros.new_zeros(tn * TILE_N, groups)
    padded[:n] = zeros
    halves = padded.reshape(tn, 2, 8, groups).permute(1, 0, 3, 2)  # [h, tn, G, i]
    return (halves[0] | halves[1] << 4).flatten().view(torch.int32).reshape(tn, groups, 2)


def unpack_zeros(packed: torch.Tensor, n: int) -> torch.Tensor:
    """Inverse of `pack_zeros`: int32 [ceil(N/16), G, 2] to uint8 [N, G]."""
    tn, groups = packed.shape[:2]
    both = packed.flatten().view(torch.uint8).reshape(tn, groups, 8)  # [tn, G, i]
    halves = torch.stack([both & 15, both >> 4], dim=1)  # [tn, h, G, i]
    return halves.permute(0, 1, 3, 2).reshape(tn * TILE_N, groups)[:n]
