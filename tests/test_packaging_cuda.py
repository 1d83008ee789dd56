"""The CUDA part of the build: which nvcc is taken, for which GPUs, what is said without one; and what is in the built extension."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from ptx_emulator.compile import tool
from setuptools import Distribution

from svdkern.backends import extension

ROOT = Path(__file__).parent.parent


@pytest.fixture
def setup_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module, in an environment without any toolkit."""
    for name in ("CUDA_HOME", "CUDA_PATH", "SVDKERN_CUDA", "SVDKERN_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    spec = importlib.util.spec_from_file_location("setup_cuda", ROOT / "setup_cuda.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    return module


def toolkit(folder: Path, version: str = "13.0", static: bool = True, archs: str = "75 80 90 100 120") -> Path:
    """A folder like a toolkit's, whose nvcc answers what a build asks."""
    for name, file in (
        ("include", "cuda_runtime_api.h"),
        ("lib", "libcudart_static.a" if static else "libcudart.so.13"),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / file).touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    answers = {
        "--version": f"Cuda compilation tools, release {version}, V{version}.88",
        "--dryrun": f"#$ TOP={nvcc.parent}/..",
        "--list-gpu-arch": "\n".join(f"compute_{arch}" for arch in archs.split()),
    }
    for option, answer in answers.items():
        nvcc.with_name(f"nvcc{option}").write_text(answer)
    nvcc.write_text('#!/bin/sh\ncat "$0$1"\n')
    nvcc.chmod(0o755)
    return nvcc


def test_nvcc_is_taken_from_cuda_home_then_path_then_packages(
    setup_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert setup_cuda.toolkit() == "no nvcc (CUDA_HOME, PATH, or PyPI's nvidia-cuda-nvcc)"
    packaged = toolkit(tmp_path / "nvidia" / "cu13", "13.1")
    namespace = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(setup_cuda, "find_spec", lambda name: namespace)
    kit = setup_cuda.toolkit()
    assert (kit.nvcc, kit.version, kit.libraries) == (packaged, (13, 1), packaged.parents[1] / "lib")
    on_path = toolkit(tmp_path / "a toolkit")
    (tmp_path / "path").mkdir()
    wrapper = tmp_path / "path" / "nvcc"
    wrapper.write_text(f'#!/bin/sh\nexec "{on_path}" "$@"\n')
    wrapper.chmod(0o755)
    kit = setup_cuda.toolkit()
    assert (kit.nvcc, kit.include) == (wrapper, on_path.parents[1] / "include")
    assert kit.description == "nvcc 13.0: 80 90+ptx 100 120"
    named = toolkit(tmp_path / "named", "12.9")
    monkeypatch.setenv("CUDA_HOME", str(named.parents[1]))
    assert setup_cuda.toolkit().nvcc == named
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert setup_cuda.toolkit() == f"no nvcc in CUDA_HOME={tmp_path / 'nowhere'}"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"version": "12.6"}, "is of CUDA 12.6, the kernels need 12.8"),
        ({"static": False}, "no static runtime beside it"),
    ],
)
def test_a_toolkit_that_will_not_do_is_said_why(
    setup_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict, reason: str
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "kit", **options).parents[1]))
    assert reason in setup_cuda.toolkit()
    monkeypatch.setenv("SVDKERN_CUDA", "1")
    with pytest.raises(SystemExit, match=f"SVDKERN_CUDA=1, and .*{reason}"):
        setup_cuda.toolkit()


def test_the_environment_decides(setup_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "kit").parents[1]))
    monkeypatch.setenv("SVDKERN_ARCHS", "80; 120+ptx")
    assert setup_cuda.targets(setup_cuda.toolkit().archs) == [
        "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]  # fmt: skip
    for wrong in ("75", "8.0", "sm_80", "130"):
        monkeypatch.setenv("SVDKERN_ARCHS", wrong)
        with pytest.raises(SystemExit, match=f"'{wrong}' in SVDKERN_ARCHS is none of 80, 90, 100, 120"):
            setup_cuda.toolkit()
    monkeypatch.setenv("SVDKERN_CUDA", "0")
    assert setup_cuda.toolkit() == "SVDKERN_CUDA=0"
    monkeypatch.setenv("SVDKERN_CUDA", "yes")
    with pytest.raises(SystemExit, match="SVDKERN_CUDA is 'yes', expected 0, 1 or auto"):
        setup_cuda.toolkit()


def test_ninja_compiles_each_kernel_whatever_the_folders_are_called(
    setup_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = toolkit(tmp_path / "it's a $toolkit: with spaces")
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parents[1]))
    monkeypatch.setenv("CXX", "env g++")
    setup = SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))
    if setup.ninja() is None:
        pytest.skip("needs ninja")
    (tmp_path / "build.ninja").write_text(
        setup.NinjaBuild(Distribution()).rules(tmp_path / "torch", tmp_path / "_C.abi3.so")
    )
    told = subprocess.run(
        [setup.ninja(), "-C", str(tmp_path), "-t", "commands"], capture_output=True, text=True, check=True
    )
    commands = [shlex.split(line) for line in told.stdout.splitlines() if "-o" in line]
    by_nvcc = [words for words in commands if words[0] == str(nvcc)]
    assert {words[words.index("-c") + 1] for words in by_nvcc} == {str(ROOT / name) for name in setup_cuda.SOURCES}
    for words in by_nvcc:
        assert words[words.index("-ccbin") + 1] == "g++"
        assert "-gencode=arch=compute_90,code=compute_90" in words
    for source in setup_cuda.OPERATORS:
        assert any(str(ROOT / source) in words and str(nvcc.parents[1] / "include") in words for words in commands)
    link = commands[-1]
    assert f"-L{nvcc.parents[1]}/lib" in link and "-lcudart_static" in link and "-lculibos" not in link
    assert link.index("-lcudart_static") > max(i for i, word in enumerate(link) if word.endswith(".o"))
    operators = next(words for words in commands if str(ROOT / "csrc/ops.cpp") in words)
    assert '-DSVDKERN_CUDA_BUILD="nvcc 13.0: 80 90+ptx 100 120"' in operators


def test_a_build_without_nvcc_says_so_in_one_line(
    setup_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    monkeypatch.setitem(sys.modules, "setup_cuda", setup_cuda)
    setup = SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))
    if setup.missing() is not None:
        pytest.skip(f"needs what a build needs: {setup.missing()}")
    assert setup.extensions()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "no nvcc" in lines[0] and "building without CUDA kernels" in lines[0]


# ------------------------------------------------------------------------------------------------ the built extension


@pytest.fixture
def built() -> tuple[Path, list[str]]:
    """The extension's file, and the GPUs that it says it has code for."""
    if extension.why_missing is not None:
        pytest.skip(f"needs the compiled extension: {extension.why_missing}")
    said = torch.ops.svdkern._cuda_build()
    if not said:
        pytest.skip("needs an extension with CUDA kernels: build it with nvcc (CUDA 12.8 or newer)")
    spec = importlib.util.find_spec("svdkern._C")
    assert spec and spec.origin
    return Path(spec.origin), said.partition(": ")[2].split()


def test_the_extension_has_code_for_each_gpu_that_it_names(built: tuple[Path, list[str]]) -> None:
    library, archs = built
    listed = subprocess.run(
        [tool("cuobjdump"), "-lelf", "-lptx", library], capture_output=True, text=True, check=True
    ).stdout
    cubins = set(re.findall(r"\.sm_(\d+)\.cubin", listed))
    texts = set(re.findall(r"\.sm_(\d+)\.ptx", listed))
    assert cubins == {arch.removesuffix("+ptx") for arch in archs}
    assert texts == {arch.removesuffix("+ptx") for arch in archs if arch.endswith("+ptx")}


def test_the_extension_needs_no_cuda_library(built: tuple[Path, list[str]]) -> None:
    """It was imported here; where there is no driver, that is the proof that it needs none."""
    told = subprocess.run(["readelf", "-d", built[0]], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", told)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "cuda" in name or "cudart" in name or "nvidia" in name]
