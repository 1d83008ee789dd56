"""Whether autocast is on, and keeping it out: the dtypes of a call are decided once, and a weight's values never by it.

Layer: below everything else; imports nothing of svdkern.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

# looked up once: torch.compile of 2.11 does not trace the question
_KINDS = frozenset(
    kind for kind in ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla") if torch.amp.is_autocast_available(kind)
)


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast is enabled on this kind of device; False for one that has none (meta)."""
    return device.type in _KINDS and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which products on this kind of device run in their operands' own dtype."""
    if device.type not in _KINDS:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
