"""The whole backward in one persistent launch, from dy (M, N) and the saved h (M, r).

A super-group of HEIGHT row groups (BM rows each) has, in the order of its tickets (a piece of RT ranks each but for dx),

    p-tiles     p = dy V        t = s p * g        q = t * sigma | t R^T        z = s (h * sigma | h R) * g
                q, z -> (M, R) in T, the counters of the group and of the super-group; partial sums over the group's rows of
                dsigma = h * t        dR = h^T t        ds = p * z / s        and, row by row, dg = s p * (h * sigma | h R)
    dx-tiles    dx = dy W + D * (q U^T), (BM, BN): as in forward.py; with dropout the adapter comes first, and its mask
    dU-tiles    (D * x)^T q over the super-group's rows: (BF, R), output-stationary, added to what the super-groups before have
    dV-tiles    dy^T z likewise, and db = the sum of dy

and after the last of them

    sums        dsigma, dR, ds = the partial sums of the row groups, added up

dU- and dV-tiles are bound by bandwidth, dx-tiles by arithmetic: CTAs of one run beside CTAs of the other. Sums over M are added
in an order that the shape alone decides, a tile of dU waiting for the same tile of the super-group before: no float atomics,
the same bits every time, and 4 r (K + N) bytes of workspace for any M. Floor: that of the frozen dy W plus 2 r (K + N) / (K N)
of its arithmetic, one read of dy and x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .configs import Config, ceil_div
from .reduce import BLOCK, add_up
from .tiles import (
    COUNTERS,
    adapter_step,
    consume,
    fence_async_proxy,
    keep,
    kind,
    load_rows,
    load_scale,
    modulate,
    product,
    product_tma,
    publish,
    store_rows,
    take_ticket,
)

OUTER_STAGES = tl.constexpr(4)  # steps of a dU- or dV-tile that are on their way: little but bandwidth counts there


@triton.jit
def outer_tile(
    a, stride_a, columns, L, q, R: tl.constexpr, rank, RT: tl.constexpr, first_row, last_row,
    control, counter, super_group, is_last, so_far, out, out_row, out_rank, r, totals, total_out, piece,
    rng_state, threshold, keep_scale, BF: tl.constexpr, BD: tl.constexpr, DROPOUT: tl.constexpr,
    PRODUCT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, ONE_STAGE: tl.constexpr, FENCE: tl.constexpr,
):  # fmt: skip
    """so_far[columns, rank] += (D * a)[rows, columns]^T q[rows, rank] and totals[piece, columns] += the sum of a over rows.

    Of the last super-group the sums go to out and total_out.
    """
    if SUM:
        totals += piece.to(tl.int64) * L
    depth, at_columns = tl.arange(0, BD), columns + tl.arange(0, BF)
    acc = tl.zeros((BF, RT), tl.float32)
    total = tl.zeros((BF,), tl.float32)
    if super_group > 0:
        consume(control, counter, super_group)
        if PRODUCT:
            acc = load_rows(so_far, at_columns, L, rank, r)
        if SUM:
            total = tl.load(totals + at_columns, mask=at_columns < L, other=0.0)
    STAGES: tl.constexpr = 1 if (DROPOUT or SUM) and ONE_STAGE else OUTER_STAGES  # launching.wgmma says why
    for row in tl.range(first_row, last_row, BD, num_stages=STAGES):
        rows = row + depth
        inside = rows < last_row
        # loaded as it is multiplied: for mma.sync Triton does not copy asynchronously what tl.trans takes
        at = a + rows[None, :].to(tl.int64) * stride_a + at_columns[:, None]
        tile = tl.load(at, mask=inside[None, :] & (at_columns < L)[:, None], other=0.0)
        if SUM:
            total += tl.sum(tile.to(tl.float32), 1)
        if PRODUCT:
            if DROPOUT:
                tile = tl.where(tl.trans(keep(rows, columns, rng_state, threshold, BF)), tile, 0.0)
            q_at = q + rows[:, None].to(tl.int64) * R + rank[None, :]
            right = tl.load(q_at, mask=inside[:, None], other=0.0)
            if FENCE:
                fence_async_proxy()
            acc = tl.dot(tile, right, acc, input_precision=PRECISION)
    if is_last:
        if PRODUCT:
            if DROPOUT:
                acc *= keep_scale
            out_at = out + at_columns[:, None].to(tl.int64) * out_row + rank[None, :].to(tl.int64) * out_rank
            tl.store(out_at, acc.to(out.dtype.element_ty), mask=(at_columns < L)[:, None] & (rank < r)[None, :])
        if SUM:
            tl.store(total_out + at_columns, total.to(total_out.dtype.element_ty), mask=at_columns < L)
    else:
        if PRODUCT:
            store_rows(so_far, acc, at_columns, L, rank, r)
        if SUM:
            tl.store(totals + at_columns, total, mask=at_columns < L)
        publish(control, counter)


@triton.jit(do_not_specialize=["M", "threshold"])
def backward_kernel(
    control, dy, stride_dy, weight, stride_wn, stride_wk, M, N, K, dy_tma, w_tma, x, stride_x, u, v, stride_v, h, r,
    sigma, core, gate, scale, dx, stride_dx, q, z, sigmas, cores, scales, dgate, u_sum, v_sum, bias_sum, dsigma, dcore, dscale,
    du, du_row, du_rank, dv, dv_row, dv_rank, dbias, rng_state, threshold, keep_scale,
    R: tl.constexpr, RT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HEIGHT: tl.constexpr,
    BF: tl.constexpr, BD: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr,
    DROPOUT: tl.constexpr, BASE: tl.constexpr, WANT_P: tl.constexpr, WANT_X: tl.constexpr, WANT_U: tl.constexpr,
    WANT_SIGMA: tl.constexpr, WANT_V: tl.constexpr, WANT_BIAS: tl.constexpr, WANT_SCALE: tl.constexpr, WANT_CORE: tl.constexpr,
    WANT_GATE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, ONE_STAGE: tl.constexpr, FENCE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = dy.dtype.element_ty
    NEEDS_H: tl.constexpr = WANT_V or WANT_SIGMA or WANT_SCALE or WANT_CORE or WANT_GATE
    PIECES: tl.constexpr = R // RT
    tl.static_assert(PIECES == 1 or KIND != "core")
    row_groups = tl.cdiv(M, BM)
    groups = tl.cdiv(row_groups, HEIGHT)
    x_tiles = tl.cdiv(K, BN) if WANT_X else 0
    u_tiles = tl.cdiv(K, BF) * PIECES if WANT_U else 0
    v_tiles = tl.cdiv(N, BF) * PIECES if WANT_V or WANT_BIAS else 0
    per_group = PIECES + x_tiles
    whole = HEIGHT * per_group + u_tiles + v_tiles  # tiles of a super-group
    tickets = (groups - 1) * whole + (row_groups - (groups - 1) * HEIGHT) * per_group + u_tiles + v_tiles
    SCALE_SUMS: tl.constexpr = 1 if WANT_SCALE else 0
    tickets += SCALE_SUMS
    if WANT_SIGMA:
        tickets += tl.cdiv(r, BLOCK)
    if WANT_CORE:
        tickets += tl.cdiv(r * r, BLOCK)
    ticket = take_ticket(control)
    while ticket < tickets:
        super_group = tl.minimum(ticket // whole, groups - 1)
        place = ticket - super_group * whole
        first = super_group * HEIGHT
        height = tl.minimum(HEIGHT, row_groups - first)
        if place < height * PIECES:  # --------------------------------------------------------------------- p-tile
            group, piece = first + place % height, place // height
            rows, rank = group * BM + tl.arange(0, BM), piece * RT + tl.arange(0, RT)
            s = load_scale(scale, SCALE_ON_DEVICE)
            if NEEDS_H:
                hidden = load_rows(h, rows, M, rank, r)
                modulated = modulate(hidden, sigma, core, rank, r, False, KIND, T, PRECISION)
            if GATED:
                g = load_rows(gate, rows, M, rank, r)
            if WANT_V:
                gated = modulated * s
                if GATED:
                    gated *= g
                store_rows(z, gated, rows, M, rank, R)
            if WANT_P:
                p = product(
                    tl.zeros((BM, RT), tl.float32), dy, stride_dy, rows, M, v, 1, stride_v, rank, R, 0, N,
                    rng_state, threshold, BK, False, PRECISION, ONE_STAGE, FENCE,
                )  # fmt: skip
                t = p * s
                if WANT_GATE:
                    store_rows(dgate, t * modulated, rows, M, rank, r)
                if WANT_SCALE:
                    both = p * modulated
                    if GATED:
                        both *= g
                    tl.store(scales + group * PIECES + piece, tl.sum(both))
                if GATED:
                    t *= g
                if WANT_SIGMA:
                    tl.store(sigmas + group.to(tl.int64) * r + rank, tl.sum(hidden * t, 0), mask=rank < r)
                if WANT_CORE:
                    products = tl.dot(tl.trans(hidden.to(T)), t.to(T), input_precision=PRECISION)
                    store_rows(cores + group.to(tl.int64) * r * r, products, rank, r, rank, r)
                if WANT_X or WANT_U:
                    store_rows(q, modulate(t, sigma, core, rank, r, True, KIND, T, PRECISION), rows, M, rank, R)
            publish(control, group)
            publish(control, row_groups + super_group)
        elif place < height * per_group:  # ----------------------------------------------------------- dx-tile
            if WANT_X:
                place -= height * PIECES
                group, column = first + place % height, place // height * BN
                rows, columns = group * BM + tl.arange(0, BM), column + tl.arange(0, BN)
                acc = tl.zeros((BM, BN), tl.float32)
                if DROPOUT:  # the mask falls on the adapter's part alone
                    consume(control, group, PIECES)
                    acc = adapter_step(acc, q, rows, M, u, columns, K, R, RT, PRECISION)
                    acc = tl.where(keep(rows, column, rng_state, threshold, BN), acc * keep_scale, 0.0)
                if BASE:
                    if TMA:
                        acc = product_tma(acc, dy_tma, group * BM, w_tma, column, N, BK, False, PRECISION)
                    else:
                        acc = product(
                            acc, dy, stride_dy, rows, M, weight, stride_wn, stride_wk, columns, K, 0, N,
                            rng_state, threshold, BK, False, PRECISION, ONE_STAGE, FENCE,
                        )  # fmt: skip
                if not DROPOUT:
                    consume(control, group, PIECES)
                    acc = adapter_step(acc, q, rows, M, u, columns, K, R, RT, PRECISION)
                dx_at = dx + rows[:, None].to(tl.int64) * stride_dx + columns[None, :]
                tl.store(dx_at, acc.to(T), mask=(rows < M)[:, None] & (columns < K)[None, :])
        elif place < height * per_group + u_tiles + v_tiles:  # ------------------------------------ dU- and dV-tiles
            tile = place - height * per_group
            counter = row_groups + groups + tile
            consume(control, row_groups + super_group, height * PIECES)
            first_row, last_row, is_last = first * BM, tl.minimum((first + height) * BM, M), super_group == groups - 1
            if tile < u_tiles:
                if WANT_U:
                    piece = tile % PIECES
                    outer_tile(
                        x, stride_x, tile // PIECES * BF, K, q, R, piece * RT + tl.arange(0, RT), RT, first_row, last_row,
                        control, counter, super_group, is_last, u_sum, du, du_row, du_rank, r, None, None, piece,
                        rng_state, threshold, keep_scale, BF, BD, DROPOUT, True, False, PRECISION, ONE_STAGE, FENCE,
                    )  # fmt: skip
            else:
                if WANT_V or WANT_BIAS:
                    piece = (tile - u_tiles) % PIECES
                    outer_tile(
                        dy, stride_dy, (tile - u_tiles) // PIECES * BF, N, z, R, piece * RT + tl.arange(0, RT), RT, first_row,
                        last_row, control, counter, super_group, is_last, v_sum, dv, dv_row, dv_rank, r, bias_sum, dbias, piece,
                        rng_state, threshold, keep_scale, BF, BD, False, WANT_V, WANT_BIAS, PRECISION, ONE_STAGE, FENCE,
                    )  # fmt: skip
        else:  # --------------------------------------------------------------------------------------------- sums
            if WANT_SIGMA or WANT_CORE or WANT_SCALE:
                block = place - height * per_group - u_tiles - v_tiles
                for group in range(groups):
                    consume(control, row_groups + group, tl.minimum(HEIGHT, row_groups - group * HEIGHT) * PIECES)
                if block < SCALE_SUMS:
                    if WANT_SCALE:
                        add_up(scales, row_groups * PIECES, 1, 1, dscale, 0, 0, 0)
                else:
                    if WANT_SIGMA:  # a layer has sigma or a core
                        add_up(sigmas, row_groups, r, r, dsigma, 0, 1, block - SCALE_SUMS)
                    if WANT_CORE:
                        add_up(cores, row_groups, r * r, r, dcore, r, 1, block - SCALE_SUMS)
        ticket = take_ticket(control)


MOST_REGISTERS = 255
"""Of a thread: all there are, since a processor has one CTA of a persistent launch. Left to itself ptxas spills a few, for more
CTAs; of products in float32, which are unrolled, it spills more where it may have more."""


class Want(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    u: bool
    sigma: bool
    v: bool
    bias: bool
    scale: bool
    core: bool
    gate: bool


def control(dy: Tensor, width: int, R: int, config: Config) -> Tensor:
    """Ticket and counters of a launch, for pack to zero: of row groups, of super-groups, of tiles of dU and dV."""
    row_groups = ceil_div(dy.shape[0], config.BM)
    outer_tiles = (ceil_div(width, config.BF) + ceil_div(dy.shape[1], config.BF)) * (R // min(R, config.RT))
    counters = row_groups + ceil_div(row_groups, config.HEIGHT) + outer_tiles
    return dy.new_empty(COUNTERS.value + counters, dtype=torch.int32)


def backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, u: Tensor, v: Tensor, h: Tensor | None, r: int,
    sigma: Tensor | None, core: Tensor | None, gate: Tensor | None, scale: Tensor, outs: dict[str, Tensor],
    rng_state: Tensor | None, threshold: int, keep_scale: float, control: Tensor, config: Config, ctas: int,
    precision: str, tma: bool, want: Want,
) -> None:  # fmt: skip
    """Fill the wanted gradients: outs has x (M, K), u (K, r) and v (N, r) of any strides, sigma, bias, scale, core (r, r)
    contiguous, and gate (M, r) fp32.

    dy (M, N) and x (M, K) row-major; u (K, R) and v (R, N) packed; h (M, r) fp32; control: workspace.
    """
    rows, out = dy.shape
    width, R = u.shape[0], u.shape[1]
    BM, BN, BK, BF = config.BM, config.BN, config.BK, config.BF
    RT = min(R, config.RT)
    pieces = R // RT
    row_groups = ceil_div(rows, BM)
    groups = ceil_div(row_groups, config.HEIGHT)
    x_tiles = ceil_div(width, BN) if want.x else 0
    fill = pieces * ((ceil_div(width, BF) if want.u else 0) + (ceil_div(out, BF) if want.v or want.bias else 0))
    wants_p = want.x or want.u or want.sigma or want.scale or want.core or want.gate

    def sums(wanted: bool, *shape: int) -> Tensor | None:
        return dy.new_empty(*shape, dtype=torch.float32) if wanted else None

    between = [dy.new_empty(rows, R) if wanted else None for wanted in (want.x or want.u, want.v)]
    of_row_groups = (
        sums(want.sigma, row_groups, r),
        sums(want.core, row_groups, r * r),
        sums(want.scale, row_groups * pieces),
    )
    so_far = sums(want.u, width, r), sums(want.v, out, r), sums(want.bias, pieces, out)
    dx, du, dv = outs.get("x"), outs.get("u"), outs.get("v")
    on_host = launching.on_host(scale)
    sum_tiles = sum(ceil_div(size, BLOCK.value) for size in (want.sigma * r, want.core * r * r, want.scale))
    tiles = row_groups * (pieces + x_tiles) + groups * fill + sum_tiles
    launching.launch(
        backward_kernel, (min(tiles, ctas),),
        control, dy, dy.stride(0), weight, *((0, 0) if weight is None else weight.stride()), rows, out, width,
        launching.descriptor(dy, [BM, BK]) if tma else None, launching.descriptor(weight, [BK, BN]) if tma else None,
        x, 0 if x is None else x.stride(0), u, v, v.stride(0), h, r, sigma, core, gate,
        scale.item() if on_host else scale, dx, 0 if dx is None else dx.stride(0), *between,
        *of_row_groups, outs.get("gate"), *so_far, outs.get("sigma"), outs.get("core"), outs.get("scale"),
        du, *((0, 0) if du is None else du.stride()), dv, *((0, 0) if dv is None else dv.stride()), outs.get("bias"),
        rng_state, threshold, keep_scale,
        R=R, RT=RT, BM=BM, BN=BN, BK=BK, HEIGHT=config.HEIGHT, BF=BF, BD=config.BD, KIND=kind(sigma, core), GATED=gate is not None,
        SCALE_ON_DEVICE=not on_host, DROPOUT=threshold > 0, BASE=weight is not None, WANT_P=wants_p, WANT_X=want.x,
        WANT_U=want.u, WANT_SIGMA=want.sigma, WANT_V=want.v, WANT_BIAS=want.bias, WANT_SCALE=want.scale,
        WANT_CORE=want.core, WANT_GATE=want.gate, TMA=tma, PRECISION=precision,
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=None if dy.dtype == torch.float32 else MOST_REGISTERS,
        **launching.wgmma(dy.device),
    )  # fmt: skip
