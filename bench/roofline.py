"""What should one adapted layer cost? Its floor on a device and the predicted time of each design: a model, not a measurement.

    python -m svdkern bench roofline --device h100 --shapes 8192x4096x4096x16 --dtype bf16 --mode fwd
    python -m svdkern bench roofline --device mine.json                  a device of one's own: the fields of `Device`
    python -m svdkern bench roofline --device bench/results/<machine>/ceilings.jsonl --store

What is stored is held against measurements by `python -m svdkern bench confirm`.

`floor`: a pass takes max(flops / peak, bytes / bandwidth), every tensor moved once; its ratio is to the frozen layer's own
floor. Other ratios are to the predicted time of `frozen`, last wave included: what fits beside a last wave is free, so such a
ratio may lie below the floor's, the time never does. A prediction is the sum over launches of

    launch_s + max(busy_s, bytes / bandwidth)

A product is tiles (bm, bn): the device's, or halves of it, whichever are fastest. Depth k keeps one SM busy for

    t(bm, bn, k) = max(2·bm·bn·k / (peak / sms), (bm + bn)·k·size / sm_bandwidth)          k in steps of BK, r of 16

and the adapter's step adds t(bm, bn, r). Tiles of one kind are whole waves, ceil(tiles / sms)·t; tiles of several kinds in one
launch are scheduled one by one in the order of their tickets (`makespan`), tail included. Half of the L2 holds a band of one
operand while the other streams through the rest, and nothing stays from one launch to the next; read from memory are

    bytes(a) + bytes(b)·(1 if bytes(b) <= l2 / 2 else ceil(bytes(a) / (l2 / 2)))           or the same with a and b swapped

Skinny products and elementwise passes are streams, busy for flops / peak. GPU launches are those of a replayed CUDA graph: the
host is not modelled. A CPU is one SM with tiles of one element, so has no waves; its products run at the library's rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench import results
from bench.cases import DTYPES, MODES, SETS, Case

MODEL = 2  # version of the equations: a stored prediction names the one it comes from
OWN_SHARE = 0.9  # of the FMA peak, what the packed product of the CPU backend is expected to reach
FEW_ROWS = 32  # up to which a GPU's backends have kernels of their own
SIZES = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}


@dataclass(frozen=True)
class Device:
    """Rates in flop/s and bytes/s; matmul_flops: of the library's product, where not the peak. The defaults are a CPU's."""

    name: str
    kind: str
    peak_flops: Mapping[str, float]
    bandwidth: float
    launch_s: float
    source: str = "its own description"
    matmul_flops: Mapping[str, float] = dataclasses.field(default_factory=dict)
    sms: int = 1
    l2_bytes: float = math.inf
    sm_bandwidth: float = math.inf
    tile: tuple[int, int, int] = (1, 1, 1)

    def __post_init__(self) -> None:
        if self.kind not in CANDIDATES or not re.fullmatch(r"[a-z0-9_+-]+", self.name):
            raise ValueError(f"name {self.name!r}, kind {self.kind!r}: expected a-z, 0-9, _, +, -, and gpu or cpu")
        rates = [self.bandwidth, self.sm_bandwidth, *self.peak_flops.values(), *self.matmul_flops.values()]
        if min(*rates, self.sms, self.l2_bytes) <= 0 or min(self.tile) < (16 if self.kind == "gpu" else 1):
            raise ValueError(f"device {self.name}: expected rates and sizes above 0, and a GPU's tile at least 16 wide")

    def peak(self, dtype: str) -> float:
        if dtype not in self.peak_flops:
            raise ValueError(f"device {self.name} has no rate for {dtype}, only for {', '.join(self.peak_flops)}")
        return self.peak_flops[dtype]

    def matmul(self, dtype: str) -> float:
        return self.matmul_flops.get(dtype, self.peak(dtype))


@dataclass(frozen=True)
class Launch:
    """Arithmetic, bytes from and to memory, and the least time that the arithmetic takes."""

    flops: float
    bytes: float
    busy_s: float


def waves(tiles: int, slots: int) -> int:
    return -(-tiles // slots)


def makespan(slots: int, groups: int, columns: int, z_s: float, y_s: float, step_s: float, *,
             fillers: Sequence[float] = (), z_first: bool = False) -> float:  # fmt: skip
    """Of tiles handed out in order to the slot that is free first: each row group's z and y-tiles, then the fillers.

    A y-tile ends no sooner than step_s after its group's z-tile; with z_first all z-tiles come first, and it waits for all.
    """
    free = [0.0] * slots

    def run(seconds: float, ready: float = 0.0) -> float:
        end = max(free[0] + seconds, ready)
        heapq.heapreplace(free, end)
        return end

    z = max(run(z_s) for _ in range(groups)) if z_first else 0.0
    for _ in range(groups):
        z = z if z_first else run(z_s)
        for _ in range(columns):
            run(y_s, z + step_s)
    for seconds in fillers:
        run(seconds)
    return max(free)


@dataclass(frozen=True)
class Pass:
    """out = a·B + z·Fᵀ, z = a·E: a (m, k), out (m, n), rank r. Backward, a is dy, out is dx, and dU and dV are wanted too."""

    device: Device
    dtype: str
    m: int
    n: int
    k: int
    r: int
    backward: bool

    @property
    def size(self) -> int:
        return SIZES[self.dtype]

    def tiles(self) -> list[tuple[int, int]]:
        """(bm, bn) to choose from: halves down to 16, while there are at most 16 waves of them."""
        bm, bn, _ = self.device.tile
        halves = [(bm >> i, bn >> j) for i in range(bm.bit_length()) for j in range(bn.bit_length())]
        return [tile for tile in halves if min(tile) >= 16 and self.waves(*tile) <= 16] or [(bm, bn)]

    def waves(self, bm: int, bn: int) -> int:
        return waves(waves(self.m, bm) * waves(self.n, bn), self.device.sms)

    def tile_s(self, bm: int, bn: int, depth: int, step: int = 16) -> float:
        """t(bm, bn, depth)."""
        device, depth = self.device, waves(depth, step) * step
        moved_s = (bm + bn) * depth * self.size / device.sm_bandwidth
        return max(2 * bm * bn * depth * device.sms / device.matmul(self.dtype), moved_s)

    def y_s(self, bm: int, bn: int, r: int) -> float:
        """Of a product's tile: the base's depth, and the adapter's step."""
        return self.tile_s(bm, bn, self.k, self.device.tile[2]) + self.tile_s(bm, bn, r)

    def product(self, r: int = 0) -> Launch:
        """The base product, with the adapter's step where r > 0."""
        m, n, k, half = self.m, self.n, self.k, self.device.l2_bytes / 2
        a, b = m * k * self.size, n * k * self.size
        read = min(p + q * (1 if q <= half else math.ceil(p / half)) for p, q in ((a, b), (b, a)))
        busy_s = min(self.waves(*tile) * self.y_s(*tile, r) for tile in self.tiles())
        return Launch(2.0 * m * n * (k + r), read + (m * n + (m + n) * r) * self.size, busy_s)

    def stream(self, a: int = 0, out: int = 0, *, skinny: bool = False) -> Launch:
        """Moves so many bytes for each element of a and of out; `skinny` multiplies what it moves by a thin factor."""
        wide = (self.k * bool(a) + self.n * bool(out)) * skinny
        flops, thin = 2.0 * self.m * self.r * wide, (wide + self.m * skinny) * self.r * self.size
        return Launch(flops, self.m * (self.k * a + self.n * out) + thin, flops / self.device.matmul(self.dtype))

    def shrink(self) -> Launch:
        """a·E, or a gradient aᵀ·z."""
        return self.stream(self.size, skinny=True)

    def expand(self, touches: int = 1) -> Launch:
        """z·Fᵀ written to out, or added to it in two touches, or a gradient outᵀ·z."""
        return self.stream(out=touches * self.size, skinny=True)

    def outer(self) -> list[Launch]:
        """Backward, dU and dV in one launch that reads x and dy once."""
        return [self.stream(self.size, self.size, skinny=True)] * self.backward

    def casts(self, launches: int) -> list[Launch]:
        """The factors from fp32 to the layer's dtype or, two of them, their gradients back: packed in one launch, cast in two."""
        moved = (self.k + self.n) * self.r * (4 + self.size) / launches
        return [Launch(0, moved, 0)] * (launches if launches == 1 or self.size < 4 else 0)

    def scheduled(self, *, z_first: bool) -> Launch:
        """z- and y-tiles in one schedule; without z_first the tiles of dU and dV too, each along no more rows than a y-tile."""
        m, n, k, r, device = self.m, self.n, self.k, self.r, self.device
        parts = [self.product(r), self.shrink(), *self.outer() * (not z_first)]
        a, width = m * k * self.size, device.tile[0]
        fillers = (waves(n, width) + waves(k, width)) * waves(m, k) * (len(parts) - 2)

        def span(bm: int, bn: int) -> float:
            groups, z_s, step_s = waves(m, bm), self.tile_s(bm, r, k), self.tile_s(bm, bn, r)
            if z_first:  # all z-tiles read at once, each with its share of the bandwidth
                z_s = max(z_s, a / m * min(bm, m) * min(groups, device.sms) / device.bandwidth)
            return makespan(device.sms, groups, waves(n, bn), z_s, self.y_s(bm, bn, r), step_s,
                            fillers=[self.tile_s(width, r, min(m, k))] * fillers, z_first=z_first)  # fmt: skip

        moved = sum(part.bytes for part in parts) - a * (not z_first)  # a z-tile brings a for its y-tiles
        return Launch(sum(part.flops for part in parts), moved, min(span(*tile) for tile in self.tiles()))

    # The designs, as the launches of a pass.

    def frozen(self) -> list[Launch]:
        return [self.product()]

    def split(self) -> list[Launch]:
        """Factors packed; the shrink; the product with its adapter step; backward, dU and dV."""
        return [*self.casts(1), self.shrink(), self.product(self.r), *self.outer()]

    def pdl(self) -> list[Launch]:
        """`split` with a programmatic dependent launch: y-tiles start beside the shrink, and wait for it before their last step."""
        return [*self.casts(1), self.scheduled(z_first=True), *self.outer()]

    def persistent(self) -> list[Launch]:
        """Each row group's z-tile ahead of its y-tiles, the tiles of dU and dV last, whose sums stay in the L2."""
        return [*self.casts(1), self.scheduled(z_first=False)]

    def recompute(self) -> list[Launch]:
        """Every tile spends r of its columns on h; nothing where no tile has columns left."""
        m, k, r, base = self.m, self.k, self.r, self.product(self.r)

        def launch(bm: int, bn: int) -> Launch:
            flops, moved = 2.0 * m * k * r * waves(self.n, bn - r), (m + k) * r * self.size
            return Launch(base.flops + flops, base.bytes + moved, self.waves(bm, bn - r) * self.y_s(bm, bn, r))

        found = [launch(bm, bn) for bm, bn in self.tiles() if bn > r]
        return [*self.casts(1), min(found, key=lambda one: one.busy_s), *self.outer()] if found else []

    def few(self) -> list[Launch]:
        """Few rows: the shrink, and the product with its adapter step, the factors read as they are, in fp32; no packing."""
        if self.m > FEW_ROWS:
            return []

        def wide(launch: Launch, length: int) -> Launch:
            return replace(launch, bytes=launch.bytes + length * self.r * (SIZES["fp32"] - self.size))

        gradients = [wide(launch, self.k + self.n) for launch in self.outer()]
        return [wide(self.shrink(), self.k), wide(self.product(self.r), self.n), *gradients]

    def unfused(self) -> list[Launch]:
        """By hand, as in the field: in-place addmm_ after the product reads and writes out again; factors cast, never x."""
        gradients = [self.shrink(), self.expand()] * self.backward
        return [*self.casts(2), self.product(), self.shrink(), self.expand(2), *gradients]

    def eager(self) -> list[Launch]:
        """The plain expression: s·(h·Vᵀ) and the sum are passes of their own; backward, s·dy and the sum of both dx."""
        s, thin = self.size, [self.shrink(), self.expand()]
        scaled = [self.stream(2 * s), *thin] if self.backward else [self.stream(out=2 * s)]
        return [*self.casts(2), self.product(), *thin, *scaled, self.stream(out=3 * s)]

    def peft(self) -> list[Launch]:
        """PEFT's default: `eager` with fp32 factors, so x (dy) is cast to fp32, and the adapter's side stays so to its end."""
        s, wide = self.size, replace(self, dtype="fp32")
        thin, cast = [wide.shrink(), wide.expand()], self.stream(4 + s)
        if s == 4:
            return self.eager()
        if self.backward:  # dy to fp32 and, for the base, back; its scale; dx of the adapter cast, and added; dU and dV
            dx = [self.stream(out=4 + s), self.stream(out=3 * s)]
            return [self.product(), cast, cast, self.stream(8), *thin, *dx, *thin]
        # x cast; the scale; the base added in fp32; the sum cast
        return [self.product(), cast, *thin, self.stream(out=8), self.stream(out=8 + s), self.stream(out=4 + s)]

    def fused(self) -> list[Launch]:
        """The CPU backend's packed product: U as more columns, z as one more step, dU and dV of blocks in cache."""
        m, n, k, r, twice = self.m, self.n, self.k, self.r, 1 + self.backward  # in backward dU and dV, from a and out
        flops = 2.0 * m * (n * k + r * (n + k) * twice)
        moved = (n * k + m * (n * twice + k)) * self.size + (n + k) * r * 4 * twice
        rate = max(self.device.matmul(self.dtype), OWN_SHARE * self.device.peak(self.dtype))
        return [Launch(flops, moved, flops / rate)]


CANDIDATES: dict[str, dict[str, Callable[[Pass], list[Launch]]]] = {
    "gpu": {"frozen": Pass.frozen, "split": Pass.split, "pdl": Pass.pdl, "persistent": Pass.persistent,
            "recompute": Pass.recompute, "few": Pass.few, "unfused": Pass.unfused, "eager": Pass.eager, "peft": Pass.peft},
    "cpu": {"frozen": Pass.frozen, "fused": Pass.fused, "steps": Pass.unfused, "eager": Pass.eager, "peft": Pass.peft},
}  # fmt: skip


def gpu(name: str, source: str, bf16: float, tf32: float, fp32: float, **fields: Any) -> Device:
    rates = {"bf16": bf16, "fp16": bf16, "tf32": tf32, "fp32": fp32}
    return Device(name, "gpu", rates, source=source, **fields)


# Dense rates, fp32 accumulation. sm_bandwidth: 64 bytes a clock from the L2. launch_s: assumed.
DEVICES = {known.name: known for known in (
    gpu("h100", "H100 SXM: what large bf16 products and copies are known to reach; other dtypes: that share of the data sheet",
        798e12, 399e12, 54e12, bandwidth=3.0e12, sms=132, l2_bytes=50e6, sm_bandwidth=64 * 1.83e9, launch_s=1.5e-6,
        tile=(128, 256, 64)),
    gpu("a100", "A100 SXM 80 GB: data sheet", 312e12, 156e12, 19.5e12, bandwidth=2.039e12, sms=108, l2_bytes=40e6,
        sm_bandwidth=64 * 1.41e9, launch_s=2e-6, tile=(128, 256, 64)),
    gpu("rtx4090", "GeForce RTX 4090: data sheet", 165.2e12, 82.6e12, 82.6e12, bandwidth=1.008e12, sms=128, l2_bytes=72e6,
        sm_bandwidth=64 * 2.52e9, launch_s=2e-6, tile=(128, 128, 64)),
)}  # fmt: skip


def device_from_ceilings(rows: Iterable[results.Row]) -> Device:
    """A CPU from its rows of the bench `ceilings`: the greatest of fma and matmul, dtype by dtype, and of read and copy.

    bf16 and fp16 have at least fp32's peak, since packing widens them; where matmul has no row, the library has the peak.
    """
    latest = results.latest(row for row in rows if row["bench"] == "ceilings" and row["status"] == "ok")
    greatest = dict(sorted((str(row["dtype"]), row["value"]) for row in latest if row["device"] == "cpu"))
    if not {"fp32", "None"} <= {*greatest}:
        raise ValueError("a CPU's ceilings need a row of fma or matmul in fp32, and one of read or copy")
    peaks = {dtype: max(greatest.get(dtype, 0.0), greatest["fp32"]) for dtype in DTYPES}
    return Device(results.machine_id(latest[-1]), "cpu", peaks, greatest["None"], launch_s=5e-6,
                  matmul_flops={row["dtype"]: row["value"] for row in latest if row["provider"] == "matmul"},
                  source="measured ceilings; 5 µs a call are assumed")  # fmt: skip


def floor_s(device: Device, case: Case, dtype: str, mode: str) -> float:
    """Pass by pass max(flops / peak, bytes / bandwidth); of the frozen layer with r = 0 and mask x."""
    upto = [(case.flops(m), case.traffic(m, SIZES[dtype])) for m in MODES[: 1 + MODES.index(mode)]]
    passes = [(now[0] - before[0], now[1] - before[1]) for before, now in pairwise([(0.0, 0.0), *upto])]
    return sum(max(flops / device.peak(dtype), moved / device.bandwidth) for flops, moved in passes)


def predict(device: Device, case: Case, dtype: str, mode: str) -> list[dict[str, Any]]:
    """A row for the floor and one for every candidate of the device's kind that can do the case."""
    if case.dropout or case.mask != "xuv":
        raise ValueError(f"case {case}: the model knows neither dropout nor partial gradients")
    m, k, n, r = case.M, case.K, case.N, case.r if device.kind == "cpu" else waves(case.r, 16) * 16
    passes = [Pass(device, dtype, m, n, k, r, False), Pass(device, dtype, m, k, n, r, True)][: 1 + MODES.index(mode)]
    floor, bare = (floor_s(device, one, dtype, mode) for one in (case, replace(case, r=0, mask="x")))
    found = {"floor": (case.flops(mode), case.traffic(mode, SIZES[dtype]), floor)}
    for name, design in CANDIDATES[device.kind].items():
        if launches := [launch for one in passes for launch in design(one)]:
            seconds = sum(device.launch_s + max(one.busy_s, one.bytes / device.bandwidth) for one in launches)
            found[name] = (sum(one.flops for one in launches), sum(one.bytes for one in launches), seconds)
    return [
        {"bench": "roofline", "device": device.name, "model": MODEL, **dataclasses.asdict(case), "mode": mode, "dtype": dtype,
         "candidate": name, "flops": flops, "bytes": moved, "floor_s": floor, "predicted_s": seconds,
         "ratio_to_frozen": seconds / (bare if name == "floor" else found["frozen"][2])}
        for name, (flops, moved, seconds) in found.items()
    ]  # fmt: skip


def describe(device: Device, rows: Sequence[Mapping[str, Any]]) -> str:
    """All predictions as one table."""
    form = "{:22}{:12}{:>8}{:>8}{:>10}{:>13}"
    head = f"{device.name}, {rows[0]['dtype']}, {rows[0]['mode']}: predicted, not measured ({device.source})"
    lines = [head, form.format("shape", "candidate", "GFLOP", "MB", "ms", "over frozen")]
    for row in rows:
        shape = "x".join(str(row[field]) for field in "MKNr") if row["candidate"] == "floor" else ""
        sums = (f"{row['flops'] / 1e9:.4g}", f"{row['bytes'] / 1e6:.4g}", f"{row['predicted_s'] * 1e3:.4f}")
        lines.append(form.format(shape, row["candidate"], *sums, f"{row['ratio_to_frozen']:.3f}"))
    return "\n".join(lines)


def known_device(text: str) -> Device:
    """By name, from a .json file with the fields of `Device`, or from a .jsonl file of ceilings."""
    path, known = Path(text), ", ".join(DEVICES)
    if text not in DEVICES and path.suffix not in (".json", ".jsonl"):
        raise argparse.ArgumentTypeError(f"{text!r} is no device; expected {known}, or a .json or .jsonl file")
    try:
        if path.suffix == ".jsonl":
            return device_from_ceilings(results.read_jsonl(path))
        return DEVICES.get(text) or Device(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {results.why(error)}") from error


SHAPES = ("8192x4096x4096x16", "8192x4096x4096x64", "8192x4096x4096x128", "2048x2048x2048x16", "1024x576x1536x16",
          "1x4096x4096x16", "16x4096x4096x16")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m svdkern bench roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", type=known_device, default="h100", help=f"{', '.join(DEVICES)}, or a file")
    parser.add_argument("--shapes", type=Case.parse, nargs="+", default=[*map(Case.parse, SHAPES)], metavar="MxKxNxr")
    parser.add_argument("--set", choices=SETS, help="the cases of a set of bench linear instead")
    parser.add_argument("--dtype", choices=SIZES, default="bf16")
    parser.add_argument("--mode", choices=MODES, default="fwd_bwd")
    parser.add_argument("--json", metavar="-", choices=["-"], help="JSON lines to standard output, not a table")
    parser.add_argument("--store", action="store_true", help="add the rows to bench/results/<device>/roofline.jsonl")
    options = parser.parse_args(arguments)
    device, shapes = options.device, SETS[options.set].cases if options.set else options.shapes
    try:
        rows = [row for case in shapes for row in predict(device, case, options.dtype, options.mode)]
    except (OSError, ValueError, KeyError) as error:
        parser.error(results.why(error))
    if options.store:
        results.append(results.RESULTS / device.name / "roofline.jsonl", rows)
    print(results.to_jsonl(rows) if options.json else describe(device, rows) + "\n", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
