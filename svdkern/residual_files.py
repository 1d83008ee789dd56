"""The model with residuals in place of its adapted weights: the same files, byte for byte but for those weights.

A residual has its weight's shape and dtype, so a shard keeps its header. One weight is in memory at a time. Layer: below
``streaming``.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
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
from svdkern.model_files import ModelFiles
from svdkern.workspace import workspace_of

_PIECE = 1 << 24  # bytes copied at a time
_BESIDE_THE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja")


def check_residual_folder(
    folder: Path, files: ModelFiles, config: Method, names: list[str], dtype: torch.dtype | None
) -> None:
    """ValueError if ``write_residual`` would not be able to."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists, expected a new or empty directory for the residual model")
    if not config.changes_residual:
        raise ValueError(f"{config.name} leaves the weights as they are: there is no residual to write")
    for name in names:
        stored = files.tensors[f"{name}.weight"].dtype
        if dtype is not None and stored != dtype:
            raise ValueError(
                f"{name} is stored in {stored} and adapted in {dtype}: its residual does not fit into the file"
            )


def write_residual(
    folder: Path, adapter: Path, files: ModelFiles, settings: dict[str, Any], progress: bool | None
) -> None:
    """Write the files of ``files`` with the residuals of ``adapter``, into a directory that appears when it is whole.

    What an interrupted run has finished, in ``<folder>.partial``, is kept and taken up again.

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
        workspace_of(folder, settings) as workspace,
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
        for pattern in _BESIDE_THE_WEIGHTS:
            for file in files.folder.glob(pattern):
                workspace.add(file.name, lambda path, file=file: shutil.copyfile(file, path))  # type: ignore[misc]
        workspace.publish(folder)


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
