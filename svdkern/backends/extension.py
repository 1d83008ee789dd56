"""Loading the compiled extension ``svdkern._C`` and remembering why it is not there.

The extension registers its private operators under ``torch.ops.svdkern``; Python only needs it to be loaded. A pure-Python
install has none: then ``why_missing`` says so, the eager backend serves every call, and ``python -m svdkern doctor`` shows it.
"""

from __future__ import annotations

import importlib

import torch


def _load() -> str | None:
    try:
        importlib.import_module("svdkern._C")
    except ImportError as error:
        return f"{error}"
    if not hasattr(torch.ops.svdkern, "_cpu_isa"):
        return "svdkern._C loaded, but registered no operators (built against another version of svdkern?)"
    return None


why_missing: str | None = _load()
"""None when the extension is loaded, else the reason in one line."""
