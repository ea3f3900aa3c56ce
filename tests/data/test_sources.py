"""Sources: names, folders and metadata files, and the errors of broken ones."""

import json
from dataclasses import replace

import fsspec
import numpy as np
import pytest
from PIL import Image

from glide_jax.data.batches import make_batches
from glide_jax.data.data_config import DataConfig
from glide_jax.data.sources import open_source
from glide_jax.data.storage import BrokenRecord
from glide_jax.errors import GlideError, UsageError
from glide_jax.models.tokenizers import GPT2Tokenizer
from tests.support.commands import ROOT, make_images
from tests.support.shards import png, read, samples, write_tar

MINI = str(ROOT / "tests" / "fixtures" / "emoji_mini.npz")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Cache of the positions of records, in a folder of its own for each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GLIDE_JAX_CACHE", str(folder))
    return folder


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, message",
    [
        (DataConfig(), "--data.source"),
        (DataConfig(source="emoji64", data_dir="nowhere"), "glide-jax data --help"),
        (DataConfig(source="coco_captions", data_dir="nowhere"), "--data.source"),
        (DataConfig(source="nowhere/*.tar"), "no file matches"),
        (DataConfig(source="nowhere/0.tar"), "nowhere/0.tar"),
        (DataConfig(source="gsx://bucket/images"), "unknown kind of address gsx://"),
    ],
)
def test_the_error_of_missing_data_has_a_remedy(config, message):
    with pytest.raises(GlideError, match=message):
        open_source(config)


def test_the_error_of_an_address_names_the_missing_package(monkeypatch):
    def missing(protocol):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(GlideError, match="pip install gcsfs"):
        open_source(DataConfig(source="gcs://bucket/images"))


@pytest.mark.parametrize("size", [64, 256])
def test_scenes_by_name(size):
    train, test = (
        open_source(DataConfig(source=f"scenes{size}", split=split)) for split in ("train", "test")
    )
    assert train[3]["image"].shape == (size, size, 3) and "background" in train[3]["caption"]
    assert train[3]["caption"] != test[3]["caption"]
    assert len(train) == 1_000_000 and train.fingerprint != test.fingerprint


@pytest.mark.parametrize(
    "options, message",
    [
        ({"split": "train+test_concept"}, "add --data.split train"),
        ({"styles": ("flat",)}, "neither concepts nor styles"),
    ],
)
def test_scenes_have_no_other_splits_and_no_styles(options, message):
    with pytest.raises(UsageError, match=message):
        open_source(DataConfig(source="scenes64", **options))


def test_concepts_and_styles_select_records():
    config = DataConfig(source=MINI, concepts=("rocket", "penguin"), styles=("Google Noto style",))
    source = open_source(config)
    assert {source[i]["caption"] for i in range(len(source))} == {"rocket", "penguin"}
    with pytest.raises(UsageError, match="rocket"):
        open_source(replace(config, concepts=("rockett",)))


def test_another_field_of_an_npz_file_can_be_the_caption():
    config = DataConfig(source=MINI, caption_field="caption_styled")
    assert ", " in open_source(config)[0]["caption"]


def test_the_fingerprint_differs_for_other_data(tmp_path):
    make_images(tmp_path / "a")
    make_images(tmp_path / "b")
    prints = [open_source(DataConfig(source=str(tmp_path / name))).fingerprint for name in "ab"]
    assert prints[0] == prints[1]
    (tmp_path / "b" / "03.png").rename(tmp_path / "b" / "03x.png")
    (tmp_path / "b" / "03.txt").rename(tmp_path / "b" / "03x.txt")
    assert open_source(DataConfig(source=str(tmp_path / "b"))).fingerprint != prints[0]
    styles = ("Google Noto style",)
    full, subset = DataConfig(source=MINI), DataConfig(source=MINI, styles=styles)
    assert open_source(full).fingerprint != open_source(subset).fingerprint


# -- folders --------------------------------------------------------------------------------------


def test_a_folder_of_images_with_captions(tmp_path, capsys):
    folder = make_images(tmp_path / "a [1]" / "b")
    (tmp_path / "a [1]" / "captionless.png").write_bytes(png())
    (tmp_path / "a [1]" / "._hidden.png").write_bytes(b"not an image")
    (tmp_path / "a [1]" / "._hidden.txt").write_text("hidden")
    source = open_source(DataConfig(source=str(tmp_path / "a [1]")))
    assert len(source) == 12 and source.left_out == 1
    assert "left out 1 of 13: captionless.png" in capsys.readouterr().err
    record = source[4]
    assert record["caption"] == "green"
    assert np.array_equal(record["image"], np.asarray(Image.open(folder / "04.png")))


def test_a_split_is_the_folder_of_that_name(tmp_path):
    for name in ("train", "test"):
        make_images(tmp_path / name, count=4)
    splits = [open_source(DataConfig(source=str(tmp_path), split=s)) for s in ("train", "test")]
    assert splits[0].fingerprint != splits[1].fingerprint
    write_tar(tmp_path / "held" / "0.tar", samples(2))
    assert len(open_source(DataConfig(source=str(tmp_path)))) == 4
    assert len(open_source(DataConfig(source=str(tmp_path), split="held"))) == 2
    make_images(tmp_path / "train" / "flat", count=3)
    assert len(open_source(DataConfig(source=str(tmp_path / "train")))) == 7
    for split in ("val", "train[:50%]"):
        with pytest.raises(UsageError, match="has no split"):
            open_source(DataConfig(source=str(tmp_path), split=split))


def test_captions_are_utf8_with_or_without_a_bom_and_may_be_empty(tmp_path):
    for i, data in enumerate(["ein Häuschen".encode("utf-8-sig"), b"\n", "\xe4".encode("latin1")]):
        (tmp_path / f"{i}.png").write_bytes(png())
        (tmp_path / f"{i}.txt").write_bytes(data)
    source = open_source(DataConfig(source=str(tmp_path)))
    assert [source[i]["caption"] for i in range(2)] == ["ein Häuschen", ""]
    with pytest.raises(BrokenRecord, match="2.txt is not valid UTF-8"):
        source[2]


def test_an_image_that_was_deleted_is_a_broken_record(tmp_path):
    make_images(tmp_path)
    config = DataConfig(source=str(tmp_path))
    source = open_source(config)
    (tmp_path / "03.png").unlink()
    with pytest.raises(BrokenRecord, match=r"03\.png"):
        source[3]
    tokenizer = GPT2Tokenizer(8)
    batches = make_batches(source, config, batch_size=12, tokenizer=tokenizer, size=8, seed=0)
    assert next(batches)["skipped"] >= 1


def test_a_folder_without_captions_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(UsageError, match="1 images and none with a caption"):
        open_source(DataConfig(source=str(tmp_path)))


# -- metadata files -------------------------------------------------------------------------------


def listed(folder, name, content, **config):
    for i in range(4):
        (folder / f"{i}.png").write_bytes(png(i))
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_source(DataConfig(source=str(folder), **config))


def test_json_lines_list_images_captions_and_other_texts(tmp_path):
    lines = [
        {"file_name": "1.png", "caption": "line\u2028separated", "style": "flat", "size": 3},
        {"file_name": "1.png", "caption": ["one", "two"]},
        {"file_name": str(tmp_path / "2.png"), "text": ""},
    ]
    content = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    source = listed(tmp_path, "metadata.jsonl", content)
    captions = [("line\u2028separated", 1), (("one", "two"), 1), ("", 2)]
    assert read(source) == captions and source.left_out == 0
    assert source[0]["style"] == "flat" and "size" not in source[0]


@pytest.mark.parametrize("name, delimiter", [("metadata.csv", ","), ("table.tsv", "\t")])
def test_tables_list_images_and_captions(tmp_path, name, delimiter):
    rows = [["image", "summary"], ["3.png", '"two\nlines, quoted"'], ["0.png", ""]]
    content = "\ufeff" + "\r\n".join(delimiter.join(row) for row in rows)
    wanted = {"caption_field": "summary"} | ({"metadata": name} if name == "table.tsv" else {})
    assert read(listed(tmp_path, name, content, **wanted)) == [
        ("two\nlines, quoted", 3),
        ("", 0),
    ]


def test_malformed_json_lines_are_left_out_counted_and_named(tmp_path, capsys):
    content = b"\n".join(
        [
            b'{"caption": "names no file"}',
            b'{"file_name": "0.png", "caption": "good"}',
            b'{"file_name": "0.png", "caption": "cut o',
            b"[1, 2]",
            b'{"file_name": "0.png", "caption": 5}',
            b'{"file_name": "0.png", "caption": []}',
            b'{"file_name": " ", "caption": "a"}',
            b'{"file_name": "0.png", "caption": "\xff"}',
            b'{"file_name": "0.png", "caption": "\\ud800"}',
            b"[" * 100_000,
            b'{"file_name": "1.png", "caption": "good too"}',
        ]
    )
    source = listed(tmp_path, "metadata.jsonl", content)
    assert read(source) == [("good", 0), ("good too", 1)]
    assert source.left_out == 9
    error = capsys.readouterr().err
    assert "left out 9 of 11" in error and "line 1: has caption, not file_name" in error
    assert "line 3: is not JSON" in error


def test_malformed_rows_of_a_table_are_left_out(tmp_path, capsys):
    rows = [
        "file_name,caption",
        "0.png,good",
        "1.png",
        '1.png,"bad" quote',
        "1.png,too,many",
        "2.png,good too",
        '3.png,"never closed',
        "0.png,swallowed",
    ]
    source = listed(tmp_path, "metadata.csv", "\n".join(rows))
    assert read(source) == [("good", 0), ("good too", 2)]
    assert source.left_out == 4
    assert "line 3: has 1 columns, the first line has 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content, config, message",
    [
        ("metadata.jsonl", "{}\n[]\n", {}, "lists no image with a caption.*line 1"),
        ("metadata.csv", "", {}, "lists no image"),
        ("metadata.csv", "file,words\n0.png,a\n", {}, "--data.caption-field"),
        ("metadata.csv", "file,text\n0.png,a\n", {"image_field": "url"}, "--data.image-field"),
        ("list.xlsx", "", {"metadata": "list.xlsx"}, "must be .jsonl, .csv, .tsv or .parquet"),
        ("x.csv", "", {"metadata": "y.csv"}, "cannot read .*y.csv"),
    ],
)
def test_a_metadata_file_that_lists_nothing_is_refused(tmp_path, name, content, config, message):
    with pytest.raises(GlideError, match=message):
        listed(tmp_path, name, content, **config)


def test_the_error_of_two_metadata_files_names_the_option(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,caption\n1.png,one\n")
    line = '{"file_name": "2.png", "caption": "two"}'
    with pytest.raises(UsageError, match="--data.metadata"):
        listed(tmp_path, "metadata.jsonl", line)
    source = listed(tmp_path, "metadata.jsonl", line, metadata="metadata.csv")
    assert read(source) == [("one", 1)]


# -- addresses ------------------------------------------------------------------------------------


def test_folders_and_shards_are_read_at_an_address(tmp_path):
    """fsspec's memory:// takes the place of gs://: the same code with another package."""
    memory = fsspec.filesystem("memory")
    make_images(tmp_path / "images", count=3)
    write_tar(tmp_path / "tars" / "00.tar", samples(2))
    memory.put(str(tmp_path), "/bucket", recursive=True)
    try:
        assert [c for c, _ in read(open_source(DataConfig(source="memory://bucket/images")))] == [
            "red",
            "green",
            "blue",
        ]
        for name in ("tars", "tars/*.tar", "tars/{00..00}.tar"):
            source = open_source(DataConfig(source=f"memory://bucket/{name}"))
            assert read(source) == [("number 0", 0), ("number 1", 1)]
        memory.pipe("/bucket/images/metadata.csv", b"file_name,caption\n01.png,listed\n")
        source = open_source(DataConfig(source="memory://bucket/images"))
        assert [caption for caption, _ in read(source)] == ["listed"]
    finally:
        memory.rm("/bucket", recursive=True)
