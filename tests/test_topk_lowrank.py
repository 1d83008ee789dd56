"""The drop-ins over topk_svd, and peers: torch.svd_lowrank, scikit-learn, scipy."""

from __future__ import annotations

import pytest
import torch
from spectra import MATRICES, indices, seeded, with_spectrum

from svdkern.linalg import randomized_svd, svd_lowrank, topk_svd


def test_svd_lowrank_is_torchs_with_a_smaller_error() -> None:
    a = torch.randn(1300, 1040, generator=seeded())
    exact = torch.linalg.svdvals(a)[:6]
    before = torch.get_rng_state()
    found = svd_lowrank(a, 6, 4)
    assert torch.equal(torch.get_rng_state(), before)
    theirs = torch.svd_lowrank(a, 6, 4)
    assert [t.shape for t in found] == [t.shape for t in theirs]
    assert (found[1] - exact).abs().max() < 0.4 * (theirs[1] - exact).abs().max()
    assert (svd_lowrank(a, 6, 0)[1] - exact).abs().max() > 2 * (found[1] - exact).abs().max()  # niter is a limit
    u, s, v = found
    assert torch.allclose((a @ v - u * s).norm(dim=0), torch.zeros(6), atol=1e-3)


def test_svd_lowrank_of_a_batch_and_of_a_centred_matrix() -> None:
    a = torch.randn(2, 3, 40, 30, generator=seeded())
    mean = a.mean(dim=-2, keepdim=True)
    u, s, v = svd_lowrank(a, 30, M=mean, seed=1)
    assert u.shape == (2, 3, 40, 30) and s.shape == (2, 3, 30) and v.shape == (2, 3, 30, 30)
    assert torch.allclose(u * s.unsqueeze(-2) @ v.mT, a - mean, atol=1e-5)
    with pytest.raises(ValueError, match="niter is -1, expected an integer >= 0"):
        svd_lowrank(a[0, 0], 2, -1)
    with pytest.raises(ValueError, match="k is 31, expected 1 <= k <= 30"):
        svd_lowrank(a[0, 0], 31)


def test_randomized_svd_of_tensors_and_arrays() -> None:
    a = with_spectrum(1200, 1100, indices(1100) ** -1.0).float()
    exact = torch.linalg.svdvals(a)[:5]
    u, s, vt = randomized_svd(a, 5, random_state=3)
    assert u.shape == (1200, 5) and vt.shape == (5, 1100)
    assert torch.allclose(s, exact, rtol=1e-3)
    assert torch.allclose(a @ vt.mT, u * s, atol=1e-2)
    arrays = randomized_svd(a.numpy(), 5, n_iter=7, random_state=3)
    assert all(type(x).__module__ == "numpy" for x in arrays) and arrays[2].shape == (5, 1100)
    with pytest.raises(ValueError, match="power_iteration_normalizer is 'SVD', expected one of 'auto', 'QR'"):
        randomized_svd(a, 5, power_iteration_normalizer="SVD")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="random_state is a Generator, expected an integer or None"):
        randomized_svd(a, 5, random_state=seeded())  # type: ignore[arg-type]


def test_randomized_svd_takes_what_numpy_takes() -> None:
    numpy = pytest.importorskip("numpy", reason="needs NumPy")
    array = numpy.arange(40.0, dtype=numpy.float32).reshape(8, 5)
    wanted = numpy.linalg.svd(array.astype(float))[1][:2]
    for matrix in (array[::-1], array[:, ::-2][:, ::-1], array.tolist(), array.astype(int)):
        exact = numpy.linalg.svd(numpy.asarray(matrix).astype(float))[1][:2]
        found = randomized_svd(matrix, numpy.int64(2), n_iter=numpy.int64(3), random_state=numpy.int64(1))
        assert found[0].dtype == (numpy.float32 if getattr(matrix, "dtype", None) == numpy.float32 else float)
        assert abs(found[1] - exact).max() < 1e-4 * wanted[0]
    with pytest.raises(TypeError, match="A is torch.complex128, expected float32"):
        randomized_svd(array + 1j * array.astype(float), 2)


def test_randomized_svd_takes_sklearns_arguments() -> None:
    extmath = pytest.importorskip("sklearn.utils.extmath", reason="needs scikit-learn")
    import inspect

    ours, theirs = (inspect.signature(f).parameters for f in (randomized_svd, extmath.randomized_svd))
    assert list(ours) == list(theirs)
    a = MATRICES["spiked"][0]()
    for mine, other in zip(
        randomized_svd(a.numpy(), 3), extmath.randomized_svd(a.numpy(), 3, random_state=0), strict=True
    ):
        assert abs(mine - other).max() < 1e-6


def test_values_of_scipys_svds() -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg", reason="needs scipy")
    a = MATRICES["power"][0]()
    theirs = torch.from_numpy(linalg.svds(a.numpy(), 6, return_singular_vectors=False).copy()).sort(descending=True)[0]
    assert torch.allclose(topk_svd(a, 6, method="krylov", tol="accurate").S, theirs, rtol=1e-6)
