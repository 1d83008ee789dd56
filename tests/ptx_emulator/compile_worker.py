"""Compiles Triton kernels for GPUs that are not there: one request a line on stdin, one answer a line on stdout.

A process of its own, because two versions of Triton cannot live in one; the version is whatever PYTHONPATH finds first.
Request: {"module", "kernel", "signature", "constants", "divisible", "arch", "options", "out"}; the PTX, the cubin and the
metadata are written to out + ".ptx", ".cubin", ".json". Answer: {"error": null or text}.
"""

import sys

sys.path.pop(0)  # this file's folder: its modules are not top-level ones

import importlib  # noqa: E402
import json  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402


def compile_one(request: dict) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(request["module"]), request["kernel"])
    signature = request["signature"]
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in request["divisible"]}
    constants = {(list(signature).index(name),): value for name, value in request["constants"].items()}
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", request["arch"], 32)
    compiled = triton.compile(source, target=target, options=request["options"])
    metadata = {
        "triton": triton.__version__,
        "shared": compiled.metadata.shared,
        "num_warps": compiled.metadata.num_warps,
        "tensor_maps": [dict(m) for m in getattr(compiled.metadata, "tensordesc_meta", None) or []],
    }
    out = Path(request["out"])
    out.with_suffix(".cubin").write_bytes(compiled.asm["cubin"])
    out.with_suffix(".ptx").write_text(compiled.asm["ptx"])
    temporary = out.with_suffix(".json.partial")
    temporary.write_text(json.dumps(metadata, default=str))
    temporary.rename(out.with_suffix(".json"))  # last: what has a .json is whole


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        try:
            compile_one(json.loads(line))
            error = None
        except Exception:  # the test that asked shows it
            error = traceback.format_exc()
        print(json.dumps({"error": error}), file=answers, flush=True)


if __name__ == "__main__":
    main()
