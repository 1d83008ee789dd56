"""What ``adapt`` and ``load_adapter`` did to a model, readable."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from svdkern.nn import SVDLinear


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer; ``trainable`` counts its trainable numbers."""

    name: str
    method: str
    in_features: int
    out_features: int
    rank: int
    trainable: int


@dataclass(frozen=True)
class AdaptReport:
    """Adapted layers and trainable share of a model. ``str()`` is a table with one row for each shape."""

    layers: tuple[LayerReport, ...]
    trainable: int
    """Trainable parameters of the whole model, in numbers."""
    total: int
    """All parameters of the whole model, in numbers (a shared one counts once)."""

    @property
    def share(self) -> float:
        """trainable / total."""
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        groups: dict[tuple[str, str, int, int, int], list[LayerReport]] = {}
        for row in self.layers:
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name)
            groups.setdefault((pattern, row.method, row.in_features, row.out_features, row.rank), []).append(row)
        rows = [("layer", "count", "in", "out", "rank", "method", "trainable")]
        for (pattern, method, in_features, out_features, rank), group in groups.items():
            name = pattern if len(group) > 1 else group[0].name
            trainable = sum(row.trainable for row in group)
            rows.append(
                (name, f"{len(group)}", f"{in_features}", f"{out_features}", f"{rank}", method, f"{trainable:,}")
            )
        widths = [max(len(cells_of_row[column]) for cells_of_row in rows) for column in range(len(rows[0]))]
        lines = []
        for cells_of_row in rows:
            cells = [
                cell.ljust(width) if column in (0, 5) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(cells_of_row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        lines.append(
            f"{len(self.layers)} layers adapted; {self.trainable:,} of {self.total:,} parameters train "
            f"({100 * self.share:.2f} %)"
        )
        return "\n".join(lines)


def report_on(model: nn.Module, layers: dict[str, SVDLinear]) -> AdaptReport:
    """The report on these layers of a model."""
    rows = tuple(
        LayerReport(
            name,
            layer.method,
            layer.in_features,
            layer.out_features,
            layer.rank,
            sum(p.numel() for p in layer.parameters() if p.requires_grad),
        )
        for name, layer in layers.items()
    )
    parameters = list(model.parameters())
    return AdaptReport(rows, sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))
