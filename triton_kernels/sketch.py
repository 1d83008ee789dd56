"""The random start of an SVD:  out[row, column] = +-1 of column first + column, the bits of svdkern.linalg.sketch.

    key (seed_low, seed_high), counter (row, column // 128, 0, 0): Philox4x32, 10 rounds; bit column % 32 of word column % 128 // 32

A program makes ROWS rows of WORDS words of 32 columns. A word takes its four counters' rounds anew and keeps one of four:
about 3 integer operations an element, where the write of it takes longer. An entry depends on its row and column alone, so
any part of the matrix, by any tiling, has the same bits. Floor: one write of out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .configs import ceil_div

ROWS, WORDS = 32, 2


@triton.jit(do_not_specialize=["first", "key_low", "key_high"])
def sketch_kernel(
    out, rows, columns, first, key_low, key_high, ROWS: tl.constexpr, WORDS: tl.constexpr, ROUNDS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_word = first // 32 + tl.program_id(1) * WORDS
    word = first_word + tl.arange(0, WORDS)
    zero = tl.zeros((ROWS, WORDS), tl.uint32)
    c0, c1, c2, c3 = zero + row.to(tl.uint32)[:, None], zero + (word // 4).to(tl.uint32)[None, :], zero, zero
    k0, k1 = key_low.to(tl.uint32), key_high.to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        a0, a1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        b0, b1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = a1 ^ c1 ^ k0, b1, a0 ^ c3 ^ k1, b0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    which = zero + (word % 4).to(tl.uint32)[None, :]
    bits = tl.where(which < 2, tl.where(which == 0, c0, c1), tl.where(which == 2, c2, c3))
    bit = (bits[:, :, None] >> tl.arange(0, 32).to(tl.uint32)[None, None, :]) & 1
    sign = tl.reshape(1 - 2 * bit.to(tl.int32), (ROWS, 32 * WORDS))
    column = first_word * 32 - first + tl.arange(0, 32 * WORDS)
    to = out + row[:, None].to(tl.int64) * columns + column[None, :]
    inside = (row < rows)[:, None] & ((column >= 0) & (column < columns))[None, :]
    tl.store(to, sign.to(out.dtype.element_ty), mask=inside)


def sketch(rows: int, columns: int, *, seed: int, first: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns) of +-1 in a float dtype: columns ``first ...`` of the endless matrix that ``seed`` names."""
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    if out.numel():
        words = (first + columns - 1) // 32 - first // 32 + 1
        launching.launch(
            sketch_kernel, (ceil_div(rows, ROWS), ceil_div(words, WORDS)),
            out, rows, columns, first, _as_int32(seed), _as_int32(seed >> 32),
            ROWS=ROWS, WORDS=WORDS, ROUNDS=10, num_warps=4,
        )  # fmt: skip
    return out


def _as_int32(word: int) -> int:
    """The low 32 bits as a signed number: one type of argument, one compilation, for every seed."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
