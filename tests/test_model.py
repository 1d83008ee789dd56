"""``adapt``, ``merge``, ``unmerge`` and the report on whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import svdkern.initialisation
import svdkern.model as model_module
from svdkern.methods import METHODS
from svdkern.model import adapt, merge, unmerge
from svdkern.nn import SVDLinear


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width // 2)
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width // 2, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.k_proj(self.q_proj(self.norm(x)))))


class Net(nn.Module):
    """An embedding, blocks, and an output layer that shares the embedding's weight."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.lm_head = nn.Linear(width, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


IDS = torch.arange(12).view(2, 6)


def snapshot(model: nn.Module) -> tuple:  # type: ignore[type-arg]
    """Everything a failed adapt must leave alone."""
    return (
        [(name, id(module), type(module)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.data_ptr(), p._version) for name, p in model.named_parameters()],
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )


def unchanged(model: nn.Module, before: tuple) -> bool:  # type: ignore[type-arg]
    after = snapshot(model)
    return after[:2] == before[:2] and all(torch.equal(after[2][name], tensor) for name, tensor in before[2].items())


# --------------------------------------------------------------------------------------------------------- adapt


@pytest.mark.parametrize("method", ["lora", "pissa", "sorsa"])
def test_adapt_keeps_the_function_and_freezes_the_rest(method: str) -> None:
    model = Net()
    y = model(IDS)
    report = adapt(model, method, rank=4)
    names = [f"layers.{i}.{n}" for i in range(2) for n in ("q_proj", "k_proj", "down")]
    assert [row.name for row in report.layers] == names
    assert all(isinstance(model.get_submodule(name), SVDLinear) for name in names)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.embed.weight
    assert torch.allclose(model(IDS), y, atol=1e-5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{factor}" for name in names for factor in METHODS[method].trains}
    config = METHODS[method]()
    count = sum(config.trainable_parameters(row.in_features, row.out_features, 4) for row in report.layers)
    assert report.trainable == count == sum(row.trainable for row in report.layers)
    assert report.total == sum(p.numel() for p in model.parameters())
    assert report.share == count / report.total
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_report_is_a_table_with_a_row_for_each_shape() -> None:
    report = adapt(Net(depth=3), "pissa", rank=4)
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "count", "in", "out", "rank", "method", "trainable"]
    assert lines[2].split() == ["layers.*.k_proj", "3", "32", "16", "4", "pissa", f"{3 * 4 * 48:,}"]
    assert len(lines) == 5
    assert "9 layers adapted" in lines[-1] and f"{report.trainable:,} of {report.total:,}" in lines[-1]


def test_alpha_and_defaults() -> None:
    model = Net()
    adapt(model, "lora", rank=8, alpha=16, dropout_p=0.1, adapter_dtype=torch.bfloat16, target_modules=["q_proj"])
    layer = model.layers[0].q_proj
    assert layer.scale.item() == 2.0 and layer.dropout_p == 0.1 and layer.u.dtype == torch.bfloat16
    other = Net()
    adapt(other, "lora", rank=None, target_modules=["q_proj"])
    assert other.layers[0].q_proj.rank == METHODS["lora"].published_rank and other.layers[0].q_proj.scale.item() == 1.0


def test_training_mode_and_hooks_survive() -> None:
    model = Net().eval()
    seen: list[int] = []
    handle = model.layers[0].q_proj.register_forward_hook(lambda *_: seen.append(1))
    adapt(model, "pissa", rank=2)
    assert not any(module.training for module in model.modules())
    model(IDS)
    assert seen == [1]
    handle.remove()
    model(IDS)
    assert seen == [1]


def test_shared_modules_stay_shared() -> None:
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(16, 16)})
    report = adapt(model, "pissa", rank=3)
    assert model["a"] is model["b"][0] and isinstance(model["a"], SVDLinear)
    assert [row.name for row in report.layers] == ["a", "c"]


def test_a_shared_module_may_be_named_by_its_second_name() -> None:
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(16, 16)})
    report = adapt(model, "pissa", rank=3, target_modules=["b.0"])
    assert [row.name for row in report.layers] == ["a"] and model["a"] is model["b"][0]
    assert type(model["c"]) is nn.Linear


def test_a_tied_weight_is_not_changed() -> None:
    model = Net()
    before = model.embed.weight.detach().clone()
    adapt(model, "pissa", rank=4, target_modules=["lm_head"])
    merge(model)
    assert torch.equal(model.embed.weight, before) and isinstance(model.lm_head, SVDLinear)


def test_two_calls_keep_the_first_ones_factors_training() -> None:
    model = Net()
    adapt(model, "pissa", rank=3, target_modules=["q_proj"])
    adapt(model, "lora", rank=5, target_modules=["k_proj"])
    assert model.layers[0].q_proj.u.requires_grad and model.layers[0].k_proj.u.requires_grad
    assert (model.layers[0].q_proj.rank, model.layers[0].k_proj.rank) == (3, 5)


def test_a_head_of_too_small_rank_is_named_before_anything_changes() -> None:
    """NovaSky-AI/SkyRL#2069: one small layer has less rank than asked for; the model is left half adapted."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    model.add_module("score", nn.Linear(64, 1))
    before = snapshot(model)
    with pytest.raises(ValueError, match="score: rank is 16, expected 1 <= rank <= 1"):
        adapt(model, "pissa", rank=16)
    assert unchanged(model, before)
    assert len(adapt(model, "pissa", rank=16, exclude_modules=["score"]).layers) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_non_finite_weight_is_named(value: float, dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    with torch.no_grad():
        model.layers[1].down.weight[3, 5] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.1\.down: weight has a NaN or an infinity"):
        adapt(model, "lora", rank=4)
    assert [m[2] for m in before[0]] == [type(m) for m in model.modules()]
    assert all(p.requires_grad for p in model.parameters())


def test_adapted_layers_are_refused() -> None:
    model = Net()
    adapt(model, "pissa", rank=4)
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"layers\.0\.q_proj is adapted already \(pissa, rank 4\)"):
        adapt(model, "lora", rank=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="its 6 linear layers are adapted already"):
        adapt(model, "lora", rank=2)
    assert unchanged(model, before)


@pytest.mark.parametrize("method", ["lora", "pissa", "sorsa"])
def test_half_precision_models(method: str) -> None:
    """huggingface/peft#1052: adapt a bf16 model, merge it back, compare with the original weights."""
    model = Net().bfloat16()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    y = model(IDS)
    adapt(model, method, rank=4)
    assert model(IDS).dtype == torch.bfloat16
    assert (model(IDS) - y).abs().max() <= 0.02 * y.abs().max()
    merge(model)
    for name in ("layers.0.q_proj", "layers.1.down"):
        weight = original[f"{name}.weight"].float()
        error = (model.get_submodule(name).residual.float() - weight).abs()
        assert bool((error <= 2 * torch.finfo(torch.bfloat16).eps * (weight.abs() + 0.1)).all())


def test_adapt_on_the_meta_device_gives_the_structure() -> None:
    with torch.device("meta"):
        model = Net()
    report = adapt(model, "sorsa", rank=4)
    assert report.trainable == adapt(Net(), "sorsa", rank=4).trainable
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("method", ["pissa", "lora"])  # of which one is made in several threads
def test_adapt_under_inference_mode(method: str) -> None:
    model, expected = Net(), Net()
    with torch.inference_mode():
        torch.manual_seed(1)
        adapt(model, method, rank=4)
        assert torch.is_inference_mode_enabled()
    torch.manual_seed(1)
    adapt(expected, method, rank=4)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    model(IDS).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    adapt(Net(), "pissa", rank=2, progress=None)
    assert capsys.readouterr().err == ""  # not a terminal
    adapt(Net(), "pissa", rank=2, progress=False)
    assert capsys.readouterr().err == ""
    adapt(Net(), "pissa", rank=2, progress=True)
    shown = capsys.readouterr().err
    assert "6/6" in shown and "pissa" in shown


# --------------------------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("method", ["lora", "pissa", "sorsa"])
def test_merge_the_same_object_and_back(method: str) -> None:
    """EricLBuehler/candle-lora#26: merge worked on a clone, the model kept its old layers."""
    model = Net()
    adapt(model, method, rank=4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05
    state, y0 = copy.deepcopy(model.state_dict()), model(IDS)
    report = merge(model)
    assert report.layers == 6 and report.kept_bytes == 2 * 4 * (32 * 32 + 32 * 16 + 16 * 32)
    assert all(layer.merged for layer in model.modules() if isinstance(layer, SVDLinear))
    y1 = model(IDS)
    assert torch.allclose(y1, y0, atol=1e-4)
    merge(model)
    assert torch.equal(model(IDS), y1)
    unmerge(model)
    assert torch.equal(model(IDS), y0)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_failed_merge_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    adapt(model, "pissa", rank=4)
    before, real, calls = copy.deepcopy(model.state_dict()), SVDLinear.merge, []

    def failing(layer: SVDLinear, keep: bool = True) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        real(layer, keep)

    monkeypatch.setattr(SVDLinear, "merge", failing)
    with pytest.raises(MemoryError):
        merge(model)
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, SVDLinear))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_unmerge_without_kept_copies_changes_nothing() -> None:
    model = Net()
    adapt(model, "pissa", rank=4)
    merge(model)
    model.layers[1].down.unmerge()
    model.layers[1].down.merge(keep=False)
    with pytest.raises(RuntimeError, match="keep=False"):
        unmerge(model)
    assert all(layer.merged for layer in model.modules() if isinstance(layer, SVDLinear))


def test_merge_needs_an_adapted_model() -> None:
    for action in (merge, unmerge):
        with pytest.raises(ValueError, match="Net has no adapted layer"):
            action(Net())


def test_deepcopy_of_a_model_trains_alone() -> None:
    """huggingface/peft#424: an EMA by deepcopy, and its settings."""
    model = Net()
    adapt(model, "sorsa", rank=4, alpha=2.0, dropout_p=0.1)
    ema = copy.deepcopy(model)
    assert repr(ema) == repr(model)
    y = model.eval()(IDS)
    optimizer = torch.optim.SGD([p for p in ema.parameters() if p.requires_grad], lr=0.1)
    ema(IDS).square().sum().backward()
    optimizer.step()
    merge(ema)
    assert torch.equal(model(IDS), y) and not torch.equal(ema.eval()(IDS), y)


def test_modules_used_by_name_exist() -> None:
    """The hooks and functions that tests and the code reach into."""
    linear = nn.Linear(2, 2)
    assert all(name in vars(linear) for name in model_module._HOOKS)
    assert svdkern.initialisation.scale_of(3, 9, METHODS["lora"]()) == torch.tensor(1 / 3, dtype=torch.float32).item()
