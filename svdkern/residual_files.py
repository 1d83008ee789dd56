"""The model with residuals in place of its adapted weights: the same files, byte for byte but for those weights.

A residual has its weight's shape and dtype, so a shard keeps its header. One weight is in memory at a time. Layer: below
``streaming``.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from svdkern.adapter_file import CONFIG, INITIAL, TENSORS, key_of
from svdkern.fingerprint import sha256
from svdkern.linalg import exact_residual
from svdkern.methods import Method
from svdkern.model_files import INDEX, ModelFiles
from svdkern.workspace import Workspace, is_published

_PIECE = 1 << 24  # bytes copied at a time
_SHARDS = frozenset(
    (".safetensors", ".bin", ".pt")
)  # below the top they are parts of the model, as 2_Dense/model.safetensors
_OTHER_RUNTIMES = frozenset(".pth .ckpt .gguf .onnx .onnx_data .h5 .msgpack .ot .tflite".split())


def check_residual_folder(
    folder: Path,
    files: ModelFiles,
    config: Method,
    names: list[str],
    dtype: torch.dtype | None,
    settings: dict[str, Any],
) -> None:
    """ValueError if ``write_residual`` would not be able to, and a run with these settings has not finished it."""
    is_empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_empty and not is_published(folder, settings):
        raise ValueError(f"{folder} exists, expected a new or empty directory for the residual model")
    if not config.changes_residual:
        raise ValueError(f"{config.name} leaves the weights as they are: there is no residual to write")
    for name in names:
        stored = files.tensors[f"{name}.weight"].dtype
        if dtype is not None and stored != dtype:
            raise ValueError(
                f"{name} is stored in {stored} and adapted in {dtype}: its residual does not fit into the file"
            )


def write_residual(workspace: Workspace, adapter: Path, files: ModelFiles, progress: bool | None) -> None:
    """Write the files of ``files`` with the residuals of ``adapter``; the workspace's result appears when it is whole.

    Weight files that an interrupted run has finished are kept.

    Raises:
        ValueError: the model or the adapter has changed since it was made.
        OSError: the disk is full, or not writable.
    """
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    rows, ties = config["layers"], config["tied_tensors"]
    adapted = {f"{name}.weight": name for name in rows}
    quiet = not sys.stderr.isatty() if progress is None else not progress
    total = sum(file.stat().st_size for file in files.files)
    with (
        safe_open(adapter / TENSORS, framework="pt") as factors,
        tqdm(total=total, desc="residuals", unit="B", unit_scale=True, disable=quiet) as bar,
    ):

        def residual_of(key: str) -> Tensor:
            name, row = adapted[key], rows[adapted[key]]
            keys = {a: key_of(name, a) for a in INITIAL if a in row["dtypes"]}
            cut = {a: factors.get_tensor(ties.get(key, key)) for a, key in keys.items()}
            u, sigma, v = (cut.get(a) for a in INITIAL)
            assert u is not None and v is not None
            residual = exact_residual(files.read(key), u, sigma, v, row["initial_scale"])
            if sha256(residual).hex() != row["residual_sha256"]:
                raise ValueError(f"{name}: the model's files have changed since the adapter was made")
            return residual

        for file in files.files:
            if not workspace.has(file.name):
                workspace.add(file.name, lambda path, file=file: _copy(file, path, adapted, residual_of, bar))  # type: ignore[misc]
    ours = {path.resolve() for of in (workspace, Workspace(adapter)) for path in (of.result, of.folder)}
    for file in _beside_the_weights(files.folder, ours):
        name = file.relative_to(files.folder).as_posix()
        workspace.add(name, lambda path, file=file: shutil.copyfile(file, path))  # type: ignore[misc]
    workspace.publish()


def _beside_the_weights(folder: Path, skip: set[Path], is_top: bool = True) -> Iterator[Path]:
    """The model's other files, in subfolders too: none with weights of which the result has residuals, none that is hidden."""
    skip = skip | {folder.resolve()}  # a link back to it
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__" or path.resolve() in skip:
            continue
        is_weights = path.suffix in _OTHER_RUNTIMES or (is_top and path.suffix in _SHARDS)
        is_index = is_top and path.name.endswith(".index.json") and path.name != INDEX
        if path.is_dir():
            yield from _beside_the_weights(path, skip, is_top=False)
        elif path.is_file() and not is_weights and not is_index:
            yield path


def _copy(source: Path, target: Path, adapted: dict[str, str], residual_of: Any, bar: Any) -> None:
    with source.open("rb") as old, target.open("wb") as new:
        prefix = old.read(8)
        header = old.read(struct.unpack("<Q", prefix)[0])
        new.write(prefix + header)
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            if key in adapted:
                new.write(memoryview(residual_of(key).view(torch.uint8).numpy()))
                old.seek(end - begin, 1)
            else:
                _copy_bytes(old, new, end - begin)
            bar.update(end - begin)


def _copy_bytes(old: BinaryIO, new: BinaryIO, count: int) -> None:
    while count:
        piece = old.read(min(count, _PIECE))
        if not piece:
            raise ValueError(f"{old.name} is truncated")
        new.write(piece)
        count -= len(piece)
