"""Whole models: ``adapt``, ``merge``, ``unmerge``, ``regularization``.

Layer: above ``nn`` and ``methods``; the only place, with ``checkpoint``, that walks a model and replaces modules.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from svdkern.calibration import calibrated
from svdkern.frozen import use_kernels
from svdkern.initialisation import check_linear, initial_start, rehearse, scale_of
from svdkern.methods import Method, method_named
from svdkern.methods.method import sharing
from svdkern.nn import SVDLinear
from svdkern.parallel import is_small, layer_by_layer
from svdkern.report import AdaptReport, report_on
from svdkern.targets import ALL_LINEAR, Patterns, Target, find_targets

log = logging.getLogger("svdkern")
Layer = TypeVar("Layer")

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


@contextmanager
def _training_tensors() -> Iterator[None]:
    """Out of ``torch.inference_mode``, whose tensors could never train. It holds in one thread, and layers are made in several."""
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        yield


@dataclass(frozen=True)
class MergeReport:
    """How many layers are merged now, and the memory that their kept residuals take."""

    layers: int
    kept_bytes: int


@_training_tensors()
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
    data: Any = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    data_passes: int = 1,
    frozen_linears: bool = False,
    progress: bool | None = None,
) -> AdaptReport:
    """Replace linear layers of ``model`` by ``SVDLinear`` and freeze everything but their factors.

    An error or an interrupt leaves the model as it was, to the bit: all layers are checked, then all factors are
    computed (this is what takes time) and, as a rehearsal, all residuals; then all layers are put in place, and put
    back if anything fails. Signals that arrive from there on take effect at the end.

    Called under ``torch.inference_mode``, it leaves that mode for its own time: the factors are to train.

    One moment is left for methods that change the residual (PiSSA, SORSA). This takes the memory of about one weight
    beyond the model and the factors, so the residuals of the rehearsal are not kept: each is computed again, and its
    layer then lets go of the weight (whoever else holds it keeps it; it is never written to). A weight that is gone
    cannot be had back, because its residual is rounded. If memory for a residual runs out in that moment, which the
    rehearsal makes unlikely, the layers that are finished stay adapted (the log counts them), all else is as it was,
    and another call adapts the rest.

    Args:
        model: any module; changed in place. A linear layer that is used in several places stays shared.
        method: a name (docs/methods.md has the list), or a configuration, such as ``svdkern.methods.SORSA(gamma=1e-3)``.
        rank: r of every layer; None takes the published rank of the method.
        target_modules: "all-linear" (every ``nn.Linear`` but the output embedding), a list of module names or their
            last parts, or a regular expression for whole module paths. Every entry must match something.
        alpha: the scale is s = alpha / rank; None means s = 1.
        dropout_p: dropout on the adapter branches' input while training.
        adapter_dtype: dtype of the factors; float32 masters under a bfloat16 model are fast here.
        exclude_modules: names or a regular expression, read alike, of modules to leave alone.
        data: batches, for methods that start from data (docs/methods.md says which, and what they take of it). A batch is what
            ``forward`` takes; for "fila" a mapping with batches under "forget" and "retain".
        forward: ``forward(model, batch)`` returns the loss, or an output that has one (None: ``model(**batch)`` for a mapping,
            ``model(*batch)`` for a tuple or list, else ``model(batch)``). A method that needs no loss runs it for its activations.
        data_passes: the statistics of that part of the layers are in memory at a time, for which data is read once; more than
            one needs data that can be read again.
        frozen_linears: let every plain ``nn.Linear`` that is not adapted (the output embedding, say) run on our kernels, too,
            where they are faster. It becomes a ``svdkern.Linear`` with the same parameters: a subclass, so
            ``type(module) is nn.Linear`` no longer holds. On CPUs without bfloat16 this is what makes a whole bfloat16
            model usable.
        progress: a progress bar on stderr; None shows one on a terminal when it takes longer than a second.

    Returns:
        The report: layers, trainable and total parameters; ``print`` it.

    Raises:
        ValueError: an entry matches nothing; a rank out of range; a weight with NaN or infinity; an unknown method; data that
            are missing, or have a NaN.
        TypeError: a named module is no ``nn.Linear``, is adapted already, or has a weight that cannot be adapted.
            The message names the layer; the model is unchanged.
    """
    config = method_named(method)
    targets = find_targets(model, target_modules, exclude_modules)
    for target in targets:
        if isinstance(target.module, SVDLinear):
            raise TypeError(f"{target.name} is adapted already ({target.module.method}, rank {target.module.rank})")
        with _naming(target):
            r = _rank(target, rank, config)
            check_linear(target.module, r, config, scale_of(alpha, r, config), dropout_p, adapter_dtype)
    prepared: list[Replacement] = []
    with sharing():
        for part, statistics in calibrated(model, targets, config.needs, data, forward, data_passes, progress):
            prepared += layer_by_layer(
                lambda target, s=statistics: _prepare(  # type: ignore[misc]
                    target, _rank(target, rank, config), config, alpha, dropout_p, adapter_dtype, s.get(target.name)
                ),
                part,
                partial(_beside_others, config),
                lambda calls: with_progress(calls, f"{config.name} factors", progress),
            )
            statistics.clear()
            part.clear()  # it would keep every old weight alive
    made = {id(item.layer) for item in prepared}
    del targets, target  # they would keep every old weight alive
    with signals_held_back():
        replace(model, prepared)
        if frozen_linears:
            use_kernels(model)
    return report_on(model, {name: layer for name, layer in adapted_layers(model) if id(layer) in made})


@dataclass(frozen=True)
class Replacement:
    """A layer, made by ``SVDLinear.before_cut``, that is to take the place of a target."""

    target: Target
    layer: SVDLinear
    hashes: tuple[bytes, bytes] | None
    """SHA-256 of weight and residual."""
    residual_dtype: torch.dtype | None = None

    @property
    def order(self) -> tuple[bool, int]:
        """Those that take memory of their own are last in it, the largest at the end."""
        residual = self.layer.residual
        size = 0 if residual is None else residual.numel() * residual.element_size()
        return self.layer.config.changes_residual, size


def _rank(target: Target, rank: int | None, config: Method) -> int:
    if rank is not None or not isinstance(target.module, nn.Linear):
        return config.published_rank if rank is None else rank
    return config.default_rank(target.module.in_features, target.module.out_features)


def _beside_others(config: Method, target: Target) -> bool:
    """Whether the layer may be prepared while others are: on the CPU, small, without random numbers (whose order counts)."""
    weight = target.module.weight
    assert isinstance(weight, Tensor)
    return weight.device.type == "cpu" and not config.draws and is_small(weight.shape)


def _prepare(
    target: Target,
    rank: int,
    config: Method,
    alpha: float | None,
    dropout_p: float,
    adapter_dtype: torch.dtype,
    statistic: Tensor | None,
) -> Replacement:
    linear = target.module
    assert isinstance(linear, nn.Linear)
    scale = scale_of(alpha, rank, config)
    with _naming(target):
        start = initial_start(linear, rank, config, scale, adapter_dtype, statistic)
        hashes = rehearse(linear, config, start.cut)
    return Replacement(target, SVDLinear.before_cut(linear, config, start, scale, dropout_p), hashes)


def replace(model: nn.Module, prepared: list[Replacement]) -> None:
    """Put every layer in all places of its target, freeze everything but the factors, then cut out the residuals.

    Empties ``prepared`` and lets go of the old layers as it cuts, the largest weight first: every later residual fits
    into memory that an earlier weight has left. What an error cannot undo: see ``adapt``.
    """
    frozen: list[nn.Parameter] = []
    prepared.sort(key=lambda item: item.order)
    count = len(prepared)
    try:
        _put_in_place(prepared)
        _freeze(model, frozen)
        while prepared and prepared[-1].layer.config.changes_residual:
            prepared[-1].layer.cut_out(prepared[-1].residual_dtype, prepared[-1].hashes)
            prepared.pop()  # here the weight goes
    except BaseException:
        for item in prepared:
            item.target.put(item.target.module)
        for parameter in frozen:
            parameter.requires_grad_(True)
        if len(prepared) < count:
            done = count - len(prepared)
            log.error("failed while cutting out residuals: %d of %d layers are adapted and stay so", done, count)
        raise
    prepared.clear()


def _put_in_place(prepared: list[Replacement]) -> None:
    for item in prepared:
        for hooks in _HOOKS:
            item.layer.__dict__[hooks] = item.target.module.__dict__[hooks]
        item.target.put(item.layer)


def _freeze(model: nn.Module, frozen: list[nn.Parameter]) -> None:
    """Freeze all parameters but the factors of adapted layers; ``frozen`` gets those that were not frozen before."""
    trained = {id(p) for _, layer in adapted_layers(model) for p in layer.adapter().values()}
    for parameter in model.parameters():
        if id(parameter) not in trained and parameter.requires_grad:
            frozen.append(parameter)
            parameter.requires_grad_(False)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, SVDLinear]]:
    """(name, layer) of every adapted layer; a shared one comes once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SVDLinear))


def merge(model: nn.Module, keep: bool = True) -> MergeReport:
    """Merge every adapted layer (``SVDLinear.merge``): the model runs as a plain one, in the same modules.

    An error leaves the model as it was; with ``keep=False``, where there is nothing to go back to, the layers that are
    merged by then stay merged.

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

    SORSA: ``(gamma / learning_rate) * mean of ||F^T F - I||_F`` over all factors u and v. KaSA and SALT have one, too
    (docs/methods.md); methods without a penalty give 0.

    Raises:
        RuntimeError: a layer whose method has one is merged: its factors do not take part in the model's output.
    """
    groups: dict[Method, list[SVDLinear]] = {}
    for name, layer in adapted_layers(model):
        if layer.merged and layer.config.has_penalty:
            raise RuntimeError(f"{name or 'the layer'} is merged: unmerge the model to train it")
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


@contextmanager
def _naming(target: Target) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{target.name}: {error}") from error


def with_progress(layers: Iterable[Layer], what: str, progress: bool | None) -> Iterable[Layer]:
    quiet = not sys.stderr.isatty() if progress is None else not progress
    return tqdm(layers, desc=what, unit="layer", disable=quiet, delay=1.0 if progress is None else 0.0)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Signals with a handler in Python (Ctrl-C, an alarm), which may raise anywhere, take effect at the end.

    Only the main thread runs such handlers, and only it may set them.
    """
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: h for number in signal.valid_signals() if callable(h := signal.getsignal(number))}
    held: list[int] = []
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: held.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        with ExitStack() as each:  # the next one also where one raises
            for number in dict.fromkeys(held):
                each.callback(signal.raise_signal, number)
