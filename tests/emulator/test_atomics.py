"""Atomics: the value before, the value behind, one lane after another."""

from __future__ import annotations

import numpy as np
import pytest
from programs import random_bits, run
from ptx_emulator.errors import BadAddress, UnknownInstruction

pytestmark = pytest.mark.emulator
SHARED = ".shared .align 16 .b8 tile[1024];"

ATOMIC = {
    "add": lambda old, new: old + new,
    "exch": lambda old, new: new,
    "min": min,
    "max": max,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("name", "kind"), [("add", "u32"), ("add", "u64"), ("exch", "b32"), ("min", "s32"), ("max", "u32"),
                                            ("and", "b32"), ("or", "b64"), ("xor", "b32")])  # fmt: skip
def test_atomics_return_the_old_value(name: str, kind: str, space: str) -> None:
    """The lanes of a warp, one after another on one word: their answers and the word must be those of some order."""
    size = int(kind[1:]) // 8
    new = random_bits(32, np.dtype(f"{'i' if kind[0] == 's' else 'u'}{size}"), 3)
    word, old = new[:1].copy(), np.zeros_like(new)
    letter = "d" if size == 8 else "r"
    start = f"ld.global.b{8 * size} %{letter}1{size}, [%d0]; mov.b64 %d9, {'%d0' if space == 'global' else 'tile'};"
    if space == "shared":
        start += f"st.shared.b{8 * size} [%d9], %{letter}1{size};"
    run(
        start
        + f"""
        mul.wide.u32 %d20, %tx, {size}; add.s64 %d21, %d1, %d20; add.s64 %d22, %d2, %d20;
        ld.global.b{8 * size} %{letter}24, [%d21];
        atom.{space}.{name}.{kind} %{letter}25, [%d9], %{letter}24;
        st.global.b{8 * size} [%d22], %{letter}25;
        bar.warp.sync -1;
        ld.{space}.b{8 * size} %{letter}26, [%d9]; st.global.b{8 * size} [%d0], %{letter}26;
        """,
        word,
        new,
        old,
        declared=SHARED,
    )
    bits = (1 << 8 * size) - 1
    value = int(new[0])
    for before, operand in zip(old.tolist(), new.tolist(), strict=True):
        assert before == value
        value = ATOMIC[name](value, operand)
        value = value & bits if kind[0] != "s" else value
    assert word[0] == value


@pytest.mark.parametrize("seed", range(3))
def test_tickets_are_drawn_once_each(seed: int) -> None:
    counter, drawn = np.zeros(1, np.uint32), np.zeros(256, np.uint32)
    body = "atom.global.add.u32 %r3, [%d0], 1; mad.wide.u32 %d3, %r3, 4, %d1; mov.u32 %r4, 1; red.global.add.u32 [%d3], %r4;"
    run(body, counter, drawn, threads=64, grid=(4,), mode="adversarial", seed=seed)
    assert counter[0] == 256 and (drawn == 1).all()


def test_compare_and_swap() -> None:
    word, old = np.array([7], np.uint32), np.zeros(32, np.uint32)
    run(
        """
        add.u32 %r5, %tx, 7; add.u32 %r6, %tx, 8; atom.global.cas.b32 %r7, [%d0], %r5, %r6;
        mad.wide.u32 %d3, %tx, 4, %d1; st.global.u32 [%d3], %r7;
        """,
        word,
        old,
    )
    assert word[0] == 39 and old.tolist() == [*range(7, 39)]


def test_atomics_name_the_lane_of_a_bad_address() -> None:
    with pytest.raises(BadAddress, match="thread 9"):
        run("mad.wide.u32 %d1, %tx, 4, %d0; atom.global.add.u32 %r1, [%d1], 1;", np.zeros(9, np.uint32))


@pytest.mark.parametrize("instruction", ["atom.global.add.f32 %f1, [%d0], %f1", "atom.global.inc.u32 %r1, [%d0], %r1",
                                         "red.async.add.u32 [%d0], %r1", "discard.global.L2 [%d0], 128"])  # fmt: skip
def test_what_is_not_there_is_refused(instruction: str) -> None:
    with pytest.raises(UnknownInstruction, match=instruction.split()[0]):
        run(f"{instruction};", np.zeros(32, np.uint32))
