"""Before an ``nn.Linear`` is adapted: is it one that can be, and which factors and residual does it start with.

Layer: above ``methods``, below ``nn``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svdkern.fingerprint import sha256
from svdkern.frozen import Linear
from svdkern.methods import Cut, Method, Start

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def scale_of(alpha: float | None, rank: int, config: Method) -> float:
    """s = alpha / rank (or what the method divides by) as the layer stores it (a float32 value), 1 without alpha."""
    if alpha is None or rank == 0:
        return 1.0
    return float(torch.tensor(alpha / config.divisor(rank), dtype=torch.float32, device="cpu"))


def initial_start(
    linear: nn.Linear,
    rank: int,
    config: Method,
    scale: float,
    dtype: torch.dtype,
    statistic: Tensor | None = None,
) -> Start:
    """The method's factors and cut for this layer; on the meta device only their shapes."""
    weight = linear.weight.detach()
    if weight.is_meta or rank == 0:
        return config.empty_start(weight, rank, scale, dtype)
    if config.needs is not None:
        check_statistic(config, statistic)
    start = config.start(weight, rank, scale, dtype, statistic)
    for name, factor in start.factors.tensors().items():
        if factor is not None and not bool(factor.isfinite().all()):
            raise ValueError(f"initial {name} is not finite in {dtype}: its values need a wider adapter_dtype")
    return start


def check_statistic(config: Method, statistic: Tensor | None) -> None:
    """Refuse a start without the data that it depends on, or from data with NaN (ValueError)."""
    if statistic is None:
        raise ValueError(
            f"{config.name} starts from data (its {config.needs}): give svdkern.adapt(…, data=batches), "
            "or SVDLinear.from_linear(…, statistic=…)"
        )
    if not _is_finite(statistic):
        raise ValueError(f"the {config.needs} has a NaN or an infinity")


def residual_of(weight: Tensor, config: Method, cut: Cut | None) -> Tensor:
    """The method's residual for this weight, a new tensor; ValueError if it is not finite."""
    residual = config.residual(weight, cut)
    if not _is_finite(residual):
        raise ValueError(f"the residual is not finite in {residual.dtype}: weight has values too large for it")
    return residual


def rehearse(linear: nn.Linear, config: Method, cut: Cut | None) -> tuple[bytes, bytes] | None:
    """Compute the residual and let it go: what can fail in that does, while everything is as it was.

    Returns:
        SHA-256 of weight and residual; None where there is no residual to compute.
    """
    weight = linear.weight.detach()
    if weight.is_meta or not config.changes_residual:
        return None
    return sha256(weight), sha256(residual_of(weight, config, cut))


def check_linear(
    linear: nn.Module, rank: int, config: Method, scale: float, dropout_p: float, adapter_dtype: torch.dtype
) -> None:
    """Everything that can be known to be wrong before a layer is adapted: TypeError or ValueError."""
    if not isinstance(linear, nn.Linear):
        kind = type(linear)
        if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers"):
            raise TypeError("transformers' Conv1D (a linear layer with a transposed weight) is not supported yet")
        raise TypeError(f"is of type {kind.__name__}, expected nn.Linear")
    if type(linear).forward not in (nn.Linear.forward, Linear.forward) or "forward" in vars(linear):
        raise TypeError(f"{type(linear).__name__} has a forward of its own, which an SVDLinear would not call")
    weight = linear.weight
    if type(weight) not in (nn.Parameter, Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}, expected a plain tensor")
    if weight.dtype not in _FLOATS:
        raise TypeError(f"weight is {weight.dtype}, expected float32, bfloat16, float16 or float64")
    if adapter_dtype not in _FLOATS:
        raise TypeError(f"adapter_dtype is {adapter_dtype}, expected float32, bfloat16, float16 or float64")
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank is {rank!r}, expected an int")
    config.check_rank(linear.in_features, linear.out_features, rank)
    config.check_scale(scale)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}, expected 0 <= dropout_p <= 1")
    if not weight.is_meta and not _is_finite(weight.detach()):
        raise ValueError("weight has a NaN or an infinity")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()  # no temporary of the tensor's size
    return bool(low.isfinite() & high.isfinite())
