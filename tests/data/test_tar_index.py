"""Which members of a tar file are one record, and how they are told apart."""

import gzip
import tarfile

import pytest

from glide_jax.data.batches import make_batches
from glide_jax.data.data_config import DataConfig
from glide_jax.data.sources import open_source
from glide_jax.data.tar_index import split_name
from glide_jax.errors import UsageError
from glide_jax.models.tokenizers import GPT2Tokenizer
from tests.support.shards import png, read, samples, write_tar


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Cache of the positions of records, in a folder of its own for each test."""
    monkeypatch.setenv("GLIDE_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def opened(folder, names, path="0.tar", **config):
    """Open a tar of the names: images of their number, and texts that are their own name."""
    members = [(n, png(i) if "." in n and n.endswith(("jpg", "png", "AVIF")) else n.encode())
               for i, n in enumerate(names)]  # fmt: skip
    write_tar(folder / path, members)
    return open_source(DataConfig(source=str(folder / path), **config))


@pytest.mark.parametrize(
    "names, expected",
    [
        (["a.jpg", "b.jpg", "a.txt", "b.txt"], [("a.txt", 0), ("b.txt", 1)]),
        (["b.txt", "a.txt", "a.jpg", "b.jpg"], [("b.txt", 3), ("a.txt", 2)]),
        (["2.00.jpg", "2.00.txt", "2.01.jpg", "2.01.txt"], [("2.00.txt", 0), ("2.01.txt", 2)]),
        (["2.0.jpg", "2.1.jpg", "2.0.txt", "2.1.txt"], [("2.0.txt", 0), ("2.1.txt", 1)]),
        (["1.jpg", "1.txt", "1.5.jpg", "1.5.txt"], [("1.txt", 0), ("1.5.txt", 2)]),
        (["a.b.c.jpg", "a.b.c.txt"], [("a.b.c.txt", 0)]),
        (["0.input.jpg", "0.output.txt", "1.input.jpg", "1.output.txt"],
         [("0.output.txt", 0), ("1.output.txt", 2)]),
        (["0/input.jpg", "0/output.txt", "1/input.jpg", "1/output.txt"],
         [("0/output.txt", 0), ("1/output.txt", 2)]),
        (["./a.jpg", "a.txt"], [("a.txt", 0)]),
        (["x/a.jpg", "y/a.jpg", "x/a.txt", "y/a.txt"], [("x/a.txt", 0), ("y/a.txt", 1)]),
        (["x.y/a.jpg", "x.y/a.txt"], [("x.y/a.txt", 0)]),
        (["a.seg.png", "a.jpg", "a.txt"], [("a.txt", 1)]),
        (["e\u0301.jpg", "\u00e9.txt"], [("\u00e9.txt", 0)]),
        (["._a.jpg", "a.jpg", "__MACOSX/._a.jpg", "a.txt"], [("a.txt", 1)]),
        (["a.AVIF", "a.TXT"], [("a.TXT", 0)]),
        (["a.jpg", "a.caption"], [("a.caption", 0)]),
        (["a.jpg", "a.txt", "b.jpg", "b.txt", "a.jpg", "a.txt"],
         [("a.txt", 0), ("b.txt", 2), ("a.txt", 4)]),
    ],
)  # fmt: skip
def test_members_are_put_together(tmp_path, names, expected, capsys):
    source = opened(tmp_path, names)
    assert read(source) == expected
    assert not source.faults.broken


def test_names_are_split_at_the_first_dot():
    assert split_name("./a.d/b.Seg.PNG") == ("a.d/b", "seg.png")
    assert split_name("README") == ("README", "")


def test_a_large_sorted_tar_gives_every_record_its_own_text(tmp_path):
    members = sorted(samples(200), key=lambda member: (member[0][-3:], member[0]))
    write_tar(tmp_path / "0.tar", members)
    source = open_source(DataConfig(source=str(tmp_path)))
    assert read(source) == [(f"number {i}", i) for i in range(200)]
    again = open_source(DataConfig(source=str(tmp_path)))  # from the cache
    assert read(again) == read(source) and again.fingerprint == source.fingerprint


def test_sorted_and_interleaved_tars_give_the_same_batches(tmp_path):
    members = list(samples(20))
    write_tar(tmp_path / "a" / "0.tar", members)
    write_tar(tmp_path / "b" / "0.tar", sorted(members, key=lambda member: member[0][-3:]))

    def tokens(folder):
        config = DataConfig(source=str(tmp_path / folder))
        made = make_batches(
            open_source(config),
            config,
            batch_size=40,
            tokenizer=GPT2Tokenizer(8),
            size=8,
            seed=0,
        )
        return next(made)["tokens"].tolist()

    assert tokens("a") == tokens("b")


def test_lines_of_a_text_are_captions(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", png()), ("a.txt", b"one\r\ntwo\n\n")])
    config = DataConfig(source=str(tmp_path / "0.tar"))
    assert open_source(config)[0]["caption"] == ("one", "two")
    joined = DataConfig(source=config.source, caption_lines="join")
    assert open_source(joined)[0]["caption"] == "one two"


def test_class_numbers_are_captions_where_asked_for(tmp_path):
    names = ["a.jpg", "a.cls", "b.jpg", "b.cls"]
    with pytest.raises(UsageError, match=r"\(a\) has no text file or JSON, only jpg, cls: --data"):
        opened(tmp_path, names)
    assert read(opened(tmp_path, names, caption_field="cls")) == [("a.cls", 0), ("b.cls", 2)]


def test_json_gives_captions_under_the_usual_names(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", png()), ("a.json", b'\xef\xbb\xbf{"TEXT": "a"}')])
    assert open_source(DataConfig(source=str(tmp_path)))[0]["caption"] == "a"


def test_records_that_cannot_be_used_are_counted_and_named(tmp_path, capsys):
    names = ["a.jpg", "a.txt", "b.jpg", "c.txt", "d.jpg", "d.png", "d.txt", "e.jpg", "e.jpg",
             "e.txt", "README.md", ".hidden.jpg"]  # fmt: skip
    link = tarfile.TarInfo("f.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
    write_tar(tmp_path / "0.tar", [*((n, png()) for n in names), ("", link)])
    source = open_source(DataConfig(source=str(tmp_path)))
    (line,) = capsys.readouterr().err.splitlines()
    path = tmp_path / "0.tar"
    assert f"{path}: 5 of 6 records are broken, and others take their place" in line
    for named in (
        f"b.jpg in {path} (no caption: 1)",
        f"c.txt in {path}, README.md in {path} (no image: 2)",
        f"d.jpg in {path} (several images, jpg, png: 1)",
        f"e.jpg in {path} (jpg twice: 1)",
        f".hidden.jpg in {path} (hidden: 1), f.jpg in {path} (link: 1)",
    ):
        assert named in line
    assert len(source.faults.broken) == 5


def test_two_images_of_a_record_are_chosen_by_name(tmp_path):
    names = ["a.jpg", "a.png", "a.txt"]
    assert read(opened(tmp_path, names, image_field="png")) == [("a.txt", 1)]
    with pytest.raises(UsageError, match="several images, jpg, png: choose with --data.image-fie"):
        opened(tmp_path, names)


def test_images_and_texts_of_different_names_are_refused(tmp_path):
    with pytest.raises(UsageError, match="must be equal up to the first dot.*input.jpg .*output."):
        opened(tmp_path, ["input.jpg", "output.txt"])


def test_a_compressed_tar_says_so_whatever_its_name(tmp_path):
    path = write_tar(tmp_path / "x" / "0.tar", samples(2))
    data = gzip.compress(path.read_bytes())
    path.write_bytes(data)
    with pytest.raises(UsageError, match="compressed with gzip: unpack it to a plain .tar"):
        open_source(DataConfig(source=str(path)))
    for name in ("0.tar.gz", "0.tgz", "0.tar.bz2", "0.tar.zst"):
        path.rename(path := tmp_path / "x" / name)
        with pytest.raises(UsageError, match=f"{name} is compressed .*: unpack it"):
            open_source(DataConfig(source=str(tmp_path / "x")))


def test_a_tar_with_the_name_of_a_folder_is_a_tar(tmp_path):
    write_tar(tmp_path / "shards", samples(2))
    source = open_source(DataConfig(source=str(tmp_path / "shards")))
    assert read(source) == [("number 0", 0), ("number 1", 1)]


def test_files_beside_tars_are_named_apart_from_their_descriptions(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", samples(1))
    write_tar(tmp_path / "1.TAR", samples(1))
    write_tar(tmp_path / "2.tar", [])
    (tmp_path / "3.tar").write_bytes(b"no tar" * 500)
    for name in ("0.parquet", "0_stats.json", "loose.png"):
        (tmp_path / name).write_bytes(png())
    assert len(open_source(DataConfig(source=str(tmp_path)))) == 2
    error = capsys.readouterr().err
    assert "3.tar is damaged after 0 records: invalid header" in error
    assert f"{tmp_path / '2.tar'} (no records: 1), loose.png (beside tar shards: 1)" in error
    assert "parquet" not in error and "stats" not in error


@pytest.mark.parametrize(
    "pattern, count",
    [
        ("{0,2}.tar", 2),
        ("{0..2}.tar", 3),
        ("{2..0}.tar", 3),
        ("{0..2..2}.tar", 2),
        ("[01].tar", 2),
        ("?.tar", 3),
        ("*", 3),
        ("0.tar::1.tar", 2),
        ("{0,{1,2}}.tar", 3),
    ],
)
def test_patterns_of_shards(tmp_path, monkeypatch, pattern, count):
    folder = tmp_path / "a [1]"
    for i in range(3):
        write_tar(folder / f"{i}.tar", samples(1, start=i))
    monkeypatch.chdir(folder)
    assert len(open_source(DataConfig(source=pattern))) == count
    if "::" not in pattern:
        assert len(open_source(DataConfig(source=f"{folder}/{pattern}"))) == count


def test_a_file_whose_name_is_a_pattern_is_that_file(tmp_path):
    write_tar(tmp_path / "[0].tar", samples(1, start=5))
    write_tar(tmp_path / "0.tar", samples(1))
    assert read(open_source(DataConfig(source=f"{tmp_path}/[0].tar"))) == [("number 5", 5)]


def test_a_truncated_sorted_tar_names_the_images_without_captions(tmp_path, capsys):
    members = sorted(samples(4), key=lambda member: (member[0][-3:], member[0]))
    path = write_tar(tmp_path / "0.tar", members)
    path.write_bytes(path.read_bytes()[: 4 * 1024 + 2 * 1024 + 700])  # in the third caption
    source = open_source(DataConfig(source=str(path)))
    assert [source[i]["caption"] for i in range(2)] == ["number 0", "number 1"]
    error = capsys.readouterr().err
    assert "0002.png" in error and "0003.png" in error and "(no caption: 2)" in error
    assert "0.tar is damaged after 4 records" in error
