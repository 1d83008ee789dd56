"""``LowRankProjected``: any optimizer of ``torch.optim``, with its state of a matrix in r of its columns' directions.

    S = G Q,  I = the r largest columns of S          G (L, n) with n its short side, Q the DCT's basis
    the optimizer steps with the gradient S_I on P Q_I; what it changes there is added to P along Q_I

Q is fixed, so a matrix keeps r indices and states (L, r). A column that is chosen again keeps its state, one that is new starts
with 0. (The authors rotate the states by ``Q_old^T Q_new``, which for columns of one basis is just that.)

Modoranu, Safaryan, Schultheis, Ryabinin, Chumachenko, Alistarh: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive
Optimization of Large Language Models", arXiv 2505.17967. Not here: error feedback, Trion.

Layer: above ``linalg``; knows no method and no layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from svdkern.linalg.dct import dct_basis, leading_columns


class LowRankProjected(torch.optim.Optimizer):
    """An optimizer whose states of large matrices have r columns instead of n.

    ::

        optimizer = svdkern.LowRankProjected(model.parameters(), torch.optim.AdamW, rank=64, lr=1e-3)

    Matrices whose short side n is larger than rank are projected; other parameters are the inner optimizer's as they are. Learning
    rates and other options may be changed in ``param_groups`` between steps, as schedulers do. States, and the coordinates that the
    inner optimizer sees, are float32 (float64 for float64). One basis (n, n) is held for each n.

    Weight decay acts on the coordinates, that is on the part of the parameter in the directions of the step.

    Args:
        params: parameters or groups of them, as for any optimizer.
        optimizer_class: of ``torch.optim``, or one like it: elementwise in its states.
        rank: r.
        norm: by which columns are chosen, "l1" (the authors' default) or "l2" (the nearest projection).
        options: of optimizer_class.

    Raises:
        ValueError: rank < 1, an unknown norm, or what optimizer_class refuses.
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer_class: Callable[..., torch.optim.Optimizer],
        rank: int,
        norm: Literal["l1", "l2"] = "l1",
        **options: Any,
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank is {rank}, expected >= 1")
        if norm not in ("l1", "l2"):
            raise ValueError(f"norm is {norm!r}, expected 'l1' or 'l2'")
        self.rank, self.norm = rank, norm
        self._bases: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._coordinates: dict[Tensor, torch.nn.Parameter] = {}
        super().__init__(params, options)
        groups = [
            {name: value for name, value in group.items() if name != "params"}
            | {"params": [self._seen(p) for p in group["params"]]}
            for group in self.param_groups
        ]
        self.inner = optimizer_class(groups, **options)
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            for name, value in inner.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimizer."""
        super().add_param_group(param_group)
        if hasattr(self, "inner"):
            group = self.param_groups[-1]
            self.inner.add_param_group(group | {"params": [self._seen(p) for p in group["params"]]})

    def _seen(self, parameter: Tensor) -> Tensor:
        """What the inner optimizer has for a parameter: itself, or a stand-in that holds coordinates during a step."""
        if parameter.dim() != 2 or min(parameter.shape) <= self.rank:
            return parameter
        wide = torch.promote_types(parameter.dtype, torch.float32)
        stand_in = torch.nn.Parameter(torch.empty(0, dtype=wide, device=parameter.device))
        self._coordinates[parameter] = stand_in
        return stand_in

    def _basis(self, n: int, like: Tensor) -> Tensor:
        key = (n, like.dtype, like.device)
        if key not in self._bases:
            self._bases[key] = dct_basis(n, like.dtype, like.device)
        return self._bases[key]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the inner optimizer; ``closure`` computes the loss anew and returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({name: value for name, value in group.items() if name != "params"})
        before = {p: self._enter(p, seen) for p, seen in self._coordinates.items() if p.grad is not None}
        self.inner.step()
        for parameter, start in before.items():
            self._leave(parameter, self._coordinates[parameter], start)
        return loss

    def _enter(self, parameter: Tensor, seen: torch.nn.Parameter) -> Tensor:
        """Give the stand-in its gradient and coordinates; returns a copy of these."""
        assert parameter.grad is not None
        tall, grad = _tall(parameter), _tall(parameter.grad)
        basis = self._basis(tall.shape[1], seen)
        low, index = leading_columns(grad, basis, self.rank, self.norm)
        state = self.state[parameter]
        if (old := state.get("index")) is not None:
            self._carry_over(seen, old, index)
        state["index"] = index
        start = tall.to(seen.dtype) @ basis[:, index]
        seen.data, seen.grad = start.clone(), None
        seen.grad = low.to(seen.dtype)
        return start

    def _carry_over(self, seen: Tensor, old: Tensor, new: Tensor) -> None:
        same = new.unsqueeze(1) == old  # (new, old)
        kept, source = same.any(1), same.to(torch.uint8).argmax(1)
        for name, value in self.inner.state.get(seen, {}).items():
            if isinstance(value, Tensor) and value.dim() == 2:
                self.inner.state[seen][name] = torch.where(kept, value[:, source], 0.0)

    def _leave(self, parameter: Tensor, seen: torch.nn.Parameter, start: Tensor) -> None:
        """Add what the step has changed, and let go of the coordinates."""
        tall = _tall(parameter)
        basis = self._basis(tall.shape[1], seen)
        change = (seen.detach() - start) @ basis[:, self.state[parameter]["index"]].t()
        tall.copy_(tall.to(seen.dtype) + change)
        seen.grad = None
        seen.data = start.new_empty(0)

    def state_dict(self) -> dict[str, Any]:
        """The indices, and under "inner" the inner optimizer's states."""
        return super().state_dict() | {"inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "inner"})
        self.inner.load_state_dict(state_dict["inner"])
        for state in self.state.values():  # an index must not be cast to the parameter's dtype
            state["index"] = state["index"].long()


def _tall(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose, with the short side as columns."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()
