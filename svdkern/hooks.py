"""``Hooks``: what a method does around the steps of a training loop.

Layer: above ``model``. The methods' own part is in ``svdkern/methods/``; here it is called with their layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from svdkern.methods import Method
from svdkern.model import adapted_layers
from svdkern.nn import SVDLinear


class Hooks:
    """Calls every method's hooks with its layers; does nothing where a method has none.

    ::

        hooks = svdkern.Hooks(model, optimizer)
        for batch in batches:
            (loss(model, batch) + svdkern.regularization(model)).backward()
            hooks.on_backward_end()   # after clipping, if there is any
            optimizer.step()
            hooks.on_step_end()
            optimizer.zero_grad()
        hooks.on_round_end()          # where the method has rounds or tasks

    ``svdkern.integrations.transformers.MethodCallback`` does this in a ``transformers.Trainer``.

    Args:
        model: with adapted layers; looked through anew at every call.
        optimizer: whose state some methods reset and whose weight decay SoMA anneals; None leaves it alone.

    Raises:
        ValueError: the model has no adapted layer.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model, self.optimizer = model, optimizer
        self.step = 0
        """Optimizer steps made in this round (since the start, where there are no rounds); ``state_dict`` has it."""
        if not self._groups():
            raise ValueError(f"this {type(model).__name__} has no adapted layer: call svdkern.adapt first")

    def on_backward_end(self) -> None:
        """To be called when the gradients are final: after the backward and any clipping, before the optimizer."""
        for config, layers in self._groups().items():
            config.on_backward_end(layers, self.step)

    @torch.no_grad()
    def on_step_end(self) -> None:
        """To be called after ``optimizer.step()``."""
        self.step += 1
        for config, layers in self._groups().items():
            config.on_step_end(layers, self.step, self.optimizer)

    @torch.no_grad()
    def on_round_end(self) -> None:
        """To be called after a round or a task, for methods that have them (FedSVD, SST, CoDyRA, OSF)."""
        for config, layers in self._groups().items():
            config.on_round_end(layers, self.optimizer)
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """The number of steps."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self.step = int(state["step"])

    def _groups(self) -> dict[Method, list[SVDLinear]]:
        groups: dict[Method, list[SVDLinear]] = {}
        for _, layer in adapted_layers(self.model):
            if not layer.merged:
                groups.setdefault(layer.config, []).append(layer)
        return groups
