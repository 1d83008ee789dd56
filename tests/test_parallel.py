"""Layers side by side: in which order errors come."""

from __future__ import annotations

import pytest

from svdkern.parallel import layer_by_layer


def test_the_first_error_of_the_small_ones_then_of_the_large_ones() -> None:
    begun = []

    def work(item: str) -> None:
        begun.append(item)
        if "bad" in item:
            raise ValueError(item)

    items = ["large bad", "large", "small 1", "small bad 2", "small bad 3"]
    with pytest.raises(ValueError, match="small bad 2"):
        layer_by_layer(work, items, lambda item: item.startswith("small"), lambda calls: calls)
    assert not any(item.startswith("large") for item in begun)
    with pytest.raises(ValueError, match="large bad"):
        layer_by_layer(work, items[:3], lambda item: item.startswith("small"), lambda calls: calls)
    assert "large" not in begun
