"""Folders as people have them: splits and classes, formats, several captions."""

import numpy as np
import pytest
from PIL import Image, features

from glide_jax.data.batches import make_batches
from glide_jax.data.data_config import DataConfig
from glide_jax.data.sources import open_source
from glide_jax.errors import GlideError, UsageError
from glide_jax.models.tokenizers import GPT2Tokenizer
from tests.support.shards import png, read


def write(folder, *names, caption="{stem}"):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
        if caption is not None:
            text = caption.format(stem=name)
            path.with_suffix(".txt").write_bytes(text.encode())
    return str(folder)


def captions(source, **options):
    opened = open_source(DataConfig(source=source, **options))
    return [opened[i]["caption"] for i in range(len(opened))]


# -- splits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, split, expected",
    [
        (["train/0.png", "plane/0.png", "car/0.png"], "train", ["car", "plane", "train"]),
        (["train/0.png", "train_station/0.png"], "train", ["train", "train_station"]),
        (["train/0.png", "1.png"], "train", ["1.png", "train"]),
        (["val/0.png", "plane/0.png"], "train", ["plane", "val"]),
        (["train/0.png", "test/0.png"], "train", ["train"]),
        (["train/0.png", "test_iid/0.png"], "train", ["train"]),
        (["Train/0.png", "VAL/0.png"], "train", ["Train"]),
        (["train/0.png", "validation/0.png"], "validation", ["validation"]),
        (["train2017/0.png", "val2017/0.png"], "val2017", ["val2017"]),
        (["train/0.png"], "train", ["train"]),
        (["part1/0.png", "part2/0.png"], "part1", ["part1"]),
    ],
)
def test_a_split_is_a_split_only_beside_other_splits(tmp_path, names, split, expected):
    found = captions(write(tmp_path, *names), split=split)
    assert [name if name == "1.png" else name.split("/")[0] for name in found] == expected


@pytest.mark.parametrize(
    "names, split, message",
    [
        (
            ["val/0.png", "plane/0.png"],
            "val",
            r"beside val are no splits \(plane\)",
        ),
        (["training/0.png", "val/0.png"], "train", "has the splits training, val, and no 'train'"),
        (["a/0.png"], "test", "no split 'test'"),
    ],
)
def test_a_split_that_is_none_is_refused(tmp_path, names, split, message):
    with pytest.raises(UsageError, match=message):
        captions(write(tmp_path, *names), split=split)


def test_what_lies_beside_the_splits_is_named(tmp_path, capsys):
    write(tmp_path, "train/0.png", "test/0.png", "more/0.png", "loose.png")
    assert captions(str(tmp_path)) == ["train/0.png"]
    assert "not used: more/, loose.png (beside the splits: 2)" in capsys.readouterr().err


# -- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suffix",
    [".png", ".JPG", ".jfif", ".jpe", ".gif", ".TIF", ".tiff", ".bmp", ".dib", ".ppm", ".tga",
     ".ico", ".jp2", ".webp", ".avif", ".qoi", ".pcx"],
)  # fmt: skip
def test_every_format_that_pillow_reads_is_read(tmp_path, suffix):
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    if suffix == ".jp2" and not features.check("jpg_2000"):
        pytest.skip("this Pillow has no JPEG 2000")
    kind = {".jfif": "JPEG", ".jpe": "JPEG"}.get(suffix)
    Image.new("RGB", (32, 32), (200, 40, 90)).save(tmp_path / f"a{suffix}", kind)
    (tmp_path / "a.txt").write_text("a")
    source = open_source(DataConfig(source=str(tmp_path)))
    assert np.abs(source[0]["image"][16, 16].astype(int) - (200, 40, 90)).max() < 8


# -- captions -------------------------------------------------------------------------------------


def test_lines_are_captions_or_one_caption(tmp_path):
    folder = write(tmp_path, "a.png", caption="\ufeffa red apple\r\n\r\n  crisp \r\nfruit\n")
    assert captions(folder) == [("a red apple", "crisp", "fruit")]
    assert captions(folder, caption_lines="join") == ["a red apple crisp fruit"]
    with pytest.raises(UsageError, match="choose or join, not 'joined'"):
        DataConfig(caption_lines="joined")


def test_each_line_is_chosen_and_the_choice_is_that_of_the_position(tmp_path):
    folder = write(tmp_path, "a.png", "b.png", caption="one\ntwo\nthree")
    config = DataConfig(source=folder)
    tokenizer = GPT2Tokenizer(4)

    def made(size, start, count):
        batches = make_batches(
            open_source(config), config, batch_size=size, tokenizer=tokenizer, size=8, seed=3
        )
        batches.set_state({"position": start})
        return np.concatenate([next(batches)["tokens"] for _ in range(count)])

    whole = made(8, 0, 12)
    assert len(np.unique(whole, axis=0)) == 3
    assert min(np.unique(whole, axis=0, return_counts=True)[1]) > 12
    assert np.array_equal(made(4, 40, 14), whole[40:])


def test_another_way_to_read_lines_changes_the_fingerprint(tmp_path):
    config = DataConfig(source=write(tmp_path, "a.png"))
    joined = DataConfig(source=str(tmp_path), caption_lines="join")
    assert open_source(config).fingerprint != open_source(joined).fingerprint


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_names_the_encoding(tmp_path, encoding):
    write(tmp_path, "a.png", caption=None)
    (tmp_path / "a.txt").write_bytes("ein Häuschen, 猫\n".encode(encoding))
    assert captions(str(tmp_path)) == ["ein Häuschen, 猫"]


def test_json_beside_an_image_gives_caption_and_texts(tmp_path):
    write(tmp_path, "a.png", "b.png", caption=None)
    (tmp_path / "a.json").write_text('{"TEXT": "from JSON", "style": "flat"}')
    (tmp_path / "b.json").write_text('{"style": "3D"}')
    (tmp_path / "b.txt").write_text("from text")
    source = open_source(DataConfig(source=str(tmp_path)))
    assert [(source[i]["caption"], source[i]["style"]) for i in range(2)] == [
        ("from JSON", "flat"),
        ("from text", "3D"),
    ]


@pytest.mark.parametrize(
    "beside, message",
    [
        ("captions/0.txt", "captions are those of .*captions, name the folder of both"),
        ("pictures/captions.csv", "if captions.csv lists them, add --data.metadata captions.csv"),
        ("pictures/0.heic", r"there is also 0.heic \(suffix .heic: 1\)"),
    ],
)
def test_the_error_of_missing_captions_says_where_they_may_be(tmp_path, beside, message):
    write(tmp_path, "pictures/0.png", caption=None)
    (tmp_path / beside).parent.mkdir(exist_ok=True)
    (tmp_path / beside).write_text("a")
    with pytest.raises(UsageError, match=message):
        captions(str(tmp_path / "pictures"))


# -- names of sources -----------------------------------------------------------------------------


def test_a_metadata_file_can_be_the_source(tmp_path):
    write(tmp_path, "a.png", caption=None)
    (tmp_path / "list.csv").write_text("image,text\na.png,listed\n")
    assert captions(str(tmp_path / "list.csv")) == ["listed"]


def test_a_folder_with_the_name_of_a_tar_is_a_folder(tmp_path):
    write(tmp_path, "x.tar/a.png", "y.npz/b.png")
    assert captions(str(tmp_path / "x.tar")) == ["x.tar/a.png"]
    assert captions(str(tmp_path / "y.npz")) == ["y.npz/b.png"]
    assert len(captions(str(tmp_path))) == 2


@pytest.mark.parametrize(
    "name, message",
    [
        ("*.png", r"\*\.png matches .*a\.png, and no tar shards"),
        ("a.zip", "a.zip is an archive that is not read: unpack it"),
        ("a.txt", "a.txt is not read: name a folder"),
        ("{0..9.tar", r"cannot read the braces of .*write \{000\.\.099\} to count"),
        ("{a..c}.tar", r"cannot count \{a\.\.c\}"),
        ("{1..2}.tar", "cannot read .*1.tar"),
        ("[12].tar", "no file matches"),
    ],
)
def test_names_that_are_not_read_say_so(tmp_path, name, message):
    write(tmp_path, "a.png", caption=None)
    for file in ("a.zip", "a.txt"):
        (tmp_path / file).write_text("x")
    with pytest.raises(GlideError, match=message):
        captions(f"{tmp_path}/{name}")


def test_linked_folders_are_read(tmp_path):
    write(tmp_path, "store/0.png", "x/1.png")
    (tmp_path / "x" / "cats").symlink_to(tmp_path / "store")
    (tmp_path / "x" / "dogs").symlink_to(tmp_path / "store")
    source = open_source(DataConfig(source=str(tmp_path / "x")))
    assert read(source) == [("x/1.png", 1), ("store/0.png", 0)]
