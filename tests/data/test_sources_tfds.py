"""Prepared data sets of tensorflow-datasets, written and read without TensorFlow."""

import io
import itertools
import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from glide_jax.data import storage
from glide_jax.data.batches import make_batches
from glide_jax.data.data_config import DataConfig
from glide_jax.data.sources import open_source
from glide_jax.data.storage import BrokenRecord
from glide_jax.errors import GlideError, UsageError
from glide_jax.models.tokenizers import GPT2Tokenizer


def jpeg(value):
    data = io.BytesIO()
    Image.new("RGB", (48, 32), (value, value, value)).save(data, "JPEG", quality=95)
    return data.getvalue()


class Mini(tfds.core.GeneratorBasedBuilder):
    """A data set with the features of coco_captions, and a text and a class feature."""

    VERSION = tfds.core.Version("1.9.0")
    code_path = None

    def _info(self):
        kinds = tfds.features
        features = {
            "image": kinds.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "image/filename": kinds.Text(),
            "captions": kinds.Sequence({"id": np.int64, "text": kinds.Text()}),
            "objects": kinds.Sequence({"bbox": kinds.BBoxFeature(), "is_crowd": np.bool_}),
            "style": kinds.Text(),
            "label": kinds.ClassLabel(names=["cat", "dog"]),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=kinds.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 8), "val": self._generate_examples(8, 10)}

    def _generate_examples(self, start, end):
        for i in range(start, end):
            box = tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
            yield (
                i,
                {
                    "image": jpeg(10 * i) if i != 5 else jpeg(50)[:200],
                    "image/filename": f"{i}.jpg",
                    "captions": [{"id": k, "text": f"caption {i}.{k}"} for k in range(i % 3)],
                    "objects": [{"bbox": box, "is_crowd": False}] * (i % 2),
                    "style": "flat" if i % 2 else "photo",
                    "label": i % 2,
                },
            )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    Mini(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def tfrecord(data_dir, tmp_path, monkeypatch):
    """Folder of the same records in TensorFlow's format: length, checksum, bytes, checksum."""
    monkeypatch.setenv("GLIDE_JAX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "mini" / "1.9.0"
    shutil.copytree(data_dir / "mini" / "1.9.0", folder)
    for path in list(folder.glob("*.array_record-*")):
        records = ArrayRecordReader(str(path)).read_all()
        pieces = (len(r).to_bytes(8, "little") + b"crc4" + r + b"crc4" for r in records)
        Path(str(path).replace("array_record", "tfrecord")).write_bytes(b"".join(pieces))
        path.unlink()
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    return folder


def read(source, indices):
    return [source[i] for i in indices]


@pytest.mark.parametrize("stored", ["array_record", "tfrecord"])
def test_a_data_set_is_read_without_tensorflow(data_dir, tfrecord, stored):
    folder = data_dir / "mini" / "1.9.0" if stored == "array_record" else tfrecord
    config = DataConfig(source=str(folder), split="train[2:]+val")
    source = pickle.loads(pickle.dumps(open_source(config)))
    assert len(source) == 8 and "mini/1.9.0, train[2:]+val, 8 images" in source.fingerprint
    record = source[0]
    assert record["caption"] == ("caption 2.0", "caption 2.1")
    assert record["image"].shape == (32, 48, 3) and abs(int(record["image"].mean()) - 20) <= 1
    assert record["style"] == "photo" and record["label"] == "cat"
    assert record["image/filename"] == "2.jpg"
    assert [r["label"] for r in read(source, (5, 6))] == ["dog", "cat"]
    assert "tensorflow" not in sys.modules


def test_a_record_without_a_caption_or_with_a_broken_image_is_skipped(data_dir):
    config = DataConfig(source="mini", data_dir=str(data_dir))
    source = open_source(config)
    with pytest.raises(BrokenRecord, match="record 3 of mini/1.9.0, train has no caption"):
        source[3]
    with pytest.raises(BrokenRecord, match="cannot read the image record 5 of mini"):
        source[5]
    tokenizer = GPT2Tokenizer(8)
    batches = make_batches(source, config, batch_size=8, tokenizer=tokenizer, size=16, seed=0)
    arrays = next(batches)
    assert arrays["skipped"] >= 3  # 0, 3 and 6 have no caption
    texts = {
        tokenizer.decode(i[m])
        for i, m in zip(arrays["tokens"], arrays["caption_mask"], strict=True)
    }
    known = {f"caption {i}.{k}" for i in (1, 2, 4, 7) for k in range(i % 3)}
    assert texts <= known


@pytest.mark.parametrize("field, caption", [("label", "dog"), ("image/filename", "7.jpg")])
def test_any_text_or_class_can_be_the_caption(data_dir, field, caption):
    config = DataConfig(source="mini:1.9.0", data_dir=str(data_dir), caption_field=field)
    assert open_source(config)[7]["caption"] == caption


def test_styles_select_records(data_dir):
    config = DataConfig(source="mini", data_dir=str(data_dir), styles=("flat",))
    source = open_source(config)
    assert len(source) == 4 and source[0]["image/filename"] == "1.jpg"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"split": "test"}, "no split 'test'.*it has train, val"),
        ({"split": "train[:x]"}, "train\\[:x\\]"),
        ({"caption_field": "objects"}, "no field 'objects': choose .* captions/text"),
        ({"image_field": "style"}, "no field 'style': choose with --data.image-field from image"),
        ({"styles": ("flatt",)}, "did you mean 'flat'"),
        ({"concepts": ("cat",)}, "no field 'concept'"),
    ],
)
def test_the_error_of_a_missing_split_or_field_names_the_present_ones(data_dir, fields, message):
    with pytest.raises(UsageError, match=message):
        open_source(DataConfig(source="mini", data_dir=str(data_dir), **fields))


def test_the_newest_version_is_read_and_several_data_sets_are_refused(data_dir, tmp_path):
    for version in ("1.9.0", "1.10.0"):
        shutil.copytree(data_dir / "mini" / "1.9.0", tmp_path / "mini" / version)
        info = tmp_path / "mini" / version / "dataset_info.json"
        info.write_text(info.read_text().replace("1.9.0", version))
    assert "mini/1.10.0" in open_source(DataConfig(source=str(tmp_path / "mini"))).label
    shutil.copytree(tmp_path / "mini", tmp_path / "other")
    with pytest.raises(UsageError, match="several data sets.*mini/1.10.0.*other/1.9.0"):
        open_source(DataConfig(source=str(tmp_path)))


def test_a_shard_that_lacks_records_is_refused(tfrecord):
    (path,) = tfrecord.glob("*train.tfrecord*")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(GlideError, match="has 7 records, not 8: copy it again"):
        open_source(DataConfig(source=str(tfrecord)))


def test_a_record_with_damaged_bytes_is_broken(tfrecord):
    (path,) = tfrecord.glob("*train.tfrecord*")
    data = bytearray(path.read_bytes())
    data[12:60] = b"\xff" * 48
    path.write_bytes(data)
    source = open_source(DataConfig(source=str(tfrecord)))
    with pytest.raises(BrokenRecord, match="record 0 of mini"):
        source[0]
    assert source[1]["caption"] == ("caption 1.0",)


def test_the_error_of_another_format_has_a_command_to_convert_it(tfrecord):
    info = json.loads((tfrecord / "dataset_info.json").read_text())
    (tfrecord / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "riegeli"}))
    with pytest.raises(GlideError, match="riegeli.*tfds convert_format --dataset_version_dir="):
        open_source(DataConfig(source=str(tfrecord)))


def test_a_malformed_description_gives_one_line(tfrecord):
    (tfrecord / "features.json").write_text("{")
    with pytest.raises(GlideError, match="cannot read .*1.9.0"):
        open_source(DataConfig(source=str(tfrecord)))
    (tfrecord / "dataset_info.json").write_text("{")
    with pytest.raises(GlideError, match="cannot read .*1.9.0"):
        open_source(DataConfig(source=str(tfrecord)))


def test_iteration_over_a_data_set_resumes(data_dir):
    config = DataConfig(source="mini", data_dir=str(data_dir), crop="random")
    arguments = {"batch_size": 4, "tokenizer": GPT2Tokenizer(8), "size": 16, "seed": 3}
    one, two = (make_batches(open_source(config), config, **arguments) for _ in range(2))
    list(itertools.islice(one, 3))
    two.set_state(one.get_state())
    for expected, got in itertools.islice(zip(one, two, strict=True), 3):
        assert all(np.array_equal(expected[k], got[k]) for k in expected)


class Bucket(MemoryFileSystem):
    """A file system for gs:// without a network."""

    protocol = ("gs", "gcs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))


@pytest.fixture
def bucket(monkeypatch):
    storage._system.cache_clear()
    for name in ("gs", "gcs"):
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, name, Bucket)
    yield Bucket()
    storage._system.cache_clear()


def test_a_data_set_in_a_bucket(data_dir, tfrecord, bucket):
    bucket.put(str(tfrecord.parent), "/stored/mini", recursive=True)
    source = open_source(DataConfig(source="gs://stored/mini"))
    assert source[2]["caption"] == ("caption 2.0", "caption 2.1")
    named = DataConfig(source="mini", data_dir="gs://stored", split="val")
    assert len(open_source(named)) == 2
    bucket.put(str(data_dir / "mini"), "/random/mini", recursive=True)
    with pytest.raises(GlideError, match="gcloud storage cp -r gs://random/mini/1.9.0 data/mini/"):
        open_source(DataConfig(source="gs://random/mini"))
