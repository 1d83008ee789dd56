"""Shared memory: poisoned at start, bounds and alignment checked, and every byte that is read must have been written.

Watchers see each access: `watcher.read(where, warps)` and `watcher.write(where, warps)`, with `where` (accesses, bytes)
as byte offsets into all slots' memory; they raise when the access is wrong (race.py, asynchronous.py). Atomics cannot
race each other, so that the race detector does not see them; what the asynchronous proxy does is nothing that a proxy
fence must cover, so that the watcher of these does not see it (`sees_atomics`, `sees_async`).
"""

from collections.abc import Callable

import numpy as np

from .bits import STORAGE
from .errors import BadAddress, Uninitialised


class SharedMemory:
    def __init__(self, slots: int, size: int, warps_per_cta: int):
        self.size = (size + 127) & ~127
        self.allowed = size
        self.warps_per_cta = warps_per_cta
        self.data = np.full(slots * self.size, 0xFF, np.uint8)
        self.written = np.zeros(slots * self.size, np.bool_)
        self.watchers: list = []
        self.after_store: Callable[[np.ndarray, np.ndarray], None] | None = None  # takes the bytes' places and values

    def watch(
        self, verb: str, where: np.ndarray, warps: np.ndarray, atomic: bool = False, generic: bool = True
    ) -> None:
        """Show an access ("read" or "write") to the watchers; generic: by that proxy, not by the asynchronous one."""
        for watcher in self.watchers:
            if (watcher.sees_atomics or not atomic) and (watcher.sees_async or generic):
                getattr(watcher, verb)(where, warps)

    def start(self, slot: int) -> None:
        self.data[self.span(slot)] = 0xFF
        self.written[self.span(slot)] = False

    def span(self, slot: int) -> slice:
        return slice(slot * self.size, (slot + 1) * self.size)

    def locate(self, address: np.ndarray, size: int, warps: np.ndarray) -> np.ndarray:
        """Offsets into `data` of accesses of `size` bytes at shared addresses."""
        bad = (address < 0) | (address + size > self.allowed)
        if bad.any():
            k = int(np.argmax(bad))
            raise BadAddress(f"{size} bytes at shared address {int(address[k])}: the CTA has {self.allowed}", k)
        if (address % size).any():
            k = int(np.argmax(address % size != 0))
            raise BadAddress(f"shared address {int(address[k])} is not a multiple of {size}", k)
        return address.astype(np.int64) + (warps // self.warps_per_cta).astype(np.int64) * self.size

    def check_written(self, where: np.ndarray) -> None:
        known = self.written[where]
        if not known.all():
            k = int(np.argmin(known.reshape(len(where), -1).all(1)))
            raise Uninitialised(f"shared address {int(where[k].flat[0]) % self.size} was never written", k)

    def load(
        self, address: np.ndarray, size: int, count: int, warps: np.ndarray, atomic: bool = False
    ) -> list[np.ndarray]:
        at = self.locate(address, size * count, warps)
        where = at[:, None] + np.arange(size * count)
        self.watch("read", where, warps, atomic)
        self.check_written(where)
        view = self.data.view(STORAGE[8 * size])
        return [view[at // size + j] for j in range(count)]

    def store(self, address: np.ndarray, values: list[np.ndarray], warps: np.ndarray, atomic: bool = False) -> None:
        size = values[0].dtype.itemsize
        at = self.locate(address, size * len(values), warps)
        where = at[:, None] + np.arange(size * len(values))
        self.watch("write", where, warps, atomic)
        view = self.data.view(values[0].dtype)
        for j, value in enumerate(values):
            view[at // size + j] = value
        self.written[where] = True
        if self.after_store is not None and not atomic:
            self.after_store(where, np.stack(values, 1).view(np.uint8))
