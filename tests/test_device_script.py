"""bench/device.sh names tests by words: they must name some."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_sanitizer_has_kernels_to_look_at() -> None:
    words = re.search(r'^SANITIZED="([^"]+)"', (ROOT / "bench" / "device.sh").read_text(), re.M)
    assert words
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--collect-only", "-k", words.group(1)]
    told = subprocess.run([*command, "tests/test_gpu_backends.py"], capture_output=True, text=True, cwd=ROOT).stdout
    assert sorted(re.findall(r"::(test_\w+)\[cuda", told)) == [
        "test_a_core",
        "test_dropout",
        "test_the_same_bits_every_time",
    ]
