"""The packed layout is a bijection, and the one its docstring draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_trt import layout


def test_pack_puts_every_nibble_where_the_docstring_says() -> None:
    """One tile, all 1024 positions: a single 15 in Q must show up in exactly one nibble, the drawn one."""
    for n in range(16):
        for k in range(64):
            q = torch.zeros(16, 64, dtype=torch.uint8)
            q[n, k] = 15
            words = layout.pack_qweight(q).numpy().view(np.uint32)
            step, column = divmod(k, 16)
            lane = (n % 8) * 4 + (column % 8) // 2
            shift = 4 * (n // 8 + 2 * (column // 8)) + 16 * (column % 2)
            expected = np.zeros((1, 1, 32, 4), np.uint32)
            expected[0, 0, lane, step] = 15 << shift
            assert (words == expected).all(), (n, k)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_pack_and_unpack_are_inverse(rows: int, columns: int, groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, k = 8 * rows, 32 * columns
    q = torch.from_numpy(rng.integers(0, 16, (n, k), dtype=np.uint8))
    packed = layout.pack_qweight(q)
    assert packed.shape == (-(-n // 16), -(-k // 64), 32, 4)
    assert packed.dtype == torch.int32
    assert torch.equal(layout.unpack_qweight(packed, n, k), q)
    zeros = torch.from_numpy(rng.integers(0, 16, (n, groups), dtype=np.uint8))
    assert torch.equal(layout.unpack_zeros(layout.pack_zeros(zeros), n), zeros)
    scales = torch.from_numpy(rng.random((n, groups), np.float32)).half()
    assert torch.equal(layout.unpack_scales(layout.pack_scales(scales), n), scales)


def test_scales_and_zeros_of_a_lane_lie_together() -> None:
    scales = torch.arange(32, dtype=torch.float16).reshape(16, 2)
    assert layout.pack_scales(scales)[0, 1, 3].tolist() == [scales[3, 1], scales[11, 1]]
    zeros = torch.arange(16, dtype=torch.uint8).reshape(16, 1)
    as_bytes = layout.pack_zeros(zeros).view(torch.uint8).reshape(-1)
    assert as_bytes.tolist() == [i | (i + 8) << 4 for i in range(8)]


def test_padding_is_zero() -> None:
    packed = layout.pack_qweight(torch.full((8, 32), 15, dtype=torch.uint8))
    whole = layout.unpack_qweight(packed, 16, 64)
    assert whole[:8, :32].min() == 15
    assert whole[8:].max() == 0
    assert whole[:, 32:].max() == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((4, 64, 64), "out_features 4"),
        ((12, 64, 64), "out_features 12"),
        ((1 << 21, 64, 64), "out_features"),
        ((8, 48, 48), "in_features 48"),
        ((8, 0, 32), "in_features 0"),
        ((8, 64, 48), "group size 48"),
        ((8, 96, 64), "not a multiple of the group size 64"),
        ((8, 64, 64, "float32"), "float32"),
        ((8, 64, 64, "float16", 75), "7.5"),
    ],
)
def test_what_the_kernels_cannot_do_is_said(arguments: tuple, reason: str) -> None:
    assert reason in str(layout.unsupported_reason(*arguments))
    assert not layout.supports(*arguments)


@pytest.mark.parametrize(("n", "k", "group"), [(8, 32, 32), (24, 96, 32), (576, 1536, 64), (8, 96, 96), (16, 128, 128)])
def test_what_the_kernels_can_do(n: int, k: int, group: int) -> None:
    assert layout.supports(n, k, group, "bfloat16", 120)
