"""What methods take of data before training: covariances of activations, gradients and Fisher information of weights.

Batches stream through the model once; what is kept is one accumulator a layer, never an activation. The model runs in the mode
that it is in (call ``model.eval()`` first where dropout should be off), and is left as it was.

Layer: above ``targets``, below ``model``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from svdkern.linalg.precision import full_precision
from svdkern.targets import ALL_LINEAR, Patterns, Target, find_targets

Forward = Callable[[nn.Module, Any], Any]
Statistic = Literal["covariance", "gradient", "importance"]
_TINY = 1e-5


def activation_covariance(
    model: nn.Module,
    batches: Iterable[Any],
    target_modules: Patterns = ALL_LINEAR,
    *,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """CorDA's covariance of every layer's input: ``C = mean over calls of X^T X``, X (rows, K) divided by its max |x|.

    Not centred, and not divided by the number of rows. Padding counts as data.

    Args:
        model: any module; runs without gradients.
        batches: what ``forward`` takes, one after the other.
        target_modules, forward, progress: as in ``svdkern.adapt``.

    Returns:
        (K, K) float32 on the layer's device, by module path.

    Raises:
        ValueError: no batch; a layer that no batch reaches; activations with a NaN or an infinity (the message names layer and
            batch).
    """
    return _covariances(model, find_targets(model, target_modules), batches, forward, progress)


def weight_gradient(
    model: nn.Module,
    batches: Iterable[Any],
    target_modules: Patterns = ALL_LINEAR,
    *,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """The sum over batches of the loss's gradient in every layer's weight, (N, K) float32, by module path (LoRA-SB).

    ``forward(model, batch)`` returns the loss or an output with ``.loss``. Gradients that parameters hold are not touched.
    Raises as ``activation_covariance``, and TypeError where there is no loss.
    """
    return _gradients(model, find_targets(model, target_modules), batches, forward, progress, power=1)


def fisher(
    model: nn.Module,
    batches: Iterable[Any],
    target_modules: Patterns = ALL_LINEAR,
    *,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """Empirical Fisher information ``sum_b t_b grad_b^2 / sum_b t_b`` of every layer's weight, (N, K) float32, by module path.

    t_b is the number of labels that are not -100 where a batch is a mapping with "labels", else the length of its first tensor.
    The gradient is that of a batch's loss: batches of one sample come nearest to the definition. Raises as ``weight_gradient``.
    """
    return _gradients(model, find_targets(model, target_modules), batches, forward, progress, power=2)


def calibrated(
    model: nn.Module,
    targets: list[Target],
    needs: str | None,
    data: Any,
    forward: Forward | None,
    passes: int,
    progress: bool | None,
) -> Iterator[tuple[list[Target], dict[str, Tensor]]]:
    """(targets, their statistics by name), in ``passes`` parts; all targets and no statistics where a method needs none."""
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise ValueError(f"data_passes is {passes!r}, expected an integer >= 1")
    if needs is None:
        if data is not None:
            raise ValueError("data is given, but the method starts without any: leave it out")
        yield list(targets), {}
        return
    if data is None:
        raise ValueError(f"the method starts from data (the {needs} of each layer): give data=batches")
    sources = _sources(needs, data)
    if passes > 1 and any(iter(source) is source for source in sources):
        raise ValueError(f"data_passes is {passes}, but data can be read once: give a list or a data loader")
    size = -(-len(targets) // passes)
    for first in range(0, len(targets), size):
        part = targets[first : first + size]
        yield part, _statistics(model, part, needs, sources, forward, progress)


def _sources(needs: str, data: Any) -> list[Iterable[Any]]:
    if needs == "importance":
        if not isinstance(data, Mapping) or set(data) != {"forget", "retain"}:
            raise ValueError('data is expected to be {"forget": batches, "retain": batches} for this method')
        return [data["forget"], data["retain"]]
    if isinstance(data, str | Mapping | Tensor) or not isinstance(data, Iterable):
        raise TypeError(f"data is a {type(data).__name__}, expected an iterable of batches")
    return [data]


def _statistics(
    model: nn.Module,
    targets: list[Target],
    needs: str,
    sources: list[Iterable[Any]],
    forward: Forward | None,
    progress: bool | None,
) -> dict[str, Tensor]:
    if needs == "covariance":
        return _covariances(model, targets, sources[0], forward, progress)
    if needs == "gradient":
        return _gradients(model, targets, sources[0], forward, progress, power=1)
    forget = _gradients(model, targets, sources[0], forward, progress, power=2)
    retain = _gradients(model, targets, sources[1], forward, progress, power=2)
    return {name: (forget.pop(name) / (_TINY + retain.pop(name))).sum(1) for name in list(forget)}


def _covariances(
    model: nn.Module, targets: list[Target], batches: Iterable[Any], forward: Forward | None, progress: bool | None
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    batch_number = 0

    def add(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs["input"]
        x = given.detach().reshape(-1, given.shape[-1]).float()
        if not x.numel():
            return
        low, high = x.aminmax()
        largest = torch.maximum(-low, high)
        if not bool(largest.isfinite()):
            raise ValueError(f"{name}: the activations of batch {batch_number} have a NaN or an infinity")
        if bool(largest > 0):
            x = x / largest
        with full_precision(x.device):  # the user's forward may run under autocast
            product = x.t() @ x
        sums[name] = product if name not in sums else sums[name].add_(product)
        counts[name] = counts.get(name, 0) + 1

    with ExitStack() as stack:
        for target in targets:
            handle = target.module.register_forward_pre_hook(partial(add, target.name), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(torch.no_grad())
        for batch_number, batch in enumerate(_shown(batches, "activations", progress)):  # noqa: B007  the hook reads it
            _run(model, batch, forward)
    _check_reached(targets, sums)
    return {name: sums[name].div_(counts[name]) for name in sums}


def _gradients(
    model: nn.Module,
    targets: list[Target],
    batches: Iterable[Any],
    forward: Forward | None,
    progress: bool | None,
    power: int,
) -> dict[str, Tensor]:
    weights = {target.name: _weight(target) for target in targets}
    owners: dict[int, str] = {}  # of layers that share a weight, the first one's sum is that of all
    for name, parameter in weights.items():
        owners.setdefault(id(parameter), name)
    sums: dict[str, Tensor] = {}
    weight_of_batch, total = 1.0, 0.0

    def take(name: str, parameter: Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        term = grad.float() if power == 1 else grad.float().square().mul_(weight_of_batch)
        sums[name] = term.clone() if name not in sums else sums[name].add_(term)

    with ExitStack() as stack:
        stack.enter_context(_only_trainable(model, weights.values()))
        for name in owners.values():
            handle = weights[name].register_post_accumulate_grad_hook(partial(take, name))
            stack.callback(handle.remove)
        stack.enter_context(torch.enable_grad())
        for number, batch in enumerate(_shown(batches, "gradients", progress)):
            weight_of_batch = float(_tokens(batch)) if power == 2 else 1.0
            total += weight_of_batch
            loss = _loss(_run(model, batch, forward))
            if not bool(loss.isfinite()):
                raise ValueError(f"the loss of batch {number} is {loss.item()}, expected a finite number")
            loss.backward()
    shared = {name: owners[id(parameter)] for name, parameter in weights.items()}
    _check_reached(targets, [name for name, owner in shared.items() if owner in sums])
    for name, value in sums.items():
        if power == 2:
            value.div_(total)
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name}: the gradients have a NaN or an infinity")
    return {name: sums[owner] for name, owner in shared.items()}


def _weight(target: Target) -> nn.Parameter:
    weight = target.module.weight
    if not isinstance(weight, nn.Parameter):
        raise TypeError(f"{target.name}: weight is a {type(weight).__name__}, expected a parameter")
    return weight


@contextmanager
def _only_trainable(model: nn.Module, wanted: Iterable[nn.Parameter]) -> Iterator[None]:
    """Nothing but ``wanted`` requires a gradient; what was there before is put back."""
    chosen = {id(parameter): parameter for parameter in wanted}
    parameters = {id(parameter): parameter for parameter in model.parameters()} | chosen
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters.values()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in chosen)
            parameter.grad = None
        yield
    finally:
        for parameter, requires_grad, grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def _shown(batches: Iterable[Any], what: str, progress: bool | None) -> Iterable[Any]:
    quiet = not sys.stderr.isatty() if progress is None else not progress
    return tqdm(batches, desc=what, unit="batch", disable=quiet, delay=1.0 if progress is None else 0.0)


def _run(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _loss(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("loss")
    if not isinstance(found, Tensor) or found.numel() != 1:
        what = (
            f"a tensor of shape {tuple(found.shape)}"
            if isinstance(found, Tensor)
            else f"a {type(output).__name__} without a loss"
        )
        raise TypeError(
            f"the forward gives {what}, expected a scalar loss: give labels, or forward=lambda model, batch: loss"
        )
    return found.reshape(())


def _tokens(batch: Any) -> int:
    if isinstance(batch, Mapping):
        if isinstance(batch.get("labels"), Tensor):
            return int((batch["labels"] != -100).sum())
        batch = list(batch.values())
    parts = batch if isinstance(batch, tuple | list) else [batch]
    return next((len(part) for part in parts if isinstance(part, Tensor) and part.dim()), 1)


def _check_reached(targets: list[Target], reached: Container[str]) -> None:
    missing = [target.name for target in targets if target.name not in reached]
    if missing:
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(f"data reach no {some}: is it empty, or are these layers not part of the forward?")
