"""A model as it lies in a folder of safetensors files: which tensor is where, and which ones are linear layers' weights.

Tensors are read one at a time, so the model may be larger than memory. Layer: below ``streaming`` and ``tune``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_EMBEDDING = re.compile(r"embed|lm_head|\bw[tp]e\b")
# transformers' Conv1D, whose weight is (K, N): in a file nothing tells it from a Linear's.
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


class Stored(NamedTuple):
    """One tensor, unread."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None for integers, float8 and what else is no dtype of a plain weight."""


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model and the tensors in them."""

    folder: Path
    files: tuple[Path, ...]
    tensors: dict[str, Stored]
    words: int | None
    """``vocab_size`` of ``config.json``."""
    model_type: str | None

    @staticmethod
    def open(folder: Path) -> ModelFiles:
        """Read the headers: of the files that ``model.safetensors.index.json`` lists, else of ``model.safetensors``, else of
        all ``*.safetensors``.

        Raises:
            ValueError: no such folder or no such files; one is missing, truncated or damaged; one tensor in two files.
            OSError: a file cannot be read.
        """
        files, wanted = _files(folder)
        config = _json(folder / "config.json")
        tensors: dict[str, Stored] = {}
        for file in files:
            for name, stored in _header(file).items():
                if name in tensors:
                    raise ValueError(f"{name} is in {tensors[name].file.name} and in {file.name}, expected it once")
                tensors[name] = stored
        for name, file_name in wanted.items():
            if name not in tensors or tensors[name].file.name != file_name:
                raise ValueError(f"{INDEX} says that {name} is in {file_name}, which has no such tensor")
        words, model_type = config.get("vocab_size"), config.get("model_type")
        return ModelFiles(
            folder,
            tuple(files),
            tensors,
            words if isinstance(words, int) else None,
            model_type if isinstance(model_type, str) else None,
        )

    def is_linear(self, name: str) -> bool:
        """Whether this is a linear layer's weight: floating, two-dimensional, called ``*.weight``, and no embedding, by its name
        or by having as many rows as the vocabulary has words."""
        _, shape, dtype = self.tensors[name]
        if not name.endswith(".weight") or len(shape) != 2 or dtype is None:
            return False
        return not _EMBEDDING.search(name) and shape[0] != self.words

    def skeleton(self) -> nn.Module:
        """A module tree with the tensors' paths: ``nn.Linear`` on the meta device for linear layers, ``nn.Embedding`` and plain
        modules for the rest.

        Raises:
            ValueError: a model whose linear layers are stored transposed; no linear layer.
        """
        if self.model_type in _TRANSPOSED:
            raise ValueError(
                f"model_type is {self.model_type!r}: transformers' Conv1D (a linear layer with a transposed weight) "
                "is not supported yet"
            )
        leaves: dict[str, nn.Module] = {}
        for name, (_, shape, _) in self.tensors.items():
            path, _, attribute = name.rpartition(".")
            if not path or attribute != "weight" or len(shape) != 2:
                continue
            if self.is_linear(name):
                bias = f"{path}.bias" in self.tensors
                leaves[path] = nn.Linear(shape[1], shape[0], bias, device="meta", dtype=self.tensors[name].dtype)
            elif _EMBEDDING.search(name) or shape[0] == self.words:
                leaves[path] = nn.Embedding(shape[0], shape[1], device="meta")
        if not any(isinstance(leaf, nn.Linear) for leaf in leaves.values()):
            raise ValueError(
                f"{self.folder}: its files have no linear layer, a two-dimensional '*.weight' in float32, bfloat16, float16 or "
                "float64 (quantised models are not supported)"
            )
        paths = {name.rpartition(".")[0] for name in self.tensors} - {""}
        root = nn.Module()
        for path in sorted(paths, key=_natural):
            _attach(root, path, leaves.get(path))
        return root

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor in memory of its own (not in the file's mapping, whose pages another process could cut off)."""
        file = self.tensors[name].file
        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name).to(dtype=dtype, copy=True)
        except SafetensorError as error:
            raise ValueError(f"{file}: {error}: truncated or damaged") from error


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no *.safetensors file in it: no such folder")
    index = _json(folder / INDEX)
    if index:
        wanted = index.get("weight_map")
        if not isinstance(wanted, dict) or not all(isinstance(file, str) for file in wanted.values()):
            raise ValueError(f"{folder / INDEX}: weight_map is missing or no map of names to files")
        names = sorted(set(wanted.values()))
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise ValueError(f"{folder}: {name}, which {INDEX} lists, is missing")
        return [folder / name for name in names], wanted
    if (folder / ONE_FILE).is_file():
        return [folder / ONE_FILE], {}
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        others = sorted(file.name for file in folder.glob("*") if file.suffix in (".bin", ".pt", ".pth", ".gguf"))
        have = f" ({', '.join(others[:3])} would have to be converted)" if others else ""
        raise ValueError(f"{folder}: there is no *.safetensors file in this folder{have}")
    return found, {}


def _header(file: Path) -> dict[str, Stored]:
    found = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                part = opened.get_slice(name)
                found[name] = Stored(file, tuple(part.get_shape()), _DTYPES.get(part.get_dtype()))
    except SafetensorError as error:
        raise ValueError(f"{file}: {error}: truncated, or no safetensors file") from error
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, expected an object")
    return found


def _attach(root: nn.Module, path: str, leaf: nn.Module | None) -> None:
    module = root
    *parents, last = path.split(".")
    for part in parents:
        child = module._modules.get(part)
        if child is None:
            child = nn.Module()
            module.add_module(part, child)
        module = child
    if last not in module._modules:
        module.add_module(last, leaf or nn.Module())


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """layers.2 before layers.10; a module before what it contains."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]
