"""Small Triton kernels for test_planted_bugs.py to damage: a pipelined product, one launch with flags, tensor copies, sums.

They are the shapes of the real kernels (triton_kernels/) cut down to what the damage is about.
"""

import triton
import triton.language as tl


@triton.jit
def pipeline(x, sxm, rows, M, w, swn, columns, N, K, BK: tl.constexpr):
    """x[rows, :] w[columns, :]^T: a software pipeline of masked tiles."""
    depth = tl.arange(0, BK)
    total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    x_tile = x + rows[:, None] * sxm + depth[None, :]
    w_tile = w + columns[None, :] * swn + depth[:, None]
    for k in range(0, K, BK):
        a = tl.load(x_tile, mask=(rows[:, None] < M) & (depth < K - k)[None, :], other=0.0)
        b = tl.load(w_tile, mask=(columns[None, :] < N) & (depth < K - k)[:, None], other=0.0)
        total = tl.dot(a, b, total)
        x_tile += BK
        w_tile += BK
    return total


@triton.jit
def product(x, w, y, M, N, K, sxm, swn, sym, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """y = x w^T."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    total = pipeline(x, sxm, rows, M, w, swn, columns, N, K, BK)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(y + rows[:, None] * sym + columns[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def forward(
    x, w, u, f, z, control, y, M, N, K, sxm, swn, sun, sfn, sym, COLUMN_TILES, TILES,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, TICKETS: tl.constexpr,
):  # fmt: skip
    """z = x u^T and y = x w^T + z f^T in one launch: a row group has one tile of z, then COLUMN_TILES of y that wait for it.

    control: ticket, CTAs that are done, epoch, then a flag for each row group, which is the epoch in which its z was
    written. TICKETS: tiles are drawn, not dealt.
    """
    ranks = tl.arange(0, BR)
    epoch = tl.load(control + 2, volatile=True) + 1
    if TICKETS:
        t = tl.atomic_add(control, 1)
    else:
        t = tl.program_id(0)
    while t < TILES:
        group = t // (COLUMN_TILES + 1)
        tile = t % (COLUMN_TILES + 1)
        rows = group * BM + tl.arange(0, BM)
        if tile == 0:
            shrunk = pipeline(x, sxm, rows, M, u, sun, ranks, BR, K, BK)
            tl.store(z + rows[:, None] * BR + ranks[None, :], shrunk.to(z.dtype.element_ty), mask=rows[:, None] < M)
            tl.debug_barrier()
            tl.atomic_xchg(control + 3 + group, epoch, sem="release")
        else:
            columns = (tile - 1) * BN + tl.arange(0, BN)
            total = pipeline(x, sxm, rows, M, w, swn, columns, N, K, BK)
            b = tl.load(f + columns[None, :] * sfn + ranks[:, None], mask=columns[None, :] < N, other=0.0)
            while tl.atomic_or(control + 3 + group, 0, sem="acquire") != epoch:
                pass
            tl.debug_barrier()
            a = tl.load(
                z + rows[:, None] * BR + ranks[None, :], mask=rows[:, None] < M, other=0.0, cache_modifier=".cg"
            )
            total = tl.dot(a, b, total)
            inside = (rows[:, None] < M) & (columns[None, :] < N)
            tl.store(y + rows[:, None] * sym + columns[None, :], total.to(y.dtype.element_ty), mask=inside)
        if TICKETS:
            t = tl.atomic_add(control, 1)
        else:
            t += tl.num_programs(0)
    done = tl.atomic_add(control + 1, 1, sem="acq_rel")
    if done == tl.num_programs(0) - 1:
        tl.store(control, 0)
        tl.store(control + 1, 0)
        tl.store(control + 2, epoch)


@triton.jit
def copied(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c = a b^T by tensor descriptors: copies that complete on mbarriers."""
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        total = tl.dot(a.load([row, k]), b.load([column, k]).T, total)
    c.store([row, column], total.to(tl.bfloat16))


@triton.jit
def sums(x, y, K, BM: tl.constexpr, BK: tl.constexpr):
    """y = the sum of each row of x, whose columns several warps share."""
    rows, columns = tl.arange(0, BM), tl.arange(0, BK)
    tile = tl.load(x + rows[:, None] * K + columns[None, :], mask=(columns < K)[None, :], other=0.0)
    tl.store(y + rows, tl.sum(tile, axis=1))
