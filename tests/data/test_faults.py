"""Nothing is left out in silence: every file of a folder is used, or named with a reason."""

import os

import numpy as np
import pytest
from PIL import Image

from glide_jax.data.batches import make_batches
from glide_jax.data.data_config import DataConfig
from glide_jax.data.faults import Fault, Faults, group_by_reason
from glide_jax.data.sources import open_source
from glide_jax.errors import UsageError
from glide_jax.models.tokenizers import GPT2Tokenizer
from tests.support.shards import encode, png


def noise(size=200):
    return encode(np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8))


def with_every_fault(folder):
    """Write a folder with one file of every fault, and return name -> kind and reason."""
    (folder / "sub").mkdir(parents=True)
    (folder / ".cache").mkdir()
    for name in ("good.png", "bare.png", "blank.png", "latin.png", "sub/a.png", "badjson.png"):
        (folder / name).write_bytes(png())
    files = {
        "good.txt": b"good", "blank.txt": b" \n", "latin.txt": b"\xe4", "sub/a.txt": b"a",
        "sub/a.caption": b"again", "orphan.txt": b"o", "badjson.json": b"{",
        "phone.heic": b"x", "phone.txt": b"a phone", "movie.mp4": b"x", "LICENSE": b"x",
        "trunc.png": png()[:40], "trunc.txt": b"t", "cut.jpg": noise()[:5000], "cut.txt": b"c",
        "zero.jpg": b"", "zero.txt": b"z", "words.png": b"hello", "words.txt": b"w",
        ".hidden.png": png(), "._good.png": b"x", ".cache/x.png": png(),
        ".DS_Store": b"x", "two\nlines.png": png(),
    }  # fmt: skip
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for name, target in {"gone": "nowhere", "loop": "loop", "up": "..", "again": "sub"}.items():
        os.symlink(target, folder / name)
    os.mkfifo(folder / "pipe.png")
    return {
        "left out": {
            "bare.png": "no caption",
            "two\nlines.png": "no caption",
            "phone.heic": "suffix .heic is not read",
        },
        "broken": {
            "trunc.png": "unreadable",
            "cut.jpg": "unreadable",
            "words.png": "unreadable",
            "zero.jpg": "empty file",
            "latin.png": "caption is not UTF-8",
            "badjson.png": "no caption in its JSON",
        },
        "unused": {
            "sub/a.caption": "image has another text",
            "orphan.txt": "text without an image",
            "movie.mp4": "suffix .mp4",
            "LICENSE": "no suffix",
            ".hidden.png": "hidden",
            "._good.png": "hidden",
            ".cache": "hidden",
            "gone": "broken link",
            "loop": f"broken link, {os.strerror(40)}",
            "up": "link to a folder around it",
            "again": "link to a folder that is read already",
            "pipe.png": "not a file",
        },
        "empty": {"blank.png": "empty caption"},
    }


def test_every_file_is_used_or_named_with_its_reason(tmp_path, capsys):
    expected = with_every_fault(tmp_path / "x")
    source = open_source(DataConfig(source=str(tmp_path / "x")))
    found = zip(("left out", "broken", "unused", "empty"), source.faults, strict=True)
    assert {kind: dict(faults) for kind, faults in found} == expected
    good = {"good.png", "sub/a.png", *expected["broken"], *expected["empty"]}
    assert set(source.records.names) == good and source.left_out == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'x'}: left out 3 of 12: bare.png, 'two\\nlines.png' (no")
    for named in (
        "phone.heic (suffix .heic is not read: 1); 6 of 9 records are broken",
        "cut.jpg, trunc.png, words.png (unreadable: 3)",
        "zero.jpg (empty file: 1)",
        "(hidden: 3)",
        "used without a caption: blank.png (empty caption: 1)",
    ):
        assert named in line
    for name in {name for names in expected.values() for name in names} - {"two\nlines.png"}:
        assert name in line


def test_a_folder_without_faults_says_nothing(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    source = open_source(DataConfig(source=str(tmp_path)))
    assert source.faults == Faults() and capsys.readouterr().err == ""


def test_the_log_of_a_run_has_every_name(tmp_path):
    faults = Faults(tuple(Fault(f"{i}.png", "no caption") for i in range(9)))
    assert faults.line("x", 1) == (
        "x: left out 9 of 10: 0.png, 1.png, 2.png and 6 more (no caption: 9)"
    )
    log = tmp_path / "left_out.txt"
    faults.save(log)
    assert log.read_text().splitlines() == [f"left out: {i}.png: no caption" for i in range(9)]
    Faults().save(log)
    assert not log.exists()


def test_reasons_are_counted_apart():
    faults = [Fault("a", "x"), Fault("b", "y"), Fault("c", "x")]
    assert group_by_reason(faults) == "a, c (x: 2), b (y: 1)"


def test_a_folder_of_broken_images_alone_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png()[:40])
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UsageError, match=r"no image that can be used: a.png \(unreadable: 1\)"):
        open_source(DataConfig(source=str(tmp_path)))


def test_a_broken_record_does_not_change_the_order_of_the_others(tmp_path):
    for i in range(12):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.txt").write_text("a")
    config = DataConfig(source=str(tmp_path))

    def first(source):
        made = make_batches(
            source, config, batch_size=12, tokenizer=GPT2Tokenizer(8), size=8, seed=0
        )
        return next(made)["image"][:, 0, 0, 0].tolist()

    whole = open_source(config)
    before = first(whole)
    (tmp_path / "03.png").write_bytes(b"broken")
    broken = open_source(config)
    after = first(broken)
    assert [a for a, b in zip(after, before, strict=True) if b != 3] == [
        b for b in before if b != 3
    ]
    assert broken.fingerprint == whole.fingerprint
