"""Builds ``svdkern._C``: one shared library on LibTorch's stable ABI and CPython's limited API, compiled through ninja.

The wheel it makes (cp310-abi3) runs with every Python >= 3.10 and torch >= 2.11, on CPUs with and without AVX: each
instruction set is a translation unit of its own, chosen when the library runs. Where torch or a C++ compiler is missing, or
SVDKERN_BUILD=0, the result is a pure-Python package and one line says what is lost. Nothing is downloaded.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
LOST = "svdkern is built without its compiled kernels ({}): every call takes the slower eager backend"

COMMON = ["-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
CXX = ["-std=c++20", "-fvisibility-inlines-hidden", *COMMON]
# One file an instruction set. -ffp-contract=fast: a * b + c is one FMA where there is one.
X86_LEVELS = {
    "baseline": ["-march=x86-64-v2"],
    "avx2": ["-march=x86-64-v2", "-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-march=x86-64-v2", *"-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl".split()],
    "avx512_bf16": [
        "-march=x86-64-v2", *"-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16".split(),
    ],
}  # fmt: skip


def levels() -> dict[str, list[str]]:
    """The flags of every instruction set that this architecture has a file for."""
    return X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else {"neon": []}


def why_pure() -> str | None:
    """None if the extension can be built here, else why not."""
    if os.environ.get("SVDKERN_BUILD", "1") == "0":
        return "SVDKERN_BUILD=0"
    if sys.platform != "linux":
        return f"no build for {sys.platform} yet"
    if shutil.which(compilers()[1].split()[0]) is None:
        return f"no C++ compiler {compilers()[1]!r}"
    if find_ninja() is None:
        return "no ninja"
    try:
        import torch  # noqa: F401  (only here: an environment without torch still gets a package)
    except ImportError:
        return "no torch where it is built; use --no-build-isolation with torch installed"
    return None


def compilers() -> tuple[str, str]:
    """The C and the C++ compiler."""
    return os.environ.get("CC", "gcc"), os.environ.get("CXX", "g++")


def find_ninja() -> str | None:
    """The ninja program, from the environment's PyPI package or the PATH."""
    beside = Path(sys.executable).with_name("ninja")
    if beside.exists():
        return str(beside)
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        return shutil.which("ninja")


def jobs() -> int:
    """As many compilers at once as there are cores, and a gigabyte of free memory for each."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    return max(1, min(len(os.sched_getaffinity(0)), free))


class BuildWithNinja(build_ext):
    """Writes a build.ninja and runs it: parallel, and only what changed."""

    def run(self) -> None:
        reason = why_pure()
        if reason is None:
            super().run()
        else:
            print(LOST.format(reason), file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        import torch

        folder = (ROOT / "build" / f"native-{platform.machine()}").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / "_C.abi3.so"
        (folder / "build.ninja").write_text(self._rules(Path(torch.__file__).parent, library))
        ninja = find_ninja()
        assert ninja is not None
        subprocess.run([ninja, "-C", str(folder), "-j", str(jobs())], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(target.name + ".new")  # a running process keeps the file that it has mapped
        shutil.copy2(library, beside)
        os.replace(beside, target)

    def _rules(self, torch_home: Path, library: Path) -> str:
        cc, cxx = compilers()
        torch_flags = f"-isystem {torch_home}/include -DTORCH_TARGET_VERSION=0x020a000000000000"
        python_flags = f"-I{sysconfig.get_paths()['include']}"
        edges: list[tuple[str, Path, str]] = [
            ("c", CSRC / "module.c", python_flags),
            ("cxx", CSRC / "ops.cpp", torch_flags),
            ("cxx", CSRC / "cpu" / "select.cpp", ""),
            # The exact residual is defined without fused multiply-add.
            ("cxx", CSRC / "cpu" / "residual.cpp", "-ffp-contract=off"),
        ]
        # CUDA sources will join here: an edge of an nvcc rule each, their objects in the same link.
        for name, flags in levels().items():
            edges.append(("cxx", CSRC / "cpu" / f"isa_{name}.cpp", " ".join(["-ffp-contract=fast", *flags])))
        lines = [
            f"cflags = {' '.join(COMMON)}",
            f"cxxflags = {' '.join(CXX)}",
            f"rule c\n  command = {cc} -MMD -MF $out.d $cflags $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule cxx\n  command = {cxx} -MMD -MF $out.d $cxxflags $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = {cxx} -shared -o $out $in -Wl,--version-script={CSRC}/exports.map"
            f" -Wl,--as-needed -L{torch_home}/lib -ltorch -ltorch_cpu -lc10",
        ]
        objects = []
        for rule, source, flags in edges:
            objects.append(f"{source.stem}.o")
            lines.append(f"build {objects[-1]}: {rule} {source}\n  flags = {flags}")
        lines.append(f"build {library.name}: link {' '.join(objects)} | {CSRC}/exports.map")
        lines.append(f"default {library.name}")
        return "\n".join(lines) + "\n"


class AbiWheel(bdist_wheel):
    """cp310-abi3 with the extension, py3-none-any without."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if why_pure() is None:
            self.py_limited_api = "cp310"
        else:
            self.root_is_pure = True

    def get_tag(self) -> tuple[str, str, str]:
        return super().get_tag() if why_pure() is None else ("py3", "none", "any")


setup(
    ext_modules=[Extension("svdkern._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildWithNinja, "bdist_wheel": AbiWheel},
)
