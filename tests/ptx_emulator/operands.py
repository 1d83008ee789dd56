"""Operands: what a builder (machine.py) makes of an instruction's registers, constants and addresses, and of its lanes."""

from collections.abc import Callable

import numpy as np

from .bits import TYPES, as_bits, as_type, extend
from .errors import UnknownInstruction
from .parse import Address, Operand

Rows = slice | np.ndarray
Mask = np.ndarray | None


class Operands:
    """The part of the machine that reads and writes registers: arrays (warps, 32), of which an instruction gets rows."""

    warps: int
    registers: dict[str, np.ndarray]
    special: dict[str, np.ndarray]  # %tid.x, ...
    addresses: dict[str, int]  # of variables and parameters

    def reader(self, operand: Operand, kind: str) -> Callable[[Rows], np.ndarray]:
        """A function of rows that gives the operand as (rows, 32), or (1, 1) where it is a constant."""
        if not isinstance(operand, str):
            raise UnknownInstruction(f"operand {operand}")
        if operand.startswith("!"):
            register = self.registers[operand[1:]]
            return lambda rows: ~register[rows]
        if operand in self.registers:
            register = self.registers[operand]
            if register.dtype == TYPES[kind]:
                return lambda rows: register[rows]
            return lambda rows: as_type(register[rows], kind)
        if operand in self.special:
            special = self.special[operand]
            return lambda rows: as_type(special[rows], kind)
        constant = self._constant(operand, kind)
        return lambda rows: constant

    def _constant(self, operand: str, kind: str) -> np.ndarray:
        dtype = np.dtype(TYPES[kind])
        if operand in self.addresses:
            value = np.array([[self.addresses[operand]]], np.uint64)
        elif operand == "WARP_SZ":
            value = np.array([[32]], np.uint64)
        elif operand[:2] in ("0f", "0F"):
            value = np.array([[int(operand[2:], 16)]], np.uint32)
            return value.view(np.float32) if dtype == np.float32 else as_type(value, kind)
        elif operand[:2] in ("0d", "0D"):
            return np.array([[int(operand[2:], 16)]], np.uint64).view(np.float64)
        elif operand[:1].isdigit() or operand[:1] == "-":
            number = int(operand.rstrip("uU"), 0)
            if dtype == np.bool_:
                return np.array([[number != 0]])
            value = np.array([[number & (2**64 - 1)]], np.uint64)
        else:
            raise UnknownInstruction(f"operand {operand}")
        return as_type(value, kind)

    def writer(self, operand: Operand) -> Callable[[np.ndarray, Rows, Mask], None]:
        """A function (values, rows, mask) that writes a register; narrower values are extended."""
        if operand == "_":
            return lambda values, rows, mask: None
        register = self.registers[operand]
        width = 8 * register.dtype.itemsize

        def write(values: np.ndarray, rows: Rows, mask: Mask) -> None:
            bits = as_bits(values) if values.dtype.itemsize == register.dtype.itemsize else extend(values, width)
            if mask is None:
                register[rows] = bits
            elif isinstance(rows, slice):
                np.copyto(register[rows], bits, where=mask)
            else:
                kept = register[rows]
                np.copyto(kept, bits, where=mask)
                register[rows] = kept

        return write

    def address(self, operand: Operand) -> Callable[[Rows], np.ndarray]:
        """A function of rows that gives base + offset as int64 (rows, 32)."""
        if not isinstance(operand, Address):
            raise UnknownInstruction(f"operand {operand} is no address")
        register = self.registers.get(operand.base)
        base = self.reader(operand.base, "u64" if register is None or register.dtype == np.uint64 else "u32")
        return lambda rows: base(rows).astype(np.int64) + operand.offset

    def warp_ids(self, rows: Rows) -> np.ndarray:
        return np.arange(self.warps)[rows]

    def here(self, rows: Rows, mask: Mask) -> np.ndarray:
        """The warps with an active lane."""
        warps = self.warp_ids(rows)
        return warps if mask is None else warps[mask.any(1)]

    def lanes(self, rows: Rows, mask: Mask) -> np.ndarray:
        """The warp of every active lane, flat, in the order of `select`."""
        warps = np.repeat(self.warp_ids(rows), 32)
        return warps if mask is None else warps[mask.reshape(-1)]

    def select(self, values: np.ndarray, rows: Rows, mask: Mask) -> np.ndarray:
        """The active lanes' values, flat."""
        if values.shape == (1, 1):
            return np.repeat(values.reshape(-1), len(self.warp_ids(rows)) * 32 if mask is None else int(mask.sum()))
        return values.reshape(-1) if mask is None else values[mask]

    def spread(self, values: np.ndarray, rows: Rows, mask: Mask) -> np.ndarray:
        """The inverse of select: (rows, 32), zeros where no lane is active."""
        if mask is None:
            return values.reshape(-1, 32)
        out = np.zeros(mask.shape, values.dtype)
        out[mask] = values
        return out
