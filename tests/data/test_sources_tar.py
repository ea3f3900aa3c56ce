"""Tar shards: reading them, and damaged or malicious ones."""

import json
import tarfile
from dataclasses import replace

import pytest

from glide_jax.data.data_config import DataConfig
from glide_jax.data.sources import open_source
from glide_jax.data.storage import BrokenRecord
from glide_jax.errors import UsageError
from tests.support.shards import png, read, samples, write_tar


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Cache of the positions of records, in a folder of its own for each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GLIDE_JAX_CACHE", str(folder))
    return folder


@pytest.mark.parametrize("source", ["{0..1}.tar", "*.tar", ""])
def test_tar_shards_by_number_by_pattern_and_by_folder(tmp_path, source):
    write_tar(tmp_path / "0.tar", samples(3))
    write_tar(tmp_path / "1.tar", samples(2, start=3))
    source = open_source(DataConfig(source=f"{tmp_path}/{source}"))
    assert read(source) == [(f"number {i}", i) for i in range(5)]
    assert "2 tar files, 5 images" in source.fingerprint
    with pytest.raises(IndexError):
        source[5]


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_json_beside_an_image_gives_captions_and_texts(tmp_path, layout):
    folder = "a" * 99 + "/" + ("b" * 120 if layout != tarfile.USTAR_FORMAT else "b")
    metadata = {"caption": "from JSON", "text": "alt", "style": "flat", "clip_score": 0.3}
    write_tar(
        tmp_path / "0.tar",
        [
            (f"{folder}.JPG", png(7)),  # a PNG: the content counts, not the name
            (f"{folder}.json", json.dumps(metadata).encode()),
            ("second.seg.png", png(1)),
            ("second.png", png(2)),
            ("second.txt", b"from text"),
            ("second.json", b'{"style": "3D"}'),
        ],
        format=layout,
    )
    config = DataConfig(source=str(tmp_path / "0.tar"))
    source = open_source(config)
    assert read(source) == [("from JSON", 7), ("from text", 2)]
    assert [source[i]["style"] for i in range(2)] == ["flat", "3D"]
    assert open_source(replace(config, caption_field="text"))[0]["caption"] == "alt"
    assert open_source(replace(config, image_field="seg.png"))[1]["image"][0, 0, 0] == 1


def test_malicious_names_and_links_have_no_effect(tmp_path):
    link, hard, folder = (tarfile.TarInfo(name) for name in ("0001.png", "0001.txt", "0001"))
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "../../outside.txt"
    folder.type = tarfile.DIRTYPE
    write_tar(
        tmp_path / "in" / "0.tar",
        [
            ("../../escape.png", png(5)),
            ("../../escape.txt", b"relative"),
            ("/absolute.png", png(6)),
            ("._absolute.png", b"resource fork"),
            ("/absolute.txt", b"absolute"),
            ("", link),
            ("", hard),
            ("", folder),
        ],
    )
    before = sorted(tmp_path.rglob("*"))
    source = open_source(DataConfig(source=str(tmp_path / "in")))
    assert read(source) == [("relative", 5), ("absolute", 6)]
    assert sorted(tmp_path.rglob("*")) == before


def test_the_errors_of_broken_records_name_them(tmp_path):
    write_tar(
        tmp_path / "0.tar",
        [
            *samples(1),
            ("a.png", png()),
            ("b.txt", b"no image"),
            ("c.png", png()),
            ("c.png", png()),
            ("d.png", png()),
            ("d.json", b"{"),
            ("e.png", png()[:40]),
            ("e.txt", b"cut off"),
            *samples(1, start=1),
        ],
    )
    source = open_source(DataConfig(source=str(tmp_path / "0.tar")))
    assert len(source) == 7
    for i, message in enumerate(
        [r"\(a\) has no text file", r"\(b\) has txt, and no", r"\(c\) has its png twice",
         r"the JSON of .*\(d\)", r"cannot read the image .*\(e\)"], 1
    ):  # fmt: skip
        with pytest.raises(BrokenRecord, match=message):
            source[i]
    assert source[6]["caption"] == "number 1"


def test_a_name_that_is_repeated_later_is_another_record(tmp_path):
    write_tar(tmp_path / "0.tar", [*samples(2), *samples(1)])
    source = open_source(DataConfig(source=str(tmp_path)))
    assert [caption for caption, _ in read(source)] == ["number 0", "number 1", "number 0"]


@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_a_damaged_shard_is_read_up_to_the_damage(tmp_path, capsys, damage):
    path = write_tar(tmp_path / "0.tar", samples(4))
    data = bytearray(path.read_bytes())
    third = 2 * 2048  # each record has two headers and two blocks of data
    if damage == "truncated":
        path.write_bytes(data[: third + 700])
    else:
        data[third : third + 512] = b"x" * 512
        path.write_bytes(data)
    for _ in range(2):  # scanned, then read from the cache
        source = open_source(DataConfig(source=str(path)))
        assert read(source) == [("number 0", 0), ("number 1", 1)]
        assert source.left_out == 1
        assert "0.tar is damaged after 2 records" in capsys.readouterr().err


def test_a_shard_is_scanned_again_only_if_it_changes(tmp_path, own_cache, monkeypatch):
    path = write_tar(tmp_path / "0.tar", samples(2))
    config = DataConfig(source=str(path))
    open_source(config)
    (cached,) = (own_cache / "shards").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "next", lambda self: pytest.fail("scanned again"))
        assert len(open_source(config)) == 2
    cached.write_bytes(b"damaged")
    assert len(open_source(config)) == 2
    write_tar(path, samples(3))
    assert len(open_source(config)) == 3


def test_a_shard_that_shrank_during_training_has_broken_records(tmp_path):
    path = write_tar(tmp_path / "0.tar", samples(3))
    source = open_source(DataConfig(source=str(path)))
    path.write_bytes(path.read_bytes()[:5000])
    assert source[0]["caption"] == "number 0"
    with pytest.raises(BrokenRecord, match="ends early"):
        source[2]


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz"])
def test_compressed_shards_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match="unpack it to a plain .tar"):
        open_source(DataConfig(source=str(tmp_path / name)))


def test_an_empty_shard_is_refused(tmp_path):
    write_tar(tmp_path / "0.tar", [])
    with pytest.raises(UsageError, match="no records in 1 tar files"):
        open_source(DataConfig(source=str(tmp_path)))
