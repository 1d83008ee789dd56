"""A small model for every method, and the data of those that start from data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import svdkern
from svdkern.methods import METHODS, Method, SMoRA
from svdkern.nn import SVDLinear

RATES: dict[str, float] = {"lora-xs": 0.05, "svfit": 0.05}
"""Learning rates of AdamW for the fixed batch, where 0.01 is too slow or too fast for what trains."""


CONFIGURATIONS: dict[str, Method] = {"smora": SMoRA(active=2)}
"""Where the published defaults need a larger layer than these."""


def configured(method: str | Method) -> Method:
    return CONFIGURATIONS.get(method) or METHODS[method]() if isinstance(method, str) else method


class Net(nn.Module):
    """Two layers, one wide and one tall; with targets it returns the loss."""

    def __init__(self, k: int = 12, hidden: int = 20, n: int = 9, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up = nn.Linear(k, hidden, dtype=dtype)
        self.down = nn.Linear(hidden, n, dtype=dtype)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y if target is None else nn.functional.mse_loss(y, target)


def net(seed: int = 0, **sizes: Any) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**sizes)


def batch(seed: int = 1, k: int = 12, n: int = 9, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {"x": torch.randn(2, 8, k, generator=generator), "target": torch.randn(2, 8, n, generator=generator)}
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def data_for(config: Method, dtype: torch.dtype = torch.float32) -> Any:
    """Batches as the method takes them; None where it needs none."""
    if config.needs is None:
        return None
    batches = [batch(seed, dtype=dtype) for seed in (1, 2, 3)]
    return {"forget": batches[:1], "retain": batches[1:]} if config.needs == "importance" else batches


def adapted(method: str | Method, rank: int = 3, seed: int = 0, **arguments: Any) -> Net:
    """A net with this method; the seed is that of weights and of what the method draws."""
    model = net(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = configured(method)
        if config.needs is not None:
            arguments.setdefault("data", data_for(config))
        svdkern.adapt(model, config, rank=rank, **arguments)
    return model


def layer_of(
    method: str | Method, k: int = 12, n: int = 9, rank: int = 3, **arguments: Any
) -> tuple[SVDLinear, Tensor]:
    """(a layer with a bias, the weight it was made of)."""
    with torch.random.fork_rng():
        torch.manual_seed(100 * k + n)
        linear = nn.Linear(k, n)
        return SVDLinear.from_linear(linear, rank, configured(method), **arguments), linear.weight.detach().clone()


def dense(layer: SVDLinear) -> Tensor:
    """The effective weight in float64, from the parameters as the method composes them."""
    u, sigma, core, v, _ = layer.config.product(layer)
    left = v.double() * float(layer.scale)
    if core is not None:
        left = left @ core.double().t()
    elif sigma is not None:
        left = left * sigma.double()
    product = left @ u.double().t()
    return (product if layer.residual is None else layer.residual.double() + product).detach()


def train(
    model: nn.Module, steps: int = 12, rate: float | None = None, data: dict[str, Tensor] | None = None
) -> list[float]:
    """Losses of AdamW on one batch, with penalty and hooks; the last one is after the last step."""
    name = next(m.method for m in model.modules() if isinstance(m, SVDLinear))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate or RATES.get(name, 0.01), weight_decay=0.0)
    hooks = svdkern.Hooks(model, optimizer)
    data = data or batch()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**data)
        (loss + svdkern.regularization(model)).backward()
        hooks.on_backward_end()
        optimizer.step()
        hooks.on_step_end()
        losses.append(loss.item())
    losses.append(model(**data).item())
    return losses


ALL = list(METHODS)


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the state of one step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(**batch()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer
