"""Which modules ``target_modules`` names."""

from __future__ import annotations

import pytest
import torch
from test_model import Net, snapshot, unchanged
from torch import nn

from svdkern.model import adapt
from svdkern.targets import find_targets


def _names(model: nn.Module, target_modules, exclude_modules=None) -> list[str]:  # type: ignore[no-untyped-def]
    return [target.name for target in find_targets(model, target_modules, exclude_modules)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], ["layers.0.q_proj", "layers.1.q_proj"]),
        (("q_proj", "q_proj"), ["layers.0.q_proj", "layers.1.q_proj"]),
        ({"layers.1.q_proj"}, ["layers.1.q_proj"]),
        (["0.q_proj", "lm_head"], ["layers.0.q_proj", "lm_head"]),
        (r"layers\.\d+\.(q_proj|down)", ["layers.0.q_proj", "layers.0.down", "layers.1.q_proj", "layers.1.down"]),
        ("lm_head", ["lm_head"]),
    ],
)
def test_names_suffixes_and_regular_expressions(targets, expected: list[str]) -> None:  # type: ignore[no-untyped-def]
    assert _names(Net(), targets) == expected


def test_all_linear_leaves_out_the_output_embedding() -> None:
    assert "lm_head" not in _names(Net(), "all-linear") and len(_names(Net(), "All-Linear")) == 6
    assert _names(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "all-linear") == ["0", "1"]


def test_layer_1_is_not_layer_10() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"p": nn.Linear(4, 4)}) for _ in range(13))})
    assert _names(model, ["1.p"]) == ["layers.1.p"]
    assert _names(model, ["layers.1.p"]) == ["layers.1.p"]
    assert _names(model, r"layers\.1\.p") == ["layers.1.p"]


def test_exclude_modules() -> None:
    assert _names(Net(), "all-linear", ["down", "k_proj"]) == ["layers.0.q_proj", "layers.1.q_proj"]
    assert _names(Net(), "all-linear", r"layers\.0\..*") == [f"layers.1.{n}" for n in ("q_proj", "k_proj", "down")]
    assert len(_names(Net(), "all-linear", [])) == 6
    with pytest.raises(ValueError, match="exclude_modules has 'downn', which matches no module; near matches: 'down'"):
        _names(Net(), "all-linear", ["downn"])
    with pytest.raises(ValueError, match="excludes everything"):
        _names(Net(), ["down"], ["down"])


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (["q_proj", "k_proj", "nosuch"], ValueError, "target_modules has 'nosuch', which matches no module"),
        (["q_prj"], ValueError, "'q_prj', which matches no module; near matches: 'q_proj'"),
        ([], ValueError, "target_modules is empty"),
        ("q_proj", ValueError, r"'q_proj' \(a regular expression .*\) matches nothing; as a list, \['q_proj'\] would"),
        ("(", ValueError, "not a regular expression"),
        ([3], TypeError, "target_modules has 3, expected module names"),
        (["embed"], TypeError, "embed: is of type Embedding, expected nn.Linear"),
        (["norm", "q_proj"], TypeError, r"layers\.0\.norm: is of type LayerNorm"),
        (["layers"], TypeError, "layers: is of type ModuleList"),
    ],
)
def test_every_entry_must_match_a_linear(targets, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    """huggingface/peft#3603: an entry that matches nothing is skipped in silence as long as another one matches."""
    model = Net()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        adapt(model, "pissa", rank=4, target_modules=targets)
    assert unchanged(model, before)


def test_nothing_to_adapt() -> None:
    with pytest.raises(ValueError, match="Sequential: it has no nn.Linear"):
        adapt(nn.Sequential(nn.ReLU()), "lora")
    with pytest.raises(ValueError, match="the model itself is the Linear to adapt: use SVDLinear.from_linear"):
        adapt(nn.Linear(4, 4), "lora", rank=2)


def test_quantised_or_wrapped_layers_are_refused_by_name() -> None:
    model = Net()
    model.layers[0].down.weight = nn.Parameter(torch.zeros(32, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"layers\.0\.down: weight is torch.int8"):
        adapt(model, "lora", rank=2)
    model = Net()
    layer = model.layers[1].q_proj
    layer.forward = lambda x: nn.Linear.forward(layer, x)  # type: ignore[method-assign]
    with pytest.raises(TypeError, match=r"layers\.1\.q_proj: Linear has a forward of its own"):
        adapt(model, "lora", rank=2)


@pytest.mark.peer
def test_conv1d_of_transformers_is_refused() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(nn.Linear(8, 8), conv1d(8, 8))
    before = snapshot(model)
    with pytest.raises(TypeError, match="1: transformers' Conv1D .* is not supported yet"):
        adapt(model, "lora", rank=2)
    assert unchanged(model, before)


@pytest.mark.peer
def test_a_peft_model_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(TypeError, match="is adapted by PEFT already"):
        adapt(model, "lora", rank=2)
