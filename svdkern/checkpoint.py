"""``save_adapter`` and ``load_adapter``: a trained adapter as a directory of two files.

``adapter.safetensors``   the factors ``<module path>.{u,sigma,core,v}`` and the method's other tensors; for methods that
                          change the residual also what was cut out of the weight, ``{u0,sigma0,v0}``; each in its own
                          dtype, and what is one tensor in memory once
``adapter_config.json``   format_version; for each layer its method, rank, scale, shape, dtypes, and the SHA-256 of the
                          weight that it belongs to; which modules and tensors are one and the same; the SHA-256 of
                          the tensor file

Base weights are not in it. Loading computes ``W_res = W - initial product`` again, to the same bits
(``exact_residual``).
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from svdkern.adapter_file import (
    CONFIG,
    FORMAT_VERSION,
    INITIAL,
    TENSORS,
    AdapterFile,
    Row,
    dtype_name,
    key_of,
    read_adapter,
)
from svdkern.directory import replace_directory
from svdkern.fingerprint import sha256, sha256_together
from svdkern.frozen import use_kernels
from svdkern.initialisation import check_linear
from svdkern.methods import Cut, Factors, Start
from svdkern.methods.method import sharing
from svdkern.model import Replacement, adapted_layers, replace, signals_held_back, with_progress
from svdkern.nn import SVDLinear
from svdkern.report import AdaptReport, report_on
from svdkern.targets import Target


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapter of ``model`` to the directory ``path``, which is replaced as one.

    A process that is killed at any moment leaves the old adapter or the new one, whole. A merged model is saved in its
    unmerged form. Parameters outside the factors are not saved; those that require grad are named in a warning.

    Args:
        model: with adapted layers; a ``torch.compile``d or DataParallel wrapper is looked through.
        path: a new or empty directory, or one with an earlier adapter and nothing else.

    Raises:
        ValueError: no adapted layer; path holds other files; a layer is on the meta device, or its residual is no
            longer what its initial factors and its original weight give, so that a load could not rebuild it.
        RuntimeError: a layer was merged with ``keep=False``.
        OSError: the files cannot be written; what was at path is untouched.
    """
    model = unwrapped(model)
    layers = dict(adapted_layers(model))
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no adapted layer to save")
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
    tied_tensors: dict[str, str] = {}
    rows = {}
    with sharing():  # a derived tensor that layers share is made once to be compared
        for name, layer in layers.items():
            rows[name] = row_of(name, layer)
    for name, layer in layers.items():
        for attribute, tensor in saved_tensors(layer).items():
            first, _ = seen.setdefault(identity(tensor), (key_of(name, attribute), tensor))
            if first != key_of(name, attribute):
                tied_tensors[key_of(name, attribute)] = first
            else:  # a copy of its own: no storage behind a view, no strides
                tensors[first] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    _warn_of_unsaved(model, layers)
    data = safetensors.torch.save(tensors)
    config = config_text(rows, _tied_modules(model, layers), tied_tensors, hashlib.sha256(data).hexdigest())

    def build(folder: Path) -> None:
        (folder / TENSORS).write_bytes(data)
        (folder / CONFIG).write_text(config, encoding="utf-8")

    replace_directory(Path(path), build, (TENSORS, CONFIG))


def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, frozen_linears: bool = False, progress: bool | None = None
) -> AdaptReport:
    """Put a saved adapter on a fresh base model, or its factors into a model that is adapted in the same way already.

    Everything is verified before anything is changed: the files against each other, every key, shape and dtype, the
    SHA-256 of every base weight, and of every rebuilt residual. No decomposition is run, no random number drawn; the
    residuals get the bits that they had when the adapter was saved.

    Args:
        model: the model that the adapter was made on, unadapted, in the dtype that it was adapted in (cast it
            afterwards); or adapted with the same method and ranks from the same initial factors.
        path: directory written by ``save_adapter``.
        frozen_linears, progress: as in ``svdkern.adapt``.

    Returns:
        The report, as ``adapt`` gives it. On a fresh model everything but the factors is frozen, as ``adapt`` does.

    Raises:
        ValueError: the files are broken, or do not belong to this model; the message names the path. The model is
            unchanged.
        RuntimeError: a layer to refresh is merged.
    """
    file = read_adapter(Path(path))
    model = unwrapped(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in [*file.rows, *file.tied_modules]:
        if name not in modules:
            raise ValueError(f"{path}: the model has no module {name!r}")
    adapted = [name for name in file.rows if isinstance(modules[name], SVDLinear)]
    others = [name for name, _ in adapted_layers(model) if name not in file.rows] if adapted else []
    if others:
        raise ValueError(f"{path}: the model has adapted layers that the file has not: {', '.join(others[:3])}")
    targets = _targets(file, modules, adapted)
    for target in with_progress(targets, "verifying the adapter", progress):
        row = file.rows[target.name]
        try:
            _verify_base(target, row, modules, file)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {target.name}: {error}") from error
    for name in adapted:
        layer = modules[name]
        assert isinstance(layer, SVDLinear)
        try:
            _verify_adapted(layer, file, name)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from error

    with sharing():
        prepared = [_replacement(target, file) for target in targets]
    _tie_factors({item.target.name: item.layer for item in prepared}, file)
    refreshed = {name: layer for name in adapted if isinstance(layer := modules[name], SVDLinear)}
    if prepared:
        del modules, targets, target  # they would keep every old weight alive
    with signals_held_back():
        if prepared:
            replace(model, prepared)
        for name, layer in refreshed.items():
            _refresh(layer, file, name)
        if frozen_linears:
            use_kernels(model)
    return report_on(
        model, {name: layer for name, layer in adapted_layers(model) if name in file.rows or name in file.tied_modules}
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's model behind torch.compile and (Distributed)DataParallel."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def saved_tensors(layer: SVDLinear) -> dict[str, Tensor]:
    """What is saved of a layer, by attribute."""
    cut = {name: tensor for name in INITIAL if (tensor := getattr(layer, name)) is not None}
    return {name: tensor for name, tensor in layer.adapter().items() if name not in layer.config.derived} | cut


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors if they are one in memory."""
    if not tensor.numel():
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def config_text(
    rows: dict[str, dict[str, Any]], tied_modules: dict[str, str], tied_tensors: dict[str, str], tensors_sha256: str
) -> str:
    """The contents of ``adapter_config.json``."""
    config = {
        "format_version": FORMAT_VERSION,
        "svdkern_version": version(),
        "layers": rows,
        "tied_modules": tied_modules,
        "tied_tensors": tied_tensors,
        "tensors_sha256": tensors_sha256,
    }
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def row_of(name: str, layer: SVDLinear) -> dict[str, Any]:
    """What ``adapter_config.json`` says of a layer (ValueError: it could not be rebuilt from that)."""
    residual = layer.unmerged_residual
    if layer.u.is_meta or (residual is not None and residual.is_meta):
        raise ValueError(f"{name} is on the meta device: there is nothing to save")
    fingerprint = "" if residual is None else sha256(residual).hex()
    residual_dtype = layer.base_dtype if residual is None else residual.dtype
    base, initial = fingerprint, layer.initial
    if layer.fingerprint is not None:
        base, expected, cut = (bytes(row).hex() for row in layer.fingerprint.tolist())
        if fingerprint != expected:
            raise ValueError(
                f"{name}: the residual ({dtype_name(residual_dtype)}) is not the one that was computed from the "
                f"original weight ({dtype_name(layer.base_dtype)}), nor that one cast once: it was written to, or cast "
                "more than once. An adapter file could not bring it back; save the model's state_dict instead"
            )
        if sha256_together((layer.u0, layer.sigma0, layer.v0)).hex() != cut:
            raise ValueError(
                f"{name}: u0, sigma0 and v0 are not what was cut out of the original weight (a factor that {layer.method} freezes "
                "is its own initial value, and changes it when it is trained or loaded alone). An adapter file could not bring the "
                "residual back; save the model's state_dict instead"
            )
    for attribute, made in layer.config.derive(
        layer.in_features, layer.out_features, layer.rank, layer.u.dtype, layer.u.device
    ).items():
        if not torch.equal(made, getattr(layer, attribute)):
            raise ValueError(
                f"{name}: {attribute} is not what {layer.config} makes, so that a load could not bring it back; save the whole "
                "model instead"
            )
    dtypes = saved_tensors(layer) | {attribute: getattr(layer, attribute) for attribute in layer.config.derived}
    return {
        "method": layer.method,
        "method_config": asdict(layer.config),
        "rank": layer.rank,
        "scale": float(layer.scale),
        "initial_scale": initial.scale if initial else None,
        "dropout_p": layer.dropout_p,
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "base_dtype": dtype_name(layer.base_dtype if layer.fingerprint is not None else residual_dtype),
        "residual_dtype": dtype_name(residual_dtype),
        "base_sha256": base,
        "residual_sha256": fingerprint,
        "dtypes": {attribute: dtype_name(tensor.dtype) for attribute, tensor in dtypes.items()},
    }


def _tied_modules(model: nn.Module, layers: dict[str, SVDLinear]) -> dict[str, str]:
    first = {id(layer): name for name, layer in layers.items()}
    return {
        name: first[id(module)]
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in first and name != first[id(module)]
    }


def _warn_of_unsaved(model: nn.Module, layers: dict[str, SVDLinear]) -> None:
    saved = {id(tensor) for layer in layers.values() for tensor in layer.adapter().values()}
    unsaved = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in saved]
    if unsaved:
        shown = ", ".join(unsaved[:3]) + (f" and {len(unsaved) - 3} more" if len(unsaved) > 3 else "")
        warnings.warn(
            f"save_adapter saves factors only; these parameters train and are not saved: {shown}", stacklevel=3
        )


def version() -> str:
    """Of the installed package."""
    try:
        return metadata.version("svdkern")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


def _targets(file: AdapterFile, modules: dict[str, nn.Module], adapted: list[str]) -> list[Target]:
    """The modules to replace: one target a layer of the file, with every place that is to hold that layer."""
    names: dict[str, list[str]] = {name: [name] for name in file.rows if name not in adapted}
    for alias, name in file.tied_modules.items():
        if name in names:
            names[name].append(alias)
    owner: dict[int, str] = {}
    for name, group in names.items():
        for member in group:
            other = owner.setdefault(id(modules[member]), name)
            if other != name:
                raise ValueError(
                    f"{file.path}: the model uses one module as {other} and {name}, which the file adapts separately"
                )
    targets = {name: Target(modules[name], group) for name, group in names.items()}
    for place, module in modules.items():
        owned_by = owner.get(id(module))
        if owned_by is None:
            continue
        if not place:
            raise ValueError(
                f"{file.path}: the model itself is a {type(module).__name__}, which cannot be replaced in place"
            )
        parent, _, attribute = place.rpartition(".")
        targets[owned_by].places.append((modules[parent], attribute))
    return list(targets.values())


def _verify_base(target: Target, row: Row, modules: dict[str, nn.Module], file: AdapterFile) -> None:
    for module in {id(modules[name]): modules[name] for name in target.names}.values():
        check_linear(module, max(1, row.rank), row.method, row.scale, row.dropout_p, torch.float32)
        assert isinstance(module, nn.Linear)
        if (module.in_features, module.out_features) != (row.in_features, row.out_features):
            has, wants = (module.in_features, module.out_features), (row.in_features, row.out_features)
            raise ValueError(f"(in_features, out_features) is {has}, the adapter was made for {wants}")
        weight = module.weight.detach()
        if weight.is_meta:
            raise ValueError("the weight is on the meta device: load the model's weights first")
        if not row.method.has_residual:
            continue
        if weight.dtype != row.base_dtype:
            has_dtype, wants_dtype = dtype_name(weight.dtype), dtype_name(row.base_dtype)
            raise ValueError(
                f"the weight is {has_dtype}, the adapter was made on {wants_dtype}: load the model in that, "
                "cast it afterwards"
            )
        if (found := sha256(weight).hex()) != row.base_sha256:
            raise ValueError(
                "the weight is not the one the adapter was made on "
                f"(SHA-256 {found[:12]}…, expected {row.base_sha256[:12]}…)"
            )
    cut = _cut(file, target.name, weight.device)
    if cut is None:
        return
    residual = row.method.residual(weight, cut)
    if sha256(residual.to(row.residual_dtype)).hex() != row.residual_sha256:
        raise ValueError("the rebuilt residual differs from the saved one (is torch.set_flush_denormal on?)")


def _replacement(target: Target, file: AdapterFile) -> Replacement:
    linear, row = target.module, file.rows[target.name]
    assert isinstance(linear, nn.Linear)
    device = linear.weight.device
    made = {name: file.tensor(target.name, name, device) for name in row.shapes}
    if row.method.derived:
        dtype = row.dtypes[row.method.derived[0]]
        made.update(row.method.derive(row.in_features, row.out_features, row.rank, dtype, device))
    u, v = made.pop("u"), made.pop("v")
    assert u is not None and v is not None
    sigma, core = made.pop("sigma", None), made.pop("core", None)
    factors = Factors(u, sigma, core, v, {name: tensor for name, tensor in made.items() if tensor is not None})
    start = Start(factors, _cut(file, target.name, device, factors))
    layer = SVDLinear.before_cut(linear, row.method, start, row.scale, row.dropout_p)
    hashes = bytes.fromhex(row.base_sha256), bytes.fromhex(row.residual_sha256)
    return Replacement(target, layer, hashes, row.residual_dtype)


def _cut(file: AdapterFile, name: str, device: torch.device, factors: Factors | None = None) -> Cut | None:
    """What was cut out; a tensor that is one of the factors, too, is that one."""
    row = file.rows[name]
    if row.initial_scale is None:
        return None

    def tensor(attribute: str) -> Tensor | None:
        factor = attribute.removesuffix("0")
        if factors is not None and factor not in row.method.trains and factor in row.dtypes:
            if file.key(name, attribute) == file.key(name, factor):
                return factors.tensors()[factor]
        return file.tensor(name, attribute, device)

    u, sigma, v = (tensor(attribute) for attribute in INITIAL)
    assert u is not None and v is not None
    return Cut(u, sigma, v, row.initial_scale)


def _verify_adapted(layer: SVDLinear, file: AdapterFile, name: str) -> None:
    row = file.rows[name]
    if layer.merged:
        raise RuntimeError(f"{name} is merged: unmerge the model before loading factors into it")
    if layer.config != row.method:
        raise ValueError(f"the layer's method is {layer.config}, the adapter's {row.method}")
    for attribute in row.shapes:
        has, wants = _described(getattr(layer, attribute)), _described(file.tensors.get(file.key(name, attribute)))
        if has != wants:
            raise ValueError(f"{attribute} is {has} in the model and {wants} in the file")
    for attribute in row.method.derived:
        if getattr(layer, attribute).dtype != row.dtypes[attribute]:
            has, wants = dtype_name(getattr(layer, attribute).dtype), dtype_name(row.dtypes[attribute])
            raise ValueError(f"{attribute} is {has} in the model and {wants} in the file")
    if layer.residual is not None and sha256(layer.residual).hex() != row.residual_sha256:
        raise ValueError(
            "the layer's residual is another one (another base, or other initial factors): load onto a fresh base model"
        )


def _described(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"


@torch.no_grad()
def _refresh(layer: SVDLinear, file: AdapterFile, name: str) -> None:
    for attribute in file.rows[name].shapes:
        tensor = getattr(layer, attribute)
        tensor.copy_(file.tensors[file.key(name, attribute)])
    layer.scale = file.rows[name].scale  # type: ignore[assignment]
    layer.dropout_p = file.rows[name].dropout_p


def _tie_factors(layers: dict[str, SVDLinear], file: AdapterFile) -> None:
    for alias, first in file.tied_tensors.items():
        (name, _, attribute), (first_name, _, first_attribute) = alias.rpartition("."), first.rpartition(".")
        tied = name in layers and first_name in layers and name != first_name
        if tied and attribute in file.rows[name].shapes and first_attribute in file.rows[first_name].shapes:
            setattr(layers[name], attribute, getattr(layers[first_name], first_attribute))
