"""The kernels' arithmetic on one fragment, bit by bit, against the tables of the PTX ISA. Nothing of the C++ code runs
here: this is the independent derivation that fragments.h and layout.py have to agree with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from awq_trt import layout

# dtype -> (exponent bits or-ed into the word, the integer that they stand for)
MAGIC = {torch.float16: (0x64006400, 1024), torch.bfloat16: (0x43004300, 128)}


def _halves(word: int, dtype: torch.dtype) -> torch.Tensor:
    """A 32-bit register as two elements, low half first."""
    return torch.from_numpy(np.array([word & 0xFFFF, word >> 16], np.uint16).view(np.int16)).view(dtype)


@pytest.mark.parametrize("dtype", list(MAGIC), ids=str)
@pytest.mark.parametrize("zero", range(16))
def test_every_nibble_at_every_position(dtype: torch.dtype, zero: int) -> None:
    """(word >> 4j & 0x000f000f | magic) - (magic + zero) is q - zero, exactly, and its product rounds once."""
    magic, offset = MAGIC[dtype]
    scales = torch.tensor([0.0123, 1.0, 6e-5, 0.3], dtype=dtype)
    for j in range(4):
        for low in range(16):
            for high in range(16):
                noise = 0x5A5A5A5A & ~(0xF << 4 * j | 0xF << 16 + 4 * j)  # neighbours must not leak
                word = noise | low << 4 * j | high << (16 + 4 * j)
                register = word >> 4 * j & 0x000F000F | magic
                exact = _halves(register, dtype)
                assert exact.tolist() == [offset + low, offset + high]
                minus_zero = _halves(zero | zero << 16 | magic | 0x80008000, dtype)
                assert minus_zero.tolist() == [-(offset + zero)] * 2
                integers = exact + minus_zero  # one rounding, of an exact value
                assert integers.tolist() == [low - zero, high - zero]
                for scale in scales:
                    once = (torch.tensor([low - zero, high - zero]).double() * scale.double()).to(dtype)
                    assert torch.equal(integers * scale, once)


def _ptx_a(lane: int, i: int) -> tuple[int, int]:
    """(row, column) of element a_i of the .f16/.bf16 A fragment of mma.m16n8k16 (PTX ISA)."""
    group, in_group = lane >> 2, lane & 3
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, in_group * 2 + (i & 1) + (8 if i >= 4 else 0)


def test_ptx_table_is_a_bijection() -> None:
    assert {_ptx_a(lane, i) for lane in range(32) for i in range(8)} == {(r, c) for r in range(16) for c in range(16)}


def test_packed_words_are_the_a_fragment() -> None:
    """Every nibble of every lane of every step of several tiles is the element that the PTX ISA wants there."""
    n, k = 40, 160  # both with a tail
    q = np.random.default_rng(0).integers(0, 16, (n, k), dtype=np.uint8)
    padded = np.zeros((48, 192), np.uint8)
    padded[:n, :k] = q
    words = layout.pack_qweight(q).view(np.uint32)
    assert words.shape == (3, 3, 32, 4)
    for tn, tk, lane, step in np.ndindex(words.shape):
        for i in range(8):
            row, column = _ptx_a(lane, i)
            register, high = i // 2, i % 2
            nibble = int(words[tn, tk, lane, step]) >> (4 * register + 16 * high) & 15
            assert nibble == padded[16 * tn + row, 64 * tk + 16 * step + column]


def test_scales_and_zeros_are_the_rows_of_a_lane() -> None:
    """Rows g and g + 8 of lane 4g..4g+3 in one 4-byte load of scales and one byte of zeros."""
    n, groups = 40, 3
    scales = torch.arange(n * groups, dtype=torch.float16).reshape(n, groups)
    zeros = np.random.default_rng(1).integers(0, 16, (n, groups), dtype=np.uint8)
    packed_scales = layout.pack_scales(scales).numpy().reshape(-1)
    packed_zeros = layout.pack_zeros(zeros).view(np.uint8).reshape(-1)
    for row in range(48):
        for group in range(groups):
            entry = (row // 16 * groups + group) * 8 + row % 8
            half = row % 16 // 8
            expected_scale = scales[row, group].item() if row < n else 0
            expected_zero = zeros[row, group] if row < n else 0
            assert packed_scales[2 * entry + half] == expected_scale
            assert packed_zeros[entry] >> 4 * half & 15 == expected_zero
