"""The images of a run as files: nothing is lost, and a file is whole or absent."""

import errno
import json
import os
import threading

import numpy as np
import pytest
from PIL import Image

from glide_jax import folders
from glide_jax.errors import GlideError
from glide_jax.folders import cache_folder, check_writable, expand_words
from glide_jax.pipeline import images as images_module
from glide_jax.pipeline.images import Images, file_name_part
from glide_jax.pipeline.options import read_options


def made(count=3, prompt="red", value=0):
    pixels = np.full((count, 8, 8, 3), value, np.uint8)
    return Images(pixels, (prompt,) * count, 0, tuple(range(count)), "tiny", {})


def save_at_once(folder, runs=8):
    """Save runs of three images from as many threads; return all names."""
    found, start = [], threading.Barrier(runs)

    def save(value):
        start.wait()
        found.extend((p.name, value) for p in made(value=value).save(folder))

    threads = [threading.Thread(target=save, args=(i,)) for i in range(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("links", [True, False])
def test_runs_that_write_to_one_folder_at_once_lose_nothing(tmp_path, monkeypatch, locks, links):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not locks:
        monkeypatch.setattr(folders, "fcntl", None)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    saved = save_at_once(tmp_path)
    names = {name for name, _ in saved}
    assert len(names) == len(saved) == 8 * 4
    assert {p.name for p in tmp_path.iterdir()} == names
    for name, value in saved:
        if "grid" not in name:
            assert np.asarray(Image.open(tmp_path / name)).max() == value
    if locks:
        numbers = sorted(int(name[:5]) for name in names if "grid" not in name)
        assert numbers == list(range(24))


def test_a_run_that_another_overtakes_takes_the_next_names(tmp_path, monkeypatch):
    made(prompt="red").save(tmp_path)
    stale = iter((0, 3, 4, 5))
    monkeypatch.setattr(images_module, "next_number", lambda _: next(stale))
    names = [p.name for p in made(prompt="red").save(tmp_path)]
    assert names == ["00003_red.png", "00004_red.png", "00005_red.png", "00003-00005_grid.png"]


@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_full_disk_leaves_whole_files_and_one_line(tmp_path, monkeypatch, fails_at):
    calls = []

    def fsync(_):
        calls.append(1)
        if len(calls) > fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(GlideError) as error:
        made().save(tmp_path)
    saved = "; 2 of 3 images are saved" if fails_at else ""
    message = f"cannot write images to {tmp_path}: No space left on device{saved}"
    assert str(error.value) == message
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"{i:05}_red.png" for i in range(fails_at)
    ]


def test_a_preview_that_does_not_fit_leaves_the_old_one(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = made(value=7).save_preview(tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(GlideError, match=r"preview\.png: No space left on device$"):
        made(value=9).save_preview(tmp_path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_file_in_place_of_the_folder_is_said(tmp_path):
    path = tmp_path / "images"
    path.write_text("")
    with pytest.raises(GlideError) as error:
        check_writable(path)
    assert str(error.value) == f"cannot write to {path}: it is a file, not a folder"


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A blue one!", "a-blue-one"),
        ("un cafe\u0301 ÉTÉ", "un-café-été"),
        ("красное яблоко", "красное-яблоко"),
        ("赤いリンゴ", "赤いリンゴ"),
        ("सेब लाल", "सेब-लाल"),
        ("تفاحة حمراء", "تفاحة-حمراء"),
        ("../../etc/passwd", "etc-passwd"),
        ("a\\b\x00c\nd{number}", "a-b-c-d-number"),
        ("\udcff x", "x"),
        ("x" * 300, "x" * 50),
        ("語" * 300, "語" * 40),
        ("कि" * 60, "कि" * 20),
        ("🍎", "empty"),
        ("", "empty"),
    ],
)
def test_file_names_keep_the_letters_of_any_script(prompt, name, tmp_path):
    assert file_name_part(prompt) == name
    (path,) = made(1, prompt).save(tmp_path)
    assert path.name == f"00000_{name}.png" and path.is_file()
    assert json.loads(Image.open(path).text["glide_jax"])["prompt"] == prompt


def test_a_locale_of_ascii_names_gets_them(monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda name: name.encode("ascii"))
    assert file_name_part("un café") == "un-caf"


@pytest.mark.parametrize(
    ("words", "prompts"),
    [
        (["--num", "2", "a red apple"], ("a red apple",)),
        (["a", "--num", "2", "b"], ("a", "b")),
        (["-n", "2", "--", "--steps", "-x"], ("--steps", "-x")),
        (["--preview", "a"], ("a",)),
        (["--guidance-interval", "0.3", "5", "a"], ("a",)),
        (["--guidance_interval", "0.3", "5", "a"], ("a",)),
        (["--restart", "0.3", "2", "3", "a", "--interpolate", "b"], ("a", "b")),
        (["--repaint", "5", "4", "- a", "-1 apple"], ("- a", "-1 apple")),
        (["--steps=4", "a", "", "--seed", "3"], ("a", "")),
        (["--negative-prompt", "~ x", "~/a prompt"], ("~/a prompt",)),
    ],
)
def test_prompts_and_options_come_in_any_order(words, prompts):
    assert read_options("", words).prompts == prompts


def test_a_home_is_found_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["~/a.pt", "--out=~/b", "--mask", "~/c.png", "--negative-prompt", "~/d", "x~", "--e=f~"]
    assert expand_words(words, ("--negative-prompt",)) == [
        *("/home/me/a.pt", "--out=/home/me/b", "--mask", "/home/me/c.png"),
        *("--negative-prompt", "~/d", "x~", "--e=f~"),
    ]
    options = read_options("", ["--out=~/b", "--image=~/c.png", "--prompts-file=~/d", "~/e"])
    assert str(options.out) == "/home/me/b" and options.prompts == ("~/e",)
    assert str(options.editing.image) == "/home/me/c.png"
    assert str(options.prompts_file) == "/home/me/d"


def test_a_user_without_a_home_has_a_private_cache(monkeypatch, tmp_path):
    for name in ("GLIDE_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(folders.tempfile, "tempdir", str(tmp_path))
    found = cache_folder()
    assert found == tmp_path / f"glide_jax-{os.getuid()}" == cache_folder()
    assert found.stat().st_mode & 0o777 == 0o700
    # Another user made it, or can write to it: what is in it would be run.
    found.chmod(0o777)
    assert cache_folder() != found
