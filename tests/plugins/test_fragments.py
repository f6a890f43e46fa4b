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


@pytest.mark.parametrize("zero", range(16))
def test_every_nibble_one_shift_higher(zero: int) -> None:
    """fp16, decode: a nibble at bit 4 of a half is 1024 + 16 q; one FMA with 1/16 and -(64 + zero) gives q - zero."""
    minus_zero = _halves(zero << 4 | zero << 20 | 0x54005400 | 0x80008000, torch.float16)
    assert minus_zero.tolist() == [-(64 + zero)] * 2
    sixteenth = _halves(0x2C002C00, torch.float16)
    assert sixteenth.tolist() == [1 / 16] * 2
    for low in range(16):
        for high in range(16):
            word = 0x5A0A5A0A | low << 4 | high << 20
            shifted = _halves(word & 0x00F000F0 | 0x64006400, torch.float16)
            assert shifted.tolist() == [1024 + 16 * low, 1024 + 16 * high]
            exact = shifted.double() * sixteenth.double() + minus_zero.double()  # what an FMA rounds once
            assert exact.to(torch.float16).tolist() == [low - zero, high - zero]


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
    words = layout.pack_qweight(torch.from_numpy(q)).numpy().view(np.uint32)
    assert words.shape == (3, 3, 32, 4)
    for tn, tk, lane, step in np.ndindex(words.shape):
        for i in range(8):
            row, column = _ptx_a(lane, i)
            register, high = i // 2, i % 2
            nibble = int(words[tn, tk, lane, step]) >> (4 * register + 16 * high) & 15
            assert nibble == padded[16 * tn + row, 64 * tk + 16 * step + column]


def _ptx_wgmma_a(thread: int, i: int) -> tuple[int, int]:
    """(row, column) of a_i of the .f16/.bf16 A fragment in registers of wgmma.m64nNk16 (PTX ISA)."""
    warp, lane = thread >> 5, thread & 31
    row = 16 * warp + (lane >> 2) + (8 if i // 2 % 2 else 0)
    return row, (lane & 3) * 2 + (i & 1) + (8 if i >= 4 else 0)


def test_four_tiles_are_the_a_fragment_of_a_warpgroup() -> None:
    """What warp w of a warpgroup loads of row tile 4 b + w is its share of wgmma's A: one layout serves Hopper too."""
    places = {_ptx_wgmma_a(thread, i) for thread in range(128) for i in range(8)}
    assert places == {(r, c) for r in range(64) for c in range(16)}
    for thread in range(128):
        for i in range(8):
            row, column = _ptx_a(thread & 31, i)
            assert _ptx_wgmma_a(thread, i) == (16 * (thread >> 5) + row, column)


def test_scales_and_zeros_are_the_rows_of_a_lane() -> None:
    """Rows g and g + 8 of lane 4g..4g+3 in one 4-byte load of scales and one byte of zeros."""
    n, groups = 40, 3
    scales = torch.arange(n * groups, dtype=torch.float16).reshape(n, groups)
    zeros = np.random.default_rng(1).integers(0, 16, (n, groups), dtype=np.uint8)
    packed_scales = layout.pack_scales(scales).numpy().reshape(-1)
    packed_zeros = layout.pack_zeros(torch.from_numpy(zeros)).numpy().view(np.uint8).reshape(-1)
    for row in range(48):
        for group in range(groups):
            entry = (row // 16 * groups + group) * 8 + row % 8
            half = row % 16 // 8
            expected_scale = scales[row, group].item() if row < n else 0
            expected_zero = zeros[row, group] if row < n else 0
            assert packed_scales[2 * entry + half] == expected_scale
            assert packed_zeros[entry] >> 4 * half & 15 == expected_zero
