"""``bench/methods.py`` on a tiny model: every provider trains, rows are complete, the table shows both sides."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "tests")]

pytest.importorskip("peft", reason="needs peft")
pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.peer

import finetune_smollm2 as demo  # noqa: E402
from tiny_llama import tiny_llama  # noqa: E402

from bench import methods, results  # noqa: E402
from bench.measured import Machine  # noqa: E402
from bench.tables import methods_table  # noqa: E402
from svdkern.methods import METHODS  # noqa: E402


@pytest.fixture
def options(tmp_path: Path) -> Any:
    folder = tmp_path / "base"
    folder.mkdir()
    demo.export_model(tiny_llama(), folder)
    arguments = ["--model", str(folder), "--dtype", "bf16", "--tokens", "16", "--sequence", "8", "--rank", "8"]
    return methods.parse([*arguments, "--device", "cpu", "--budget-seconds", "0.2"])


QUICK = ["kasa", "fila", "peft_osf"]
SLOW = [name for name in ["frozen", *METHODS, *(f"peft_{name}" for name in methods.PEFT)] if name not in QUICK]


@pytest.mark.parametrize("provider", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_provider_makes_a_step(provider: str, options: Any) -> None:
    model = methods.prepared(provider, options)
    trainable = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    step = methods.make_step(model, provider, methods.make_ids(model, 16, 8, torch.device("cpu")))
    step(0)
    step(1)
    after = dict(model.named_parameters())
    assert provider == "frozen" or any(not torch.equal(p, after[name]) for name, p in trainable.items())


def test_rows_and_their_table(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "memory_in_a_process_of_its_own", lambda provider, options: (100.0, None))
    rows = methods.compare("kasa", options)
    assert [row["provider"] for row in rows] == ["frozen", "kasa", "peft_kasa"]
    assert all(tuple(row) == results.fields("methods") and row["status"] == "ok" for row in rows)
    assert rows[1]["trainable"] == rows[2]["trainable"] and rows[0]["ratio_to_frozen"] == 1.0
    table = methods_table(Machine("here", {"methods": rows}))
    (line,) = [text for text in table.splitlines() if text.startswith("| kasa |")]
    assert line.count("100 MB") == 2 and "frozen:" in table
