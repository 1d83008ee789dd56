"""What tracers and transforms need to know of the private operators: their shapes (fake kernels) and their vmap rule.

Only needed where a call meets the C++ operators directly: fake tensors outside ``torch.compile``, batched gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def one_call_an_example(op: Callable[..., Any]) -> Callable[..., Any]:
    """A vmap rule: right for every mix of batched and shared arguments."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        results = []
        for example in range(info.batch_size):
            picked = [
                arg.select(dim, example) if isinstance(arg, Tensor) and dim is not None else arg
                for arg, dim in zip(args, in_dims, strict=True)
            ]
            results.append(op(*picked))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
        return (stacked, [0] * len(stacked)) if isinstance(results[0], list) else (tuple(stacked), (0,) * len(stacked))

    return rule


def _forward(x, weight, u, sigma, v, bias, scale, core, gate, rng_state, threshold):
    h = x.new_empty(math.prod(x.shape[:-1]), u.shape[1], dtype=torch.float32)
    return x.new_empty(*x.shape[:-1], v.shape[0]), h


def _backward(dy, x, weight, u, sigma, v, scale, core, gate, h, rng_state, threshold, mask):
    dx, dbias = dy.new_empty(*dy.shape[:-1], u.shape[0]), dy.new_empty(v.shape[0])
    dgate = None if gate is None else gate.new_empty(math.prod(dy.shape[:-1]), gate.shape[1])
    outputs = (dx, u, sigma, v, dbias, scale, core, dgate)
    return [torch.empty_like(output) for bit, output in enumerate(outputs) if mask >> bit & 1]


def _shrink(a, f, rng_state, threshold):
    return a.new_empty(a.shape[0], f.shape[1], dtype=torch.float32)


def _outer(a, q, f, rng_state, threshold):
    return torch.empty_like(f)


def _dropout(x, rng_state, threshold, row0):
    return x.new_empty(x.shape)


def _linear(a, w, z, f, bias, rng_state, threshold):
    return a.new_empty(a.shape[0], f.shape[0])


def register() -> None:
    """Tell PyTorch; called once, where the extension is loaded."""
    for fake in (_forward, _backward, _shrink, _outer, _dropout, _linear):
        name = f"_cpu{fake.__name__}"
        torch.library.register_fake(f"svdkern::{name}", fake)
        op = getattr(torch.ops.svdkern, name).default
        torch.library.register_vmap(op, one_call_an_example(op))


def is_watched(*tensors: Tensor | None) -> bool:
    """Whether one is a tensor that need not have memory (a fake one) or means something else by it, or a mode records which
    operators run (make_fx): PyTorch's operators are what these understand, a kernel launched past them is not."""
    other = any(t is not None and type(t) is not Tensor and type(t) is not Parameter for t in tensors)
    return other or torch._C._len_torch_dispatch_stack() > 0
