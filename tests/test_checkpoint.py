"""``save_adapter`` and ``load_adapter``: bit-equal round trips, and every way a file can be wrong."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from test_model import IDS, Net, snapshot, unchanged
from torch import Tensor, nn

from svdkern.checkpoint import load_adapter, save_adapter
from svdkern.methods import METHODS
from svdkern.model import adapt, merge, regularization, unmerge
from svdkern.nn import SVDLinear


def train(model: nn.Module, run: Callable[[nn.Module], Tensor], steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        (run(model).float().square().mean() + regularization(model)).backward()
        optimizer.step()
        optimizer.zero_grad()


def forward(model: nn.Module) -> Tensor:
    return model(IDS)


def trained(method: str = "pissa", dtype: torch.dtype = torch.float32, **arguments: Any) -> Net:
    model = Net().to(dtype)
    torch.manual_seed(1)
    adapt(model, method, **({"rank": 4} | arguments))
    train(model, forward)
    return model


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def keys(path: Path) -> list[str]:
    with safe_open(path / "adapter.safetensors", "pt") as file:
        return sorted(file.keys())


# ---------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("method", ["lora", "pissa", "sorsa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip_has_the_same_bits(
    tmp_path: Path, method: str, dtype: torch.dtype, adapter_dtype: torch.dtype
) -> None:
    model = trained(method, dtype, alpha=3.0, dropout_p=0.25, adapter_dtype=adapter_dtype)
    y = model.eval()(IDS)
    save_adapter(model, tmp_path / "a")
    fresh = Net().to(dtype).eval()
    report = load_adapter(fresh, tmp_path / "a")
    assert same_bits(model, fresh) and torch.equal(fresh(IDS), y)
    assert repr(fresh) == repr(model)
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert len(report.layers) == 6 and report.trainable == sum(p.numel() for p in fresh.parameters() if p.requires_grad)
    save_adapter(fresh, tmp_path / "b")
    for file in ("adapter.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


_RELOAD = """
import sys, torch
sys.path[:0] = {paths!r}
torch.manual_seed(int(sys.argv[2]))
torch.set_num_threads(int(sys.argv[3]))
torch.rand(1000)
def refused(*args, **kwargs):
    raise AssertionError("a decomposition was run")
torch.linalg.svd = torch.linalg.eigh = torch.linalg.qr = torch.svd_lowrank = refused
from test_model import IDS, Net
from svdkern import adapter_file
from svdkern.checkpoint import load_adapter
state = torch.get_rng_state()
model = Net()
state = torch.get_rng_state()
load_adapter(model, sys.argv[1])
assert torch.equal(torch.get_rng_state(), state), "loading drew random numbers"
torch.save(model.state_dict(), sys.argv[4])
"""


@pytest.mark.parametrize("method", ["pissa", "sorsa"])
def test_reload_in_another_process_has_the_same_bits(tmp_path: Path, method: str) -> None:
    """huggingface/peft#2270: reloading runs the random SVD again, so the same file gives other results."""
    model = trained(method)
    save_adapter(model, tmp_path / "a")
    code = _RELOAD.format(paths=[str(Path(__file__).parent.parent), str(Path(__file__).parent)])
    for seed, threads in ((11, 1), (12, 2)):
        out = tmp_path / f"{seed}.pt"
        command = [sys.executable, "-c", code, str(tmp_path / "a"), str(seed), str(threads), str(out)]
        subprocess.run(command, check=True, timeout=120)
        found = torch.load(out)
        assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_names_that_look_like_keys(tmp_path: Path) -> None:
    """huggingface/peft#2773: layers whose own name contains a word of the key-mangling are saved under a wrong key."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        names = [
            "weight_proj",
            "weight",
            "lora_A",
            "lora_B",
            "sigma",
            "default",
            "base_layer",
            "u",
            "v",
            "u0",
            "svd",
            "core",
        ]
        model = nn.ModuleDict({name: nn.Linear(12, 10) for name in names})
        model["sub"] = nn.ModuleDict({"u": nn.ModuleDict({"v": nn.Linear(12, 10)})})
        return model

    model = make()
    report = adapt(model, "sorsa", rank=3)
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p += 0.01 * i
    save_adapter(model, tmp_path / "a")
    assert len(report.layers) == 13 and len(keys(tmp_path / "a")) == 13 * 6
    assert {"u.u", "weight.sigma", "sub.u.v.v0", "u0.u0"} <= set(keys(tmp_path / "a"))
    fresh = make()
    load_adapter(fresh, tmp_path / "a")
    assert same_bits(model, fresh)


def test_layer_1_beside_layer_10(tmp_path: Path) -> None:
    """huggingface/peft#2773: adapt only layers.1 of 13; the file has that one, a default load adapts that one."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(12, 12) for _ in range(13))})

    model = make()
    adapt(model, "pissa", rank=2, target_modules=["layers.1"])
    save_adapter(model, tmp_path / "a")
    assert keys(tmp_path / "a") == [f"layers.1.{a}" for a in ("u", "u0", "v", "v0")]
    fresh = make()
    load_adapter(fresh, tmp_path / "a")
    assert [type(layer) is SVDLinear for layer in fresh["layers"]] == [i == 1 for i in range(13)]
    assert same_bits(model, fresh)


def test_mixed_ranks_with_rank_zero(tmp_path: Path) -> None:
    """huggingface/peft#1539: after rank pruning some layers have rank 0 and loading fails in the resize."""
    model = trained("sorsa", rank=8)
    for rank, layer in ((0, model.layers[0].q_proj), (3, model.layers[1].down)):
        layer.u, layer.v = nn.Parameter(layer.u[:, :rank].detach()), nn.Parameter(layer.v[:, :rank].detach())
        layer.sigma = nn.Parameter(layer.sigma[:rank].detach())
    y = model(IDS)
    save_adapter(model, tmp_path / "a")
    fresh = Net()
    report = load_adapter(fresh, tmp_path / "a")
    assert sorted(row.rank for row in report.layers) == [0, 3, 8, 8, 8, 8]
    assert same_bits(model, fresh) and torch.equal(fresh(IDS), y)
    fresh(IDS).sum().backward()
    merge(fresh)
    assert torch.allclose(fresh(IDS), y, atol=1e-4)


def test_two_methods_in_one_model(tmp_path: Path) -> None:
    model = Net()
    adapt(model, "pissa", rank=3, target_modules=["q_proj"])
    adapt(model, METHODS["sorsa"](gamma=0.5), rank=5, target_modules=["down"])
    adapt(model, "lora", rank=2, target_modules=["lm_head"], alpha=4)
    train(model, forward)
    save_adapter(model, tmp_path / "a")
    fresh = Net()
    load_adapter(fresh, tmp_path / "a")
    assert same_bits(model, fresh) and fresh.layers[0].down.config.gamma == 0.5
    assert fresh.lm_head.residual.data_ptr() == fresh.embed.weight.data_ptr()


def test_file_holds_contiguous_factors_of_their_own_dtype(tmp_path: Path) -> None:
    """huggingface/transformers#27613: views, not contiguous, cannot be saved, or drag their storage along."""
    model = Net()
    adapt(model, "lora", rank=4, target_modules=["q_proj"])
    q, _ = torch.linalg.qr(torch.randn(32, 32))
    for block in model.layers:
        block.q_proj.u, block.q_proj.v = nn.Parameter(q[:, :4]), nn.Parameter(q.t()[:, 4:8])
    model.layers[1].q_proj.to(torch.bfloat16)
    save_adapter(model, tmp_path / "a")
    tensors = safetensors.torch.load_file(tmp_path / "a" / "adapter.safetensors")
    assert {t.dtype for k, t in tensors.items() if k.startswith("layers.1")} == {torch.bfloat16}
    assert {t.dtype for k, t in tensors.items() if k.startswith("layers.0")} == {torch.float32}
    assert torch.equal(tensors["layers.0.q_proj.u"], q[:, :4]) and torch.equal(
        tensors["layers.0.q_proj.v"], q.t()[:, 4:8]
    )
    size = (tmp_path / "a" / "adapter.safetensors").stat().st_size
    assert size < sum(t.numel() * t.element_size() for t in tensors.values()) + 1000


def test_shared_layers_and_factors_load_shared_again(tmp_path: Path) -> None:
    """huggingface/transformers#27613: layers that share one factor, or are one object."""

    def make() -> nn.ModuleDict:
        torch.manual_seed(0)
        shared = nn.Linear(12, 12)
        return nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(12, 12), "d": nn.Linear(12, 12)})

    model = make()
    adapt(model, "pissa", rank=3)
    model["d"].u = model["c"].u
    with torch.no_grad():
        model["c"].u += 1.0
    save_adapter(model, tmp_path / "a")
    assert "b.0.u" not in keys(tmp_path / "a") and "d.u" not in keys(tmp_path / "a")
    fresh = make()
    load_adapter(fresh, tmp_path / "a")
    assert fresh["a"] is fresh["b"][0] and fresh["c"].u is fresh["d"].u and same_bits(model, fresh)
    untied = make()
    untied["b"] = nn.Sequential(copy.deepcopy(untied["a"]))  # equal weights, but two modules
    load_adapter(untied, tmp_path / "a")
    assert untied["a"] is untied["b"][0]
    one = make()
    one["d"] = one["c"]
    before = snapshot(one)
    with pytest.raises(ValueError, match="the model uses one module as c and d"):
        load_adapter(one, tmp_path / "a")
    assert unchanged(one, before)


def test_merged_model_saves_the_same_file(tmp_path: Path) -> None:
    """EricLBuehler/candle-lora#26: saving from the merged state."""
    model = trained()
    save_adapter(model, tmp_path / "a")
    merge(model)
    save_adapter(model, tmp_path / "b")
    unmerge(model)
    for file in ("adapter.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    merge(model, keep=False)
    with pytest.raises(RuntimeError, match="keep=False"):
        save_adapter(model, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_deepcopy_saves_alone(tmp_path: Path) -> None:
    """huggingface/peft#424: the copy's settings and factors are its own."""
    model = trained("sorsa", alpha=2.0)
    other = copy.deepcopy(model)
    train(other, forward)
    save_adapter(other, tmp_path / "a")
    fresh = Net()
    load_adapter(fresh, tmp_path / "a")
    assert same_bits(fresh, other) and not same_bits(fresh, model)


def test_a_state_dict_in_a_new_process_can_still_be_saved_as_an_adapter(tmp_path: Path) -> None:
    """The initial factors and the fingerprint travel in the state_dict."""
    model = trained("sorsa")
    torch.save(model.state_dict(), tmp_path / "checkpoint.pt")
    with torch.device("meta"):
        resumed = Net()
        adapt(resumed, "sorsa", rank=4)
    resumed.to_empty(device="cpu")
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt"))
    save_adapter(resumed, tmp_path / "a")
    fresh = Net()
    load_adapter(fresh, tmp_path / "a")
    assert same_bits(fresh, model)


# ------------------------------------------------------------------------------------------------------- casting


@pytest.mark.parametrize("method", ["lora", "pissa", "sorsa"])
def test_cast_after_adapting_reloads_to_the_bits_as_they_are(tmp_path: Path, method: str) -> None:
    """modelscope/ms-swift#9694 and the rounding of initial factors: model.to(bf16) after adapt, then save."""
    model = trained(method)
    model.to(torch.bfloat16)
    save_adapter(model, tmp_path / "a")
    tensors = safetensors.torch.load_file(tmp_path / "a" / "adapter.safetensors")
    assert {t.dtype for k, t in tensors.items() if not k.endswith("0")} == {torch.bfloat16}
    if method == "lora":  # the residual is the base weight, so the base in bf16 is the one to load onto
        fresh = Net().to(torch.bfloat16)
        load_adapter(fresh, tmp_path / "a")
    else:
        assert {t.dtype for k, t in tensors.items() if k.endswith("0")} == {torch.float32}
        rounded = Net().to(torch.bfloat16)
        with pytest.raises(ValueError, match="the weight is bfloat16, the adapter was made on float32"):
            load_adapter(rounded, tmp_path / "a")
        fresh = Net()
        load_adapter(fresh, tmp_path / "a")
        assert fresh.layers[0].down.residual.dtype == torch.bfloat16
        assert fresh(IDS).dtype == torch.float32
        fresh.to(torch.bfloat16)
    assert same_bits(fresh, model) and torch.equal(fresh(IDS), model(IDS))
    save_adapter(fresh, tmp_path / "b")
    assert (tmp_path / "a" / "adapter_config.json").read_bytes() == (
        tmp_path / "b" / "adapter_config.json"
    ).read_bytes()


def test_cast_while_merged(tmp_path: Path) -> None:
    model = trained("pissa")
    merge(model)
    model.to(torch.bfloat16)
    save_adapter(model, tmp_path / "a")
    fresh = Net()
    load_adapter(fresh, tmp_path / "a")
    unmerge(model)
    assert same_bits(fresh.to(torch.bfloat16), model)


@pytest.mark.parametrize(
    "damage", [lambda m: m.to(torch.bfloat16).float(), lambda m: m.layers[0].down.residual.data.mul_(2)]
)
def test_a_residual_that_cannot_be_rebuilt_is_not_saved(tmp_path: Path, damage: Callable[[Net], object]) -> None:
    model = trained("pissa")
    damage(model)
    with pytest.raises(ValueError, match=r"layers\.0\.\w+: the residual \(float32\) is not the one"):
        save_adapter(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_changed_scale_is_saved_and_the_initial_one_rebuilds(tmp_path: Path) -> None:
    model = trained("pissa", alpha=2.0)
    for layer in model.modules():
        if isinstance(layer, SVDLinear):
            layer.scale = 0.125
    y = model(IDS)
    save_adapter(model, tmp_path / "a")
    fresh = Net()
    load_adapter(fresh, tmp_path / "a")
    assert fresh.layers[0].down.scale.item() == 0.125 and torch.equal(fresh(IDS), y)
