"""A second opinion on the Triton backend: Triton's own interpreter, float32 and float16 (its bf16 products are wrong).

It reads TRITON_INTERPRET when triton is imported: hence a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.emulator

PROGRAM = """
import torch
from operands import RNG, check, operands
from svdkern.backends import dispatch
from svdkern.backends.philox import keep_mask, keep_scale, threshold_of
from svdkern.triton_kernels import launching

launching.processors = lambda device: 2
launching.architecture = lambda device: 80
dispatch.why_not = lambda name, device, dtype: None
for dtype in (torch.float32, torch.float16):
    for rows in (3, 40):
        for form in ("sigma", "core", "none"):
            o = operands(rows, 48, 72, 5, form=form)
            wanted = tuple(n for n in ("x", "u", "sigma", "core", "v", "bias") if o[n] is not None)
            check(o, torch.randn(rows, 72), "triton", dtype, (torch.float32,) * 3, wanted)
mask = keep_mask(40, 48, RNG, threshold_of(0.2)).double() * keep_scale(threshold_of(0.2))
check(operands(40, 48, 72, 5), torch.randn(40, 72), "triton", torch.float32, (torch.float32,) * 3, ("x", "u"),
      mask=mask, dropout_p=0.2, rng_state=RNG)
print("every case is right")
"""


def test_the_interpreter_agrees() -> None:
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "every case is right"
