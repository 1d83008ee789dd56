"""Reading an adapter directory: the two files, checked against each other. Knows nothing of models.

``key`` is how a tensor is called in the file: the module path as it is, a dot, the attribute. Paths are never
rewritten, so no layer's own name can be mistaken for something else.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from svdkern.methods import METHODS, Method

FORMAT_VERSION = 1
TENSORS = "adapter.safetensors"
CONFIG = "adapter_config.json"
INITIAL = ("u0", "sigma0", "v0")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_INTEGERS = {"int64": torch.int64}


@dataclass(frozen=True)
class Row:
    """What the configuration says of one layer."""

    method: Method
    rank: int
    scale: float
    initial_scale: float | None
    """The scale the initial factors were cut out with; None where the residual is the weight."""
    dropout_p: float
    in_features: int
    out_features: int
    base_dtype: torch.dtype
    residual_dtype: torch.dtype
    base_sha256: str
    residual_sha256: str
    """Both are empty where the method has no residual: such an adapter belongs to no weight."""
    dtypes: dict[str, torch.dtype]
    """Dtype of every tensor that the layer has, by attribute."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the method that is saved, by attribute; -1 where it may be anything."""
        shapes = self.method.shapes(self.in_features, self.out_features, self.rank)
        return {name: shape for name, shape in shapes.items() if name not in self.method.derived}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter, read and consistent in itself."""

    path: Path
    rows: dict[str, Row]
    tied_modules: dict[str, str]
    """Module path -> path of the layer that it is."""
    tied_tensors: dict[str, str]
    """Key -> key of the tensor that it is."""
    tensors: dict[str, Tensor]

    def key(self, name: str, attribute: str) -> str:
        """The key under which the tensor is stored (that of the first one, if it is tied)."""
        key = key_of(name, attribute)
        return self.tied_tensors.get(key, key)

    def tensor(self, name: str, attribute: str, device: torch.device) -> Tensor | None:
        """A tensor of a layer, or None if the layer has none; a copy of its own."""
        found = self.tensors.get(self.key(name, attribute))
        return None if found is None else found.to(device, copy=True)


def key_of(name: str, attribute: str) -> str:
    """The key of a layer's tensor."""
    return f"{name}.{attribute}" if name else attribute


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def read_adapter(path: Path) -> AdapterFile:
    """Read the directory that ``save_adapter`` wrote.

    Raises:
        ValueError: it is missing, incomplete, damaged or inconsistent; the message starts with the path.
    """
    try:
        config, data = _read_both(path)
        rows = {name: _row(name, row) for name, row in _typed(config, "layers", dict, CONFIG).items()}
        tied_modules = _ties(config, "tied_modules", set(rows))
        tied_tensors = _ties(config, "tied_tensors", None)
        tensors = safetensors.torch.load(data)
        file = AdapterFile(path, rows, tied_modules, tied_tensors, tensors)
        _check_tensors(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: {TENSORS} is damaged: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return file


def _read_both(path: Path) -> tuple[dict[str, Any], bytes]:
    """Configuration and tensor file, of the same save: another process may be replacing the directory right now."""
    if path.is_file():
        raise ValueError(f"is a file, expected a directory with {TENSORS} and {CONFIG}")
    if not path.is_dir():
        raise ValueError("there is no such directory")
    for attempt in range(5):
        text = _bytes_of(path / CONFIG)
        try:
            config = json.loads(text)
        except ValueError as error:  # not UTF-8, not JSON
            raise ValueError(f"{CONFIG} is damaged: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} holds a {type(config).__name__}, expected an object")
        if config.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{CONFIG}: format_version is {config.get('format_version')!r}, this svdkern reads {FORMAT_VERSION}"
            )
        data = _bytes_of(path / TENSORS)
        if hashlib.sha256(data).hexdigest() == _typed(config, "tensors_sha256", str, CONFIG):
            return config, data
        if attempt and _bytes_of(path / CONFIG) == text:
            break
    raise ValueError(
        f"{TENSORS} ({len(data)} bytes) is not the file that {CONFIG} describes: its SHA-256 differs "
        "(truncated or damaged)"
    )


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{file.name} is missing") from error
    except IsADirectoryError as error:
        raise ValueError(f"{file.name} is a directory") from error


def _typed(holder: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    if key not in holder:
        raise ValueError(f"{where}: {key} is missing")
    value = holder[key]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{where}: {key} is {value!r}, expected {' or '.join(k.__name__ for k in kinds)}")
    return value


def _row(name: str, row: Any) -> Row:
    where = f"{CONFIG}: layer {name!r}"
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {row!r}, expected an object")
    weight_dtypes = {
        key: _dtype(_typed(row, key, str, where), f"{where}: {key}") for key in ("base_dtype", "residual_dtype")
    }
    dtypes = {
        key: _dtype(value, f"{where}: dtypes[{key!r}]", _DTYPES | _INTEGERS)
        for key, value in _typed(row, "dtypes", dict, where).items()
    }
    method = _method(row, where)
    counts = {key: _typed(row, key, int, where) for key in ("rank", "in_features", "out_features")}
    numbers = {key: float(_typed(row, key, (float, int), where)) for key in ("scale", "dropout_p")}
    initial_scale = _typed(row, "initial_scale", (float, int, type(None)), where)
    hashes = {key: _typed(row, key, str, where) for key in ("base_sha256", "residual_sha256")}
    for key, value in hashes.items() if method.has_residual else ():
        if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
            raise ValueError(f"{where}: {key} is {value!r}, expected 64 hexadecimal digits")
    if min(counts.values()) < 0 or not math.isfinite(numbers["scale"]) or not 0.0 <= numbers["dropout_p"] <= 1.0:
        raise ValueError(f"{where}: {counts | numbers} has a value out of range")
    if (initial_scale is not None) != method.changes_residual:
        raise ValueError(f"{where}: initial_scale is {initial_scale!r}, which does not go with method {method.name!r}")
    initial_scale = None if initial_scale is None else float(initial_scale)
    return Row(
        method=method,
        rank=counts["rank"],
        scale=numbers["scale"],
        initial_scale=initial_scale,
        dropout_p=numbers["dropout_p"],
        in_features=counts["in_features"],
        out_features=counts["out_features"],
        base_dtype=weight_dtypes["base_dtype"],
        residual_dtype=weight_dtypes["residual_dtype"],
        base_sha256=hashes["base_sha256"],
        residual_sha256=hashes["residual_sha256"],
        dtypes=dtypes,
    )


def _dtype(name: Any, where: str, known: dict[str, torch.dtype] = _DTYPES) -> torch.dtype:
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{where} is {name!r}, expected one of {', '.join(known)}")
    return known[name]


def _method(row: dict[str, Any], where: str) -> Method:
    name = _typed(row, "method", str, where)
    if name not in METHODS:
        raise ValueError(f"{where}: method is {name!r}, this svdkern has {', '.join(METHODS)}")
    settings = _typed(row, "method_config", dict, where)
    known = {field.name for field in fields(METHODS[name])}
    if set(settings) != known:
        raise ValueError(f"{where}: method_config has {sorted(settings)}, expected {sorted(known)}")
    try:
        return METHODS[name](**settings)
    except TypeError as error:
        raise ValueError(f"{where}: method_config is {settings}: {error}") from error


def _ties(config: dict[str, Any], key: str, ends: set[str] | None) -> dict[str, str]:
    ties = _typed(config, key, dict, CONFIG)
    for alias, first in ties.items():
        if not isinstance(first, str) or (ends is not None and (first not in ends or alias in ends)):
            raise ValueError(f"{CONFIG}: {key} has {alias!r}: {first!r}, expected names of layers")
    return ties


def _check_tensors(file: AdapterFile) -> None:
    """Every tensor that the configuration lists is there, of its shape and dtype, and no other."""
    expected: set[str] = set()
    for name, row in file.rows.items():
        shapes: dict[str, tuple[int, ...]] = dict(row.shapes)
        if row.method.changes_residual:  # the rank of what was cut out may be another one
            shapes.update(u0=(row.in_features, -1), v0=(row.out_features, -1))
            if "sigma0" in row.dtypes:
                shapes["sigma0"] = (-1,)
        named = {*shapes, *row.method.derived}
        if set(row.dtypes) != named:
            raise ValueError(f"{CONFIG}: dtypes of layer {name!r} has {sorted(row.dtypes)}, expected {sorted(named)}")
        for attribute, shape in shapes.items():
            key = file.key(name, attribute)
            if key not in file.tensors:
                raise ValueError(f"{TENSORS}: {key} is missing")
            tensor = file.tensors[key]
            fits = tensor.dim() == len(shape) and all(
                want in (-1, has) for has, want in zip(tensor.shape, shape, strict=True)
            )
            if not fits or tensor.dtype != row.dtypes[attribute]:
                has, wants = (
                    f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}",
                    f"{dtype_name(row.dtypes[attribute])} {shape}",
                )
                raise ValueError(f"{TENSORS}: {key} is {has}, expected {wants}")
            expected.add(key)
        ranks = {file.tensors[file.key(name, attribute)].shape[-1] for attribute in INITIAL if attribute in row.dtypes}
        if len(ranks) > 1:
            raise ValueError(f"{TENSORS}: the initial factors of {name} have ranks {sorted(ranks)}, expected one")
    unexpected = sorted(set(file.tensors) - expected)
    if unexpected:
        raise ValueError(f"{TENSORS}: unexpected {', '.join(unexpected[:3])}" + (", …" if len(unexpected) > 3 else ""))
