"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: no access beside an array, no undefined step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import building
import pytest

RUN = """
import building, exercise, numpy as np, sys
from pathlib import Path
kernels = building.load(Path(sys.argv[1]))
kernels.set_pieces(2)
drop = (5, 6, 20000, 0)
shapes = [(1, 65, 33, 3), (7, 129, 65, 17), (16, 530, 70, 16), (17, 33, 17, 1), (37, 131, 261, 19), (515, 34, 9, 2),
          (4, 33, 66, 128), (3, 40, 21, 64)]
for isa, runs in kernels.isas():
    for i, shape in enumerate(shapes if runs else []):
        for j, dtype in enumerate(["float32", "bfloat16", "float16"]):
            layout = ["rows", "columns", "neither"][(i + j) % 3]
            exercise.whole_layer(kernels, isa, dtype, "float32", shape, layout, drop if j % 2 else (), ["sigma", "core"][i % 2],
                                 gates=(0, 1, shape[0])[(i + j) % 3])  # fmt: skip
            exercise.whole_layer(kernels, isa, dtype, "bfloat16", shape, layout, (), "plain", "columns")
            exercise.primitives(kernels, isa, dtype, "float16", (min(3 * shape[0], 99), shape[1], shape[3]), layout, drop)
    assert len(kernels.philox_bits(isa, 1, 2, 3, 4, 5)) == 40 if runs else True
    for dtype in [np.float16, np.float64] if runs else []:
        w = np.ones((3, 37), dtype)
        kernels.residual(isa, w, np.ones((37, 2), np.float32), None, np.ones((3, 2), np.float32), 1.0, w)
print("clean")
"""


def test_no_sanitizer_complains() -> None:
    if (missing := building.why_not()) is not None:
        pytest.skip(f"needs {missing} to build the tests' module")
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip("needs libasan")
    module = building.build(sanitize=True)
    environment = os.environ | {
        "LD_PRELOAD": found,
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    done = subprocess.run([sys.executable, "-c", RUN, str(module)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "clean", done.stderr[-4000:]
