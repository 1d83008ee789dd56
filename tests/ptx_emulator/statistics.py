"""Counts of a run: instructions, global bytes and the sectors they touch, bank conflicts of shared memory.

An access of a warp to global memory moves whole sectors of 32 bytes; to shared memory it takes one pass for every
further word that falls in a bank already used, 32 banks of 4 bytes, in phases of at most 128 bytes.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .parse import Instruction


@dataclass
class Access:
    """Of one instruction, over the run."""

    text: str
    times: int = 0  # warps that executed it
    bytes: int = 0
    sectors: int = 0  # of global memory
    least_sectors: int = 0  # that the same bytes need at best
    passes: int = 0  # over shared memory
    least_passes: int = 0  # without bank conflicts


@dataclass
class Statistics:
    instructions: Counter = field(default_factory=Counter)  # by their first part, one for each warp
    accesses: dict[int, Access] = field(default_factory=dict)  # by PTX line

    def _of(self, ins: Instruction) -> Access:
        return self.accesses.setdefault(ins.line, Access(str(ins)))

    def access(self, ins: Instruction, space: str, address: np.ndarray, size: int, warps: np.ndarray) -> None:
        entry = self._of(ins)
        for warp in np.unique(warps):
            mine = np.asarray(address)[warps == warp].astype(np.int64)
            entry.times += 1
            entry.bytes += len(mine) * size
            if space == "shared":
                phase = max(1, 128 // size)
                for begin in range(0, len(mine), phase):
                    entry.passes += self._passes(mine[begin : begin + phase], size)
                    entry.least_passes += 1
            else:
                touched = np.unique((mine[:, None] + np.arange(0, size, min(size, 32))) // 32)
                entry.sectors += len(touched)
                entry.least_sectors += -(-len(np.unique(mine)) * size // 32)

    @staticmethod
    def _passes(address: np.ndarray, size: int) -> int:
        words = np.unique((address[:, None] + np.arange(0, max(size, 4), 4)) // 4)
        return int(np.bincount(words % 32).max())

    def rows(self, ins: Instruction, at: np.ndarray) -> None:
        """ldmatrix, stmatrix: (warps, matrices, 8) addresses of rows of 16 bytes; each matrix is one pass at best."""
        entry = self._of(ins)
        entry.times += at.shape[0]
        entry.bytes += at.size * 16
        entry.least_passes += at.shape[0] * at.shape[1]
        for matrix in at.reshape(-1, 8):
            entry.passes += self._passes(matrix, 16)

    def bulk(self, ins: Instruction, size: int) -> None:
        entry = self._of(ins)
        entry.times += 1
        entry.bytes += size

    def wasted_sectors(self) -> int:
        """Sectors of global memory that were moved beyond what the bytes needed."""
        return sum(max(a.sectors - a.least_sectors, 0) for a in self.accesses.values())

    def conflicts(self) -> int:
        """Passes over shared memory that bank conflicts cost."""
        return sum(a.passes - a.least_passes for a in self.accesses.values())
