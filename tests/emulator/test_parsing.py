"""From text to instructions: scopes, comments, operands, and what is said of text that is not understood."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from programs import lanes, module, run
from ptx_emulator import run_ptx
from ptx_emulator.errors import BadAddress, PtxError, UnknownInstruction
from ptx_emulator.parse import Address, parse

pytestmark = pytest.mark.emulator
STORE = "mad.wide.u32 %d9, %tx, 4, %d0; st.global.u32 [%d9], %r9;"


def only(body: str):  # type: ignore[no-untyped-def]
    """The instruction of a body that has one."""
    (found,) = (i for i in parse(module(body, [".param .u64 p0"])).code if i.parts[0] != "ret")
    return found


# ------------------------------------------------------------------------------------------------------------ scopes


def test_inline_assembly_has_registers_of_its_own() -> None:
    """As Triton writes it: the same names twice, in braces, and outside with another type."""
    body = """
    .reg .b64 p; mov.b64 p, 5;
    // begin inline asm
    { .reg .pred p; .reg .b32 x; setp.lt.u32 p, %tx, 10; mov.b32 x, 1; @p mov.b32 %r1, x; @!p mov.b32 %r1, 2; }
    // end inline asm
    {
        .reg .b32 x, y<2>;
        mov.b32 y0, 10; mov.b32 y1, 20; add.u32 x, y0, y1;
        { .reg .b32 x; mov.b32 x, 1000; }
        add.u32 %r1, %r1, x;
    }
    cvt.u32.u64 %r9, p; add.u32 %r9, %r9, %r1;
    """
    out = np.zeros(32, np.uint32)
    run(body + STORE, out)
    assert out.tolist() == [5 + (1 if i < 10 else 2) + 30 for i in range(32)]


def test_labels_belong_to_their_braces() -> None:
    """The spin loop of an mbarrier wait stands in many places with one label; one is used before it is declared."""
    loop = """
    {{
        .reg .pred q; mov.u32 %r1, 0;
        waitLoop: add.u32 %r1, %r1, 1; setp.lt.u32 q, %r1, {0}; @q bra.uni waitLoop;
    }}
    add.u32 %r9, %r9, %r1;
    """
    skip = "{ bra.uni end; add.u32 %r9, %r9, 1000; end: }"
    out = np.zeros(32, np.uint32)
    run("mov.u32 %r9, 0;" + loop.format(3) + skip + loop.format(4) + skip + STORE, out)
    assert set(out) == {7}


def test_a_label_that_is_nowhere() -> None:
    with pytest.raises(PtxError, match="label NOWHERE is nowhere"):
        run("bra.uni NOWHERE;")
    with pytest.raises(PtxError, match="label inner is nowhere"):
        run("{ inner: add.u32 %r1, %r1, 1; } bra inner;")


# ------------------------------------------------------------------------------------------- comments, lines, operands


def test_comments() -> None:
    body = """
    mov.u32 %o, 1; // add.u32 %o, %o, 100;
    /* add.u32 %o, %o, 200;
       { */ add.u32 %o, /* in the middle */ %o,  // and at the end
            2;
    //} ; @%p bra NOWHERE;
    add.u32 %o, %o, 4;
    """
    assert set(lanes(body, np.zeros(32, np.uint32))) == {7}


def test_two_statements_on_a_line_and_one_over_many() -> None:
    assert set(lanes("mov.u32 %o,\n1\n;add.u32\t%o,%o,\n\n%o;", np.zeros(32, np.uint32))) == {2}


def test_errors_name_the_line_of_the_source() -> None:
    """The line of the PTX, and that of the kernel which .loc gives, also inside inlined functions."""
    body = """
    .loc 1 17 3
    mov.u32 %r1, 0;
    .loc	1 21 24, function_name $L__info_string0, inlined_at 1 17 3
    // a comment between

    ld.global.u32 %r9, [%d0+4];
    """
    text = module("ld.param.u64 %d0, [p0];" + body, [".param .u64 p0"]) + '\n.file 1 "/some/where/kernel.py"\n'
    line = next(i for i, row in enumerate(text.splitlines(), 1) if "ld.global" in row)
    with pytest.raises(BadAddress, match=rf"ld\.global\.u32 %r9, \[%d0\+4\], PTX line {line} \(kernel\.py:21\)"):
        run_ptx(text, (1,), 32, [torch.zeros(1)])


@pytest.mark.parametrize(
    ("text", "operands"),
    [
        ("mov.b64 {%r1, %r2}, %d1;", [("%r1", "%r2"), "%d1"]),
        ("st.global.v2.b32 [%d1+-8], {%r1,%r2};", [Address("%d1", -8), ("%r1", "%r2")]),
        ("ld.global.b32 %r1, [ %d1 + 16 ];", ["%r1", Address("%d1", 16)]),
        ("ld.shared.b32 %r1, [tile+0x20];", ["%r1", Address("tile", 32)]),
        ("setp.eq.and.s32 %p1|%p2, %r1, -7, !%p3;", [("%p1", "%p2"), "%r1", "-7", "!%p3"]),
        (
            "cp.async.bulk.x [%r1], [%d1, {%r2, 0}], [%r3];",
            [Address("%r1"), Address("%d1", 0, ("%r2", "0")), Address("%r3")],
        ),
    ],
)
def test_operands(text: str, operands: list) -> None:
    assert only(text).operands == operands


def test_guards() -> None:
    for text, guard, negated in (
        ("@%p1 mov.b32 %r1, 0;", "%p1", False),
        ("@!%p1 mov.b32 %r1, 0;", "%p1", True),
        ("@! %p1 mov.b32 %r1, 0;", "%p1", True),
    ):
        found = only(text)
        assert (found.guard, found.negated, found.name) == (guard, negated, "mov.b32")
    with pytest.raises(UnknownInstruction, match="no register %nowhere"):
        run("@%nowhere mov.b32 %r1, 0;")


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        ("7", 7),
        ("-1", 2**32 - 1),
        ("0x1F", 31),
        ("0XFFU", 255),
        ("4294967295", 2**32 - 1),
        ("0b101", 5),
        ("0f3F800000", 0x3F800000),
    ],
)
def test_literals(literal: str, value: int) -> None:
    assert set(lanes(f"mov.b32 %o, {literal};", np.zeros(32, np.uint32))) == {value}


SPECIAL = {
    "tid.x": lambda cta, t: t,
    "tid.y": lambda cta, t: 0,
    "ntid.x": lambda cta, t: 96,
    "ctaid.x": lambda cta, t: cta % 3,
    "ctaid.y": lambda cta, t: cta // 3,
    "ctaid.z": lambda cta, t: 0,
    "nctaid.x": lambda cta, t: 3,
    "nctaid.y": lambda cta, t: 2,
    "laneid": lambda cta, t: t % 32,
    "warpid": lambda cta, t: t // 32,
    "lanemask_eq": lambda cta, t: 2 ** (t % 32),
    "lanemask_lt": lambda cta, t: 2 ** (t % 32) - 1,
    "lanemask_le": lambda cta, t: 2 ** (t % 32 + 1) - 1,
    "lanemask_gt": lambda cta, t: 2**32 - 2 ** (t % 32 + 1),
    "lanemask_ge": lambda cta, t: 2**32 - 2 ** (t % 32),
}


def test_special_registers() -> None:
    out = np.zeros((len(SPECIAL), 6, 96), np.uint32)
    place = """
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mad.lo.u32 %r2, %r2, 3, %r1; mad.lo.u32 %r2, %r2, 96, %tx;
    mad.wide.u32 %d1, %r2, 4, %d0;
    """
    stores = [f"mov.u32 %r3, %{name}; st.global.u32 [%d1+{4 * 576 * i}], %r3;" for i, name in enumerate(SPECIAL)]
    run(place + "".join(stores), out, threads=96, grid=(3, 2))
    for name, got in zip(SPECIAL, out, strict=True):
        assert got.tolist() == [[SPECIAL[name](cta, t) for t in range(96)] for cta in range(6)], name


# ------------------------------------------------------------------------------------------------ what is not known


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tcgen05.ld.sync.aligned.16x256b.x1.b32 {%r1, %r2, %r3, %r4}, [%r5];", r"tcgen05\.ld.*PTX line \d+"),
        ("call.uni (retval0), vprintf, (param0);", "call"),
        (".branchtargets A, B;", r"directive '\.branchtargets"),
        ("mov.b32 %r1, %clock;", "%clock"),
        ("add.u32 %r1, %r1, %undeclared;", "%undeclared"),
        ("add.u32 %undeclared, %r1, %r1;", "%undeclared"),
        ("mov.b128 %d1, %d2;", r"mov\.b128"),
        ("add.f32 %f1, %f1, 1.5;", r"1\.5"),
    ],
)
def test_what_is_not_known_is_an_error_that_prints_it(text: str, message: str) -> None:
    """Before anything runs: the instruction stands behind a return."""
    with pytest.raises(UnknownInstruction, match=message):
        run("ret;" + text)


def test_which_kernel() -> None:
    text = module("ret;", [])
    two = text + text.split(".address_size 64")[1].replace("entry kernel", "entry other")
    assert parse(two, "other").name == "other"
    with pytest.raises(PtxError, match=r"None is not in this PTX, which has \['kernel', 'other'\]"):
        parse(two)
    with pytest.raises(PtxError, match="is this PTX"):
        parse(".visible .entry kernel() { ret; }")
    head = parse(text)
    assert (head.version, head.target, head.parameters) == ("8.7", "sm_90a", [])


def test_parameters_have_sizes_and_places() -> None:
    text = module(
        "",
        [
            ".param .u8 a",
            ".param .u64 .ptr .global .align 1 b",
            ".param .align 4 .b8 c[12]",
            ".param .align 16 .b8 d[16]",
            ".param .f32 e",
        ],
    )
    assert parse(text).parameter_offsets() == {"a": 0, "b": 8, "c": 16, "d": 32, "e": 48}


def test_launches_are_checked() -> None:
    text = module("", [".param .u32 a"])
    with pytest.raises(PtxError, match="2 arguments for the 1 parameters of kernel"):
        run_ptx(text, (1,), 32, [1, 2])
    with pytest.raises(PtxError, match="48 threads"):
        run_ptx(text, (1,), 48, [1])
    with pytest.raises(PtxError, match="launches nothing"):
        run_ptx(text, (0,), 32, [1])
    with pytest.raises(ValueError, match="one of"):
        run_ptx(text, (1,), 32, [1], mode="lazy")
    with pytest.raises(PtxError, match="has 4 bytes, 8 were given"):
        run_ptx(text, (1,), 32, [b"12345678"])
