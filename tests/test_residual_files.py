"""The residual model's other files: all that the model's code needs, and no weights that are not residuals."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_folders import Net, files_below, saved

from svdkern.streaming import init_adapter

KEPT = (
    "modeling_x.py",
    "qwen.tiktoken",
    "README.md",
    "settings.json",
    "notes.tmp",
    "1_Pooling/config.json",
    "2_Dense/model.safetensors",
    "2_Dense/deeper/vocab.bin",
)
LEFT = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.safetensors",
    "model.gguf",
    "original/consolidated.00.pth",
    "onnx/model.onnx",
    ".git/config",
    ".gitattributes",
    "__pycache__/modeling_x.pyc",
)


def with_others(folder: Path) -> Path:
    for name in KEPT + LEFT:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"this is {name}")
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_other_files_are_copied(tmp_path: Path, shards: int) -> None:
    folder = with_others(saved(tmp_path / "model", Net(), shards))
    before = files_below(folder)
    init_adapter(folder, tmp_path / "out", rank=4, residual=tmp_path / "res")
    res = files_below(tmp_path / "res")
    assert set(res) == set(before) - set(LEFT) and set(KEPT) < set(res)
    assert all(res[name] == before[name] for name in res if not name.startswith("model"))
    assert files_below(folder) == before


def test_links_are_followed_and_loops_left(tmp_path: Path) -> None:
    """As in a cache of downloads, where every file is a link."""
    folder, blobs = saved(tmp_path / "model", Net()), tmp_path / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    (blobs / "sub").mkdir()
    (blobs / "sub" / "a.py").write_text("a")
    (folder / "sub").symlink_to(blobs / "sub")
    (blobs / "sub" / "back").symlink_to(folder)
    (folder / "gone").symlink_to(blobs / "gone")
    init_adapter(folder, tmp_path / "out", rank=4, residual=tmp_path / "res")
    assert set(files_below(tmp_path / "res")) == {"config.json", "model.safetensors", "sub/a.py"}
    assert not any(path.is_symlink() for path in (tmp_path / "res").rglob("*"))


def test_results_in_the_models_own_folder(tmp_path: Path) -> None:
    """They are not copied into themselves."""
    folder = saved(tmp_path / "model", Net())
    init_adapter(folder, folder / "out", rank=4, residual=folder / "res")
    assert set(files_below(folder / "res")) == {"config.json", "model.safetensors"}
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "out", "res"]
