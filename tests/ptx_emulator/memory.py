"""Global memory: the tensors' own memory behind a registry of allowed ranges, and what a CTA may see of it.

Plain mode: a store is seen by everyone at once. Weak mode is what the PTX memory model allows at its worst:

- a weak store waits in a buffer of its warp; a CTA barrier orders the buffers of the CTA's warps; a release by one of
  its threads publishes what is ordered before it and its own warp's stores; the end of the CTA publishes the rest;
- a weak load sees what memory held at the CTA's last acquire (or at its start), and the CTA's own stores.

Volatile and relaxed accesses and atomics act on memory itself. To one location a thread's accesses keep their order:
its own buffered stores there, and those a barrier has ordered, go first, and the CTA sees what such an access stored.
"""

import ctypes
from dataclasses import dataclass, field

import numpy as np

from .bits import STORAGE
from .errors import BadAddress


@dataclass(eq=False)
class Range:
    """Bytes [start, stop) of a tensor; `data` begins at `start` rounded down to 16, so that typed views fit."""

    name: str
    start: int
    stop: int
    writable: bool
    readable: bool = True
    data: np.ndarray = field(init=False)
    base: int = field(init=False)
    _snapshot: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.base = self.start & ~15
        size = (self.stop - self.base + 15) & ~15
        self.data = np.frombuffer((ctypes.c_uint8 * size).from_address(self.base), np.uint8)

    def snapshot(self) -> np.ndarray:
        if self._snapshot is None:
            self._snapshot = self.data.copy()
        return self._snapshot

    def changed(self) -> None:
        self._snapshot = None


class Store:
    """One buffered store: values[j] go to element index + j of a typed view."""

    def __init__(self, range_: Range, index: np.ndarray, values: list[np.ndarray]):
        self.range, self.index, self.values = range_, index, values

    def bytes(self) -> np.ndarray:
        """Offsets of its bytes in the range."""
        size = self.values[0].dtype.itemsize
        return (self.index[:, None] * size + np.arange(size * len(self.values))).reshape(-1)

    def apply(self, data: np.ndarray) -> None:
        view = data.view(self.values[0].dtype)
        for j, value in enumerate(self.values):
            view[self.index + j] = value


class GlobalMemory:
    def __init__(self) -> None:
        self.ranges: list[Range] = []
        self.weak = False

    def allow(self, name: str, start: int, size: int, writable: bool = True, readable: bool = True) -> None:
        """Ranges that touch become one: two views of one tensor are one piece of memory."""
        stop = start + size
        for other in [r for r in self.ranges if r.start < stop and start < r.stop]:
            self.ranges.remove(other)
            start, stop = min(start, other.start), max(stop, other.stop)
            name, writable, readable = f"{other.name}+{name}", writable or other.writable, readable or other.readable
        self.ranges.append(Range(name, start, stop, writable, readable))
        self.ranges.sort(key=lambda r: r.start)
        self.starts = np.array([r.start for r in self.ranges], np.uint64)

    def begin(self, slots: int, warps_per_cta: int) -> None:
        self.warps_per_cta = warps_per_cta
        self.buffers: list[list[Store]] = [[] for _ in range(slots * warps_per_cta)]
        self.ordered: list[list[Store]] = [[] for _ in range(slots)]
        self.views: list[dict[Range, np.ndarray]] = [{} for _ in range(slots)]
        self.owned: list[set[Range]] = [set() for _ in range(slots)]
        for range_ in self.ranges:
            range_.changed()
        self.first = {r: r.snapshot() for r in self.ranges if self.weak and r.writable}
        self.async_views = [dict(self.first) for _ in range(slots)]

    # ------------------------------------------------------------------------------------------- finding bytes

    def find(self, address: np.ndarray, size: int, write: bool) -> list[tuple[Range, np.ndarray]]:
        """The ranges of these accesses of `size` bytes, each with the positions in `address` that fall in it."""
        if not len(self.ranges):
            raise BadAddress(f"global address {int(address[0]):#x}: the kernel was given no tensor")
        which = np.searchsorted(self.starts, address.astype(np.uint64), side="right").astype(np.int64) - 1
        if (address % size).any():
            k = int(np.argmax(address % size != 0))
            raise BadAddress(f"global address {int(address[k]):#x} is not a multiple of {size}", k)
        found = []
        for i in [int(which[0])] if (which == which[0]).all() else np.unique(which):
            at = np.flatnonzero(which == i)
            range_ = self.ranges[max(i, 0)]
            outside = (address[at] < range_.start) | (address[at] + size > range_.stop)
            if outside.any():
                k = int(at[np.argmax(outside)])
                raise BadAddress(
                    f"{size} bytes at global address {int(address[k]):#x} are {self.nearest(int(address[k]))}", k
                )
            if write and not range_.writable:
                raise BadAddress(f"write to {range_.name}, which is read-only", int(at[0]))
            if not write and not range_.readable:
                raise BadAddress(f"read of {range_.name}, which is write-only", int(at[0]))
            found.append((range_, at))
        return found

    def nearest(self, address: int) -> str:
        range_ = min(self.ranges, key=lambda r: max(r.start - address, address - r.stop + 1, 0))
        return f"at byte {address - range_.start} of {range_.name}, which has {range_.stop - range_.start}"

    # ------------------------------------------------------------------------------------------ weak accesses

    def load(
        self, address: np.ndarray, size: int, count: int, warps: np.ndarray, weak: bool = True, stale: bool = False
    ) -> list[np.ndarray]:
        """`count` values of `size` bytes at each address, as bit patterns; stale: as the launch found them."""
        values = [np.empty(len(address), STORAGE[8 * size]) for _ in range(count)]
        for range_, at in self.find(address, size * count, False):
            if not (self.weak and (weak or stale) and range_.writable):
                if self.weak:
                    self._publish_location(range_, address[at, None] - range_.base + np.arange(size * count), warps[at])
                self._gather(range_, range_.data, address, at, values)
                continue
            if stale:
                self._gather(range_, self.first[range_], address, at, values)
                continue
            slots = warps[at] // self.warps_per_cta
            for slot in np.unique(slots):
                self._gather(range_, self._view(int(slot), range_), address, at[slots == slot], values)
        return values

    @staticmethod
    def _gather(range_: Range, data: np.ndarray, address: np.ndarray, at: np.ndarray, values: list[np.ndarray]) -> None:
        view = data.view(values[0].dtype)
        index = (address[at] - range_.base) // values[0].dtype.itemsize
        for j, value in enumerate(values):
            value[at] = view[index + j]

    def store(self, address: np.ndarray, values: list[np.ndarray], warps: np.ndarray, weak: bool = True) -> None:
        size = values[0].dtype.itemsize
        for range_, at in self.find(address, size * len(values), True):
            index = (address[at] - range_.base) // size
            if not (self.weak and weak):
                store = Store(range_, index, [v[at] for v in values])
                if self.weak:
                    self._publish_location(range_, store.bytes(), warps[at])
                    for slot in np.unique(warps[at] // self.warps_per_cta):
                        store.apply(self._own_view(int(slot), range_))
                store.apply(range_.data)
                range_.changed()
                continue
            for warp in np.unique(warps[at]):
                mine = warps[at] == warp
                store = Store(range_, index[mine], [v[at][mine] for v in values])
                self.buffers[warp].append(store)
                store.apply(self._own_view(int(warp) // self.warps_per_cta, range_))

    def _publish_location(self, range_: Range, where: np.ndarray, warps: np.ndarray) -> None:
        """What these warps stored at these bytes comes before what they do there now."""
        for warp in np.unique(warps):
            for stores in (self.ordered[warp // self.warps_per_cta], self.buffers[warp]):
                for store in [s for s in stores if s.range is range_ and np.isin(where, s.bytes()).any()]:
                    stores.remove(store)
                    store.apply(range_.data)
                    range_.changed()

    # -------------------------------------------------------------------------------------------- the async proxy

    def load_async(self, address: np.ndarray, size: int, slot: int) -> np.ndarray:
        """What a tensor copy reads: memory as the kernel's start left it, or as the CTA saw it at its last proxy fence."""
        values = np.empty(len(address), STORAGE[8 * size])
        for range_, at in self.find(address, size, False):
            self._gather(range_, self.async_views[slot].get(range_, range_.data), address, at, [values])
        return values.view(np.uint8)

    def fence_async(self, slot: int) -> None:
        self.async_views[slot] = {r: self._view(slot, r).copy() for r in self.first}

    # ----------------------------------------------------------------------------------------------- ordering

    def _view(self, slot: int, range_: Range) -> np.ndarray:
        return self.views[slot].get(range_, range_.data)

    def _own_view(self, slot: int, range_: Range) -> np.ndarray:
        """The CTA's view, no longer shared with that of others."""
        if range_ not in self.owned[slot]:
            self.owned[slot].add(range_)
            self.views[slot][range_] = self.views[slot][range_].copy()
        return self.views[slot][range_]

    def start(self, slot: int) -> None:
        """A CTA begins: it sees memory as it is now."""
        self.acquire(slot)
        self.async_views[slot] = dict(self.first)

    def acquire(self, slot: int) -> None:
        if not self.weak:
            return
        self.views[slot] = {r: r.snapshot() for r in self.ranges if r.writable}
        self.owned[slot] = set()
        pending = list(self.ordered[slot])
        for warp in range(slot * self.warps_per_cta, (slot + 1) * self.warps_per_cta):
            pending += self.buffers[warp]
        for store in pending:
            store.apply(self._own_view(slot, store.range))

    def barrier(self, slot: int, warps: np.ndarray) -> None:
        if not self.weak:
            return
        for warp in warps:
            self.ordered[slot] += self.buffers[warp]
            self.buffers[warp] = []

    def release(self, warp: int) -> None:
        if not self.weak:
            return
        slot = warp // self.warps_per_cta
        for stores in (self.ordered[slot], self.buffers[warp]):
            for store in stores:
                store.apply(store.range.data)
                store.range.changed()
            stores.clear()

    def unpublished(self, slot: int) -> bool:
        """Whether the CTA has stores that others cannot see yet."""
        warps = range(slot * self.warps_per_cta, (slot + 1) * self.warps_per_cta)
        return bool(self.ordered[slot]) or any(self.buffers[warp] for warp in warps)

    def finish(self, slot: int) -> None:
        """A CTA ends: all that it stored is published."""
        for warp in range(slot * self.warps_per_cta, (slot + 1) * self.warps_per_cta):
            self.release(warp)
