"""The layers that are measured: one list for every benchmark, plot and pytest-benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

DTYPES = ("fp32", "bf16", "fp16")
MODES = ("fwd", "fwd_bwd")
MASKS = ("xuv", "uv", "x")
"""Which gradients are wanted: of x, u and v; of the factors alone (a first layer); of x alone (a finished adapter)."""


@dataclass(frozen=True)
class Case:
    """x: (M, K), weight: (N, K), rank r; dropout on the adapter's input; mask: the gradients that are wanted."""

    M: int
    K: int
    N: int
    r: int
    dropout: float = 0.0
    mask: str = "xuv"

    @staticmethod
    def parse(text: str) -> Case:
        try:
            m, k, n, r = (int(part) for part in text.lower().split("x"))
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a shape; expected MxKxNxr, as 1024x576x1536x16"
            ) from error
        if min(m, k, n, r) < 1:
            raise argparse.ArgumentTypeError(f"{text!r}: every size must be at least 1")
        return Case(m, k, n, r)

    def __str__(self) -> str:
        rest = f" dropout {self.dropout}" if self.dropout else ""
        return f"{self.M}x{self.K}x{self.N}x{self.r}{rest}" + (f" grad {self.mask}" if self.mask != "xuv" else "")

    def bytes(self, size: int) -> int:
        """Of one call's tensors, elements of `size` bytes, factors fp32."""
        return (self.M * (self.K + self.N) * 2 + self.K * self.N) * size + (self.K + self.N) * self.r * 4

    def flops(self, mode: str) -> float:
        """Of the adapted layer; of the frozen one with r = 0."""
        base, skinny = 2.0 * self.M * self.K * self.N, 2.0 * self.M * self.r * (self.K + self.N)
        if mode == "fwd":
            return base + skinny
        dx, factors = "x" in self.mask, "u" in self.mask
        return base * (1 + dx) + skinny * (1 + (dx or factors) + factors)

    def traffic(self, mode: str, size: int) -> float:
        """Bytes that must move if every tensor is read or written once in each pass."""
        weight, rows = self.K * self.N * size, self.M * (self.K + self.N) * size
        factors = (self.K + self.N) * self.r * 4
        if mode == "fwd":
            return weight + rows + factors
        dx, du = "x" in self.mask, "u" in self.mask
        backward = self.M * self.N * size + factors + (weight + self.M * self.K * size) * dx
        return weight + rows + factors + backward + (self.M * self.K * size + factors) * du


@dataclass(frozen=True)
class Set:
    """Cases with the dtypes and modes they are measured in."""

    what: str
    cases: tuple[Case, ...]
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    modes: tuple[str, ...] = ("fwd_bwd",)


def _cases(*sizes: tuple[int, int, int, int]) -> tuple[Case, ...]:
    return tuple(Case(*size) for size in sizes)


def _rows(*rows: int) -> tuple[Case, ...]:
    return tuple(Case(m, 2048, 2048, 16) for m in rows)


def _ranks(*ranks: int) -> tuple[Case, ...]:
    return tuple(Case(1024, 2048, 2048, r) for r in ranks)


SETS = {
    "readme": Set(
        "a square training layer at two ranks, the layers of SmolLM2-135M, decoding, call overhead",
        _cases((2048, 2048, 2048, 16), (2048, 2048, 2048, 128), (1024, 576, 1536, 16), (1024, 1536, 576, 16),
               (1024, 576, 576, 16), (1, 4096, 4096, 16), (16, 4096, 4096, 16), (4, 64, 64, 4)),
        DTYPES,
        MODES,
    ),
    "models": Set(
        "layers of Llama-3.2-1B, Llama-2-7B, Qwen2.5-7B (a short batch each) and ViT-L/16 (8 images)",
        _cases((512, 2048, 8192, 16), (512, 8192, 2048, 16), (512, 2048, 512, 16), (256, 4096, 4096, 16),
               (256, 4096, 11008, 16), (256, 3584, 18944, 16), (1576, 1024, 4096, 16)),
    ),
    "rows": Set("how it goes with the number of rows", _rows(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)),
    "ranks": Set("how it goes with the rank", _ranks(1, 4, 8, 16, 32, 64, 128, 256)),
    "odd": Set(
        "sizes that divide nothing",
        _cases((1000, 1001, 999, 17), (129, 515, 1030, 3), (33, 127, 4001, 8), (7, 4097, 63, 5)),
    ),
    "dropout": Set(
        "dropout 0.1 on the adapter's input",
        tuple(
            replace(case, dropout=0.1)
            for case in _cases((2048, 2048, 2048, 16), (1024, 576, 1536, 16), (16, 4096, 4096, 16))
        ),
    ),
    "masks": Set("fewer gradients", tuple(Case(2048, 2048, 2048, 16, mask=mask) for mask in MASKS[1:])),
}  # fmt: skip


def groups(names: tuple[str, ...]) -> Iterator[tuple[Case, str, str]]:
    """(case, dtype, mode) of the named sets."""
    seen: set[tuple[Case, str, str]] = set()
    for name in names:
        chosen = SETS[name]
        for case in chosen.cases:
            for dtype in chosen.dtypes:
                for mode in chosen.modes:
                    if (case, dtype, mode) not in seen:
                        seen.add((case, dtype, mode))
                        yield case, dtype, mode
