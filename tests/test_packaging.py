"""The build: what setup.py does where something is missing (Dao-AILab/flash-attention#1421)."""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from setuptools import Distribution

ROOT = Path(__file__).parent.parent


def _copy(folder: Path) -> Path:
    copy = folder / "svdkern-source"
    for name in ("svdkern", "csrc", "triton_kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "setup_cuda.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def _wheel(source: Path, before: str = "", **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    code = f"import sys, runpy\n{before}\nsys.argv = ['setup.py', 'bdist_wheel', '--dist-dir', 'dist']\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "runpy.run_path('setup.py', run_name='__main__')"],
        cwd=source, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    return done, [path.name for path in (source / "dist").glob("*.whl")]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"SVDKERN_BUILD": "0"}, "SVDKERN_BUILD=0"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler"),
    ],
)
def test_a_pure_wheel_where_nothing_can_be_compiled(tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    source = _copy(tmp_path)
    done, wheels = _wheel(source, **environment)
    assert done.returncode == 0, done.stderr
    assert wheels == ["svdkern-0.1.0-py3-none-any.whl"]
    lines = [line for line in done.stderr.splitlines() if "building without compiled kernels" in line]
    assert len(lines) == 1 and reason in lines[0]


def test_a_build_environment_without_torch_still_gives_a_package(tmp_path: Path) -> None:
    """pip builds in isolation: torch may be installed and still not be there."""
    source = _copy(tmp_path)
    done, wheels = _wheel(source, before="sys.modules['torch'] = None")
    assert done.returncode == 0, done.stderr
    assert wheels == ["svdkern-0.1.0-py3-none-any.whl"]
    assert "no torch in the build environment" in done.stderr


def test_the_build_takes_any_folder_name_and_any_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ninja would run names files that are there and flags that are whole, with all that is special to it or to the shell."""
    source = _copy(tmp_path / "it's a $folder: with spaces")
    setup = SimpleNamespace(**runpy.run_path(str(source / "setup.py")))
    if setup.ninja() is None:
        pytest.skip("needs ninja")
    monkeypatch.setenv("SVDKERN_CUDA", "0")  # test_packaging_cuda.py has the rest
    monkeypatch.setenv("CXXFLAGS", "-DNAME='a b'")
    monkeypatch.setenv("LDFLAGS", "-Wl,-rpath,'$ORIGIN/lib'")
    torch, build = source / "torch", source / "build"
    build.mkdir()
    (build / "build.ninja").write_text(setup.NinjaBuild(Distribution()).rules(torch, build / "_C.abi3.so"))

    def ninja(*arguments: str) -> str:
        done = subprocess.run([setup.ninja(), "-C", str(build), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    ninja("-n")  # fails where a source is not there
    *compiles, link = (shlex.split(line) for line in ninja("-t", "commands").splitlines() if "-o" in line)
    compiled = {words[words.index("-c") + 1] for words in compiles}
    assert compiled == {str(source / name) for name in (*setup.kernel_sources(), "csrc/ops.cpp", "csrc/module.c")}
    operators = next(words for words in compiles if words[-1] == "ops.o")
    assert operators[operators.index("-isystem") + 1] == str(torch / "include")
    assert "-DNAME=a b" in operators
    assert {f"-Wl,--version-script={source}/csrc/exports.map", f"-L{torch}/lib", "-Wl,-rpath,$ORIGIN/lib"} <= set(link)


def test_the_source_distribution_holds_the_kernels(tmp_path: Path) -> None:
    import tarfile

    source = _copy(tmp_path)
    done = subprocess.run([sys.executable, "setup.py", "sdist"], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = (source / "dist").glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert expected <= names
    assert {"setup.py", "setup_cuda.py", "pyproject.toml", "LICENSE", "svdkern/backends/choices.json"} <= names


def test_the_version_is_one() -> None:
    import svdkern

    assert f'version = "{svdkern.__version__}"' in (ROOT / "pyproject.toml").read_text()
