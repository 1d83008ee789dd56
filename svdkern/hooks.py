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
    """Calls every method's hooks with its layers; does nothing where a method has none, nor to a layer of which nothing trains.

    ::

        hooks = svdkern.Hooks(model, optimizer)
        for batch in batches:
            (loss(model, batch) + svdkern.regularization(model)).backward()
            hooks.on_backward_end()   # after clipping, if there is any
            optimizer.step()
            hooks.on_step_end()
            optimizer.zero_grad()
        hooks.on_round_end()          # where the method has rounds or tasks

    ``svdkern.integrations.transformers.MethodCallback`` does this in a ``transformers.Trainer``. Where several processes train
    replicas of the model, each makes these calls.

    Args:
        model: with adapted layers; looked through anew at every call.
        optimizer: whose state some methods reset and whose weight decay SoMA anneals; None leaves it alone.

    Raises:
        ValueError: the model has no adapted layer.
        RuntimeError, by every call: a layer that trains is merged.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model, self.optimizer = model, optimizer
        self.step = 0
        """Optimizer steps made in this round (since the start, where there are no rounds); ``state_dict`` has it."""
        self.earlier = 0
        """Those of earlier rounds."""
        if next(adapted_layers(model), None) is None:
            raise ValueError(f"this {type(model).__name__} has no adapted layer: call svdkern.adapt first")
        self._groups()

    def on_backward_end(self) -> None:
        """To be called when the gradients are final: after the backward and any clipping, before the optimizer."""
        for config, layers in self._groups().items():
            config.on_backward_end(layers, self._step(config))

    @torch.no_grad()
    def on_step_end(self) -> None:
        """To be called after ``optimizer.step()``, and not after one that a ``torch.amp.GradScaler`` skipped.

        It skipped it if ``scaler.get_scale()`` is smaller after ``scaler.update()`` than before.
        """
        groups = self._groups()
        self.step += 1
        for config, layers in groups.items():
            config.on_step_end(layers, self._step(config), self.optimizer)

    @torch.no_grad()
    def on_round_end(self) -> None:
        """To be called after a round, a task or a stage of methods that have them: FedSVD, SST, CoDyRA, OSF, KIND, DiffoRA.

        Others go on as if it were not called.
        """
        for config, layers in self._groups().items():
            config.on_round_end(layers, self.optimizer)
        self.step, self.earlier = 0, self.earlier + self.step

    def state_dict(self) -> dict[str, Any]:
        """The numbers of steps."""
        return {"step": self.step, "earlier": self.earlier}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self.step, self.earlier = int(state["step"]), int(state["earlier"])

    def _step(self, config: Method) -> int:
        return self.step if config.has_rounds else self.earlier + self.step

    def _groups(self) -> dict[Method, list[SVDLinear]]:
        groups: dict[Method, list[SVDLinear]] = {}
        for name, layer in adapted_layers(self.model):
            if not any(getattr(layer, factor).requires_grad for factor in layer.config.trains):
                continue
            if layer.merged:
                raise RuntimeError(f"{name or 'the layer'} is merged: unmerge the model to train it")
            groups.setdefault(layer.config, []).append(layer)
        return groups
