"""What the emulator says when a program is wrong: one exception for each kind of fault."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PtxError(Exception):
    """A fault of the program under emulation; the message names the instruction, its source line and the lane.

    `lane` counts the active lanes of the instruction, where the fault is one lane's.
    """

    def __init__(self, message: str, lane: int | None = None):
        super().__init__(message)
        self.lane = lane


@contextmanager
def blaming(lane_of: Callable[[int], int | None]) -> Iterator[None]:
    """Where an instruction has more or fewer accesses than lanes: `lane_of` an access is the lane that faults name."""
    try:
        yield
    except PtxError as problem:
        if problem.lane is not None:
            problem.lane = lane_of(problem.lane)
        raise


def no_lane(access: int) -> None:
    """For `blaming` where an instruction ends what others issued."""


class UnknownInstruction(PtxError):
    """An instruction, or a form of one, that the emulator does not know: never skipped."""


class BadAddress(PtxError):
    """Outside every tensor or the shared memory, misaligned, or a write to a read-only tensor."""


class Uninitialised(PtxError):
    """A byte of shared memory is read that nothing wrote."""


class PartialWarp(PtxError):
    """A collective instruction is reached by only some of the lanes that it names."""


class Race(PtxError):
    """Two warps touch one byte of shared memory, one of them writing, with nothing that orders them."""


class StillInFlight(PtxError):
    """An asynchronous operation still reads or writes the bytes that are touched."""


class MissingFence(PtxError):
    """The asynchronous proxy reads bytes that the generic proxy wrote, with no proxy fence between."""


class Deadlock(PtxError):
    """No warp can run, though some have not ended."""


class EndlessLoop(PtxError):
    """The step budget ran out."""
