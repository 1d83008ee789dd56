"""Loads and stores of global and shared memory: vectors, extension, bounds, alignment; every wrong access is named."""

from __future__ import annotations

import numpy as np
import pytest
from programs import random_bits, run
from ptx_emulator.errors import BadAddress, Uninitialised, UnknownInstruction

pytestmark = pytest.mark.emulator
EACH = "mul.wide.u32 %d9, %tx, {0}; add.s64 %d10, %d0, %d9; add.s64 %d11, %d1, %d9;"  # element of arrays 0 and 1
SHARED = ".shared .align 16 .b8 tile[1024];"


# -------------------------------------------------------------------------------------------------- loads and stores


@pytest.mark.parametrize(
    ("kind", "count"), [(k, c) for k in ("b8", "b16", "b32", "b64") for c in (1, 2, 4) if (k, c) != ("b64", 4)]
)
def test_vectors_are_in_order(kind: str, count: int) -> None:
    """Copied element by element in reverse, so that the order shows."""
    size = int(kind[1:]) // 8
    source = random_bits(32 * count, np.dtype(f"u{size}"))
    target = np.zeros_like(source)
    letter = {1: "h", 2: "h", 4: "r", 8: "d"}[size]
    registers = [f"%{letter}{20 + i}" for i in range(count)]
    vector = f".v{count}" if count > 1 else ""
    loaded, stored = (", ".join(r) for r in (registers, registers[::-1]))
    braces = ("{", "}") if count > 1 else ("", "")
    run(
        EACH.format(size * count)
        + f"ld.global{vector}.{kind} {braces[0]}{loaded}{braces[1]}, [%d10];"
        + f"st.global{vector}.{kind} [%d11], {braces[0]}{stored}{braces[1]};",
        source,
        target,
    )
    assert np.array_equal(target.reshape(32, count), source.reshape(32, count)[:, ::-1])


@pytest.mark.parametrize(("kind", "dtype"), [("s8", np.int8), ("u8", np.uint8), ("s16", np.int16), ("u16", np.uint16)])
def test_narrow_loads_are_extended(kind: str, dtype: type) -> None:
    source = random_bits(32, dtype)
    target = np.zeros(32, np.int32)
    run(
        f"""
        mul.wide.u32 %d9, %tx, {source.itemsize}; add.s64 %d10, %d0, %d9;
        mul.wide.u32 %d9, %tx, 4; add.s64 %d11, %d1, %d9;
        ld.global.{kind} %r9, [%d10]; st.global.b32 [%d11], %r9;
        """,
        source,
        target,
    )
    assert np.array_equal(target, source.astype(np.int32))


def test_offsets_have_both_signs() -> None:
    data = np.arange(4, dtype=np.uint32)
    run("add.s64 %d1, %d0, 8; ld.global.u32 %r1, [%d1+-8]; ld.global.u32 %r2, [%d1+-4]; ld.global.u32 %r3, [%d1 + 4];"
        "add.u32 %r4, %r1, %r2; add.u32 %r4, %r4, %r3; st.global.u32 [%d0], %r4;", data)  # fmt: skip
    assert data[0] == 0 + 1 + 3


def test_a_guard_keeps_the_other_lanes_out_of_memory() -> None:
    data = np.zeros(7, np.uint32)
    run(
        "setp.lt.u32 %p1, %tx, 7; mul.wide.u32 %d1, %tx, 4; add.s64 %d1, %d0, %d1; @%p1 st.global.u32 [%d1], %tx;",
        data,
    )
    assert data.tolist() == [*range(7)]


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(UnknownInstruction, match="ld.global.v4.b32 of 2 registers"):
        run("ld.global.v4.b32 {%r1, %r2}, [%d0];", np.zeros(4, np.uint32))


@pytest.mark.parametrize("instruction", ["ld.global.b32 %r1, [%d9]", "st.global.b32 [%d9], %tx"])
def test_out_of_bounds_names_the_thread_and_the_tensor(instruction: str) -> None:
    text = f"mad.wide.u32 %d9, %tx, 4, %d0; {instruction};"
    with pytest.raises(BadAddress, match=r"(?s)at byte 160 of argument 0, which has 160.*\[%d9\].*PTX line.*thread 40"):
        run(text, np.zeros(40, np.uint32), threads=64)


def test_before_the_first_and_beside_no_tensor() -> None:
    with pytest.raises(BadAddress, match="at byte -4 of argument 0"):
        run("ld.global.b32 %r1, [%d0+-4];", np.zeros(4, np.uint32))
    with pytest.raises(BadAddress, match="given no tensor"):
        run("mov.b64 %d1, 64; ld.global.b32 %r1, [%d1];")


def test_the_gap_between_rows_of_a_view_is_not_out_of_bounds_but_behind_the_last_row_is() -> None:
    whole = np.zeros((4, 8), np.uint32)
    run("ld.global.b32 %r1, [%d0+20];", whole[:, :4])
    with pytest.raises(BadAddress, match="at byte 112"):
        run("ld.global.b32 %r1, [%d0+112];", whole[:, :4])


@pytest.mark.parametrize(("instruction", "size"), [("ld.global.b32 %r1", 4), ("ld.global.v2.b32 {%r1, %r2}", 8),
                                                   ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}", 16)])  # fmt: skip
def test_misaligned_vectors(instruction: str, size: int) -> None:
    data = np.zeros(32, np.uint32)
    run(f"and.b64 %d1, %d0, -16; add.s64 %d1, %d1, 16; {instruction}, [%d1];", data)
    with pytest.raises(BadAddress, match=f"not a multiple of {size}"):
        run(f"{instruction}, [%d0+{size // 2}];", data)


def test_a_read_only_tensor_is_not_written() -> None:
    source, target = np.ones(32, np.uint32), np.zeros(32, np.uint32)
    copy = EACH.format(4) + "ld.global.u32 %r9, [%d10]; st.global.u32 [%d11], %r9;"
    run(copy, source, target, read_only=[0])
    with pytest.raises(BadAddress, match="argument 1, which is read-only"):
        run(copy, source, target, read_only=[1])


# ------------------------------------------------------------------------------------------------------------ shared


def test_shared_is_read_as_written_by_anyone_of_the_cta() -> None:
    out = np.zeros(64, np.uint32)
    run(
        """
        mov.b32 %r1, tile; mad.lo.u32 %r2, %tx, 4, %r1; st.shared.u32 [%r2], %tx;
        bar.sync 0;
        xor.b32 %r3, %tx, 63; mad.lo.u32 %r3, %r3, 4, %r1; ld.shared.u32 %r4, [%r3];
        mad.wide.u32 %d1, %tx, 4, %d0; st.global.u32 [%d1], %r4;
        """,
        out,
        threads=64,
        declared=SHARED,
    )
    assert out.tolist() == [*range(63, -1, -1)]


def test_unwritten_shared_memory() -> None:
    with pytest.raises(Uninitialised, match=r"(?s)shared address 4 was never written.*thread 1"):
        run("mov.b32 %r1, tile; st.shared.u32 [%r1], %r1; mad.lo.u32 %r2, %tx, 4, %r1; ld.shared.u32 %r3, [%r2];",
            declared=SHARED)  # fmt: skip


def test_one_unwritten_byte_of_a_vector() -> None:
    with pytest.raises(Uninitialised):
        run("mov.b32 %r1, tile; st.shared.v2.b32 [%r1], {%r1, %r1}; st.shared.b16 [%r1+8], 0; st.shared.b8 [%r1+10], 0;"
            "ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r1];", declared=SHARED)  # fmt: skip


def test_a_new_cta_finds_its_shared_memory_unwritten() -> None:
    body = """
    mov.b32 %r1, tile; mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, 0;
    @%p1 st.shared.u32 [%r1], %r1; ld.shared.u32 %r3, [%r1];
    """
    with pytest.raises(Uninitialised, match=r"(?s)CTA 1"):
        run(body, grid=(2,), resident=1, declared=SHARED)


def test_shared_bounds_and_alignment() -> None:
    with pytest.raises(BadAddress, match="the CTA has 1024"):
        run("mov.b32 %r1, tile; st.shared.u32 [%r1+1024], %r1;", declared=SHARED)
    with pytest.raises(BadAddress, match="not a multiple of 16"):
        run("mov.b32 %r1, tile; st.shared.v4.b32 [%r1+8], {%r1, %r1, %r1, %r1};", declared=SHARED)


def test_dynamic_shared_memory_lies_behind_the_static() -> None:
    declared = ".extern .shared .align 16 .b8 dynamic[];\n" + SHARED
    out = np.zeros(2, np.uint32)
    body = """
    mov.b32 %r1, tile; mov.b32 %r2, dynamic; st.global.u32 [%d0], %r1; st.global.u32 [%d0+4], %r2;
    st.shared.u32 [%r2+252], %r1;
    """
    run(body, out, declared=declared, shared=256)
    assert out.tolist() == [0, 1024]
    with pytest.raises(BadAddress, match="the CTA has 1280"):
        run("mov.b32 %r2, dynamic; st.shared.u32 [%r2+256], %r2;", declared=declared, shared=256)
