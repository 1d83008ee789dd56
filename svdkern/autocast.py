"""Whether autocast is on, and keeping it out: the dtypes of a call are decided once, and a weight's values never by it.

Layer: below everything else; imports nothing of svdkern.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast is enabled on this kind of device; False for one that has none (meta)."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which products on this kind of device run in their operands' own dtype."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
