"""TSV-M: task vectors merged by their leading singular vectors, made orthogonal to each other.

    delta_t = P_t diag(S_t) Q_t^T, its min(N, K) / T leading triplets          P = [P_1 ... P_T], S and Q likewise
    delta = polar(P) diag(S) polar(Q)^T

polar(.) is the nearest matrix with orthonormal columns. With one task delta is its task vector. Triplets whose value is rounding
error are left out: their vectors are arbitrary, and would push those of other tasks aside (a LoRA's task vector has few others).

Gargiulo, Crisostomi, Bucarelli, Scardapane, Silvestri, Rodola: "Task Singular Vectors: Reducing Task Interference in Model
Merging", CVPR 2025, arXiv 2412.00081.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from svdkern import linalg
from svdkern.linalg.precision import full_precision


@torch.no_grad()
def tsvm(deltas: Sequence[Tensor]) -> Tensor:
    """One task vector (N, K) of T <= min(N, K) task vectors of one matrix.

    Equivalent to::

        r, found = min(N, K) // T, [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
        left, right = (torch.cat(each, dim=1) for each in ([p[:, :r] for p, _, _ in found], [qh[:r].t() for _, _, qh in found]))
        delta = polar(left) @ torch.diag(torch.cat([s[:r] for _, s, _ in found])) @ polar(right).t()

    Args:
        deltas: (N, K) each, floating-point, on one device: tuned minus pretrained weight.

    Returns:
        (N, K) in the first one's dtype, computed in float32 (float64 for float64).

    Raises:
        ValueError: no delta, shapes that differ, more deltas than min(N, K), a NaN or an infinity.
    """
    if not deltas:
        raise ValueError("there is no delta, expected at least one")
    shape, count = deltas[0].shape, len(deltas)
    for delta in deltas:
        if delta.dim() != 2 or delta.shape != shape:
            raise ValueError(f"a delta is {tuple(delta.shape)}, expected matrices of one shape {tuple(shape)}")
    rank = min(shape) // count
    if rank == 0:
        raise ValueError(f"there are {count} deltas of shape {tuple(shape)}, expected at most {min(shape)}")
    u, sigma, v = zip(*(_significant(delta, rank) for delta in deltas), strict=True)
    values = torch.cat(sigma)
    if not values.numel():
        return torch.zeros_like(deltas[0])
    left, right = linalg.polar(torch.cat(v, dim=1)), linalg.polar(torch.cat(u, dim=1))
    with full_precision(left.device):
        return ((left * values) @ right.t()).to(deltas[0].dtype)


def _significant(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, sigma, v = linalg.factors(delta, rank)
    kept = sigma > max(delta.shape) * torch.finfo(sigma.dtype).eps * sigma[0]
    return u[:, kept], sigma[kept], v[:, kept]


@torch.no_grad()
def tsvm_state(
    base: Mapping[str, Tensor],
    tuned: Sequence[Mapping[str, Tensor]],
    scale: float = 1.0,
    average: Sequence[str] = ("text_projection",),
) -> dict[str, Tensor]:
    """The state_dict of a merged model: ``base + scale * delta``, delta by ``tsvm`` for matrices, else the mean.

    Args:
        base: state_dict of the pretrained model.
        tuned: state_dicts of the models that were tuned from it, with the same names.
        scale: of every delta; the paper takes 1.
        average: parts of names of matrices that are averaged, too (the authors' default is CLIP's text projection).

    Returns:
        base's names and dtypes; tensors that are not floating-point are base's.

    Raises:
        ValueError: no tuned model, or names or shapes that differ; the message names the tensor.
    """
    if not tuned:
        raise ValueError("there is no tuned state_dict, expected at least one")
    merged = {}
    for name, weight in base.items():
        for state in tuned:
            if name not in state or state[name].shape != weight.shape:
                raise ValueError(f"{name} is not in every tuned state_dict with the shape {tuple(weight.shape)}")
        if not weight.is_floating_point():
            merged[name] = weight.clone()
            continue
        wide = torch.promote_types(weight.dtype, torch.float32)
        deltas = [state[name].to(weight.device, wide) - weight.to(wide) for state in tuned]
        by_vectors = weight.dim() == 2 and not any(part in name for part in average)
        delta = tsvm(deltas) if by_vectors else torch.stack(deltas).mean(0)
        merged[name] = (weight.to(wide) + scale * delta).to(weight.dtype)
    return merged
