"""``svd_linear``: the public function. Checks, autocast, flattening to 2-D, the choice of a backend, one call.

Layer: above ``autograd`` and ``backends``, below ``nn``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from svdkern.autocast import autocast_is_on, without_autocast
from svdkern.autograd import OperatorFunction, SVDLinearFunction
from svdkern.backends.dispatch import choose_path, strict
from svdkern.backends.philox import threshold_of

Gate = Tensor | tuple[Tensor, Tensor]


def svd_linear(
    x: Tensor,
    weight: Tensor | None,
    u: Tensor,
    sigma: Tensor | None,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    core: Tensor | None = None,
    gate: Gate | None = None,
    group: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""A linear layer with an SVD adapter: ``y = x W^T + s ((x U) * sigma) V^T + b``, in one operation.

    Equivalent to::

        h = x @ u.to(x.dtype)
        z = h * sigma.to(x.dtype)
        y = torch.nn.functional.linear(x, weight, bias) + scale * (z @ v.to(x.dtype).t())

    without the intermediates of y's size, without a cast of x, and with one fused backward.

    Args:
        x: activations (..., K), float32, bfloat16, float16 or (eager backend) float64; any strides.
        weight: frozen weight (N, K) in ``nn.Linear`` layout, or None for the low-rank branch alone. It may require grad
            (its gradient is correct, not fast).
        u: input-side factor (K, r). **The right singular vectors of weight**: papers often call them V.
        sigma: singular values (r,), signed; None means 1 (LoRA, PiSSA).
        v: output-side factor (N, r).
        bias: (N,) or None.
        scale: s, a float or a 0-d tensor (a tensor is never read on the host; under ``torch.compile`` pass a tensor, a float
            is a constant of the graph).
        core: dense core R (r, r) instead of sigma: ``z = (x U) R`` (LoRA-XS).
        gate: multiplies z last. A table (G, r) with ``group`` (row of the table for every position of x; None if G = 1), or a
            pair ``(index, value)``, both (..., k): z is kept in the k columns ``index`` and multiplied with ``value`` there.
        group: integer tensor of shape ``x.shape[:-1]``.
        dropout_p: dropout on the adapter branch's input, in [0, 1]. No mask is stored: it is made again in the backward.
        rng_state: int64 (2,) on x's device, (seed, offset) of the dropout stream; drawn from torch's generator when None.
        backend: "eager", "cpu", "triton", "cuda" or None (the fastest correct one that is measured; on a GPU that is eager, but for
            layers of bfloat16 or float16 and small rank on sm_90, which take "cuda").

    The factors may have any floating dtype, each its own (float32 masters under bfloat16 activations); they are cast, x never
    is, and their gradients come back in their dtype. Under autocast x, weight and bias take autocast's dtype, as in
    ``torch.nn.functional.linear``; as there, the copy of a weight in that dtype is kept for x's gradient (a weight that has it
    already is kept by reference). Differentiable once.

    Returns:
        y (..., N) in x's dtype.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype that cannot be used.
        ValueError: shapes, devices or values that do not fit; the message names both.
    """
    _check(x, weight, u, sigma, v, bias, core)
    if type(scale) is float:
        scale = _host_scale(scale)
    else:
        scale = _scale_tensor(scale, x)
    gate_values, index = (None, None) if gate is None and group is None else _gate(x, u.shape[1], gate, group)
    threshold = 0
    if dropout_p != 0.0:
        threshold, rng_state = _dropout(x, dropout_p, rng_state)
    else:
        rng_state = None
    if autocast_is_on(x.device):
        x, weight, bias = _autocast(x, weight, bias)
        with without_autocast(x.device):  # the dtypes are decided, once
            return _call(backend, index, rng_state, threshold, x, weight, u, sigma, v, bias, scale, core, gate_values)
    return _call(backend, index, rng_state, threshold, x, weight, u, sigma, v, bias, scale, core, gate_values)


def _call(
    name: str | None,
    index: Tensor | None,
    rng_state: Tensor | None,
    threshold: int,
    x: Tensor,
    weight: Tensor | None,
    u: Tensor,
    sigma: Tensor | None,
    v: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    core: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    """The call with or without a graph, through the operators where a compiler or a transform looks on."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        y, _ = OperatorFunction.apply(
            name or "", index, rng_state, threshold, x, weight, u, sigma, v, bias, scale, core, gate
        )
        return y
    if torch.is_grad_enabled() and (
        x.requires_grad
        or u.requires_grad
        or v.requires_grad
        or (sigma is not None and sigma.requires_grad)
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (core is not None and core.requires_grad)
        or (gate is not None and gate.requires_grad)
        or scale.requires_grad
    ):
        backend = choose_path(x, v, name, threshold)
        return SVDLinearFunction.apply(
            backend, index, rng_state, threshold, x, weight, u, sigma, v, bias, scale, core, gate
        )
    # a forward-mode derivative passes through PyTorch's operators, not through ours
    backend = choose_path(x, v, name if forward_ad._current_level < 0 else "eager", threshold)
    y, _ = backend.forward(x, weight, u, sigma, v, bias, scale, core, gate, index, rng_state, threshold)
    return y


def _autocast(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if x.dtype == torch.float64:  # PyTorch's own linear leaves float64 alone, too
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return (
        x.to(dtype),
        None if weight is None else weight.to(dtype),
        None if bias is None else bias.to(dtype),
    )


def _check(
    x: Tensor,
    weight: Tensor | None,
    u: Tensor,
    sigma: Tensor | None,
    v: Tensor,
    bias: Tensor | None,
    core: Tensor | None,
) -> None:
    for name, tensor in (("x", x), ("u", u), ("v", v)):
        _check_tensor(name, tensor, x)
    for name, optional in (("weight", weight), ("sigma", sigma), ("bias", bias), ("core", core)):
        if optional is not None:
            _check_tensor(name, optional, x)
    shape = x.shape
    if u.dim() != 2 or v.dim() != 2:
        raise ValueError(f"u and v must be matrices (K, r) and (N, r), got u {_of(u)} and v {_of(v)}")
    width, rank = u.shape
    out, v_rank = v.shape
    if not shape or shape[-1] != width:
        if weight is not None and weight.dim() == 2 and shape and shape[-1] == weight.shape[1]:
            raise ValueError(f"u has {width} rows, expected K={shape[-1]} (weight is {_of(weight)})")
        raise ValueError(f"x is {tuple(shape)}, expected (..., K={width}) (u is {_of(u)})")
    if v_rank != rank:
        raise ValueError(f"v has rank {v_rank}, expected r={rank} (u is {_of(u)}, v is {_of(v)})")
    if weight is not None:
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ValueError(f"weight is {_of(weight)}, expected (N, K={width}) (u is {_of(u)})")
        if weight.shape[0] != out:
            raise ValueError(f"v has {out} rows, expected N={weight.shape[0]} (weight is {_of(weight)})")
    if sigma is not None:
        if core is not None:
            raise ValueError("sigma and core exclude each other: give one of them")
        if sigma.dim() != 1 or sigma.shape[0] != rank:
            raise ValueError(f"sigma is {_of(sigma)}, expected (r={rank},)")
    elif core is not None and core.shape != (rank, rank):
        raise ValueError(f"core is {_of(core)}, expected (r={rank}, r={rank})")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != out):
        raise ValueError(f"bias is {_of(bias)}, expected (N={out},)")


def _check_tensor(name: str, tensor: Any, x: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a tensor")
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} is {tensor.dtype}, expected float32, bfloat16, float16 or float64")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, expected x's device {x.device}")


_FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


_MOST_SCALES = 256
_scales: dict[float, Tensor] = {}


def _host_scale(value: float) -> Tensor:
    """A scale that is a number, on the host: remembered, for making one costs more than the checks. Nobody writes to it."""
    # there a tensor is not what it seems
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return torch.tensor(value, dtype=torch.float32, device="cpu")
    found = _scales.get(value)
    if found is None:
        if len(_scales) >= _MOST_SCALES:
            _scales.clear()
        with torch.inference_mode(False):  # what is made in it cannot be saved for a backward
            found = _scales[value] = torch.tensor(value, dtype=torch.float32, device="cpu")
    return found


def _scale_tensor(scale: Any, x: Tensor) -> Tensor:
    if not isinstance(scale, Tensor):
        if not isinstance(scale, (int, float)):
            raise TypeError(f"scale is {scale!r}, expected a float or a 0-d tensor")
        return _host_scale(float(scale))
    if scale.dim() != 0:
        raise ValueError(f"scale is {_of(scale)}, expected a float or a 0-d tensor")
    if scale.device.type != "cpu" and scale.device != x.device:
        raise ValueError(f"scale is on {scale.device}, expected the CPU or x's device {x.device}")
    return scale if scale.dtype == torch.float32 else scale.to(torch.float32)


def _gate(x: Tensor, rank: int, gate: Gate | None, group: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gate and its index in the backends' 2-D form (``svdkern.backends.formula.gate_rows``)."""
    lead = x.shape[:-1]
    if gate is None:
        raise ValueError(f"group is {_of(group)} but gate is None: group selects rows of a gate table")
    if isinstance(gate, tuple):
        index, value = gate
        _check_tensor("gate", value, x)
        if group is not None:
            raise ValueError("group belongs to a gate table (G, r); gate is a pair (index, value)")
        if index.shape != value.shape or index.shape[:-1] != lead or index.dim() != x.dim():
            raise ValueError(
                f"gate index is {_of(index)} and value {_of(value)}, expected both {tuple(lead)} + (k,) (x is {_of(x)})"
            )
        index = _in_range(index, rank, "gate index", "r").reshape(-1, index.shape[-1])
        return value.reshape(-1, value.shape[-1]), index
    _check_tensor("gate", gate, x)
    if gate.dim() != 2 or gate.shape[1] != rank:
        raise ValueError(f"gate is {_of(gate)}, expected (G, r={rank})")
    if group is None:
        if gate.shape[0] != 1:
            raise ValueError(f"gate has {gate.shape[0]} rows but group is None: expected a group for every row of x")
        return gate, None
    if group.shape != lead:
        raise ValueError(f"group is {_of(group)}, expected {tuple(lead)} (x is {_of(x)})")
    return gate, _in_range(group, gate.shape[0], "group", "G").reshape(-1)


def _in_range(index: Tensor, stop: int, name: str, limit: str) -> Tensor:
    if index.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{name} is {index.dtype}, expected an integer dtype")
    if index.device.type == "meta":
        return index.to(torch.int64)
    readable = (index.device.type == "cpu" or strict()) and not torch.compiler.is_compiling()
    if readable and index.numel() and not torch._C._are_functorch_transforms_active():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= stop:
            raise ValueError(f"{name} has values from {low} to {high}, expected 0 <= {name} < {limit}={stop}")
    return index.to(torch.int64)


def _dropout(x: Tensor, p: float, rng_state: Tensor | None) -> tuple[int, Tensor | None]:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p is {p}, expected 0 <= dropout_p <= 1")
    threshold = threshold_of(p)
    if threshold == 0:
        return 0, None
    if rng_state is None:
        return threshold, torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=x.device)
    if rng_state.shape != (2,) or rng_state.dtype != torch.int64 or rng_state.device != x.device:
        raise ValueError(
            f"rng_state is {rng_state.dtype} {_of(rng_state)} on {rng_state.device}, expected int64 (2,) on {x.device}"
        )
    return threshold, rng_state


def _of(tensor: Tensor | None) -> str:
    return "None" if tensor is None else str(tuple(tensor.shape))
