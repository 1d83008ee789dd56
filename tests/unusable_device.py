"""What a run does once a test has left the GPU unusable: after an illegal address every CUDA call of the process fails.

A worker of pytest-xdist ends, and a new one goes on with the tests that were left; without xdist the run stops. Otherwise
every later test of the process would be an error, and hide what it is there to find.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import torch


def why_unusable() -> str | None:
    """None if the GPU, where one is in use, still works; else what CUDA says, in one line."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    failed = item.session.testsfailed
    result = yield
    if item.session.testsfailed > failed and (reason := why_unusable()) is not None:
        if hasattr(item.config, "workerinput"):
            # The reports are sent, that the test is done is not: xdist takes it, not the next one, for what the worker died of.
            os._exit(1)
        pytest.exit(f"the GPU is unusable after {item.nodeid}: {reason}", returncode=1)
    return result
