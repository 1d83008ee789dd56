"""Build of svdkern: pure Python plus one extension, ``svdkern._C`` (LibTorch Stable ABI, CPython abi3), built by ninja.

One wheel serves every CPython >= 3.10 and every torch >= 2.11. Without a compiler or torch in the build environment, or with
``SVDKERN_BUILD=0``, the wheel is pure Python and one line says what it lacks. Nothing is downloaded.

Environment: ``CXX``, ``CC``, ``CXXFLAGS``, ``LDFLAGS``, ``MAX_JOBS``, ``SVDKERN_BUILD``; setup_cuda.py has more.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError as old:  # without build isolation nothing else checks [build-system].requires
    raise SystemExit("svdkern needs setuptools >= 77 to build: pip install --upgrade setuptools") from old

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # pip does not
import setup_cuda  # noqa: E402

BYTES_PER_JOB = 1 << 30  # what one compiler may need
TORCH_TARGET = "0x020a000000000000"  # the oldest stable ABI that is spoken: torch 2.10
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"

# Kernel files: one translation unit an instruction set, chosen at run time; each FMA is meant, so contraction is allowed.
KERNELS_X86 = {
    "csrc/cpu/isa_baseline.cpp": "-msse4.2 -mpopcnt -ffp-contract=fast",
    "csrc/cpu/isa_avx2.cpp": "-mavx2 -mfma -mf16c -ffp-contract=fast",
    "csrc/cpu/isa_avx512.cpp": f"{AVX512} -ffp-contract=fast",
    "csrc/cpu/isa_avx512_bf16.cpp": f"{AVX512} -mavx512bf16 -ffp-contract=fast",
    "csrc/cpu/isa_amx_bf16.cpp": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16 -ffp-contract=fast",
    # The exact residual is defined by its roundings: no FMA.
    "csrc/cpu/residual_baseline.cpp": "-msse4.2 -ffp-contract=off",
    "csrc/cpu/residual_avx2.cpp": "-mavx2 -mfma -mf16c -ffp-contract=off",
    "csrc/cpu/residual_avx512.cpp": f"{AVX512} -ffp-contract=off",
}
KERNELS_OTHER = {
    "csrc/cpu/isa_baseline.cpp": "-ffp-contract=fast",
    "csrc/cpu/residual_baseline.cpp": "-ffp-contract=off",
}
KERNELS_COMMON = {"csrc/cpu/select.cpp": ""}


def kernel_sources() -> dict[str, str]:
    """Torch-free sources and their own flags for the machine that is built on; the tests build their module from them too."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return {**(KERNELS_X86 if x86 else KERNELS_OTHER), **KERNELS_COMMON}


def jobs() -> int:
    """Parallel compilers: MAX_JOBS, or as many as cores and free memory allow."""
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return cores
    return max(1, min(cores, free // BYTES_PER_JOB))


def compiler(variable: str, default: str) -> list[str] | None:
    """The command of a compiler, None where there is none."""
    command = shlex.split(os.environ.get(variable, "")) or [default]
    return command if shutil.which(command[0]) else None


def ninja() -> str | None:
    """The ninja of the build environment, or of the machine."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja")
    return str(Path(BIN_DIR) / "ninja")


def ninja_path(path: Path) -> str:
    """A path as a build statement takes it: a checkout may lie in a folder with a space in its name."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_words(*words: str | Path) -> str:
    """Words of a command, as they are: quoted for the shell, and then for ninja."""
    return shlex.join(map(str, words)).replace("$", "$$")


def object_name(source: str) -> str:
    """csrc/cuda/ops.cpp -> cuda_ops.o: two folders may have a file of one name."""
    return "_".join(Path(source).with_suffix(".o").parts[1:])


def torch_directory() -> Path | None:
    """Where torch is installed; it is looked for, not imported (importing it costs seconds)."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def missing() -> str | None:
    """Why the extension cannot be built, None if it can."""
    if os.environ.get("SVDKERN_BUILD") == "0":
        return "SVDKERN_BUILD=0"
    if sys.platform != "linux":
        return f"no kernels for {sys.platform} yet"
    if compiler("CXX", "g++") is None or compiler("CC", "gcc") is None:
        return "no C++ compiler (g++, or CXX and CC)"
    if ninja() is None:
        return "no ninja"
    torch = torch_directory()
    if torch is None:
        return "no torch in the build environment (pip install --no-build-isolation builds against yours)"
    if not (torch / "include/torch/csrc/stable/library.h").exists():
        return f"{torch} has no stable-ABI headers (torch >= 2.10)"
    return None


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it; the library is linked aside and renamed, so a running import never sees half of it."""

    def build_extension(self, ext: Extension) -> None:
        torch = torch_directory()
        assert torch is not None
        # one place for wheels, editable installs and --inplace: setuptools would take a fresh one, and ninja start over
        build = ROOT.resolve() / "build" / f"ninja-{sysconfig.get_platform()}"
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        linked = build / "_C.abi3.so"
        (build / "build.ninja").write_text(self.rules(torch, linked))
        if subprocess.run([str(ninja()), "-C", str(build), "-j", str(jobs()), "--quiet"]).returncode:
            raise SystemExit(
                "svdkern: compiling the kernels failed (messages above; GCC 11 or newer is needed). "
                "SVDKERN_BUILD=0 installs without them: every call then uses PyTorch's own operators"
            )
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copy2(linked, aside)
        aside.replace(target)

    def rules(self, torch: Path, linked: Path) -> str:
        strict = " -Werror" if os.environ.get("SVDKERN_WERROR") == "1" else ""  # a new compiler's warning stops no user
        warnings = f"-Wall -Wextra{strict}"
        common = f"-O3 -fPIC -fvisibility=hidden {warnings}"
        cxx = ninja_words(*compiler("CXX", "g++") or [])
        cc = ninja_words(*compiler("CC", "gcc") or [])
        cxxflags, ldflags = (ninja_words(*shlex.split(os.environ.get(name, ""))) for name in ("CXXFLAGS", "LDFLAGS"))
        root = ROOT.resolve()
        exports = root / "csrc/exports.map"
        script = ninja_words(f"-Wl,--version-script={exports}")
        operators = f"-DTORCH_TARGET_VERSION={TORCH_TARGET} -isystem {ninja_words(torch / 'include')}"
        kit = setup_cuda.toolkit()
        cuda = isinstance(kit, setup_cuda.Toolkit)
        built = f'-DSVDKERN_CUDA_BUILD="{kit.description if cuda else ""}"'
        sources = {**kernel_sources(), "csrc/ops.cpp": f"{operators} {ninja_words(built)}"}
        if cuda:
            sources |= dict.fromkeys(setup_cuda.OPERATORS, f"{operators} -isystem {ninja_words(kit.include)}")
            ldflags = f"{setup_cuda.link_flags(kit, ninja_words)} {ldflags}"
        lines = [
            "ninja_required_version = 1.5",
            f"rule cxx\n  command = {cxx} -std=c++20 {common} {cxxflags} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = $in",
            f"rule cc\n  command = {cc} {common} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = $in",
            f"rule link\n  command = {cxx} -shared {script} -Wl,--as-needed -o $out $in "
            f"-L{ninja_words(torch / 'lib')} -ltorch -ltorch_cpu -lc10 {ldflags}",
            "  description = $out",
        ]
        objects = []
        for source, flags in sources.items():
            objects.append(object_name(source))
            lines.append(f"build {objects[-1]}: cxx {ninja_path(root / source)}\n  flags = {flags}")
        if cuda:
            lines.insert(1, setup_cuda.rule(kit, compiler("CXX", "g++") or [], ninja_words))
            for source in setup_cuda.SOURCES:
                objects.append(object_name(source))
                lines.append(f"build {objects[-1]}: nvcc {ninja_path(root / source)}")
        lines.append(f"build module.o: cc {ninja_path(root / 'csrc/module.c')}\n  flags =")
        lines.append(f"build {linked.name}: link {' '.join(objects)} module.o | {ninja_path(exports)}")
        return "\n".join(lines) + "\n"


class Abi3Wheel(bdist_wheel):
    """cp310-abi3 with the extension, py3-none-any without."""

    def finalize_options(self) -> None:
        if self.distribution.ext_modules:
            self.py_limited_api = "cp310"
        super().finalize_options()


def extensions() -> list[Extension]:
    """The extension, or an empty list and one line on what is lost."""
    commands = {"build_ext", "bdist_wheel", "build", "install", "develop", "editable_wheel"}
    if not commands & set(sys.argv):
        return [Extension("svdkern._C", [], py_limited_api=True)]
    reason = missing()
    if reason is None:
        kit = setup_cuda.toolkit()
        if isinstance(kit, str):
            print(
                f"svdkern: {kit}: building without CUDA kernels, GPUs will use Triton's or PyTorch's", file=sys.stderr
            )
        return [Extension("svdkern._C", [], py_limited_api=True)]
    print(
        f"svdkern: {reason}: building without compiled kernels, every call will use PyTorch's own operators",
        file=sys.stderr,
    )
    return []


if __name__ == "__main__":
    setup(
        # The Triton kernels have a folder of their own in the checkout and are svdkern.triton_kernels where installed.
        packages=[*find_packages(include=["svdkern", "svdkern.*"]), "svdkern.triton_kernels"],
        package_dir={"svdkern.triton_kernels": "triton_kernels"},
        ext_modules=extensions(),
        cmdclass={"build_ext": NinjaBuild, "bdist_wheel": Abi3Wheel},
    )
