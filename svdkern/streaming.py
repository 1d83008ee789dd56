"""Adapters for a model that stays on the disk: one weight in memory at a time, or as many small ones as there are threads.

Every layer is made by ``SVDLinear.from_linear``, so the adapter is that of ``adapt`` on the loaded model, bit for bit. Layer: above
``checkpoint``, below the command line.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from svdkern.adapter_file import CONFIG, TENSORS, dtype_name, key_of
from svdkern.checkpoint import config_text, identity, row_of, saved_tensors, version
from svdkern.directory import check_replaceable, replace_directory
from svdkern.initialisation import check_linear, scale_of
from svdkern.methods import Method, method_named
from svdkern.model_files import ModelFiles
from svdkern.nn import SVDLinear
from svdkern.parallel import is_small, layer_by_layer
from svdkern.residual_files import check_residual_folder, write_residual
from svdkern.targets import ALL_LINEAR, Patterns, Target, find_targets
from svdkern.workspace import Workspace, workspace_of

_PIECE = 1 << 24  # bytes read at a time


@dataclass(frozen=True)
class Initialised:
    """What ``init_adapter`` made."""

    layers: int
    resumed: int
    """How many of them an earlier, interrupted run had made."""
    parameters: int
    """Trainable numbers."""
    adapter_bytes: int


def init_adapter(
    model: Path,
    out: Path,
    method: str | Method = "pissa",
    rank: int | None = 16,
    target_modules: Patterns = ALL_LINEAR,
    *,
    exclude_modules: Patterns | None = None,
    alpha: float | None = None,
    dropout_p: float = 0.0,
    adapter_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype | None = None,
    residual: Path | None = None,
    progress: bool | None = None,
) -> Initialised:
    """Write the adapter that ``save_adapter`` would after ``adapt`` on the loaded model, without loading the model.

    An interrupted run leaves ``out`` as it was (once all layers are finished: as the new adapter), finished layers in
    ``<out>.partial`` and finished files of the residual model in ``<residual>.partial``; the same call goes on from there.

    Args:
        model: folder with ``*.safetensors`` files, sharded or not.
        out: the adapter directory, replaced as one (``save_adapter``).
        method: a method that starts from the weights alone, without random numbers or data ("pissa", "sorsa", "milora", …).
        rank, target_modules, exclude_modules, alpha, dropout_p, adapter_dtype: as in ``adapt``. Names are those of the files'
            tensors; "all-linear" is every two-dimensional ``*.weight`` that is no embedding (``ModelFiles.is_linear``).
        dtype: the dtype that the model will be loaded in, if that is not the files'.
        residual: a new directory for the model with residuals in place of the adapted weights, shard by shard.
        progress: a progress bar on stderr; None shows one on a terminal.

    Raises:
        ValueError: the files are missing or damaged, nothing matches, an argument is out of range, a weight has a NaN, ``out``
            or ``residual`` holds something else, or ``<out>.partial`` belongs to other settings.
        TypeError: a layer that cannot be adapted.
        OSError: the disk is full, or not writable.
    """
    config = method_named(method)
    if config.draws or config.needs:
        why = "draws random factors" if config.draws else "starts from data, for which the model has to run"
        raise ValueError(f"{config.name} {why}: load the model and call adapt()")
    # Replacing an empty current directory takes it away: from there on no relative path leads anywhere.
    model, out = Path(os.path.realpath(model)), Path(os.path.realpath(out))
    residual = None if residual is None else Path(os.path.realpath(residual))
    files = ModelFiles.open(model)
    targets = find_targets(files.skeleton(), target_modules, exclude_modules)
    for target in targets:
        linear = target.module  # whatever it is: _check refuses all but linear layers
        r = _rank(config, rank, linear.in_features, linear.out_features) if isinstance(linear, nn.Linear) else 1
        _check(target, r, config, scale_of(alpha, r, config), dropout_p, adapter_dtype, dtype)
    check_replaceable(out, (TENSORS, CONFIG))
    if residual is not None and residual == out:
        raise ValueError(f"{out} is given for the adapter and for the residual model, expected two directories")
    settings: dict[str, Any] = {
        "version": version(),
        "model": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files.files},
        "method": config.name,
        "method_config": asdict(config),
        "rank": rank,
        "alpha": alpha,
        "dropout_p": dropout_p,
        "adapter_dtype": dtype_name(adapter_dtype),
        "dtype": None if dtype is None else dtype_name(dtype),
        "layers": [target.name for target in targets],
    }
    if residual is not None:
        check_residual_folder(residual, files, config, settings["layers"], dtype, settings)
    with workspace_of(out, settings) as workspace:
        made = _Layers(files, workspace, config, rank, alpha, dropout_p, adapter_dtype, dtype)
        left = [target.name for target in targets if not made.is_done(target.name)]
        sizes = {target.name: _elements(files, target.name) for target in targets}
        with _bar(f"{config.name} factors", sum(sizes.values()), progress) as bar:
            lock = threading.Lock()
            bar.update(sum(size for name, size in sizes.items() if name not in left))
            bar.refresh()

            def work(name: str) -> None:
                made.make(name)
                with lock:
                    bar.update(sizes[name])

            layer_by_layer(
                work, left, lambda name: is_small(files.tensors[f"{name}.weight"].shape), lambda calls: calls
            )
        size = _assemble(out, workspace, [target.name for target in targets])
        if residual is None:
            workspace.remove()
        else:
            adapter = json.loads((out / CONFIG).read_text(encoding="utf-8"))["tensors_sha256"]
            with workspace_of(residual, settings | {"adapter": adapter}) as finished:
                if not finished.published:
                    write_residual(finished, out, files, progress)
                workspace.remove()
                finished.remove()  # last: by it the same command knows that the residual model is this one
    shapes = [files.tensors[f"{target.name}.weight"].shape for target in targets]
    parameters = sum(config.trainable_parameters(k, n, _rank(config, rank, k, n)) for n, k in shapes)
    return Initialised(len(targets), len(targets) - len(left), parameters, size)


def _rank(config: Method, rank: int | None, in_features: int, out_features: int) -> int:
    return config.default_rank(in_features, out_features) if rank is None else rank


def _check(
    target: Target,
    rank: int,
    config: Method,
    scale: float,
    dropout_p: float,
    adapter_dtype: torch.dtype,
    dtype: torch.dtype | None,
) -> None:
    try:
        check_linear(target.module, rank, config, scale, dropout_p, adapter_dtype)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{target.name}: {error}") from error
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}, expected float32, bfloat16, float16 or float64")


def _elements(files: ModelFiles, name: str) -> int:
    n, k = files.tensors[f"{name}.weight"].shape
    return n * k


def _bar(what: str, total: int, progress: bool | None) -> tqdm[Any]:
    """Counts weights, so that the time it estimates is fair to layers of different sizes."""
    quiet = not sys.stderr.isatty() if progress is None else not progress
    return tqdm(total=total, desc=what, unit=" weights", unit_scale=True, disable=quiet, smoothing=0.05)


@dataclass(frozen=True)
class _Layers:
    """A file a layer in the workspace: its tensors, and its row of the configuration as metadata."""

    files: ModelFiles
    workspace: Workspace
    config: Method
    rank: int | None
    alpha: float | None
    dropout_p: float
    adapter_dtype: torch.dtype
    dtype: torch.dtype | None

    def is_done(self, name: str) -> bool:
        """Whether the layer's file is there, and whole: a crash of the machine may have cut it off."""
        try:
            _part(self.workspace, name)
        except (FileNotFoundError, SafetensorError):
            return False
        return True

    def make(self, name: str) -> None:
        """Decompose the layer's weight and keep the result."""
        try:
            weight = self.files.read(f"{name}.weight", self.dtype)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            layer = SVDLinear.from_linear(
                linear,
                _rank(self.config, self.rank, weight.shape[1], weight.shape[0]),
                self.config,
                alpha=self.alpha,
                dropout_p=self.dropout_p,
                adapter_dtype=self.adapter_dtype,
            )
            row = row_of(name, layer)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        first: dict[Any, str] = {}
        tensors, ties = {}, {}
        for attribute, tensor in saved_tensors(layer).items():
            owner = first.setdefault(identity(tensor), attribute)
            if owner == attribute:
                tensors[attribute] = tensor.detach().contiguous()
            else:
                ties[attribute] = owner
        metadata = {"row": json.dumps(row), "ties": json.dumps(ties)}
        self.workspace.add(_part_name(name), lambda path: _save(tensors, path, metadata))


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"{path} cannot be written: {error}") from error


def _part_name(name: str) -> str:
    """A file name that any module path has, whatever its characters and length."""
    return f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"


def _part(workspace: Workspace, name: str) -> Any:
    return safe_open(workspace.path(_part_name(name)), framework="pt")


def _assemble(out: Path, workspace: Workspace, names: list[str]) -> int:
    """The adapter directory from the layers' files, which stay in their mappings; its bytes."""
    rows, tensors, ties = {}, {}, {}
    for name in names:
        part = _part(workspace, name)
        rows[name] = json.loads(part.metadata()["row"])
        for alias, owner in json.loads(part.metadata()["ties"]).items():
            ties[key_of(name, alias)] = key_of(name, owner)
        for attribute in part.keys():  # noqa: SIM118 (it is no dict)
            tensors[key_of(name, attribute)] = part.get_tensor(attribute)

    def build(folder: Path) -> None:
        _save(tensors, folder / TENSORS)
        digest = hashlib.sha256()
        with (folder / TENSORS).open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
        (folder / CONFIG).write_text(config_text(rows, {}, ties, digest.hexdigest()), encoding="utf-8")
        shutil.copymode(folder / CONFIG, folder / TENSORS)  # save_file keeps its file from everybody else

    replace_directory(out, build, (TENSORS, CONFIG))
    return sum(file.stat().st_size for file in out.iterdir())
