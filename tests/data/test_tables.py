"""Tables and JSON that list images and captions, as programs write them."""

import json
import unicodedata

import pytest

from glide_jax.data.data_config import DataConfig
from glide_jax.data.sources import open_source
from glide_jax.errors import UsageError
from tests.support.shards import png, read

FILES = ("0.png", "1.png", "2.png")


def opened(folder, name, content, files=FILES, **config):
    for number, file in enumerate(files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(png(number))
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_source(DataConfig(source=str(folder), **config))


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("metadata.csv", "file_name;caption\n0.png;a, b\n", [("a, b", 0)]),
        ("metadata.csv", "file_name\tcaption\n1.png\ta; b\n", [("a; b", 1)]),
        ("metadata.csv", "file_name|caption\n1.png|a\n", [("a", 1)]),
        ("metadata.tsv", "file_name,caption\n1.png,a\n", [("a", 1)]),
        ("metadata.csv", 'file_name, caption\n1.png, "a, b"\n', [("a, b", 1)]),
        ("metadata.csv", '"file_name";"caption"\r\n"1.png";"a ""b"""\r\n', [('a "b"', 1)]),
        ("metadata.csv", "sep=;\r\nfile_name;caption\r\n1.png;a\r\n", [("a", 1)]),
        ("metadata.csv", "0.png,a\n2.png,b\n", [("a", 0), ("b", 2)]),
        ("metadata.csv", "a cat,0.png\n", [("a cat", 0)]),
        ("metadata.csv", "\ufefffile_name,caption\r1.png,a\r", [("a", 1)]),
        ("metadata.csv", "file_name,caption\n\n1.png,a\n,\n", [("a", 1)]),
        ("METADATA.CSV", "File Name,TEXT\n1.png,a\n", [("a", 1)]),
        ("metadata.csv", "id,prompt\n1,a\n", [("a", 1)]),
        ("metadata.json", '[{"path": "0.png", "Caption": "a"}]', [("a", 0)]),
        ("metadata.json", '{"0.png": "a", "1.png": ["b", "c"]}', [("a", 0), (("b", "c"), 1)]),
        ("metadata.json", '{"0.png": {"text": "a"}}', [("a", 0)]),
        ("metadata.json", '{"data": [{"image": "2.png", "text": "a"}]}', [("a", 2)]),
        ("metadata.json", '{"image": "2.png", "text": "a"}\n{"image": "1.png", "text": "b"}\n',
         [("a", 2), ("b", 1)]),
        ("metadata.jsonl", '[\n{"image": "2.png", "text": "a"}\n]', [("a", 2)]),
        ("metadata.jsonl", '{"image": "2.png", "text": "a"}\r{"image": "1.png", "text": "b"}',
         [("a", 2), ("b", 1)]),
        ("metadata.jsonl", '{"image": 2, "caption": null, "text": "a"}', [("a", 2)]),
        ("metadata.jsonl", '{"image": {"path": "2.png", "bytes": null}, "text": "a"}', [("a", 2)]),
        ("metadata.jsonl", '{"image": "2.png", "text": "a", "caption": "a"}', [("a", 2)]),
        ("metadata.jsonl", '{"image": "no", "file_name": "2.png", "text": "a"}', [("a", 2)]),
    ],
)  # fmt: skip
def test_rows_are_read_as_programs_write_them(tmp_path, name, content, expected):
    source = opened(tmp_path, name, content)
    assert read(source) == expected and source.left_out == 0


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    "name, content",
    [
        ("metadata.csv", "file_name,caption\n1.png,猫\n"),
        ("metadata.jsonl", '{"file_name": "1.png", "caption": "猫"}\n'),
        ("metadata.json", '{"1.png": "猫"}'),
    ],
)
def test_a_byte_order_mark_names_the_encoding(tmp_path, encoding, name, content):
    assert read(opened(tmp_path, name, content.encode(encoding))) == [("猫", 1)]


def test_captions_of_coco(tmp_path):
    content = {
        "info": {},
        "images": [{"id": 7, "file_name": "1.png"}, {"id": 8, "file_name": "0.png"}],
        "annotations": [
            {"image_id": 8, "caption": "a"},
            {"image_id": 7, "caption": "b"},
            {"image_id": 8, "caption": "c"},
        ],
    }
    source = opened(tmp_path, "list.json", json.dumps(content), metadata="list.json")
    assert read(source) == [(("b",), 1), (("a", "c"), 0)]


@pytest.mark.parametrize(
    "file, written",
    [
        ("x/é ü.png", unicodedata.normalize("NFD", "x/é ü.png")),
        (unicodedata.normalize("NFD", "é.png"), "é.png"),
        ("x/a.png", "x\\a.png"),
        ("x/a.png", "./x/a.png"),
        ("x/a.png", "/x/a.png"),
        ("x/a.PNG", "X/a.png"),
        ("x/a.png", "x/a"),
        ("images/a.png", "a.png"),
        ("写真/猫.png", "写真/猫.png"),
    ],
)
def test_names_of_files_are_understood(tmp_path, file, written):
    content = json.dumps({"file_name": written, "caption": "a"})
    assert read(opened(tmp_path, "metadata.jsonl", content, [file])) == [("a", 0)]


def test_a_name_that_fits_two_files_fits_none(tmp_path):
    files = ["a.png", "A.PNG", "b.png"]
    rows = "file_name,caption\na.Png,x\na.png,y\n"
    source = opened(tmp_path, "metadata.csv", rows, files)
    assert read(source) == [("y", 0)] and source.left_out == 1


def test_images_outside_of_the_folder_are_read(tmp_path):
    (tmp_path / "other.png").write_bytes(png(9))
    rows = f"file_name,caption\n{tmp_path / 'other.png'},absolute\n../other.png,relative\n"
    assert read(opened(tmp_path / "x", "metadata.csv", rows)) == [("absolute", 9), ("relative", 9)]


def test_rows_that_are_not_used_are_counted_and_named(tmp_path, capsys):
    rows = "file_name,caption\n0.png,a\n0.png,a\n0.png,b\n9.png,gone\n1.png,a,b\n1.png,\n"
    source = opened(tmp_path, "metadata.csv", rows)
    assert read(source) == [("a", 0), ("b", 0), ("", 1)] and source.left_out == 3
    error = capsys.readouterr().err
    assert "metadata.csv, line 3 (the same as line 2: 1)" in error
    assert "metadata.csv, line 5: there is no file 9.png" in error
    assert "line 6: has 3 columns, the first line has 2 (bad row: 2)" in error
    assert "not used: 2.png (not in metadata.csv: 1)" in error
    assert "used without a caption: 1.png (empty caption: 1)" in error


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metadata.csv", "file_name,text,caption\n0.png,a,b\n",
         "metadata.csv, line 2 has captions in caption and text: .*--data.caption-field"),
        ("metadata.csv", "file_name,text,TEXT\n0.png,a,b\n", "captions in text and TEXT"),
        ("metadata.csv", "file_name,image,text\n0.png,1.png,a\n",
         "names images in file_name and image: .*--data.image-field"),
        ("metadata.csv", "file_name,text,text\n0.png,a,b\n", "metadata.csv names 'text' twice"),
        ("metadata.csv", "file_name,words\n0.png,b\n", "has file_name, words, not caption"),
        ("metadata.csv", "file_name,text\n9.png,b\n", "there is no file 9.png"),
        ("metadata.csv", "file_name,text\n0.png,b\n".encode("utf-16-le"),
         "metadata.csv: it has bytes 0, like UTF-16 .*: save as UTF-8"),
        ("metadata.json", "[{]", "metadata.json is not JSON"),
        ("metadata.json", "5", "neither a list nor an object"),
        ("metadata.json", '{"annotations": [{"bbox": []}], "images": []}', "without captions"),
    ],
)  # fmt: skip
def test_the_error_of_a_table_names_what_is_wrong(tmp_path, name, content, message):
    with pytest.raises(UsageError, match=message):
        opened(tmp_path, name, content)


def test_the_chosen_fields_show_the_delimiter_and_settle_what_is_unclear(tmp_path):
    content = "bild;titel, lang\n0.png;a, b\n"
    chosen = {"image_field": "bild", "caption_field": "titel, lang"}
    assert read(opened(tmp_path, "metadata.csv", content, **chosen)) == [("a, b", 0)]
    content = "file_name,text,caption\n0.png,a,b\n"
    assert read(opened(tmp_path, "metadata.csv", content, caption_field="text")) == [("a", 0)]


def test_tables_in_subfolders_name_their_own_images(tmp_path):
    opened(tmp_path / "cats", "metadata.csv", "file_name,text\n0.png,a cat\n")
    opened(tmp_path / "dogs", "metadata.jsonl", '{"file_name": "1.png", "text": "a dog"}')
    assert read(open_source(DataConfig(source=str(tmp_path)))) == [("a cat", 0), ("a dog", 1)]


def test_a_table_above_the_splits_gives_each_its_rows(tmp_path, capsys):
    rows = "file_name,text\ntrain/0.png,one\ntest/1.png,two\ntrain/9.png,gone\n"
    files = ["train/0.png", "test/1.png"]
    assert read(opened(tmp_path, "metadata.csv", rows, files)) == [("one", 0)]
    assert "there is no file train/9.png" in capsys.readouterr().err
    test = open_source(DataConfig(source=str(tmp_path), split="test"))
    assert [test[i]["caption"] for i in range(len(test))] == ["two"]


def test_a_split_has_a_table_of_its_own(tmp_path):
    opened(tmp_path / "train", "metadata.csv", "file_name,text\n0.png,one\n")
    opened(tmp_path / "test", "metadata.csv", "file_name,text\n1.png,two\n")
    assert read(open_source(DataConfig(source=str(tmp_path)))) == [("one", 0)]
