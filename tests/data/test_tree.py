"""Files below a folder: links are followed once, and nothing depends on the disk's order."""

import os

import pytest

from glide_jax.data import tree
from glide_jax.data.faults import Fault
from glide_jax.data.tree import find
from glide_jax.errors import GlideError

ALREADY = "link to a folder that is read already"
AROUND = "link to a folder around it"


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


def test_a_linked_folder_outside_is_read(tmp_path):
    touch(tmp_path, "store/cats/a.png", "store/cats/deep/b.png", "x/c.png")
    (tmp_path / "x" / "cats").symlink_to(tmp_path / "store" / "cats")
    assert find(str(tmp_path / "x")) == (["c.png", "cats/a.png", "cats/deep/b.png"], [])


def test_a_link_as_the_folder_itself_is_read(tmp_path):
    touch(tmp_path, "real/a.png")
    (tmp_path / "link").symlink_to("real")
    assert find(str(tmp_path / "link")).names == ["a.png"]


def test_cycles_end(tmp_path):
    touch(tmp_path, "x/a/b/c.png", "other/d.png")
    os.symlink("../..", tmp_path / "x" / "a" / "b" / "back")
    os.symlink("..", tmp_path / "x" / "up")
    os.symlink(".", tmp_path / "x" / "here")
    # A folder outside leads back into the first one.
    os.symlink("../other", tmp_path / "x" / "other")
    os.symlink("../x", tmp_path / "other" / "x")
    found = find(str(tmp_path / "x"))
    assert found.names == ["a/b/c.png", "other/d.png"]
    assert found.unused == [
        Fault("a/b/back", AROUND),
        Fault("here", AROUND),
        Fault("other/x", AROUND),
        Fault("up", AROUND),
    ]


def test_two_links_to_one_folder_are_read_once_and_the_folder_itself_first(tmp_path):
    touch(tmp_path, "store/a.png", "x/z/b.png")
    for name, target in {"one": "../store", "two": "../store", "alias": "z"}.items():
        os.symlink(target, tmp_path / "x" / name)
    found = find(str(tmp_path / "x"))
    assert found.names == ["one/a.png", "z/b.png"]
    assert found.unused == [Fault("alias", ALREADY), Fault("two", ALREADY)]


def test_linked_files_are_files_and_broken_links_are_named(tmp_path):
    touch(tmp_path, "a.png")
    os.symlink("a.png", tmp_path / "b.png")
    os.symlink("missing", tmp_path / "c.png")
    found = find(str(tmp_path))
    assert found.names == ["a.png", "b.png"]
    assert found.unused == [Fault("c.png", "broken link")]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "closed/b.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(tree.os, "scandir", refuse)
    found = find(str(tmp_path))
    assert found.names == ["a.png"]
    assert found.unused == [Fault("closed/", "folder that cannot be read, Permission denied")]
    with pytest.raises(GlideError, match="cannot read .*closed"):
        find(str(tmp_path / "closed"))
