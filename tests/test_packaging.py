"""The build: what setup.py does where something is missing (Dao-AILab/flash-attention#1421)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _copy(folder: Path) -> Path:
    copy = folder / "svdkern-source"
    for name in ("svdkern", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
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


def test_the_source_distribution_holds_the_kernels(tmp_path: Path) -> None:
    import tarfile

    source = _copy(tmp_path)
    done = subprocess.run([sys.executable, "setup.py", "sdist"], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = (source / "dist").glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert expected <= names
    assert {"setup.py", "pyproject.toml", "LICENSE"} <= names


def test_the_version_is_one() -> None:
    import svdkern

    assert f'version = "{svdkern.__version__}"' in (ROOT / "pyproject.toml").read_text()
