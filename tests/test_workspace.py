"""The folder of finished parts: removed meanwhile, removed in part, published, by whom it is locked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from svdkern.workspace import Workspace, is_published, workspace_of

SETTINGS = {"rank": 4}


def add(workspace: Workspace, *names: str) -> None:
    for name in names:
        workspace.add(name, lambda path, name=name: path.write_text(name))  # type: ignore[misc]


def test_parts_are_kept_and_become_the_result(tmp_path: Path) -> None:
    """A part may have any name, the settings' too, and lie in a subfolder."""
    names = ["settings.json", "x.tmp", "1_Pooling/config.json"]
    with workspace_of(tmp_path / "a", SETTINGS) as workspace:
        add(workspace, *names)
    with workspace_of(tmp_path / "a", SETTINGS) as workspace:
        assert all(workspace.has(name) for name in names) and not workspace.published
        workspace.publish()
        assert workspace.published and is_published(tmp_path / "a", SETTINGS)
        assert not is_published(tmp_path / "a", {"rank": 5}) and not is_published(tmp_path / "b", SETTINGS)
        workspace.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert {name: (tmp_path / "a" / name).read_text() for name in names} == {name: name for name in names}


def test_a_link_to_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with workspace_of(tmp_path / "link", SETTINGS) as workspace:
        add(workspace, "x")
        workspace.publish()
        workspace.remove()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "x").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_other_settings_and_other_folders_are_refused(tmp_path: Path) -> None:
    with workspace_of(tmp_path / "a", SETTINGS) as workspace:
        add(workspace, "x")
    with (
        pytest.raises(ValueError, match=r"started otherwise \(rank was 4, is 5\)"),
        workspace_of(tmp_path / "a", {"rank": 5}),
    ):
        pass
    workspace.settings.write_text("{")
    with pytest.raises(ValueError, match="its settings are damaged"), workspace_of(tmp_path / "a", SETTINGS):
        pass
    workspace.settings.unlink()
    with pytest.raises(ValueError, match="not the folder of an unfinished run"), workspace_of(tmp_path / "a", SETTINGS):
        pass
    assert workspace.path("x").read_text() == "x"


@pytest.mark.parametrize("step", ["parts", "settings", "folder"])
def test_a_removal_that_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    with workspace_of(tmp_path / "a", SETTINGS) as workspace:
        add(workspace, "x", "y")
        at = {"parts": workspace.parts, "settings": workspace.settings, "folder": workspace.folder}[step]

        def interrupted(real):  # type: ignore[no-untyped-def]
            def remove(path: Path, *more: object) -> None:
                if path != at:
                    return real(path, *more)
                if step == "parts":
                    os.unlink(workspace.path("x"))  # the removal of a tree may be anywhere in it
                raise KeyboardInterrupt

            return remove

        for owner, name in ((shutil, "rmtree"), (Path, "unlink"), (Path, "rmdir")):
            monkeypatch.setattr(owner, name, interrupted(getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            workspace.remove()
        monkeypatch.undo()
    with workspace_of(tmp_path / "a", SETTINGS) as workspace:
        assert not workspace.has("x") and workspace.has("y") == (step == "parts")
        add(workspace, "x", "y")
        workspace.remove()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_removed_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with workspace_of(tmp_path / "a", SETTINGS) as workspace:
        (workspace.folder / "mine").write_text("x")
        workspace.remove()
    assert "a.partial is needed no longer, and cannot be removed" in caplog.text


@pytest.mark.parametrize("remade", [False, True], ids=["removed", "remade and locked"])
def test_the_folder_changes_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remade: bool) -> None:
    """By a process that has finished, and by one that has then begun."""
    fcntl = pytest.importorskip("fcntl")
    real, folder, held = os.open, tmp_path / "a.partial", []

    def open_early(path: Path, flags: int) -> int:
        lock = real(path, flags)
        monkeypatch.setattr(os, "open", real)
        shutil.rmtree(folder)
        if remade:
            folder.mkdir()
            held.append(real(folder, os.O_RDONLY))
            fcntl.flock(held[0], fcntl.LOCK_EX)
        return lock

    monkeypatch.setattr(os, "open", open_early)
    if remade:
        with pytest.raises(ValueError, match="another process works in"), workspace_of(tmp_path / "a", SETTINGS):
            pass
        os.close(held[0])
    else:
        with workspace_of(tmp_path / "a", SETTINGS) as workspace:
            add(workspace, "x")
            with pytest.raises(ValueError, match="another process works in"), workspace_of(tmp_path / "a", SETTINGS):
                pass
        assert workspace.path("x").exists()
