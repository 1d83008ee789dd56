"""Whole models: ``adapt``, ``merge``, ``unmerge``, ``regularization``.

Layer: above ``nn`` and ``methods``; the only place, with ``checkpoint``, that walks a model and replaces modules.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from svdkern.initialisation import check_linear, initial_factors, scale_of
from svdkern.methods import Factors, Method, method_named
from svdkern.nn import SVDLinear
from svdkern.report import AdaptReport, report_on
from svdkern.targets import ALL_LINEAR, Patterns, Target, find_targets

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


@dataclass(frozen=True)
class MergeReport:
    """How many layers are merged now, and the memory that their kept residuals take."""

    layers: int
    kept_bytes: int


def adapt(
    model: nn.Module,
    method: str | Method = "pissa",
    rank: int | None = 16,
    target_modules: Patterns = ALL_LINEAR,
    *,
    alpha: float | None = None,
    dropout_p: float = 0.0,
    adapter_dtype: torch.dtype = torch.float32,
    exclude_modules: Patterns | None = None,
    progress: bool | None = None,
) -> AdaptReport:
    """Replace linear layers of ``model`` by ``SVDLinear`` and freeze everything but their factors.

    All layers are checked first, then all factors are computed (this is what takes time), and only then are layers
    replaced: an error or an interrupt before that leaves the model as it was. An interrupt while layers are being
    replaced is held back until all are. Beyond the model and the factors this takes the memory of about one weight: a
    replaced layer lets go of its weight (whoever else holds it keeps it; it is never written to).

    Args:
        model: any module; changed in place. A linear layer that is used in several places stays shared.
        method: "lora", "pissa", "sorsa", or a configuration, such as ``svdkern.methods.SORSA(gamma=1e-3)``.
        rank: r of every layer; None takes the published rank of the method.
        target_modules: "all-linear" (every ``nn.Linear`` but the output embedding), a list of module names or their
            last parts, or a regular expression for whole module paths. Every entry must match something.
        alpha: the scale is s = alpha / rank; None means s = 1.
        dropout_p: dropout on the adapter branches' input while training.
        adapter_dtype: dtype of the factors; float32 masters under a bfloat16 model are fast here.
        exclude_modules: names or a regular expression, read alike, of modules to leave alone.
        progress: a progress bar on stderr; None shows one on a terminal when it takes longer than a second.

    Returns:
        The report: layers, trainable and total parameters; ``print`` it.

    Raises:
        ValueError: an entry matches nothing; a rank out of range; a weight with NaN or infinity; an unknown method.
        TypeError: a named module is no ``nn.Linear``, is adapted already, or has a weight that cannot be adapted.
            The message names the layer; the model is unchanged.
    """
    config = method_named(method)
    rank = config.published_rank if rank is None else rank
    targets = find_targets(model, target_modules, exclude_modules)
    for target in targets:
        if isinstance(target.module, SVDLinear):
            raise TypeError(f"{target.name} is adapted already ({target.module.method}, rank {target.module.rank})")
        with _naming(target):
            check_linear(target.module, rank, config, scale_of(alpha, rank), dropout_p, adapter_dtype)
    scale = scale_of(alpha, rank)
    prepared: list[tuple[Target, Factors]] = []
    for target in with_progress(targets, f"{config.name} factors", progress):
        assert isinstance(target.module, nn.Linear)
        with _naming(target):
            prepared.append((target, initial_factors(target.module, rank, config, scale, adapter_dtype)))

    def replacement(target: Target, factors: Factors) -> SVDLinear:
        assert isinstance(target.module, nn.Linear)
        return SVDLinear.from_factors(target.module, config, factors, scale, dropout_p)

    del targets, target  # they would keep every old weight alive
    with interrupts_held_back():
        layers = replace(prepared, replacement)
        freeze(model)
    order = {name: position for position, (name, _) in enumerate(adapted_layers(model))}
    return report_on(model, dict(sorted(layers.items(), key=lambda item: order[item[0]])))


def replace(prepared: list[tuple[Target, Any]], replacement: Any) -> dict[str, SVDLinear]:
    """Put ``replacement(target, value)`` in every place of each target; empties ``prepared`` and lets go of the old
    layers.

    The largest weights come first: every later one fits into memory that an earlier one has left. Old layers whose
        weight is still in use cost nothing to keep, so they are put back if something fails in spite of that.
    """
    layers: dict[str, SVDLinear] = {}
    undo: list[tuple[nn.Module, str, nn.Module]] = []
    prepared.sort(key=lambda item: _weight_bytes(item[0]))
    try:
        while prepared:
            target, value = prepared.pop()
            old = target.module
            layer = replacement(target, value)
            for hooks in _HOOKS:
                layer.__dict__[hooks] = old.__dict__[hooks]
            shared = _storage(layer.residual) == _storage(old.weight)
            for parent, attribute in target.places:
                setattr(parent, attribute, layer)
                if shared:
                    undo.append((parent, attribute, old))
            layers[target.name] = layer
            del target, old
    except BaseException:
        for parent, attribute, old in reversed(undo):
            setattr(parent, attribute, old)
        raise
    return layers


def freeze(model: nn.Module) -> None:
    """Freeze all parameters but the factors of adapted layers."""
    factors = {id(p) for _, layer in adapted_layers(model) for p in (layer.u, layer.sigma, layer.core, layer.v)}
    for parameter in model.parameters():
        if id(parameter) not in factors:
            parameter.requires_grad_(False)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, SVDLinear]]:
    """(name, layer) of every adapted layer; a shared one comes once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SVDLinear))


def merge(model: nn.Module, keep: bool = True) -> MergeReport:
    """Merge every adapted layer (``SVDLinear.merge``): the model runs as a plain one, in the same modules.

    Raises:
        ValueError: the model has no adapted layer.
    """
    layers = _layers_or_raise(model)
    fresh = [layer for layer in layers if not layer.merged]
    try:
        for layer in fresh:
            layer.merge(keep)
    except BaseException:
        for layer in fresh:
            if layer.merged and layer.kept is not None:
                layer.unmerge()
        raise
    kept = [layer.kept for layer in layers if layer.kept is not None]
    return MergeReport(len(layers), sum(tensor.numel() * tensor.element_size() for tensor in kept))


def unmerge(model: nn.Module) -> None:
    """Unmerge every adapted layer, to the exact bits.

    Raises:
        ValueError: the model has no adapted layer.
        RuntimeError: a layer was merged with ``keep=False``; then none is unmerged.
    """
    layers = _layers_or_raise(model)
    for layer in layers:
        layer.unmerged_residual  # noqa: B018  raises where the kept copy is gone
    for layer in layers:
        layer.unmerge()


def regularization(model: nn.Module) -> Tensor:
    """The penalty of the model's methods, a scalar to add to the loss: ``(loss +
    svdkern.regularization(model)).backward()``.

    SORSA: ``(gamma / learning_rate) * mean of ||F^T F - I||_F`` over all factors u and v. Methods without a penalty
        give 0.
    """
    groups: dict[Method, list[SVDLinear]] = {}
    for _, layer in adapted_layers(model):
        groups.setdefault(layer.config, []).append(layer)
    penalties = [penalty for config, layers in groups.items() if (penalty := config.penalty(layers)) is not None]
    if not penalties:
        first = next(model.parameters(), None)
        return torch.zeros((), device=None if first is None else first.device)
    return torch.stack([penalty.to(penalties[0].device) for penalty in penalties]).sum()


def _layers_or_raise(model: nn.Module) -> list[SVDLinear]:
    layers = [layer for _, layer in adapted_layers(model)]
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no adapted layer: call svdkern.adapt or load_adapter first")
    return layers


def _weight_bytes(target: Target) -> int:
    weight = target.module.weight
    assert isinstance(weight, Tensor)
    return weight.numel() * weight.element_size()


def _storage(tensor: Any) -> Any:
    return None if tensor.is_meta else tensor.untyped_storage().data_ptr()


@contextmanager
def _naming(target: Target) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{target.name}: {error}") from error


def with_progress(targets: list[Target], what: str, progress: bool | None) -> Iterable[Target]:
    quiet = not sys.stderr.isatty() if progress is None else not progress
    return tqdm(targets, desc=what, unit="layer", disable=quiet, delay=1.0 if progress is None else 0.0)


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Ctrl-C inside takes effect at the end. Only the main thread gets interrupts, and only it may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    if signal.getsignal(signal.SIGINT) is None:  # a handler that Python did not install could not be put back
        yield
        return
    previous = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:
            signal.raise_signal(signal.SIGINT)
