"""emoji64: reading the .npz file, the data set made of it, the held-out splits."""

import pickle
import subprocess
import sys
import zipfile

import grain
import numpy as np
import pytest

from glide_jax.commands.emoji_data import main
from glide_jax.data.emoji import art
from glide_jax.data.emoji.builder import prepare
from glide_jax.data.emoji.npz import FIELDS, SPLITS, load_npz, read_fields
from glide_jax.data.emoji.rasteriser import HeldOut
from glide_jax.errors import GlideError, UsageError
from tests.support.commands import ROOT

MINI = ROOT / "tests" / "fixtures" / "emoji_mini.npz"


@pytest.fixture(scope="module")
def fields():
    return read_fields(MINI)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Folder of the data set made from the subset."""
    return prepare(MINI, tmp_path_factory.mktemp("data"))


def test_the_subset_has_every_field_and_split(fields):
    assert tuple(fields) == FIELDS
    assert set(fields["split"]) == set(SPLITS)
    assert set(fields["license"]) <= {"MIT", "Apache-2.0", "CC-BY-4.0", "public-domain"}
    for vendor, style, family, licence in zip(
        *(fields[f] for f in ("vendor", "style", "family", "license")), strict=True
    ):
        assert art.VENDORS[vendor] == (style, family, licence)
    assert MINI.stat().st_size < 1_500_000


def test_load_npz_reads_the_records_that_numpy_reads(fields):
    everything = load_npz(MINI)
    with np.load(MINI) as file:
        assert np.array_equal(everything.images, file["image"])
    assert len(everything) == len(fields["split"])
    chosen = load_npz(MINI, "train", ["penguin", "rocket"], ["Google Noto style"])
    assert sorted(r["caption"] for r in chosen) == ["penguin", "rocket"]
    for record in chosen:
        i = record["index"]
        assert isinstance(i, int) and record["style"] == "Google Noto style"
        assert np.array_equal(record["image"], everything.images[i])
        assert record["caption"] == fields["caption"][i]
        assert record["concept"] == fields["concept"][i]
    styled = load_npz(MINI, concepts="penguin", styles="EmojiOne style", caption="caption_styled")
    assert styled[0]["caption"] == "penguin, EmojiOne style"


def test_load_npz_takes_several_splits():
    tests = load_npz(MINI, SPLITS[1:])
    assert len(tests) + len(load_npz(MINI, "train")) == len(load_npz(MINI))
    assert not {r["index"] for r in tests} & {r["index"] for r in load_npz(MINI, "train")}


def test_the_source_is_a_sequence_that_identifies_itself():
    source = load_npz(MINI, "train")
    with pytest.raises(IndexError):
        source[len(source)]
    with pytest.raises(ValueError):
        source[0]["image"][0] = 0
    copy = pickle.loads(pickle.dumps(source))
    assert repr(copy) == repr(source) and "train" in repr(source)
    assert str(MINI.parent) not in repr(source)
    assert repr(source) != repr(load_npz(MINI, "train", styles="Google Noto style"))
    batch = next(iter(grain.MapDataset.source(source).seed(0).shuffle().batch(4)))
    assert batch["image"].shape == (4, 64, 64, 3) and batch["image"].dtype == np.uint8


@pytest.mark.parametrize(
    "selection, message",
    [
        ({"concepts": ["pengin"]}, "no concept 'pengin'; the nearest is 'penguin'"),
        ({"styles": ["noto"]}, "no style 'noto'; the nearest is 'Google Noto style'"),
        ({"split": "trian"}, "no split 'trian'; the nearest is 'train'"),
        ({"caption": "captions"}, "no caption 'captions'; the nearest is 'caption'"),
        ({"split": "train", "concepts": ["red apple"]}, "no image has the wanted split"),
    ],
)
def test_the_error_of_an_unknown_selection_names_the_nearest(selection, message):
    with pytest.raises(UsageError, match=message):
        load_npz(MINI, **selection)


def rewrite(path, **arrays):
    with np.load(MINI) as file:
        np.savez_compressed(path, **({name: file[name] for name in file.files} | arrays))


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Folder of files that are almost emoji64 files."""
    folder = tmp_path_factory.mktemp("broken")
    data = MINI.read_bytes()
    (folder / "half.npz").write_bytes(data[: len(data) // 2])
    (folder / "empty.npz").write_bytes(b"")
    (folder / "flipped.npz").write_bytes(data[:90_000] + bytes(64) + data[90_064:])
    (folder / "folder.npz").mkdir()
    rewrite(folder / "short.npz", caption=np.array(["one"]))
    rewrite(folder / "less.npz", image=np.zeros((3, 64, 64, 3), np.uint8))
    rewrite(folder / "grey.npz", image=np.zeros((323, 64, 64), np.uint8))
    np.savez(folder / "other.npz", x=np.zeros(3))
    with zipfile.ZipFile(MINI) as whole, zipfile.ZipFile(folder / "cut.npz", "w") as cut:
        for name in whole.namelist():
            content = whole.read(name)
            cut.writestr(name, content[: len(content) // 2] if name == "image.npy" else content)
    return folder


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing", "no such file"),
        ("half", "truncated, or not an .npz file"),
        ("empty", "truncated, or not an .npz file"),
        ("flipped", "truncated, or not an .npz file"),
        ("folder", "is a folder"),
        ("short", "differ in length"),
        ("less", "3 images but 323 captions"),
        ("grey", "not uint8"),
        ("other", "not an emoji64 file"),
        ("cut", "ends in the middle"),
    ],
)
def test_a_broken_file_gives_one_line(broken, name, message):
    with pytest.raises(GlideError, match=message) as caught:
        load_npz(broken / f"{name}.npz", "train")
    assert not isinstance(caught.value, UsageError) and "\n" not in str(caught.value)


def pairs(fields, split, *names):
    return set(zip(*(fields[n][fields["split"] == split].tolist() for n in names), strict=True))


def test_no_held_out_pair_occurs_in_train(fields):
    for split, names in (
        ("test_style", ("concept", "family")),
        ("test_style", ("concept", "style")),
        ("test_tone", ("concept", "tone")),
        ("test_concept", ("concept",)),
    ):
        held_out = pairs(fields, split, *names)
        assert held_out
        assert held_out.isdisjoint(pairs(fields, "train", *names)), split


def test_the_list_in_the_package_gives_the_splits_of_the_file(fields):
    split_of = HeldOut()
    assert len({k for k, v in split_of.split_of.items() if v == "test_concept"}) == 32
    for i, split in enumerate(fields["split"]):
        concept, tone = str(fields["concept"][i]), int(fields["tone"][i])
        description = art.Description("", concept, tone=tone)
        record = art.Record(str(fields["vendor"][i]), str(fields["name"][i]), description, "")
        assert split_of(record) == split


def test_the_data_set_has_the_images_and_texts_of_the_file(prepared, fields):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(prepared)
    assert set(builder.info.splits) == set(SPLITS)
    assert builder.info.features["image"].shape == (64, 64, 3)
    for split in SPLITS:
        wanted = load_npz(MINI, split)
        dataset = grain.MapDataset.source(builder.as_data_source(split))
        assert len(dataset) == len(wanted)
        for record, want in zip(dataset, wanted, strict=True):
            assert np.array_equal(record["image"], want["image"])
            i = want["index"]
            for field in ("caption", "caption_styled", "style", "family", "concept", "license"):
                assert record[field].decode() == fields[field][i]
            assert b", ".join(record["keywords"]).decode() == fields["keywords"][i]
            assert record["tone"] == fields["tone"][i]


def test_no_tensorflow_is_imported(tmp_path):
    program = f"""
import sys
from glide_jax.data.emoji.npz import load_npz
load_npz({str(MINI)!r}, "train")
assert "tensorflow_datasets" not in sys.modules and "resvg_py" not in sys.modules
from glide_jax.data.emoji.builder import prepare
folder = prepare({str(MINI)!r}, {str(tmp_path)!r})
import tensorflow_datasets as tfds
source = tfds.builder_from_directory(folder).as_data_source("test_style")
assert source[0]["image"].shape == (64, 64, 3)
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_preparing_again_does_nothing_and_other_images_are_refused(prepared, tmp_path, capfd):
    before = {p: p.stat().st_mtime_ns for p in prepared.iterdir()}
    assert prepare(MINI, prepared.parent.parent) == prepared
    assert before == {p: p.stat().st_mtime_ns for p in prepared.iterdir()}
    rewrite(tmp_path / "other.npz", image=np.zeros((323, 64, 64, 3), np.uint8))
    with pytest.raises(GlideError, match="other images"):
        prepare(tmp_path / "other.npz", prepared.parent.parent)


def test_a_data_set_of_another_size_is_refused(tmp_path):
    rewrite(tmp_path / "small.npz", image=np.zeros((323, 8, 8, 3), np.uint8))
    with pytest.raises(UsageError, match="8x8"):
        prepare(tmp_path / "small.npz", tmp_path / "data")


KILLED = """
import os, sys
from glide_jax.data.emoji import builder
record = builder.Emoji64._record
def killed(self, fields, i, image):
    if i == 200:
        os._exit(9)
    return record(self, fields, i, image)
builder.Emoji64._record = killed
builder.prepare(sys.argv[1], sys.argv[2])
"""


def test_a_killed_run_leaves_nothing_that_looks_complete(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(MINI), str(tmp_path)], cwd=ROOT)
    assert done.returncode == 9
    assert not (tmp_path / "emoji64" / "1.0.0").exists()
    assert not list(tmp_path.rglob("dataset_info.json"))
    folder = prepare(MINI, tmp_path)
    assert (folder / "dataset_info.json").exists()


def test_a_failing_run_leaves_no_files(broken, tmp_path):
    with pytest.raises(GlideError, match="ends in the middle"):
        prepare(broken / "cut.npz", tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_damaged_data_set_is_refused(tmp_path):
    (tmp_path / "emoji64" / "1.0.0").mkdir(parents=True)
    with pytest.raises(GlideError, match="not a data set"):
        prepare(MINI, tmp_path)


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ("prepare --npz missing.npz --data-dir x", 1, "missing.npz: no such file"),
        ("rasterise --sources missing --out x.npz", 1, "missing: lacks emojibase-data-17.0.0.tgz"),
        ("rasterise --sources missing --out x.png", 2, "must end in .npz"),
        ("fetch --to sources --vendors apple", 2, "no vendor 'apple'"),
    ],
)
def test_the_command_line_ends_with_one_line(
    arguments, code, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    error = capsys.readouterr().err
    assert caught.value.code == code
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
