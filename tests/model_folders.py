"""Small models on the disk, as transformers saves them, and initialisations that break off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from svdkern import SVDLinear, streaming


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(48, 48), nn.Linear(48, 16, bias=False)
        self.up, self.down = nn.Linear(48, 200, bias=False), nn.Linear(200, 48, bias=False)
        self.norm = nn.LayerNorm(48)


class Net(nn.Module):
    def __init__(self, seed: int = 0, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(60, 48)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.lm_head = nn.Linear(48, 60, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def saved(folder: Path, model: nn.Module, shards: int = 1) -> Path:
    folder.mkdir()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    (folder / "config.json").write_text(json.dumps({"vocab_size": 60, "model_type": "tiny"}))
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(state)}
    for file in names:
        save_file({n: t for n, t in state.items() if weight_map[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def parts(folder: Path) -> list[Path]:
    """The tensor files that an interrupted run has finished, of the result at ``folder``."""
    return list(folder.with_name(f"{folder.name}.partial").glob("parts/*.safetensors"))


def failing_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> Callable[[], int]:
    real, calls = streaming.row_of, iter(range(1000))
    seen = []

    def row(name: str, layer: SVDLinear) -> object:
        seen.append(name)
        if next(calls) == count:
            raise error
        return real(name, layer)

    monkeypatch.setattr(streaming, "row_of", row)
    return lambda: len(seen)
