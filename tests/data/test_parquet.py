"""Parquet and arrow files: columns, splits, faults, and the order of a run."""

import json
import sys

import fsspec.config
import numpy as np
import pyarrow as pa
import pytest

from glide_jax.data import parquet, row_groups, storage
from glide_jax.data.batches import make_batches
from glide_jax.data.data_config import DataConfig
from glide_jax.data.sources import open_source
from glide_jax.data.storage import BrokenRecord
from glide_jax.errors import GlideError, UsageError
from glide_jax.models.tokenizers import GPT2Tokenizer
from tests.support.data_hub import serve
from tests.support.parquets import image_table, write_arrow, write_parquet
from tests.support.shards import png, read


def numbers(count, start=0, **columns):
    """Return a table of images, whose grey value is their number, and captions."""
    order = range(start, start + count)
    columns = columns or {"text": [f"number {i}" for i in order]}
    return image_table([png(i) for i in order], columns)


def expected(count, start=0):
    return [(f"number {i}", i) for i in range(start, start + count)]


def opened(path, **options):
    return open_source(DataConfig(source=str(path), **options))


# -- files and splits -----------------------------------------------------------------------------


def test_a_file_has_its_rows_in_order_and_says_nothing(tmp_path, capsys):
    source = opened(write_parquet(tmp_path / "a.parquet", numbers(8)))
    assert read(source) == expected(8)
    assert "1 parquet files, 8 images" in source.fingerprint
    assert capsys.readouterr().err == ""
    with pytest.raises(IndexError):
        source[8]


LAYOUTS = {
    "shards": ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
               "data/test-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
    "plain": ("train_a.parquet", "train_b.parquet", "test.parquet", "val.parquet"),
    "converted": ("default/train/0000.parquet", "default/train/0001.parquet",
                  "default/test/0000.parquet", "default/validation/0000.parquet"),
    "folders": ("train/0000.parquet", "train/0001.parquet", "test/0000.parquet", "val/0.parquet"),
    "hashes": ("data/train-00000-of-00002-0123456789abcdef.parquet",
               "data/train-00001-of-00002-0123456789abcdef.parquet",
               "data/test-00000-of-00001-0123456789abcdef.parquet",
               "data/valid-00000-of-00001-0123456789abcdef.parquet"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_shards_has_the_splits_that_file_names_say(tmp_path, layout, capsys):
    for i, name in enumerate(LAYOUTS[layout]):
        write_parquet(tmp_path / name, numbers(4, 4 * i))
    (tmp_path / "README.md").write_text("about")
    assert read(opened(tmp_path)) == expected(8)
    assert read(opened(tmp_path, split="test")) == expected(4, 8)
    validation = "val" if layout == "folders" else "validation"
    assert read(opened(tmp_path, split=validation)) == expected(4, 12)
    if layout != "folders":
        assert read(opened(tmp_path, split="test+val")) == expected(8, 8)
        message = f"{tmp_path} has the splits test, train, validation, and no 'tset'"
        with pytest.raises(UsageError, match=message):
            opened(tmp_path, split="tset")
    assert "note" not in capsys.readouterr().err


def test_a_pattern_takes_its_files_and_the_split_only_where_there_are_several(tmp_path):
    for i, name in enumerate(("train-0", "train-1", "test-0")):
        write_parquet(tmp_path / f"{name}.parquet", numbers(2, 2 * i))
    assert read(opened(f"{tmp_path}/*.parquet")) == expected(4)
    assert read(opened(f"{tmp_path}/test*.parquet")) == expected(2, 4)
    assert read(opened(f"{tmp_path}/train-{{1..1}}.parquet")) == expected(2, 2)


def test_a_missing_shard_is_noted(tmp_path, capsys):
    write_parquet(tmp_path / "train-00001-of-00003.parquet", numbers(2))
    opened(tmp_path)
    assert capsys.readouterr().err == f"note: {tmp_path} has 1 of 3 files of its split\n"


def test_configurations_are_not_mixed(tmp_path):
    for name in ("en", "fr"):
        write_parquet(tmp_path / name / "train-00000-of-00001.parquet", numbers(2))
    with pytest.raises(UsageError, match=f"configurations en, fr: .*--data.source {tmp_path}/en"):
        opened(tmp_path)
    assert read(opened(tmp_path / "fr")) == expected(2)


def test_parquet_files_beside_tar_shards_and_beside_captioned_images_are_not_data(tmp_path):
    write_parquet(tmp_path / "list.parquet", numbers(2))
    (tmp_path / "a.png").write_bytes(png(7))
    (tmp_path / "a.txt").write_text("seven")
    assert read(opened(tmp_path)) == [("seven", 7)]


def test_save_to_disk_folders_are_read_without_their_caches(tmp_path):
    for split, start in (("train", 0), ("test", 5)):
        folder = tmp_path / split
        write_arrow(folder / "data-00000-of-00001.arrow", numbers(5, start))
        write_arrow(folder / "cache-0123.arrow", numbers(2))
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read(opened(tmp_path)) == expected(5)
    assert read(opened(tmp_path, split="test")) == expected(5, 5)
    assert read(opened(tmp_path / "test")) == expected(5, 5)


def test_an_arrow_file_with_a_footer_is_read_too(tmp_path):
    table, path = numbers(5), str(tmp_path / "a.arrow")
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, table.schema) as out:
        out.write_table(table, max_chunksize=2)
    assert read(opened(path)) == expected(5)


# -- columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["text", "TEXT", "Caption", "prompt", "alt_text", "txt"])
def test_the_caption_is_found_by_its_usual_names(tmp_path, field):
    table = numbers(2, 0, id=["a", "b"], **{field: ["number 0", "number 1"]})
    assert read(opened(write_parquet(tmp_path / "a.parquet", table))) == expected(2)


def test_images_may_be_plain_bytes_or_in_a_field_that_is_asked_for(tmp_path):
    table = pa.table({
        "jpg": pa.array([png(0), png(1)], pa.large_binary()),
        "other": pa.array([png(8), png(9)]),
        "txt": ["number 0", "number 1"],
        "json": [{"caption": "a"}, {"caption": "b"}],
    })  # fmt: skip
    path = write_parquet(tmp_path / "a.parquet", table)
    assert read(opened(path, caption_field="txt")) == expected(2)
    chosen = opened(path, image_field="other", caption_field="json/caption")
    assert read(chosen) == [("a", 8), ("b", 9)]


def test_several_captions_are_alternatives_and_classes_have_names(tmp_path):
    label = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    columns = {
        "captions": [["a", "b"], ["c"], [], None],
        "label": [1, 0, -1, 1],
        "style": ["flat", None, "", "3D"],
        "score": [1.0, 2.0, 3.0, 4.0],
    }
    table = image_table([png(i) for i in range(4)], columns, label)
    path = write_parquet(tmp_path / "a.parquet", table)
    records = opened(path).records
    assert records[0]["caption"] == ("a", "b") and records[1]["caption"] == ("c",)
    assert {k: v for k, v in records[0].items() if k not in ("image", "caption")} == {
        "label": "dog",
        "style": "flat",
    }
    for index in (2, 3):
        with pytest.raises(BrokenRecord, match=f"a.parquet, row {index}"):
            records[index]
    assert read(opened(path, caption_field="label"))[:2] == [("dog", 0), ("cat", 1)]


@pytest.mark.parametrize(
    "columns, options, message",
    [
        ({"text": ["a"], "prompt": ["b"]}, {}, "row 0 has captions in text and prompt: choose"),
        ({"title": ["a"]}, {}, "has no caption: choose with --data.caption-field from title"),
        ({"n": [1]}, {}, "has no caption: its columns are image, n"),
        ({"text": ["a"]}, {"caption_field": "txet"}, "no text 'txet', did you mean 'text'"),
        ({"text": ["a"]}, {"image_field": "img"}, "no column 'img'.*from image"),
        ({"text": ["a"]}, {"image_field": "text"}, "has string in text, and no bytes of images"),
        ({"text": ["a"], "img": [b"x"]}, {"image_field": "im"}, "from image"),
        ({"text": ["a"]}, {"concepts": ("cat",)}, "no concepts or styles"),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit_are_refused_in_one_line(tmp_path, columns, options, message):
    path = write_parquet(tmp_path / "a.parquet", image_table([png()], columns))
    with pytest.raises(UsageError, match=message) as error:
        opened(path, **options)
    assert "\n" not in str(error.value)


def test_lists_of_images_and_two_images_are_refused(tmp_path):
    images = pa.array([[{"bytes": png(), "path": "a"}]])
    path = write_parquet(tmp_path / "a.parquet", pa.table({"images": images, "text": ["a"]}))
    message = "a list of images in each row of images, which is not read: write a row for each"
    with pytest.raises(UsageError, match=message):
        opened(path)
    one = pa.array([{"bytes": png(3), "path": "a"}])
    path = write_parquet(tmp_path / "b.parquet", pa.table({"l": one, "r": one, "text": ["a"]}))
    with pytest.raises(UsageError, match="images in l and r: choose one with --data.image-field"):
        opened(path)
    assert read(opened(path, image_field="r")) == [("a", 3)]


def test_only_the_needed_columns_are_read(tmp_path, monkeypatch):
    table = numbers(4, text=list("abcd"), embedding=[[0.0]] * 4, mask=[b"x"] * 4, n=[1] * 4)
    path = write_parquet(tmp_path / "a.parquet", table)
    asked, group = set(), row_groups._File.group
    monkeypatch.setattr(
        row_groups._File, "group", lambda self, i, c: asked.update(c) or group(self, i, c)
    )
    assert opened(path)[3]["caption"] == "d"
    assert asked == {"image", "text"}


# -- faults ---------------------------------------------------------------------------------------


def test_rows_that_cannot_be_used_are_counted_named_and_saved(tmp_path, capsys):
    images = [png(0), None, (None, None), b"", b"no image", png(5), png(6), (None, "gone.png")]
    captions = [*"abcde", None, " ", "h"]
    write_parquet(tmp_path / "train.parquet", image_table(images, {"text": captions}))
    source = opened(tmp_path)
    line = (
        f"{tmp_path}: 6 of 8 records are broken, and others take their place: "
        "train.parquet, row 1, train.parquet, row 2 (no image: 2), train.parquet, row 3 (no bytes: "
        "1), train.parquet, row 4 (unreadable: 1), train.parquet, row 5 (no caption: 1), "
        "train.parquet, row 7 (no file of its image: 1); used without a caption: train.parquet, "
        "row 6 (empty caption: 1)\n"
    )
    assert capsys.readouterr().err == line
    source.faults.save(tmp_path / "left_out.txt")
    lines = (tmp_path / "left_out.txt").read_text().splitlines()
    assert lines[4] == "broken: train.parquet, row 5: no caption" and len(lines) == 7
    with pytest.raises(BrokenRecord, match=r"train.parquet, row 1 has no image: its image is null"):
        source[1]


def test_nothing_usable_is_an_error(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", image_table([None, None], {"text": ["a", "b"]}))
    with pytest.raises(UsageError, match=r"a.parquet has no row that can be used: .*no image: 2"):
        opened(path)
    path = write_parquet(tmp_path / "b.parquet", image_table([], {"text": pa.array([], "string")}))
    with pytest.raises(UsageError, match=f"there are no rows in {path}"):
        opened(path)
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(GlideError, match=f"cannot read {tmp_path}/c.parquet: "):
        opened(tmp_path / "c.parquet")


def test_a_broken_group_breaks_its_rows_only(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", numbers(6))
    group = row_groups._File.group

    def broken(self, number, columns):
        if number == 1:
            raise OSError("Corrupt snappy compressed data.")
        return group(self, number, columns)

    monkeypatch.setattr(row_groups._File, "group", broken)
    source = opened(path)
    assert [fault.name for fault in source.faults.broken] == [
        f"a.parquet, row {i}" for i in (3, 4, 5)
    ]
    with pytest.raises(BrokenRecord, match=r"cannot read .*a.parquet: Corrupt snappy .*row 4"):
        source[4]


def test_files_of_different_columns_are_refused(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", numbers(2))
    write_parquet(tmp_path / "train-1.parquet", numbers(2, caption=["a", "b"]))
    with pytest.raises(UsageError, match=r"train-1.parquet has no column 'text', and .*train-0"):
        opened(tmp_path)


def test_without_pyarrow_one_line_names_the_extra(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", numbers(2))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError) as error:
        opened(path)
    assert str(error.value) == f"{path} needs pyarrow: pip install 'glide-jax[parquet]'"


# -- images beside --------------------------------------------------------------------------------


def test_paths_of_images_are_relative_to_the_file_or_the_folder(tmp_path):
    for name, value in (("data/images/a.png", 1), ("images/b.png", 2)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(value))
    rows = [(None, "images/a.png"), (None, "images/b.png")]
    table = image_table(rows, {"text": ["number 1", "number 2"]})
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", table)
    assert read(opened(tmp_path)) == expected(2, 1)


@pytest.mark.parametrize(
    "name, named", [("metadata", ""), ("list", "list.parquet"), ("list", "self")]
)
def test_a_table_of_names_beside_images_is_metadata(tmp_path, name, named):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    names = ["0.png", "1.png", "2.png"]
    table = pa.table({"file_name": names, "text": ["number 0", "number 1", "x"], "hash": [b""] * 3})
    path = write_parquet(tmp_path / f"{name}.parquet", table)
    source = opened(path) if named == "self" else opened(tmp_path, metadata=named)
    assert read(source) == expected(2)
    (bad,) = source.faults.left_out
    assert bad.name == f"{name}.parquet, row 2: there is no file 2.png"


# -- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", ["main", "v1", "refs/convert/parquet"])
def test_a_data_set_of_the_hub_is_read_in_place(tmp_path, monkeypatch, revision):
    names = ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000-of-00001")
    files = {"README.md": b"about", ".gitattributes": b""}
    for i, name in enumerate(names):
        local = write_parquet(tmp_path / "a.parquet", numbers(4, 4 * i))
        files[f"{name}.parquet"] = local.read_bytes()
    where = "hf://datasets/user/name" + (f"@{revision}" if revision != "main" else "")
    with serve("user/name", revision, files) as address:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": address, "token": False})
        storage._system.cache_clear()
        assert read(opened(where)) == expected(8)
        assert read(opened(where, split="test")) == expected(4, 8)
        assert read(opened(f"{where}/data")) == expected(8)
        assert read(opened(f"{where}/data/train-*.parquet")) == expected(8)
        assert read(opened(f"{where}/{names[1]}.parquet")) == expected(4, 4)
        with pytest.raises(
            UsageError, match="no data set hf://datasets/user/gone: .*hf auth login"
        ):
            opened("hf://datasets/user/gone")
    storage._system.cache_clear()


def test_an_address_of_the_hub_names_a_data_set():
    with pytest.raises(UsageError, match="write hf://datasets/USER/NAME"):
        opened("hf://user/name")


# -- order ----------------------------------------------------------------------------------------


def taken(source, count, position=0, process=(0, 1), **options):
    """Return the rows of some batches, as grey values and tokens."""
    config = DataConfig(**options)
    made = make_batches(
        source, config, batch_size=4, tokenizer=GPT2Tokenizer(16), size=8, seed=3, process=process
    )
    made.set_state({"position": position, "rounds": 16})
    batches = [next(made) for _ in range(count)]
    made.close()
    values = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])
    return values.tolist(), np.concatenate([batch["tokens"] for batch in batches]).tolist()


@pytest.mark.parametrize("write, name", [(write_parquet, "a.parquet"), (write_arrow, "a.arrow")])
def test_batches_do_not_depend_on_workers_processes_and_resuming(tmp_path, write, name):
    source = opened(write(tmp_path / name, numbers(12)))
    values, tokens = taken(source, 6)
    assert sorted(values[:12]) == sorted(values[12:]) == list(range(12))
    assert taken(source, 6, workers=2) == (values, tokens)
    assert taken(source, 6, threads=3) == (values, tokens)
    assert taken(source, 3, position=12)[0] == values[12:]
    halves = [taken(source, 6, process=(i, 2))[0] for i in range(2)]
    assert [halves[k // 2 % 2][k // 4 * 2 + k % 2] for k in range(24)] == values


def test_the_cache_keeps_the_last_groups_within_its_room(tmp_path, monkeypatch):
    path = str(write_parquet(tmp_path / "a.parquet", numbers(9)))
    rows, _ = row_groups.open_row_groups([path])
    kept = row_groups._Kept()
    sizes = [kept.get(path, i, ("image",)).nbytes for i in range(3)]
    assert len(kept._groups) == 3 and kept._bytes == sum(sizes)
    assert kept.get(path, 0, ("image",)) is kept.get(path, 0, ("image",))
    monkeypatch.setattr(row_groups, "ROOM", sizes[0] + 1)
    kept = row_groups._Kept()
    for i in (0, 1, 2):
        kept.get(path, i, ("image",))
    assert [key[1] for key in kept._groups] == [2] and kept._bytes == sizes[2]
    assert rows.name(7) == f"{path}, row 7"


def test_large_groups_are_noted(tmp_path, monkeypatch, capsys):
    path = write_parquet(tmp_path / "a.parquet", numbers(9), rows=5)
    monkeypatch.setattr(parquet, "ROOM", 100)
    opened(path)
    assert "write the files again with row_group_size=100" in capsys.readouterr().err
