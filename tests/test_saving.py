"""``save_adapter``: what it refuses, what it warns of, full disks, kills, readers beside it, wrapped models."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_checkpoint import forward, keys, same_bits, train, trained
from test_model import Net
from torch import nn

from svdkern import adapter_file
from svdkern.checkpoint import load_adapter, save_adapter
from svdkern.nn import SVDLinear


def test_save_needs_an_adapted_model_with_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Net has no adapted layer"):
        save_adapter(Net(), tmp_path / "a")
    model = trained()
    model.to("meta")
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj is on the meta device"):
        save_adapter(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_save_warns_of_what_it_does_not_save(tmp_path: Path) -> None:
    model = trained()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path / "a")
    model.layers[0].norm.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"not saved: layers\.0\.norm\.weight"):
        save_adapter(model, tmp_path / "a")


def test_no_space_left(tmp_path: Path) -> None:
    """Lightning-AI/pytorch-lightning#688: the disk is full."""
    resource = pytest.importorskip("resource")
    model = trained()
    save_adapter(model, tmp_path / "a")
    old = (tmp_path / "a" / "adapter.safetensors").read_bytes()
    train(model, forward)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError):
            save_adapter(model, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "a" / "adapter.safetensors").read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


_SAVE_LOOP = """
import sys, torch
sys.path[:0] = {paths!r}
from test_checkpoint import save_adapter, trained
model = trained()
print("ready", flush=True)
while True:
    with torch.no_grad():
        model.layers[0].down.u.add_(1.0)
    save_adapter(model, sys.argv[1])
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    """Lightning-AI/pytorch-lightning#688: SIGKILL in a process that saves over p; p is the old or the new file."""
    path = tmp_path / "a"
    save_adapter(trained(), path)
    code = _SAVE_LOOP.format(paths=[str(Path(__file__).parent.parent), str(Path(__file__).parent)])
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    for _ in range(20):  # a reader sees one adapter or the next all the time
        load_adapter(Net(), path)
    process.kill()
    process.wait()
    process.stdout.close()
    model = Net()
    load_adapter(model, path)
    assert not torch.equal(model.layers[0].down.u, trained().layers[0].down.u)
    save_adapter(model, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_replaced_between_reading_its_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = tmp_path / "a", trained()
    save_adapter(model, path)
    train(model, forward)
    real, pending = adapter_file._bytes_of, [1]

    def reading(file: Path) -> bytes:
        if file.name == "adapter.safetensors" and pending:
            pending.clear()
            save_adapter(model, path)
        return real(file)

    monkeypatch.setattr(adapter_file, "_bytes_of", reading)
    fresh = Net()
    load_adapter(fresh, path)
    assert same_bits(fresh, model)


def test_compiled_and_wrapped_models(tmp_path: Path) -> None:
    model = trained()
    save_adapter(model, tmp_path / "a")
    for wrapped in (torch.compile(model), nn.DataParallel(model), nn.DataParallel(torch.compile(model))):
        save_adapter(wrapped, tmp_path / "b")
        assert keys(tmp_path / "a") == keys(tmp_path / "b")
    fresh = Net()
    load_adapter(torch.compile(fresh), tmp_path / "a")
    assert same_bits(fresh, model)


def test_a_layer_alone(tmp_path: Path) -> None:
    layer = SVDLinear.from_linear(nn.Linear(8, 6), 2, "pissa")
    save_adapter(layer, tmp_path / "a")
    assert keys(tmp_path / "a") == ["u", "u0", "v", "v0"]
    expected = layer.u.detach().clone()
    with torch.no_grad():
        layer.u.zero_()
    load_adapter(layer, tmp_path / "a")
    assert torch.equal(layer.u, expected)
