"""docs/methods.md is what the registry says, and says what the methods do."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from recipes import ALL

from svdkern.methods import METHODS, Method

ROOT = Path(__file__).resolve().parents[2]


def _writer():  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location("methods_page", ROOT / "docs" / "methods.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date() -> None:
    writer, page = _writer(), Path(ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert writer.page(page) == page, "run: python docs/methods.py"
    assert writer.page(page.replace("## Which", "## What")) != page


@pytest.mark.parametrize("name", ALL)
def test_a_card_says_what_the_method_has(name: str) -> None:
    method = METHODS[name]
    config, card = method(), method.card
    assert bool(card.penalty) == (method.penalty is not Method.penalty)
    hooks = ("on_backward_end", "on_step_end", "on_round_end")
    changed = [hook for hook in hooks if getattr(method, hook) is not getattr(Method, hook)]
    assert bool(card.hooks) == bool(changed or name == "smora")
    assert ("**Data**" in card.start) == (config.needs is not None)
    assert ("W_res" in card.forward or "W_world" in card.forward or "W_high" in card.forward) == config.changes_residual
    assert ("no W" in card.forward) == (not config.has_residual)
    assert ("random" in card.start or config.name in ("sst", "randlora", "kind")) or not config.draws or name == "lora"
    if hasattr(config, "compat"):
        assert 'compat="official"' in card.differs
    assert re.search(r"arXiv \d{4}\.\d{5}", config.citation)


def test_every_method_of_the_page_has_a_file_named_after_it() -> None:
    for name, method in METHODS.items():
        assert method.__module__ == f"svdkern.methods.{name.replace('-', '_')}"
        assert (ROOT / "svdkern" / "methods" / f"{name.replace('-', '_')}.py").is_file()
