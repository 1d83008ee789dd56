"""Triton kernel -> PTX and cubin, for any architecture and for each version of Triton that is installed, cached on disk.

Besides the interpreter's own Triton those in `<environment>/triton-<version>/` count (pip install --target). What is compiled
lies under `build/ptx/`, named by a hash of the kernels' sources and of the request.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "ptx"


@dataclass(frozen=True)
class Compiled:
    ptx: str
    cubin: Path
    shared: int  # bytes of dynamic shared memory
    num_warps: int
    tensor_maps: tuple[dict, ...]


@functools.cache
def versions() -> dict[str, str | None]:
    """Triton versions -> folder to put first on the path (None: the interpreter's own)."""
    found: dict[str, str | None] = {importlib.metadata.version("triton"): None}
    for folder in sorted(Path(sys.prefix).glob("triton-*")):
        found.setdefault(folder.name.removeprefix("triton-"), str(folder))
    return found


@functools.cache
def _worker(version: str) -> subprocess.Popen:
    environment = dict(os.environ)
    folder = versions()[version]
    paths = [p for p in (folder, str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH")) if p]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    environment.pop("TRITON_INTERPRET", None)
    worker = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("compile_worker.py"))],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    atexit.register(worker.kill)
    return worker


@functools.cache
def _sources(module: str) -> str:
    """A hash of every file beside the module: kernels import each other."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    digest = hashlib.sha256()
    for file in sorted(Path(spec.origin).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=64)
def _compiled(request: str, version: str) -> Compiled:
    name = hashlib.sha256((request + version).encode()).hexdigest()[:24]
    CACHE.mkdir(parents=True, exist_ok=True)
    out = CACHE / name
    if not out.with_suffix(".json").is_file():
        fields = json.loads(request)
        del fields["sources"]
        worker = _worker(version)
        partial = CACHE / f"{name}-{os.getpid()}"
        print(json.dumps(fields | {"out": str(partial)}), file=worker.stdin, flush=True)
        answer = worker.stdout.readline()
        if not answer:
            raise RuntimeError(f"the compiler of Triton {version} ended with status {worker.wait()} over {request}")
        if error := json.loads(answer)["error"]:
            raise RuntimeError(f"Triton {version} cannot compile {fields['module']}.{fields['kernel']}:\n{error}")
        for suffix in (".ptx", ".cubin", ".json"):
            partial.with_suffix(suffix).rename(out.with_suffix(suffix))
    metadata = json.loads(out.with_suffix(".json").read_text())
    return Compiled(
        out.with_suffix(".ptx").read_text(),
        out.with_suffix(".cubin"),
        metadata["shared"],
        metadata["num_warps"],
        tuple(metadata["tensor_maps"]),
    )


def compile_kernel(
    module: str,
    kernel: str,
    signature: dict[str, str],
    constants: dict[str, object],
    divisible: set[str],
    arch: int,
    version: str | None = None,
    **options: object,
) -> Compiled:
    """Compile `module.kernel` for sm_`arch`.

    Args:
        signature: Triton type of every parameter in order ("*bf16", "i32", "constexpr", "tensordesc<bf16[128,64]>").
        constants: values of those that are "constexpr".
        divisible: parameters known to be multiples of 16.
        version: of Triton; None: the interpreter's own.
        options: num_warps, num_stages, ...
    """
    request = {
        "module": module,
        "kernel": kernel,
        "signature": signature,
        "constants": constants,
        "divisible": sorted(divisible),
        "arch": arch,
        "options": options,
        "sources": _sources(module),
    }
    return _compiled(json.dumps(request), version or next(iter(versions())))


@functools.cache
def tool(name: str) -> str:
    """The path of cuobjdump or nvdisasm, which come with Triton."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: which triton is this?")
    return str(path)
