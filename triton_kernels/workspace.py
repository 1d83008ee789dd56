"""Memory that persistent launches share on one stream: tickets, flags and the rows (M, R) between tiles.

It belongs to one (device, stream): launches on a stream follow each other, launches on two streams never meet. It is zeroed
when it is made and reset by the last CTA of every launch. While a CUDA graph is captured each launch gets its own, whose
zeroing is part of the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launching
from .tiles import FLAGS

_controls: dict[tuple[torch.device, int], Tensor] = {}


def control(device: torch.device, row_groups: int) -> Tensor:
    """int32 [ticket, done, epoch, one flag a row group]."""
    size = FLAGS.value + row_groups
    if launching.capturing(device):
        return torch.zeros(size, dtype=torch.int32, device=device)
    key = (device, launching.stream(device))
    found = _controls.get(key)
    if found is None or found.numel() < size:
        found = _controls[key] = torch.zeros(-(-size // 1024) * 1024, dtype=torch.int32, device=device)
    return found
