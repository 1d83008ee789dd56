"""Who runs next.

*Convergent*: all warps that stand at one instruction run as one numpy operation; warps that jumped back last wait for
the others, so that nobody spins alone. *Adversarial*: few warps at a time, drawn by the seed, preempted in between, and
unfair: one CTA (or warp) may be starved until nothing else can run, one that has drawn a ticket may be held for long, and one
that released a flag is held while the others look. Programs that are right give the same bits under all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .machine import Machine, Rows, Step

PREEMPTED = ("ld", "st", "atom", "red", "cp", "mbarrier", "wgmma", "fence")  # an adversary may switch after these
PATIENCE, RELIEF = 3000, 200  # turns for which a starved warp waits though the others only spin, and may run then
STALLS = 0.3  # of those who draw from a counter, how many are held for as long
WINDOW = 300  # turns for which the CTA that released a flag is held


class Schedule:
    """`adversarial`: "" or one of "warp", "cta", "starve_cta", "starve_warp", "priority", "stall"."""

    def __init__(self, seed: int = 0, adversarial: str = ""):
        self.seed, self.adversarial = seed, adversarial
        self.rng = np.random.default_rng([seed, len(adversarial)])
        self.turns = 0
        self.jumped: np.ndarray | None = None
        self.held: tuple[int, int] | None = None  # slot, until which turn
        self.stalled: tuple[int, int] | None = None
        self.victim: int | None = None

    def order(self, ctas: int) -> np.ndarray:
        """In which order CTAs become resident."""
        return self.rng.permutation(ctas) if self.adversarial else np.arange(ctas)

    def next(self, machine: Machine, ready: np.ndarray) -> tuple[Rows, int]:
        self.turns += 1
        if self.jumped is None:
            self.jumped = np.zeros(machine.warps, np.int64)
            self.priority = self.rng.random(machine.warps)
        if self.adversarial:
            ready = self._unfair(machine, ready)
        candidates = np.flatnonzero(ready)
        if not self.adversarial:
            key = self.jumped[candidates] * (len(machine.program) + 1) + machine.pc[candidates]
            first = candidates[np.argmin(key)]
            pc = int(machine.pc[first])
            return _as_rows(candidates[machine.pc[candidates] == pc]), pc
        if self.adversarial == "priority":
            chosen = candidates[np.argmax(self.priority[candidates])]
        else:
            chosen = self.rng.choice(candidates)
        pc = int(machine.pc[chosen])
        if "warp" in self.adversarial or self.adversarial == "priority":
            return slice(chosen, chosen + 1), pc
        slot = machine.slot_of[chosen]
        return _as_rows(candidates[(machine.slot_of[candidates] == slot) & (machine.pc[candidates] == pc)]), pc

    def _unfair(self, machine: Machine, ready: np.ndarray) -> np.ndarray:
        ready, self.held = self._without(machine, ready, self.held)
        ready, self.stalled = self._without(machine, ready, self.stalled)
        if self.adversarial.startswith("starve"):
            whose = machine.slot_of if self.adversarial == "starve_cta" else np.arange(machine.warps)
            if self.victim is None:
                self.victim = int(self.rng.choice(np.unique(whose)))
            others = ready & (whose != self.victim)
            if others.any() and self.turns % (PATIENCE + RELIEF) < PATIENCE:
                ready = others
        return ready

    def _without(
        self, machine: Machine, ready: np.ndarray, who: tuple[int, int] | None
    ) -> tuple[np.ndarray, tuple[int, int] | None]:
        """The others, while there are any and until that turn."""
        if who is None or self.turns >= who[1]:
            return ready, None
        others = ready & (machine.slot_of != who[0])
        return (others, who) if others.any() else (ready, None)

    def preempt(self, step: Step) -> bool:
        if not self.adversarial or step.instruction.parts[0] not in PREEMPTED:
            return False
        return self.rng.random() < (0.05 if step.instruction.parts[0] in ("ld", "st") else 0.15)

    def looped(self, warps: np.ndarray) -> None:
        self.jumped[warps] = self.turns
        if self.adversarial == "priority" and self.rng.random() < 0.5:
            self.priority[warps] = self.priority.min() - 1 - self.rng.random()

    def released(self, slot: int) -> None:
        """A CTA published a flag: the others get the time to look at what it guards."""
        if self.adversarial:
            self.held = (slot, self.turns + WINDOW)

    def drew(self, slot: int) -> None:
        """A CTA changed what all count by: the work that it took may be late, and others go on without it."""
        if self.adversarial == "stall" and self.stalled is None and self.rng.random() < STALLS:
            self.stalled = (slot, self.turns + PATIENCE)


def _as_rows(warps: np.ndarray) -> Rows:
    if warps[-1] - warps[0] + 1 == len(warps):
        return slice(int(warps[0]), int(warps[-1]) + 1)
    return warps
