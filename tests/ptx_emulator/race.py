"""Races on shared memory: two warps touch one byte, one of them writes, and nothing orders them.

Every warp has a vector clock; a CTA barrier, and an mbarrier between who arrives and who waits, join them. A byte
remembers its last writer with the writer's clock then, and for each warp the clock of its last read. An asynchronous
operation accesses its bytes twice here, when it is issued and when it is waited for: anything between would race it.
"""

import numpy as np

from .errors import Race
from .machine import Machine


class RaceDetector:
    sees_atomics, sees_async = False, True

    def __init__(self, machine: Machine):
        self.machine = machine
        count, size = machine.warps_per_cta, machine.shared.data.size
        self.clock = np.zeros((machine.warps, count), np.int32)  # of each warp: what it knows of its CTA's warps
        self.writer = np.full(size, -1, np.int16)
        self.written_at = np.zeros(size, np.int32)
        self.read_at = np.full((size, count), -1, np.int32)
        machine.shared.watchers.append(self)
        machine.shared.after_store = self.wrote
        machine.on_barrier.append(self.barrier)
        machine.on_start.append(self.start)

    def start(self, slot: int) -> None:
        span = self.machine.shared.span(slot)
        self.writer[span], self.read_at[span] = -1, -1
        rows = slice(slot * self.machine.warps_per_cta, (slot + 1) * self.machine.warps_per_cta)
        self.clock[rows] = 0
        self.clock[rows][np.diag_indices(self.machine.warps_per_cta)] = 1

    def _local(self, warps: np.ndarray) -> np.ndarray:
        return warps % self.machine.warps_per_cta

    def _after_write(self, where: np.ndarray, warps: np.ndarray) -> None:
        writer = self.writer[where]
        known = np.take_along_axis(
            self.clock[warps], np.maximum(writer, 0).astype(np.int64).reshape(len(warps), -1), 1
        ).reshape(where.shape)
        self._check(
            (writer < 0) | (writer == self._local(warps)[:, None]) | (known >= self.written_at[where]),
            where,
            warps,
            writer,
        )

    def _check(self, fine: np.ndarray, where: np.ndarray, warps: np.ndarray, other: np.ndarray) -> None:
        if fine.all():
            return
        k = int(np.argmin(fine.reshape(len(where), -1).all(1)))
        byte = int(np.argmin(fine[k].reshape(-1)))
        address = int(where[k].reshape(-1)[byte]) % self.machine.shared.size
        first, second = int(other[k].reshape(-1)[byte]), int(self._local(warps)[k])
        raise Race(f"shared address {address}: warp {first} and warp {second} with no barrier between", k)

    def read(self, where: np.ndarray, warps: np.ndarray) -> None:
        self._after_write(where, warps)
        local = self._local(warps)
        self.read_at[where, np.broadcast_to(local[:, None], where.shape)] = self.clock[warps, local][:, None]

    def write(self, where: np.ndarray, warps: np.ndarray) -> None:
        self._after_write(where, warps)
        local = self._local(warps)
        reads = self.read_at[where]  # (elements, bytes, warps of the CTA)
        fine = reads <= self.clock[warps][:, None, :]
        fine[np.arange(len(warps)), :, local] = True
        self._check(fine.all(2), where, warps, np.argmin(fine, 2))
        self.writer[where] = local.astype(np.int16)[:, None]
        self.written_at[where] = self.clock[warps, local][:, None]

    def wrote(self, where: np.ndarray, values: np.ndarray) -> None:
        """Threads that write one byte in one instruction must agree: compilers let warps store what all of them hold."""
        fine = self.machine.shared.data[where] == values
        if not fine.all():
            k, byte = np.argwhere(~fine)[0]
            address = int(where[k, byte]) % self.machine.shared.size
            raise Race(f"shared address {address}: threads write different values at once", int(k))

    def barrier(self, slot: int, warps: np.ndarray) -> None:
        self.clock[warps] = self.clock[warps].max(0)
        self.clock[warps, self._local(warps)] += 1

    # an mbarrier, or bar.arrive: arrivals publish what the warp knows, a successful wait takes it

    def arrive(self, clock: np.ndarray | None, warp: int) -> np.ndarray:
        known = self.clock[warp].copy()
        self.clock[warp, warp % self.machine.warps_per_cta] += 1
        return known if clock is None else np.maximum(clock, known)

    def join(self, clock: np.ndarray, warps: int | np.ndarray) -> None:
        self.clock[warps] = np.maximum(self.clock[warps], clock)
