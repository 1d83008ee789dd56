"""``MethodCallback``: the hooks and the penalty of the methods within a ``transformers.Trainer``."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from svdkern.hooks import Hooks
from svdkern.model import regularization


class MethodCallback(TrainerCallback):
    """``Trainer(model, args, callbacks=[MethodCallback(model)])`` trains any method as its paper does.

    The penalty's gradient is added at the steps of the optimizer, after clipping (so that it is not clipped), once a step
    whatever the gradient accumulation; that is where SORSA's authors add it. The logged loss does not contain it.

    Rounds and tasks are the caller's: ``callback.hooks.on_round_end()``.

    Args:
        model: with adapted layers.
        penalty: whether to add it; False where the loss has ``svdkern.regularization(model)`` already.

    Raises (when training begins):
        ValueError: float16 gradient scaling with ``max_grad_norm=0``: the Trainer unscales gradients only where it clips them.
    """

    def __init__(self, model: nn.Module, *, penalty: bool = True) -> None:
        self.hooks, self.penalty = Hooks(model), penalty

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if args.fp16 and not args.max_grad_norm:
            raise ValueError(
                f"fp16 is on and max_grad_norm is {args.max_grad_norm}: the Trainer unscales gradients only where it clips them, "
                "so that hooks and penalty would meet scaled ones. Expected max_grad_norm > 0, or bf16"
            )
        self.hooks.optimizer, self.hooks.step = optimizer, state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.penalty and (penalty := regularization(self.hooks.model)).requires_grad:
            penalty.backward()
        self.hooks.on_backward_end()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if not getattr(optimizer, "step_was_skipped", False):  # by a GradScaler: accelerate's optimizer knows
            self.hooks.on_step_end()
