"""What is written takes the place of what was there whole, or not at all."""

import os

import pytest

from keras_vit import files
from keras_vit.files import check_replaceable, replacing


def write_folder(path, text):
    with replacing(path) as temporary:
        assert not temporary.exists()
        temporary.mkdir()
        (temporary / "name").write_text(text)


def test_folder_is_replaced(tmp_path):
    for text in ("old", "new"):
        write_folder(tmp_path / "folder", text)
    assert (tmp_path / "folder" / "name").read_text() == "new"
    assert os.listdir(tmp_path) == ["folder"]


def test_what_a_killed_process_left_is_not_in_the_way(tmp_path, monkeypatch):
    """In a container, the process that comes after it may have its number."""
    monkeypatch.setattr(os, "getpid", lambda: 8)
    kept = []
    for _ in range(2):
        kept.append(replacing(tmp_path / "folder"))
        kept[-1].__enter__().mkdir()
    write_folder(tmp_path / "folder", "new")
    assert (tmp_path / "folder" / "name").read_text() == "new"


@pytest.mark.parametrize("is_folder", [False, True])
def test_link_stays(is_folder, tmp_path):
    """What it points to, on another disk, is replaced there."""
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "target", tmp_path / "link"
    link.symlink_to(target)
    for text in ("old", "new"):
        if is_folder:
            write_folder(link, text)
        else:
            files.write_text(link, text)
        assert link.is_symlink()
        assert (target / "name" if is_folder else target).read_text() == text
    assert os.listdir(tmp_path / "disk") == ["target"]
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"]


@pytest.mark.parametrize("fails", ["block", "move"])
def test_old_folder_survives_a_failure(fails, tmp_path, monkeypatch):
    write_folder(tmp_path / "folder", "old")
    replace, moves = os.replace, []

    def replace_once(source, path):
        moves.append(path)
        if fails == "move" and len(moves) == 2:
            raise OSError("The disk is full.")
        replace(source, path)

    monkeypatch.setattr(os, "replace", replace_once)

    def write():
        with replacing(tmp_path / "folder") as temporary:
            temporary.mkdir()
            if fails == "block":
                raise OSError("The disk is full.")

    with pytest.raises(OSError, match="full"):
        write()
    assert (tmp_path / "folder" / "name").read_text() == "old"
    assert os.listdir(tmp_path) == ["folder"]


def test_file_does_not_replace_a_folder(tmp_path):
    write_folder(tmp_path / "folder", "old")
    with pytest.raises(ValueError, match=r"is a folder: a file cannot replace it"):
        files.write_text(tmp_path / "folder", "new")
    assert (tmp_path / "folder" / "name").read_text() == "old"


def test_what_may_be_replaced(tmp_path):
    """Nothing, an empty folder, and what the command wrote; not what a mount is."""
    folder = tmp_path / "folder"

    def check(overwrite):
        check_replaceable(folder, "report.json", "export", overwrite)

    for overwrite in (False, True):
        check(overwrite)
    folder.mkdir()
    for overwrite in (False, True):
        check(overwrite)
    write_folder(folder, "new")  # in the place of the empty one
    with pytest.raises(ValueError, match=r"exists already: pass overwrite=True"):
        check(False)
    with pytest.raises(ValueError, match=r"not a folder that `export` wrote"):
        check(True)
    (folder / "report.json").touch()
    check(True)


@pytest.mark.parametrize("name", ["folder", "link"])
def test_a_mount_is_not_replaced(name, tmp_path, monkeypatch):
    mount = tmp_path / "folder"
    mount.mkdir()
    (tmp_path / "link").symlink_to(mount)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == mount)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=rf"{name} is a mount, which cannot be replaced"):
            check_replaceable(tmp_path / name, "report.json", "export", overwrite)
