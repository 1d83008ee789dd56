"""What a CTA may see of another's stores: messages through a flag, right and wrong, and what one thread sees of itself.

The wrong ones are right in the convergent mode, and most are right on any GPU on most days; each must be caught among SEEDS.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from programs import run, zeros
from ptx_emulator import TensorMap
from ptx_emulator.errors import EndlessLoop

pytestmark = pytest.mark.emulator
SEEDS = range(10)  # two of each adversary

# CTA 0 writes data[tid] = tid + 1 and raises a flag; CTA 1 waits for it and copies the data
MESSAGE = """
    setp.eq.u32 %p1, %tx, 0; mov.u32 %r1, %ctaid.x; setp.ne.u32 %p2, %r1, 0; mov.u32 %r5, 1;
    mad.wide.u32 %d4, %tx, 4, %d0; mad.wide.u32 %d5, %tx, 4, %d2; @%p2 bra RECEIVE;
    add.u32 %r2, %tx, 1; st.global.u32 [%d4], %r2;
    {before} @!%p1 bra DONE; {raise_flag} bra.uni DONE;
    RECEIVE: @!%p1 bra READY;
    SPIN: {look} setp.eq.u32 %p3, %r6, 0; @%p3 bra SPIN; {behind}
    READY: {after}
    {read} st.global.u32 [%d5], %r7;
    DONE:
"""
RIGHT = {
    "before": "bar.sync 0;",
    "raise_flag": "atom.release.gpu.global.exch.b32 %r6, [%d1], 1;",
    "look": "ld.acquire.gpu.global.u32 %r6, [%d1];",
    "behind": "",
    "after": "bar.sync 0;",
    "read": "ld.global.u32 %r7, [%d4];",
}


def message(seed: int, mode: str = "adversarial", **change: str) -> bool:
    """Whether the message arrives whole."""
    data, flag, out = np.zeros(64, np.uint32), np.zeros(1, np.uint32), np.zeros(64, np.uint32)
    body = MESSAGE.format(**(RIGHT | change))
    run(body, data, flag, out, threads=64, grid=(2,), resident=2, mode=mode, seed=seed, budget=20_000)
    return out.tolist() == [*range(1, 65)]


@pytest.mark.parametrize(
    "raise_flag",
    ["atom.release.gpu.global.exch.b32 %r6, [%d1], 1;", "red.release.gpu.global.add.u32 [%d1], 1;",
     "st.release.gpu.global.u32 [%d1], %r5;", "atom.acq_rel.sys.global.add.u32 %r6, [%d1], 1;",
     "fence.acq_rel.gpu; st.relaxed.gpu.global.u32 [%d1], %r5;", "membar.gl; st.volatile.global.u32 [%d1], %r5;"],
)  # fmt: skip
def test_flags_that_release(raise_flag: str) -> None:
    assert all(message(seed, raise_flag=raise_flag) for seed in SEEDS)


@pytest.mark.parametrize(
    ("look", "behind"),
    [("ld.acquire.gpu.global.u32 %r6, [%d1];", ""), ("atom.acquire.gpu.global.or.b32 %r6, [%d1], 0;", ""),
     ("ld.relaxed.gpu.global.u32 %r6, [%d1];", "fence.acq_rel.gpu;"), ("ld.volatile.global.u32 %r6, [%d1];", "membar.gl;"),
     ("atom.global.or.b32 %r6, [%d1], 0;", "fence.sc.gpu;")],
)  # fmt: skip
def test_looks_that_acquire(look: str, behind: str) -> None:
    assert all(message(seed, look=look, behind=behind) for seed in SEEDS)


WRONG = {
    "the flag is relaxed": {"raise_flag": "atom.relaxed.gpu.global.exch.b32 %r6, [%d1], 1;"},
    "the flag is volatile": {"raise_flag": "st.volatile.global.u32 [%d1], %r5;"},
    "the release is for the CTA": {"raise_flag": "atom.release.cta.global.exch.b32 %r6, [%d1], 1;"},
    "the fence is for the CTA": {"raise_flag": "membar.cta; st.relaxed.gpu.global.u32 [%d1], %r5;"},
    "no barrier before the release": {"before": ""},
    "the look is relaxed": {"look": "ld.relaxed.gpu.global.u32 %r6, [%d1];"},
    "the look is volatile": {"look": "ld.volatile.global.u32 %r6, [%d1];"},
    "the acquire is for the CTA": {"look": "ld.acquire.cta.global.u32 %r6, [%d1];"},
    "no barrier after the acquire": {"after": ""},
    "the data come by the read-only path": {"read": "ld.global.nc.u32 %r7, [%d4];"},
}


@pytest.mark.parametrize("name", WRONG)
def test_broken_messages(name: str) -> None:
    assert message(0, "convergent", **(WRONG[name] if name != "no barrier after the acquire" else {}))
    assert not all(message(seed, **WRONG[name]) for seed in SEEDS)


def test_a_plain_look_never_sees_the_flag() -> None:
    with pytest.raises(EndlessLoop):
        for seed in SEEDS:
            message(seed, look="ld.global.u32 %r6, [%d1];")


def test_cached_loads_of_what_nobody_writes_are_right() -> None:
    """The read-only path is wrong only where the kernel writes."""
    data, flag, out = np.arange(1, 65, dtype=np.uint32), np.zeros(1, np.uint32), np.zeros(64, np.uint32)
    body = MESSAGE.format(**(RIGHT | {"read": "ld.global.nc.u32 %r7, [%d4];"})).replace("st.global.u32 [%d4], %r2;", "")
    for seed in SEEDS:
        run(body, data, flag, out, threads=64, grid=(2,), resident=2, mode="adversarial", seed=seed, read_only=[0])
        assert np.array_equal(out, data)


def test_what_is_seen_is_passed_on() -> None:
    """CTA 0 releases to CTA 1, which writes nothing of its own and releases to CTA 2: that one sees the data of CTA 0."""
    body = """
    mov.u32 %r1, %ctaid.x; mov.u32 %r5, 1; setp.ne.u32 %p1, %tx, 0; mad.wide.u32 %d4, %tx, 4, %d0; mad.wide.u32 %d5, %tx, 4, %d2;
    setp.eq.u32 %p2, %r1, 0; setp.eq.u32 %p3, %r1, 2; mad.wide.u32 %d6, %r1, 4, %d1;
    @%p2 add.u32 %r2, %tx, 1; @%p2 st.global.u32 [%d4], %r2; @%p2 bra PASS;
    @%p1 bra READY;
    SPIN: ld.acquire.gpu.global.u32 %r6, [%d6+-4]; setp.eq.u32 %p4, %r6, 0; @%p4 bra SPIN;
    READY:
    PASS: bar.sync 0; @%p3 ld.global.u32 %r7, [%d4]; @%p3 st.global.u32 [%d5], %r7;
    @!%p1 st.release.gpu.global.u32 [%d6], %r5;
    """
    for seed in SEEDS:
        data, flags, out = np.zeros(64, np.uint32), np.zeros(3, np.uint32), np.zeros(64, np.uint32)
        run(body, data, flags, out, threads=64, grid=(3,), resident=3, mode="adversarial", seed=seed)
        assert out.tolist() == [*range(1, 65)]


# ------------------------------------------------------------------------------------------- one thread, one location

SELF = {
    "weak, then relaxed": ("st.global.u32 [%d1], %r1; ld.relaxed.gpu.global.u32 %r2, [%d1];", lambda t: (t + 5, t + 5)),
    "weak, then atomic": ("st.global.u32 [%d1], %r1; atom.global.add.u32 %r2, [%d1], 1;", lambda t: (t + 5, t + 6)),
    "atomic, then weak": ("atom.global.add.u32 %r2, [%d1], %r1; ld.global.u32 %r2, [%d1];", lambda t: (t + 5, t + 5)),
    "relaxed, then weak": ("st.relaxed.gpu.global.u32 [%d1], %r1; ld.global.u32 %r2, [%d1];", lambda t: (t + 5, t + 5)),
    "weak, then relaxed store": (
        "st.global.u32 [%d1], 1; st.relaxed.gpu.global.u32 [%d1], %r1; mov.u32 %r2, 0;",
        lambda t: (0, t + 5),
    ),
    "a byte of it": (
        "st.global.u32 [%d1], %r1; st.global.u8 [%d1], 7; ld.volatile.global.u32 %r2, [%d1];",
        lambda t: (7, 7),
    ),
}


@pytest.mark.parametrize("name", SELF)
def test_a_thread_sees_its_own_accesses_in_order(name: str) -> None:
    body, expected = SELF[name]
    place = "mad.wide.u32 %d1, %tx, 4, %d0; add.u32 %r1, %tx, 5;"
    for seed in SEEDS:
        memory = np.zeros(128, np.uint32)
        run(place + body + "st.global.u32 [%d1+256], %r2;", memory, threads=64, mode="adversarial", seed=seed)
        want: list[Callable] = [expected(t) for t in range(64)]
        assert [*zip(memory[64:].tolist(), memory[:64].tolist(), strict=True)] == want


def test_what_a_barrier_ordered_comes_before_the_atomics_of_the_others() -> None:
    """One thread sets a counter, a barrier, all count: none of them may count first, nor the setting come last."""
    body = "setp.eq.u32 %p1, %tx, 5; @%p1 st.global.u32 [%d0], 1000; bar.sync 0; red.global.add.u32 [%d0], 1;"
    for seed in SEEDS:
        memory = np.zeros(1, np.uint32)
        run(body, memory, threads=128, mode="adversarial", seed=seed)
        assert memory[0] == 1128


def test_the_end_of_a_kernel_publishes_all() -> None:
    body = (
        "mov.u32 %r1, %ctaid.x; mad.lo.u32 %r1, %r1, 64, %tx; mad.wide.u32 %d1, %r1, 4, %d0; st.global.u32 [%d1], %r1;"
    )
    for seed in SEEDS:
        memory = np.zeros(64 * 5, np.uint32)
        run(body, memory, threads=64, grid=(5,), mode="adversarial", seed=seed)
        assert memory.tolist() == [*range(320)]


# ---------------------------------------------------------------------------------------------------- the async proxy

# as MESSAGE, but CTA 1 gets the data by a tensor copy of thread 0
BY_TENSOR_COPY = """
    setp.eq.u32 %p1, %tx, 0; mov.u32 %r1, %ctaid.x; setp.ne.u32 %p2, %r1, 0;
    mad.wide.u32 %d4, %tx, 4, %d0; mad.wide.u32 %d5, %tx, 4, %d2; @%p2 bra RECEIVE;
    add.u32 %r2, %tx, 1; st.global.u32 [%d4], %r2; bar.sync 0;
    @%p1 atom.release.gpu.global.exch.b32 %r6, [%d1], 1; bra.uni DONE;
    RECEIVE: mov.b32 %r8, bar; mov.b32 %r9, tile; @!%p1 bra READY;
    SPIN: ld.acquire.gpu.global.u32 %r6, [%d1]; setp.eq.u32 %p3, %r6, 0; @%p3 bra SPIN;
    {fence}
    mov.b64 %d6, p3; mbarrier.init.shared::cta.b64 [%r8], 1; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r8], 256;
    cp.async.bulk.tensor.1d.shared::cta.global.mbarrier::complete_tx::bytes [%r9], [%d6, {{0}}], [%r8];
    READY: bar.sync 0;
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r8], 0; @!%p4 bra WAIT;
    mad.lo.u32 %r9, %tx, 4, %r9; ld.shared.u32 %r7, [%r9]; st.global.u32 [%d5], %r7;
    DONE:
"""


@pytest.mark.parametrize(
    "fence", ["fence.proxy.async;", "fence.proxy.async.global;", "fence.proxy.async.shared::cta;", ""]
)
def test_a_tensor_copy_sees_what_a_proxy_fence_of_global_memory_lets_it(fence: str) -> None:
    whole = []
    for seed in SEEDS:
        data, flag, out = zeros(64, np.uint32), np.zeros(1, np.uint32), np.zeros(64, np.uint32)
        map_ = TensorMap(data.ctypes.data, 4, (64,), (), (64,))
        declared = ".shared .align 8 .b64 bar;\n.shared .align 128 .b8 tile[256];"
        run(BY_TENSOR_COPY.format(fence=fence), data, flag, out, map_, threads=64, grid=(2,), resident=2, mode="adversarial",
            seed=seed, declared=declared)  # fmt: skip
        whole.append(out.tolist() == [*range(1, 65)])
    assert all(whole) if fence in ("fence.proxy.async;", "fence.proxy.async.global;") else not all(whole)
