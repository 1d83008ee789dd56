"""Builds the tests' own module from the kernels' sources and the flags that setup.py compiles them with (cached in build/)."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
NAME = "cpu_kernels_module"


def _setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("svdkern_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def why_not() -> str | None:
    """Why the module cannot be built here, None if it can."""
    if shutil.which("g++") is None:
        return "g++"
    for package in ("pybind11", "numpy"):
        if importlib.util.find_spec(package) is None:
            return package
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python.h (python3-dev)"
    return None if _setup().ninja() else "ninja"


def build(sanitize: bool) -> Path:
    """The built module's file; with the address and undefined-behaviour sanitizers if asked."""
    setup = _setup()
    folder = ROOT / "build" / ("cpu_kernels_sanitized" if sanitize else "cpu_kernels")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # test processes side by side build once
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(folder, setup, sanitize)


def _build(folder: Path, setup: ModuleType, sanitize: bool) -> Path:
    import pybind11

    mode = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined" if sanitize else "-O2"
    python, csrc = f"-I{sysconfig.get_paths()['include']}", f"-I{ROOT / 'csrc'}"
    includes = setup.ninja_words(python, "-isystem", pybind11.get_include(), csrc)
    lines = [
        f"rule cxx\n  command = g++ -std=c++20 {mode} -fPIC -Wall -Wextra -Werror $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = g++ {mode} -shared -o $out $in -lpthread",
    ]
    objects = []
    for source, flags in {**setup.kernel_sources(), "tests/cpu_kernels/module.cpp": includes}.items():
        # the sanitizers make GCC 12 see uninitialised values and unused tables in the templates of its own headers
        flags += " -fvisibility=hidden -Wno-unused-function" + (" -Wno-maybe-uninitialized" if sanitize else "")
        objects.append(f"{Path(source).stem}.o")
        lines.append(f"build {objects[-1]}: cxx {setup.ninja_path(ROOT / source)}\n  flags = {flags}")
    library = f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    lines.append(f"build {library}: link {' '.join(objects)}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    command = [setup.ninja(), "-C", str(folder), "-j", str(setup.jobs()), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / library


def load(path: Path) -> ModuleType:
    """Imports the built module from its file."""
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
