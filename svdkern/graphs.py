"""What a model needs before a CUDA graph captures it: its kernels compiled.

Layer: above ``nn``, beside ``model``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from svdkern.autocast import autocast_is_on
from svdkern.backends import dispatch
from svdkern.backends.formula import Backend
from svdkern.backends.philox import threshold_of
from svdkern.functional import svd_linear
from svdkern.nn import SVDLinear


def warmup(model: nn.Module, rows: Iterable[int], *, dtype: torch.dtype | None = None) -> int:
    """Compile and load every Triton kernel that the model's ``SVDLinear`` layers and their penalties will launch.

    A kernel that has yet to be compiled cannot be captured in a CUDA graph. Each layer is run on zeros as it would be in the
    model: forward and, unless under ``torch.no_grad()``, backward, for an x that wants a gradient and for one that does not
    (as the first layer's). The mode (train or eval) and autocast are those of the moment. Nothing of the model is changed: no
    hook runs, no gradient is kept, no random number is drawn. An x whose rows are not contiguous, or do not begin at
    multiples of 16 bytes, has kernels of its own: run such a step once instead.

    Example::

        svdkern.warmup(model, rows=[batch * length])
        with torch.cuda.graph(graph):
            model(x)

    Args:
        model: a module; its layers are on their device already.
        rows: rows of x that calls will have (batch x sequence length), each number of them.
        dtype: of x; None: each layer's own weight's, which is right where activations have it.

    Returns:
        How many layers times numbers of rows were run: 0 on a CPU, and wherever a backend serves them that has nothing to
        compile or to load ("triton" and "cuda" have).

    Raises:
        RuntimeError: a CUDA graph is being captured.
        ValueError: a number of rows is not positive.
    """
    counts = sorted(set(rows))
    if counts and counts[0] < 1:
        raise ValueError(f"rows are {counts}, expected positive numbers")
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("warmup is called while a CUDA graph is being captured: call it before the capture")
    count, devices = 0, set()
    for layer in model.modules():
        if not isinstance(layer, SVDLinear) or layer.merged:
            continue
        base = layer.base_dtype if layer.residual is None else layer.residual.dtype
        device = layer.u.device
        if device.type == "meta":
            continue
        before = count
        for m in counts:
            x = torch.zeros(m, layer.in_features, dtype=dtype or base, device=device)
            if _backend(layer, x).name in ("triton", "cuda"):
                _run(layer, x)
                count += 1
        if count == before:
            continue
        with torch.no_grad():
            layer.config.penalty([layer])  # its Gram matrix has a kernel of its own
        if device.type == "cuda":
            devices.add(device)
    for device in devices:
        torch.cuda.synchronize(device)
    return count


def _backend(layer: SVDLinear, x: Tensor) -> Backend:
    """What ``svd_linear`` will take for this layer."""
    if autocast_is_on(x.device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    threshold = threshold_of(layer.dropout_p if layer.training else 0.0)
    with torch.no_grad():
        return dispatch.choose_path(x, layer.config.product(layer).v, "", threshold)


def _run(layer: SVDLinear, x: Tensor) -> None:
    """One forward, and one backward for each x that there may be."""

    def leaf(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad)

    made = layer.config.product(layer)
    residual, u, sigma, v, bias, core = map(leaf, (layer.residual, made.u, made.sigma, made.v, layer.bias, made.core))
    gate, group = layer.config.gate(layer, x)
    assert u is not None and v is not None
    rng_state = torch.zeros(2, dtype=torch.int64, device=x.device)
    for wants_x in (True, False) if torch.is_grad_enabled() else (False,):
        x = x.detach().requires_grad_(wants_x)
        y = svd_linear(
            x, residual, u, sigma, v, bias, scale=layer.scale, core=core, gate=gate, group=group,
            dropout_p=layer.dropout_p if layer.training else 0.0, rng_state=rng_state,
        )  # fmt: skip
        leaves = [t for t in (x, residual, u, sigma, v, bias, core) if t is not None and t.requires_grad]
        if y.requires_grad:
            torch.autograd.grad(y, leaves, torch.zeros_like(y))
