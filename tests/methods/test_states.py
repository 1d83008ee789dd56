"""What a model's state is: a state_dict that can be saved, restores the model or is refused, and survives casts and copies."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import safetensors.torch
import torch
from recipes import ALL, adapted, batch, net, train

import svdkern
from svdkern.methods import SST, RandLoRA


@pytest.mark.parametrize("method", ALL)
def test_a_state_dict_fits_into_safetensors_and_restores_the_model(method: str, tmp_path: Path) -> None:
    """One tensor in memory twice, or two tensors that share it, is refused there."""
    model = adapted(method)
    train(model, 2)
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_model(model, str(file))  # refuses what it would have to guess
    safetensors.torch.save_file(model.state_dict(), file)
    other = adapted(method, seed=0)
    other.load_state_dict(safetensors.torch.load_file(file))
    model.eval()
    assert torch.equal(other.eval()(batch()["x"]), model(batch()["x"]))
    svdkern.save_adapter(other, tmp_path / "a")
    fresh = net()
    svdkern.load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh.eval()(batch()["x"]), model(batch()["x"]))


@pytest.mark.parametrize("change", ["none", "move", "copy", "cast", "cast back"])
def test_svfit_holds_and_saves_a_frozen_factor_once_unless_it_is_cast(change: str, tmp_path: Path) -> None:
    model = adapted("svfit")
    train(model, 2)
    u0 = model.up.u0.clone()
    if change == "move":
        model._apply(lambda tensor: tensor.clone())  # as a move to another device does
    if change == "copy":
        model = copy.deepcopy(model)
    if change.startswith("cast"):
        model.to(torch.bfloat16)
    if change == "cast back":
        model.float()
    once = not change.startswith("cast")
    assert (model.up.u0.data_ptr() == model.up.u.data_ptr()) == once == ("up.u0" not in model.state_dict())
    other = adapted("svfit").to(model.up.u.dtype)
    other.load_state_dict(model.state_dict())
    x = batch()["x"].to(model.up.u.dtype)
    assert torch.equal(other.up.u0, u0) and torch.equal(other(x), model(x))
    plain = adapted("svfit")  # from a state whose factors were cast into a layer whose factors were not
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.up.u0, u0) and torch.equal(plain.up.u, model.up.u.float())
    if once:
        svdkern.save_adapter(other, tmp_path / "a")
        fresh = net()
        svdkern.load_adapter(fresh, tmp_path / "a")
        assert torch.equal(fresh(x), model(x))


def test_svfit_refuses_to_save_what_its_own_factors_no_longer_rebuild(tmp_path: Path) -> None:
    model = adapted("svfit")
    model.up.u.requires_grad_(True)
    train(model, 2)
    with pytest.raises(ValueError, match="up: u0, sigma0 and v0 are not what was cut out"):
        svdkern.save_adapter(model, tmp_path / "a")
    other = adapted("svfit")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch()["x"]), model(batch()["x"]))  # what the message advises
    alone = adapted("svfit")
    alone.load_state_dict({name: 1.5 * alone.state_dict()[name] for name in ("up.u", "up.v")}, strict=False)
    with pytest.raises(ValueError, match="up: u0, sigma0 and v0 are not what was cut out"):
        svdkern.save_adapter(alone, tmp_path / "a")


@pytest.mark.parametrize("method", ALL)
def test_what_a_layer_remembers_is_no_parameter(method: str) -> None:
    """Or an average of parameters (EMA) would average indices, and an optimizer over all of them would step them."""
    model = adapted(SST(interval=1) if method == "sst" else method)
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        train(model, 1)
        average.update_parameters(model)
    assert all(p.is_floating_point() for p in model.parameters())
    for layer in (model.up, average.module.up):
        for name, dtype in layer.config.state.items():
            assert name in dict(layer.named_buffers()) and getattr(layer.bfloat16(), name).dtype == dtype


def test_randlora_refuses_a_state_of_other_bases(tmp_path: Path) -> None:
    model = adapted(RandLoRA(seed=1))
    train(model, 2)
    state = model.state_dict()
    for other, what in (
        (adapted(RandLoRA(seed=2)), "dense, of seed 2, in torch.float32"),
        (adapted(RandLoRA(seed=1, bases="sparse")), "sparse, of seed 1"),
        (adapted(RandLoRA(seed=1), adapter_dtype=torch.bfloat16), "in torch.bfloat16"),
    ):
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(
            RuntimeError, match=f"up: the state belongs to dense bases of seed 1 in torch.float32.*{what}"
        ):
            other.load_state_dict(state)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    with torch.no_grad():
        model.down.v[0, 0] += 1
    with pytest.raises(ValueError, match="down: v is not what RandLoRA.* makes"):
        svdkern.save_adapter(model, tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_randlora_bases_keep_the_dtype_that_they_were_made_in(dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted("randlora", adapter_dtype=dtype)
    train(model, 2)
    model.to(torch.bfloat16).float()
    assert model.up.u.dtype == model.up.v.dtype == dtype and model.up.sigma.dtype == torch.float32
    svdkern.save_adapter(model, tmp_path / "a")
    fresh = net().to(torch.bfloat16).float()
    fresh.load_state_dict({f"{a}.{b}": getattr(model, a).residual if b == "weight" else getattr(model, a).bias
                           for a in ("up", "down") for b in ("weight", "bias")})  # fmt: skip
    svdkern.load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh(batch()["x"]), model(batch()["x"]))
    pair = [torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)]
    both = torch.nn.Sequential(*pair)
    svdkern.adapt(both, "randlora", rank=2)
    safetensors.torch.save_file(both.state_dict(), tmp_path / "state.safetensors")  # refuses tensors that share memory
    svdkern.save_adapter(both.double(), tmp_path / "b")
    assert both[0].u is both[1].u and both[0].u.dtype == torch.float32
