"""topk_svd of a matrix that is known by its products alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from spectra import MATRICES, indices, seeded, with_spectrum
from torch import Tensor

from svdkern.linalg import topk_svd


@dataclass
class Products:
    """left @ diag(by) @ right.T, never formed."""

    left: Tensor
    by: Tensor
    right: Tensor
    calls: int = 0

    def __post_init__(self) -> None:
        self.shape, self.dtype = (self.left.shape[0], self.right.shape[0]), self.left.dtype

    def matmat(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.left @ (self.by.unsqueeze(1) * (self.right.t() @ x))

    def rmatmat(self, y: Tensor) -> Tensor:
        self.calls += 1
        return self.right @ (self.by.unsqueeze(1) * (self.left.t() @ y))

    def matrix(self) -> Tensor:
        return (self.left * self.by) @ self.right.t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(300, 220), (220, 300)])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e30])
def test_a_product_of_factors(shape: tuple[int, int], dtype: torch.dtype, scale: float) -> None:
    generator = seeded(2)
    left, right = (torch.randn(n, 40, generator=generator, dtype=torch.float64).to(dtype) for n in shape)
    a = Products(left, (scale * indices(40) ** -1.0).to(dtype), right)
    found = topk_svd(a, 8)
    assert found.info.method == "krylov" and found.info.passes + 1 >= a.calls > 4
    s = torch.linalg.svdvals(a.matrix().double())[:8]
    assert torch.allclose(found.S.double(), s, rtol=1e-4)
    u, v = found.U.double(), found.V.double()
    wide = a.matrix().double()
    for rest in (wide @ v - u * found.S.double(), wide.t() @ u - v * found.S.double()):
        assert bool((torch.linalg.vector_norm(rest, dim=0) <= found.info.residuals + 1e-5 * s[0]).all())
    assert (u.t() @ u - torch.eye(8)).abs().max() < 1e-5


def test_the_same_as_the_matrix_itself() -> None:
    a = MATRICES["power"][0]()
    n = a.shape[1]
    operator = Products(a, torch.ones(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64))
    found = topk_svd(operator, 5, tol="accurate", certify=True)
    assert torch.allclose(found.S, topk_svd(a, 5, method="krylov", tol="accurate").S, rtol=1e-9)
    assert found.info.tail == pytest.approx(topk_svd(a, 5).info.tail, rel=0.3)
    assert found.info.certificate is not None and found.info.certificate.delta == 1e-3


def test_where_the_scale_is_beyond_float32() -> None:
    """1e-42 is a float32, 1e42 is none."""
    a = Products(torch.eye(60), torch.full((60,), 1e-42), torch.eye(60))
    assert torch.allclose(topk_svd(a, 4).S * 1e30, torch.full((4,), 1e-12), rtol=0.01)


def test_of_a_rank_below_k() -> None:
    a = with_spectrum(200, 180, indices(3))
    operator = Products(a, torch.ones(180, dtype=torch.float64), torch.eye(180, dtype=torch.float64))
    found = topk_svd(operator, 6)
    assert torch.allclose(found.S[:3], torch.tensor([3.0, 2.0, 1.0]).double()) and float(found.S[3:].max()) < 1e-9


class _Wrong(Products):
    def matmat(self, x: Tensor) -> Tensor:
        return super().matmat(x)[:-1]


def test_refusals() -> None:
    good = Products(torch.ones(9, 2), torch.ones(2), torch.ones(6, 2))
    with pytest.raises(ValueError, match="which is 'smallest' and method 'auto' of an operator"):
        topk_svd(good, 2, which="smallest")
    with pytest.raises(ValueError, match="method 'exact' of an operator"):
        topk_svd(good, 2, method="exact")
    with pytest.raises(ValueError, match="k is 7, expected 1 <= k <= 6"):
        topk_svd(good, 7)
    with pytest.raises(ValueError, match=r"A.matmat returned \(8, 16\), expected a tensor \(9, 16\)"):
        topk_svd(_Wrong(torch.ones(9, 2), torch.ones(2), torch.ones(6, 2)), 2)
    with pytest.raises(ValueError, match="A.matmat returned a NaN or an infinity"):
        topk_svd(Products(torch.full((9, 2), float("nan")), torch.ones(2), torch.ones(6, 2)), 2)
    with pytest.raises(TypeError, match="an operator of torch.bfloat16, expected torch.float32 or torch.float64"):
        topk_svd(Products(torch.ones(9, 2).bfloat16(), torch.ones(2), torch.ones(6, 2)), 2)
    with pytest.raises(TypeError, match="A is a dict, expected a tensor, or an operator"):
        topk_svd({}, 2)  # type: ignore[arg-type]
