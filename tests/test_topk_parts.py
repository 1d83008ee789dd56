"""What topk_svd is made of: the sketch, orthonormal blocks, the small SVD."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from spectra import seeded, with_spectrum
from torch import Tensor

from svdkern.backends import extension
from svdkern.backends.philox import philox4x32
from svdkern.linalg.exact import small_svd
from svdkern.linalg.orthogonal import new_directions, orthonormal
from svdkern.linalg.sketch import sketch, sketch_in_torch


def test_philox_with_ten_rounds_has_the_published_vectors() -> None:
    """Random123's kat_vectors."""
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        words = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)), rounds=10)  # type: ignore[arg-type]
        assert tuple(int(word) for word in words) == expected


def test_an_entry_of_the_sketch_depends_on_its_place_alone() -> None:
    options = {"seed": (5 << 40) + 7, "dtype": torch.float64, "device": torch.device("cpu")}
    whole = sketch(5000, 300, **options)
    assert bool((whole.abs() == 1).all())
    assert abs(float(whole.mean())) < 0.01
    assert torch.equal(sketch(700, 150, first=100, **options), whole[:700, 100:250])
    # The bits of the words of counter (row, col // 128), by hand.
    row = 4321
    words = philox4x32(tuple(map(torch.tensor, (row, 1, 0, 0))), (torch.tensor(7), torch.tensor(5 << 8)), rounds=10)  # type: ignore[arg-type]
    bits = sum(int(word) << (32 * i) for i, word in enumerate(words))
    assert whole[row, 128:256].tolist() == [1 - 2 * ((bits >> i) & 1) for i in range(128)]
    assert not torch.equal(sketch(50, 50, **(options | {"seed": 8})), sketch(50, 50, **(options | {"seed": 9})))
    assert sketch(3, 0, **options).shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, (5 << 40) + 7, -3, 2**63 + 5, 2**64 + 1])
def test_the_sketch_has_the_bits_of_plain_pytorch(seed: int, dtype: torch.dtype) -> None:
    """Every number of rows and of columns around a bundle, a word and a group."""
    for rows, columns, first in itertools.product(
        (0, 1, 7, 8, 33), (0, 1, 31, 32, 33, 129, 300), (0, 31, 100, 1 << 20)
    ):
        options = {"seed": seed, "first": first, "dtype": dtype, "device": torch.device("cpu")}
        found, wanted = sketch(rows, columns, **options), sketch_in_torch(rows, columns, **options)  # type: ignore[arg-type]
        assert found.dtype == dtype and torch.equal(found, wanted), (rows, columns, first)


@pytest.mark.skipif(extension.why_missing is not None, reason=f"needs the compiled extension: {extension.why_missing}")
def test_the_sketch_has_the_same_bits_on_any_instruction_set_and_number_of_threads() -> None:
    code = (
        "import torch, hashlib; from svdkern.linalg.sketch import sketch; torch.set_num_threads({threads});"
        "s = sketch(5000, 140, seed=9, first=3, dtype=torch.float32, device=torch.device('cpu'));"
        "print(hashlib.sha256(s.numpy().tobytes()).hexdigest())"
    )
    found = set()
    for isa, threads in (("", 2), ("", 1), ("baseline", 2)):
        environment = os.environ | {"SVDKERN_CPU_ISA": isa}
        done = subprocess.run(
            [sys.executable, "-c", code.format(threads=threads)], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


@pytest.mark.skipif(extension.why_missing is not None, reason=f"needs the compiled extension: {extension.why_missing}")
def test_the_sketch_operator_refuses_what_does_not_fit() -> None:
    with pytest.raises(RuntimeError, match="out must be contiguous"):
        torch.ops.svdkern._cpu_sketch(torch.zeros(4, 4).t()[:2], 0, 0)
    with pytest.raises(RuntimeError, match="out must be float32 or float64"):
        torch.ops.svdkern._cpu_sketch(torch.zeros(4, 4).bfloat16(), 0, 0)
    with pytest.raises(RuntimeError, match="first is -1, expected >= 0"):
        torch.ops.svdkern._cpu_sketch(torch.zeros(4, 4), 0, -1)


# ------------------------------------------------------------------------------------------------------------ orthogonality


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decades", [0, 3, 7, 12, 40])
def test_blocks_become_orthonormal(dtype: torch.dtype, decades: int) -> None:
    x = with_spectrum(500, 20, torch.logspace(0, -decades, 20, dtype=torch.float64)).to(dtype)
    q, fallback = orthonormal(x)
    eps = torch.finfo(dtype).eps
    assert (q.double().t() @ q.double() - torch.eye(20)).abs().max() < 20 * eps
    assert (fallback is None) == (decades <= 7)
    assert (x - q @ (q.t() @ x)).norm() < 100 * eps * x.norm()


def test_new_directions_fill_up_what_a_block_lacks() -> None:
    basis, _ = orthonormal(torch.randn(60, 20, generator=seeded()))
    x = torch.randn(60, 2, generator=seeded(1)) @ torch.randn(2, 8, generator=seeded(2))
    x -= basis @ (basis.t() @ x)
    taken: list[int] = []

    def fresh(count: int) -> Tensor:
        taken.append(count)
        return torch.randn(60, count, generator=seeded(3))

    block, own, fallback = new_directions(basis, x, 1e-4, fresh)
    together = torch.cat([basis, block], dim=1).double()
    assert (own, taken, fallback) == (2, [6], "random directions")
    assert (together.t() @ together - torch.eye(28)).abs().max() < 1e-6
    assert (x - block @ (block.t() @ x)).norm() < 1e-4 * x.norm()
    assert new_directions(torch.eye(8)[:, :6], torch.randn(8, 4), 0.0, fresh)[0].shape == (8, 2)
    assert new_directions(torch.eye(8), torch.zeros(8, 4), 0.0, fresh)[0].shape == (8, 0)


@pytest.mark.parametrize("failures", [0, 1, 2, 3])
def test_where_lapacks_svd_gives_up(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen here for the triangle of 704 images, 80 of the values 1: gesdd, error code 1 (two threads, not one)."""
    a = with_spectrum(60, 60, torch.cat([torch.ones(20), torch.logspace(-1, -12, 40)]).double())
    real, left = torch.linalg.svd, [failures]

    def failing(*arguments: object, **options: object) -> object:
        if left[0]:
            left[0] -= 1
            raise torch.linalg.LinAlgError("too many repeated singular values")
        return real(*arguments, **options)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    if failures == 3:
        with pytest.raises(RuntimeError, match=r"the SVD of a \(60, 60\) matrix does not converge"):
            small_svd(a)
        return
    u, s, v = small_svd(a)
    assert ((u * s) @ v.t() - a).norm() < 1e-13
    for factor in (u, v):
        assert (factor.t() @ factor - torch.eye(60)).abs().max() < 1e-13
    assert torch.allclose(s, real(a)[1], rtol=0, atol=1e-14)
