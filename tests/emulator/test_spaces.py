"""Generic addresses, local memory, constants and kernel parameters."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from programs import run
from ptx_emulator.errors import BadAddress, PtxError, UnknownInstruction

pytestmark = pytest.mark.emulator
SHARED = ".shared .align 16 .b8 tile[1024];"
GENERIC = """
    .local .align 8 .b8 depot[256];
    .reg .b64 %SP, %SPL, %shared;
    mov.b64 %SPL, depot; cvta.local.u64 %SP, %SPL;
    mov.b64 %shared, tile; cvta.shared.u64 %shared, %shared;
"""


def test_generic_addresses_of_three_spaces_in_one_instruction() -> None:
    """Lane by lane another space: each keeps what was stored through its own instruction."""
    out = np.zeros(96, np.uint32)
    run(
        GENERIC
        + """
        rem.u32 %r1, %tx, 3; mad.wide.u32 %d1, %tx, 4, %d0; mad.wide.u32 %d2, %tx, 4, %shared; add.s64 %d3, %SP, 8;
        st.global.u32 [%d1], %tx;
        add.u32 %r2, %tx, 100; mov.b64 %d4, tile; mad.wide.u32 %d4, %tx, 4, %d4; st.shared.u32 [%d4], %r2;
        add.u32 %r3, %tx, 200; st.local.u32 [%SPL+8], %r3;
        setp.eq.u32 %p1, %r1, 1; setp.eq.u32 %p2, %r1, 2;
        selp.b64 %d5, %d2, %d1, %p1; selp.b64 %d5, %d3, %d5, %p2;
        ld.u32 %r4, [%d5]; add.u32 %r4, %r4, 1000; st.u32 [%d5], %r4; ld.u32 %r4, [%d5];
        st.global.u32 [%d1+256], %r4;
        """,
        out,
        declared=SHARED,
    )
    want = [i + 100 * (i % 3) + 1000 for i in range(32)]
    assert out[64:].tolist() == want
    assert out[:32].tolist() == [w if i % 3 == 0 else i for i, w in enumerate(want)]


def test_isspacep_and_the_way_back() -> None:
    out = np.zeros(8, np.uint32)
    tests = "".join(
        f"isspacep.{space} %p1, {address}; selp.u32 %r1, 1, 0, %p1; st.global.u32 [%d0+{4 * i}], %r1;"
        for i, (space, address) in enumerate(
            [
                ("global", "%d0"),
                ("shared", "%shared"),
                ("local", "%SP"),
                ("shared", "%d0"),
                ("local", "%shared"),
                ("global", "%SP"),
            ]
        )
    )
    back = """
    cvta.to.shared.u64 %d1, %shared; mov.b64 %d2, tile; setp.eq.s64 %p2, %d1, %d2; selp.u32 %r2, 1, 0, %p2;
    st.global.u32 [%d0+24], %r2;
    """
    run(GENERIC + tests + back, out, declared=SHARED)
    assert out.tolist() == [1, 1, 1, 0, 0, 0, 1, 0]


def test_local_memory_belongs_to_a_thread() -> None:
    out = np.zeros(64, np.uint32)
    body = """
    st.local.v2.u32 [%SPL+16], {%tx, %lane}; ld.local.u32 %r1, [%SPL+16];
    mad.wide.u32 %d1, %tx, 4, %d0; st.global.u32 [%d1], %r1;
    """
    run(GENERIC + body, out, threads=64, declared=SHARED)
    assert out.tolist() == [*range(64)]
    with pytest.raises(BadAddress, match="a thread has 256"):
        run(GENERIC + "ld.local.u32 %r1, [%SPL+256];", out, declared=SHARED)


def test_constants_and_module_variables() -> None:
    declared = """
    .const .align 4 .b8 table[8] = {1, 2, 3, 4, 255, 255, 255, 255};
    .global .align 4 .u32 counter = 5;
    .const .s16 one = -3;
    """
    out = np.zeros(4, np.int32)
    run(
        """
        ld.const.u32 %r1, [table]; st.global.u32 [%d0], %r1; ld.const.s32 %r1, [table+4]; st.global.u32 [%d0+4], %r1;
        mov.b64 %d1, counter; atom.global.add.u32 %r2, [%d1], 1; ld.global.u32 %r2, [counter];
        st.global.u32 [%d0+8], %r2; ld.const.s16 %r3, [one]; st.global.u32 [%d0+12], %r3;
        """,
        out,
        declared=declared,
    )
    assert out.tolist() == [0x04030201, -1, 5 + 32, -3]
    with pytest.raises(BadAddress, match="table, which is read-only"):
        run("mov.b64 %d1, table; st.global.u32 [%d1], %tx;", declared=declared)


# -------------------------------------------------------------------------------------------------------- parameters


def test_scalar_parameters() -> None:
    out = np.zeros(4, np.float32)
    run("cvt.rn.f32.s32 %f5, %r1; st.global.f32 [%d0], %f5; st.global.f32 [%d0+4], %f2; st.global.u32 [%d0+8], %r3;",
        out, -7, 0.5, 2**31)  # fmt: skip
    assert out[:2].tolist() == [-7, 0.5] and out.view(np.uint32)[2] == 2**31


def test_a_struct_by_value() -> None:
    """Fields by offset, as vectors, through a register, and through a generic address."""
    fields = struct.pack("<iiqfhxx", -5, 6, 1 << 40, 1.5, -2)
    out = np.zeros(8, np.int64)
    run(
        """
        ld.param.v2.u32 {%r1, %r2}, [p1];
        cvt.s64.s32 %d5, %r1; st.global.s64 [%d0], %d5;
        cvt.s64.s32 %d5, %r2; st.global.s64 [%d0+8], %d5;
        ld.param.s64 %d5, [p1+8]; st.global.s64 [%d0+16], %d5;
        ld.param.f32 %f1, [p1+16]; cvt.rzi.s64.f32 %d5, %f1; st.global.s64 [%d0+24], %d5;
        mov.b64 %d6, p1;
        add.s64 %d7, %d6, 4; ld.param.s32 %r3, [%d7]; cvt.s64.s32 %d5, %r3; st.global.s64 [%d0+32], %d5;
        cvta.param.u64 %d7, %d6; ld.s16 %r3, [%d7+20]; cvt.s64.s32 %d5, %r3; st.global.s64 [%d0+40], %d5;
        """,
        out,
        fields,
    )
    assert out.tolist() == [-5, 6, 1 << 40, 1, 6, -2, 0, 0]


def test_parameters_are_checked() -> None:
    out = np.zeros(1, np.uint32)
    with pytest.raises(PtxError, match="of the 12 bytes of parameters"):
        run("ld.param.u32 %r5, [p1+4];", out, 3)
    with pytest.raises(BadAddress, match="constant"):
        run("mov.b64 %d6, p1; cvta.param.u64 %d6, %d6; st.u32 [%d6], %tx;", out, 3)
    with pytest.raises(UnknownInstruction, match="p7"):
        run("ld.param.u32 %r5, [p7];", out)
