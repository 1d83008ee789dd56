"""CUDA C++ through its own launcher: what nvcc makes of the language, and launches that CUDA refuses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ptx_emulator import cuda
from ptx_emulator.errors import BadAddress

pytestmark = [pytest.mark.emulator, pytest.mark.skipif(cuda.nvcc() is None, reason="needs nvcc")]

SOURCE = Path(__file__).parent / "kernels" / "forms.cu"
THREADS, INVALID, EMPTY = 64, 1, 9  # cudaError_t


def launch(
    handle: Callable[[cuda.Launch], None], given: torch.Tensor, out: torch.Tensor, blocks: int = 1, shared: int = 4 * THREADS,
    granted: bool = False,
) -> int:  # fmt: skip
    library = cuda.build("forms", (SOURCE,))
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (given, out))
    with library.launches(handle):
        return ctypes.CDLL(str(library.path)).launch_forms(*pointers, blocks, shared, granted)


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(-50, 50, (THREADS,), dtype=torch.int32), torch.full((THREADS,), 123456, dtype=torch.int32)


@pytest.mark.parametrize("mode", ["convergent", "late", "race", "adversarial"])
def test_structs_and_every_space_of_memory(mode: str) -> None:
    given, out = operands()
    seen: list[cuda.Launch] = []

    def run(launched: cuda.Launch) -> None:
        seen.append(launched)
        launched.run([given, out], read_only=[given], write_only=[out], mode=mode)

    assert launch(run, given, out) == 0
    assert [(one.kernel, one.grid, one.threads, one.shared) for one in seen] == [("forms_kernel", (1, 1, 1), 64, 256)]
    want = []
    for i, value in enumerate(given.tolist()):
        local = [k * i for k in range(8)]
        where = [given.tolist(), (10 * given).tolist(), given.tolist(), local][i % 4]
        want.append(where[(i ^ 1) % 8] + [3, -1, 4, 1][i % 4] * 1000 + local[value & 7] - 7 + 2)
    assert out.tolist() == want
    for space in (".local", ".const", ".shared", ".extern .shared", "cvta"):
        assert space in seen[0].ptx, f"the test no longer has {space}"


def test_what_is_wrong_with_the_program_comes_out_of_the_launch() -> None:
    given, out = operands()
    with pytest.raises(BadAddress, match="at byte 128 of memory 1, which has 128"):
        launch(lambda one: one.run([given, out[:32]]) and None, given, out)


def test_more_shared_memory_than_any_kernel_may_have_must_be_asked_for() -> None:
    given, out = operands()
    seen: list[cuda.Launch] = []
    assert launch(seen.append, given, out, shared=(48 << 10) + 4) == INVALID and not seen
    assert launch(seen.append, given, out, shared=(48 << 10) + 4, granted=True) == 0
    assert seen[0].shared == (48 << 10) + 4


def test_an_empty_grid_is_refused() -> None:
    given, out = operands()
    assert launch(lambda one: None, given, out, blocks=0) == EMPTY
