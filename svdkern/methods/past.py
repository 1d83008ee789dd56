"""Finished tasks as frozen factors of the same call: what CoDyRA and OSF keep beside the factors that train."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svdkern.methods.method import Factors, Layer


def with_past(layer: Layer) -> Factors:
    """The product of ``past_u, past_sigma, past_v`` and of ``u, sigma, v``, as one."""
    if not layer.past_sigma.numel():
        return Factors(layer.u, layer.sigma, None, layer.v)
    assert layer.sigma is not None
    return Factors(
        torch.cat([layer.past_u, layer.u], dim=1),
        torch.cat([layer.past_sigma, layer.sigma]),
        None,
        torch.cat([layer.past_v, layer.v], dim=1),
    )


def into_past(layer: Layer, u: Tensor, sigma: Tensor, v: Tensor) -> None:
    """Append triplets to the past."""
    for name, now in (("past_u", u), ("past_sigma", sigma), ("past_v", v)):
        past = getattr(layer, name)
        setattr(layer, name, nn.Parameter(torch.cat([past, now.to(past.dtype)], dim=-1), requires_grad=False))
