"""What the kernels share on the device: tiles of a product, the modulation between the factors, dropout, tickets and counters.

    product    acc += a[rows, :] b[:, columns]              a (M, K) row-major, b (K, N) by its strides; any tails
    modulate   h * sigma | h R, and backward t * sigma | t R^T
    keep       the dropout mask of a tile (Philox4x32, 7 rounds), the bits of svdkern.backends.philox

r is padded to a power of two R >= 16: columns past r hold zeros. Tiles of products with a factor have RT of the R ranks.
Accumulation is in fp32. T is the activations' dtype.
"""

import triton
import triton.language as tl

# ------------------------------------------------------------------------------------------------------------ products


@triton.jit
def fence_async_proxy():
    """What this thread wrote to shared memory is there for wgmma, which reads it through another proxy (launching.wgmma)."""
    tl.inline_asm_elementwise(
        "fence.proxy.async.shared::cta; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def product(
    acc, a, stride_a, rows, M, b, stride_bk, stride_bn, columns, N, first, K,
    rng_state, threshold, BK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    ONE_STAGE: tl.constexpr, FENCE: tl.constexpr,
):  # fmt: skip
    """acc + (D * a)[rows, first : K] b[first : K, columns] without D's factor; b is cast to a's dtype. M K may pass 2^31."""
    depth = tl.arange(0, BK)
    a_at = a + rows[:, None].to(tl.int64) * stride_a + (first + depth)[None, :]
    b_at = b + (first + depth)[:, None].to(tl.int64) * stride_bk + columns[None, :].to(tl.int64) * stride_bn
    STAGES: tl.constexpr = 1 if DROPOUT and ONE_STAGE else None  # launching.wgmma says why
    for start in tl.range(first, K, BK, num_stages=STAGES):
        inside = depth < K - start
        left = tl.load(a_at, mask=(rows < M)[:, None] & inside[None, :], other=0.0)
        right = tl.load(b_at, mask=inside[:, None] & (columns < N)[None, :], other=0.0).to(left.dtype)
        if DROPOUT:
            left = tl.where(keep(rows, start, rng_state, threshold, BK), left, 0.0)
        if FENCE:
            fence_async_proxy()
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        a_at += BK
        b_at += BK * stride_bk
    return acc


@triton.jit
def product_tma(acc, a, row, b, column, K, BK: tl.constexpr, B_IS_OUT_BY_IN: tl.constexpr, PRECISION: tl.constexpr):
    """The same of tensor descriptors, tiles from (row, column) on: b's are (N, K) tiles, or (K, N) if not B_IS_OUT_BY_IN."""
    for start in range(0, K, BK):
        left = a.load([row, start])
        if B_IS_OUT_BY_IN:
            acc = tl.dot(left, b.load([column, start]).T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(left, b.load([start, column]), acc, input_precision=PRECISION)
    return acc


@triton.jit
def adapter_step(acc, z, rows, M, factor, columns, N, R: tl.constexpr, RT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + z[rows, :] factor[columns, :]^T, RT ranks at a time; z (M, R) and factor (N, R) contiguous, in T."""
    for first in tl.range(0, R, RT, num_stages=1):  # staged loads would cost the registers of the accumulators
        rank = first + tl.arange(0, RT)
        right_at = factor + columns[None, :].to(tl.int64) * R + rank[:, None]
        right = tl.load(right_at, mask=(columns < N)[None, :], other=0.0)
        left = tl.load(z + rows[:, None].to(tl.int64) * R + rank[None, :], mask=(rows < M)[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


# ---------------------------------------------------------------------------------------------------------- modulation


@triton.jit
def load_scale(scale, ON_DEVICE: tl.constexpr):
    if ON_DEVICE:
        return tl.load(scale).to(tl.float32)
    else:
        return scale


@triton.jit
def load_core(core, stride_row, stride_column, rank, r):
    """The core on ranks x ranks, zeros past r; strides (1, r) give its transpose."""
    i, j = rank[:, None], rank[None, :]
    return tl.load(core + i * stride_row + j * stride_column, mask=(i < r) & (j < r), other=0.0)


@triton.jit
def load_rows(matrix, rows, M, rank, r):
    """(rows, ranks) of a contiguous matrix (M, r), zeros outside."""
    at = matrix + rows[:, None].to(tl.int64) * r + rank[None, :]
    return tl.load(at, mask=(rows < M)[:, None] & (rank < r)[None, :], other=0.0)


@triton.jit
def store_rows(matrix, values, rows, M, rank, r):
    at = matrix + rows[:, None].to(tl.int64) * r + rank[None, :]
    tl.store(at, values.to(matrix.dtype.element_ty), mask=(rows < M)[:, None] & (rank < r)[None, :])


def kind(sigma: object, core: object) -> str:
    """KIND of a layer: what stands between the factors."""
    return "core" if core is not None else "sigma" if sigma is not None else "one"


@triton.jit
def modulate(
    h, sigma, core, rank, r, TRANSPOSED: tl.constexpr, KIND: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr
):
    """h * sigma (KIND "sigma"), h R or h R^T ("core": all ranks at once), h ("one"): before gate and scale."""
    if KIND == "sigma":
        return h * tl.load(sigma + rank, mask=rank < r, other=0.0).to(tl.float32)[None, :]
    if KIND == "core":
        if TRANSPOSED:
            return tl.dot(h.to(T), load_core(core, 1, r, rank, r).to(T), input_precision=PRECISION)
        return tl.dot(h.to(T), load_core(core, r, 1, rank, r).to(T), input_precision=PRECISION)
    return h


# ------------------------------------------------------------------------------------------------------------- dropout


@triton.jit
def keep(rows, column, rng_state, threshold, WIDTH: tl.constexpr):
    """bool (rows, WIDTH): which elements of columns column ... survive; column and WIDTH are multiples of 8."""
    seed, offset = tl.load(rng_state), tl.load(rng_state + 1)
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    octet = (column // 8 + tl.arange(0, WIDTH // 8)).to(tl.uint32)
    zero = tl.zeros((rows.shape[0], WIDTH // 8), tl.uint32)
    c0, c1 = zero + rows.to(tl.uint32)[:, None], zero + octet[None, :]
    c2, c3 = zero + (offset & 0xFFFFFFFF).to(tl.uint32), zero + ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(7):
        a0, a1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        b0, b1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = a1 ^ c1 ^ k0, b1, a0 ^ c3 ^ k1, b0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    # half j % 2 (low first) of word j // 2 is column j: interleaving puts x0 y0 x1 y1 ... side by side
    low = tl.interleave(tl.interleave(c0 & 0xFFFF, c2 & 0xFFFF), tl.interleave(c1 & 0xFFFF, c3 & 0xFFFF))
    high = tl.interleave(tl.interleave(c0 >> 16, c2 >> 16), tl.interleave(c1 >> 16, c3 >> 16))
    return tl.interleave(low, high) >= threshold


# --------------------------------------------------------------------------------------------------- tickets and counters
#
# control: int32 [ticket, counters], zeroed by the launch of pack.py that stands before. A tile depends only on tiles of lower
# tickets, so what a CTA waits for is held by one that runs. A counter says how many tiles of a row group, or of a super-group,
# have published their rows.

TICKET = tl.constexpr(0)
COUNTERS = tl.constexpr(1)


@triton.jit
def take_ticket(control):
    return tl.atomic_add(control + TICKET, 1, sem="relaxed")


@triton.jit
def publish(control, counter):
    """All stores of this CTA before here become visible to whoever sees this counter move."""
    tl.debug_barrier()  # Triton 3.6 puts none before an atomic
    tl.atomic_add(control + COUNTERS + counter, 1, sem="release")


@triton.jit
def consume(control, counter, count):
    """Wait until `count` tiles have published."""
    while tl.atomic_or(control + COUNTERS + counter, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()  # one thread looked; the others must not run ahead of it
