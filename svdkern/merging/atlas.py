"""aTLAS: a model as the pretrained one plus task vectors, each block of which has a coefficient that trains.

    y = x (W + sum_t c_t delta_t^T) + b          delta_t = V_t U_t^T of rank r_t, c = 0 at first
      = x W + ((x [U_1 ... U_T]) * [c_1 ... c_1, c_2 ...]) [V_1 ... V_T]^T + b          trains c: T numbers a layer

One call with a sigma that is constant on each task's columns: its gradient is the sum of sigma's over them, and nothing of width K
is saved. Task vectors of full weights, as the authors have them, have no such form.

Zhang, Albert, Rodriguez-Opazo, van den Hengel, Abbasnejad: "Knowledge Composition using Task Vectors with Learned Anisotropic
Scaling", NeurIPS 2024, arXiv 2407.02880.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from svdkern.functional import svd_linear
from svdkern.linalg.merged import effective_weight
from svdkern.nn import SVDLinear
from svdkern.targets import find_targets


@torch.no_grad()
def task_factors(layer: SVDLinear) -> tuple[Tensor, Tensor]:
    """u (K, r) and v (N, r) of the task vector of an adapted layer: ``v @ u.T`` is its weight minus the pretrained one.

    Where the method has cut something out of the weight, the cut is part of the task vector and r is the sum of both ranks.

    Raises:
        RuntimeError: the method's branch depends on the input.
        ValueError: the method has no residual, so that there is no weight to which it adds.
    """
    if not layer.config.merges:
        raise RuntimeError(f"{layer.method}'s branch depends on the input: it is no task vector")
    if not layer.config.has_residual:
        raise ValueError(f"{layer.method} adds to no weight: it is no task vector")
    u, sigma, core, v, _ = layer.config.product(layer)
    wide = torch.promote_types(u.dtype, torch.float32)
    left = v.to(wide) * layer.scale
    if core is not None:
        left = left @ core.to(wide).t()
    elif sigma is not None:
        left = left * sigma.to(wide)
    us, vs, cut = [u.to(wide)], [left], layer.initial
    if cut is not None:
        us.append(cut.u.to(wide))
        vs.append(-cut.scale * (cut.v.to(wide) if cut.sigma is None else cut.v.to(wide) * cut.sigma.to(wide)))
    return torch.cat(us, dim=1), torch.cat(vs, dim=1)


class ATLASLinear(nn.Module):
    """A linear layer plus task vectors with coefficients: ``y = x W^T + sum_t c_t (x U_t) V_t^T + b``.

    Parameters: ``coefficients`` (T,) float32, 0 at first, the only ones that train; ``weight`` and ``bias``, the linear's own,
    frozen. Buffers: ``u`` (K, R), ``v`` (N, R), ``blocks`` (T, R), 1 where a column is a task's.

    Args:
        linear: the pretrained layer.
        tasks: the same layer, adapted and trained for each task.

    Raises:
        ValueError: no task, or one of another shape.
        RuntimeError: as ``task_factors``.
    """

    u: Tensor
    v: Tensor
    blocks: Tensor

    def __init__(self, linear: nn.Linear, tasks: Sequence[SVDLinear]) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("there is no task, expected at least one")
        shape = (linear.in_features, linear.out_features)
        for task in tasks:
            if (task.in_features, task.out_features) != shape:
                other = (task.in_features, task.out_features)
                raise ValueError(f"a task's layer has (in_features, out_features) {other}, expected {shape}")
        found = [task_factors(task) for task in tasks]
        device = linear.weight.device
        owner = torch.cat([torch.full((u.shape[1],), i) for i, (u, _) in enumerate(found)])
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.coefficients = nn.Parameter(torch.zeros(len(tasks), device=device))
        self.register_buffer("u", torch.cat([u for u, _ in found], dim=1).to(device))
        self.register_buffer("v", torch.cat([v for _, v in found], dim=1).to(device))
        self.register_buffer("blocks", (owner == torch.arange(len(tasks)).unsqueeze(1)).float().to(device))

    def sigma(self) -> Tensor:
        """(R,): each task's coefficient on its columns."""
        # a sum, not an index: its gradient is one, too, in a fixed order on every device
        return (self.coefficients.unsqueeze(1) * self.blocks).sum(0)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> y (..., N)."""
        return svd_linear(x, self.weight, self.u, self.sigma(), self.v, self.bias)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear layer with the sum as its weight."""
        made = nn.Linear(self.u.shape[0], self.v.shape[0], self.bias is not None, device="meta")
        scale = torch.ones((), device=self.u.device)
        weight = effective_weight(self.weight, self.u, self.sigma(), self.v, scale, None, self.weight.dtype)
        made.weight = nn.Parameter(weight)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().clone())
        return made


def combine(model: nn.Module, tasks: Sequence[nn.Module]) -> dict[str, ATLASLinear]:
    """Put an ``ATLASLinear`` in place of every layer that is adapted in the tasks' models, and freeze all but coefficients.

    Args:
        model: the pretrained model; changed in place.
        tasks: the same model, adapted (``svdkern.adapt`` or ``load_adapter``) and trained for each task.

    Returns:
        The new layers by module path. Their coefficients start at 0, so that the model computes what it did.

    Raises:
        ValueError: no task, or tasks in which other layers are adapted.
        TypeError: what is adapted in the tasks is no ``nn.Linear`` in the model.
    """
    adapted = [{n: m for n, m in task.named_modules() if isinstance(m, SVDLinear)} for task in tasks]
    if not adapted or not adapted[0]:
        raise ValueError("there is no task with an adapted layer, expected at least one")
    names = list(adapted[0])
    for i, layers in enumerate(adapted):
        if layers.keys() != adapted[0].keys():
            different = sorted(layers.keys() ^ adapted[0].keys())
            raise ValueError(f"task {i} and task 0 differ in what is adapted: {', '.join(different[:3])}")
    made, targets = {}, find_targets(model, "|".join(map(re.escape, names)))
    for target in targets:
        if not isinstance(target.module, nn.Linear):
            raise TypeError(f"{target.name} is a {type(target.module).__name__}, expected nn.Linear")
        made[target.name] = ATLASLinear(target.module, [layers[target.name] for layers in adapted])
    model.requires_grad_(False)
    for target in targets:
        target.put(made[target.name])
    return made
