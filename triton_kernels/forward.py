"""The whole forward in one persistent launch:  y = x W + s ((D * x) U * sigma) V^T + b.

Tiles of two kinds in one order. A super-group of HEIGHT row groups (BM rows each) has HEIGHT z-tiles (a piece of RT ranks each)

    h = (D * x) U        z = s (h * sigma | h R) * g        -> z (M, R) in T, h (M, r) kept for the backward, the group's counter

and then its y-tiles (BM, BN), m running fastest so that HEIGHT tiles share a tile of W in the L2:

    acc = x W over K in steps of BK; wait for the group's counter; acc += z V^T, one step of R; y = acc + b, rounded once

x comes into the L2 for the z-tile and is there for the y-tiles; y is written once and never read. Tiles are taken by a
ticket; a y-tile depends on a z-tile of a lower ticket, so there is no deadlock whatever else runs on the GPU (tiles.py).
Floor: that of the frozen product plus r (K + N) / (K N) of its arithmetic. With TMA (sm_90 and later) x and W come through
tensor descriptors. Triton issues a loop's loads early, ahead of any wait in it: hence the adapter step stands after it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .configs import Config, ceil_div
from .tiles import (
    COUNTERS,
    adapter_step,
    consume,
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


@triton.jit(do_not_specialize=["M", "threshold"])
def forward_kernel(
    control, x, stride_x, weight, stride_wn, stride_wk, M, N, K, x_tma, w_tma, u, stride_u, v, z, r, sigma, core, gate, scale, bias,
    y, stride_y, h_out, rng_state, threshold, keep_scale,
    R: tl.constexpr, RT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HEIGHT: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr, BIAS: tl.constexpr, SAVE_H: tl.constexpr,
    DROPOUT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, ONE_STAGE: tl.constexpr, FENCE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = y.dtype.element_ty
    PIECES: tl.constexpr = R // RT
    tl.static_assert(PIECES == 1 or KIND != "core")
    row_groups, column_tiles = tl.cdiv(M, BM), tl.cdiv(N, BN)
    per_group = PIECES + column_tiles
    ticket = take_ticket(control)
    while ticket < row_groups * per_group:
        first = ticket // (HEIGHT * per_group) * HEIGHT
        height = tl.minimum(HEIGHT, row_groups - first)
        place = ticket - first * per_group
        if place < height * PIECES:
            group, piece = first + place % height, place // height
            rows, rank = group * BM + tl.arange(0, BM), piece * RT + tl.arange(0, RT)
            h = product(
                tl.zeros((BM, RT), tl.float32), x, stride_x, rows, M, u, 1, stride_u, rank, R, 0, K,
                rng_state, threshold, BK, DROPOUT, PRECISION, ONE_STAGE, FENCE,
            )  # fmt: skip
            if DROPOUT:
                h *= keep_scale
            if SAVE_H:
                store_rows(h_out, h, rows, M, rank, r)
            modulated = modulate(h, sigma, core, rank, r, False, KIND, T, PRECISION) * load_scale(
                scale, SCALE_ON_DEVICE
            )
            if GATED:
                modulated *= load_rows(gate, rows, M, rank, r)
            store_rows(z, modulated, rows, M, rank, R)
            publish(control, group)
        else:
            place -= height * PIECES
            group, column = first + place % height, place // height * BN
            rows, columns = group * BM + tl.arange(0, BM), column + tl.arange(0, BN)
            acc = tl.zeros((BM, BN), tl.float32)
            if TMA:
                acc = product_tma(acc, x_tma, group * BM, w_tma, column, K, BK, True, PRECISION)
            else:
                acc = product(
                    acc, x, stride_x, rows, M, weight, stride_wk, stride_wn, columns, N, 0, K,
                    rng_state, threshold, BK, False, PRECISION, ONE_STAGE, FENCE,
                )  # fmt: skip
            consume(control, group, PIECES)
            acc = adapter_step(acc, z, rows, M, v, columns, N, R, RT, PRECISION)
            if BIAS:
                acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
            y_at = y + rows[:, None].to(tl.int64) * stride_y + columns[None, :]
            tl.store(y_at, acc.to(T), mask=(rows < M)[:, None] & (columns < N)[None, :])
        ticket = take_ticket(control)


def control(x: Tensor, config: Config) -> Tensor:
    """Ticket and counters of a launch, for pack to zero."""
    return x.new_empty(COUNTERS.value + ceil_div(x.shape[0], config.BM), dtype=torch.int32)


def forward(
    x: Tensor, weight: Tensor, u: Tensor, v: Tensor, r: int, sigma: Tensor | None, core: Tensor | None,
    gate: Tensor | None, scale: Tensor, bias: Tensor | None, y: Tensor, z: Tensor, h: Tensor | None,
    rng_state: Tensor | None, threshold: int, keep_scale: float, control: Tensor, config: Config, ctas: int, precision: str,
    tma: bool,
) -> None:  # fmt: skip
    """y (M, N) and, unless None, h (M, r) fp32.

    x (M, K) row-major; weight (N, K), any strides; u (R, K) and v (N, R) packed; gate (M, r) fp32; z (M, R) of x's
    dtype and control: workspace.
    """
    (rows, width), out = x.shape, weight.shape[0]
    BM, BN, BK = config.BM, config.BN, config.BK
    row_groups = ceil_div(rows, BM)
    R = v.shape[1]
    RT = min(R, config.RT)
    tiles = row_groups * (ceil_div(out, BN) + R // RT)
    on_host = launching.on_host(scale)
    launching.launch(
        forward_kernel, (min(tiles, ctas),),
        control, x, x.stride(0), weight, *weight.stride(), rows, out, width,
        launching.descriptor(x, [BM, BK]) if tma else None, launching.descriptor(weight, [BN, BK]) if tma else None,
        u, u.stride(0), v, z, r, sigma, core, gate, scale.item() if on_host else scale, bias, y, y.stride(0), h,
        rng_state, threshold, keep_scale,
        R=R, RT=RT, BM=BM, BN=BN, BK=BK, HEIGHT=config.HEIGHT, KIND=kind(sigma, core), GATED=gate is not None,
        SCALE_ON_DEVICE=not on_host, BIAS=bias is not None, SAVE_H=h is not None, DROPOUT=threshold > 0,
        TMA=tma, PRECISION=precision, num_warps=config.num_warps, num_stages=config.num_stages, **launching.wgmma(x.device),
    )  # fmt: skip
