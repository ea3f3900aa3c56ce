"""Measure how fast images are read, decoded, cropped and tokenised.

    python benchmarks/input_pipeline.py                        # images per second of one core
    python benchmarks/input_pipeline.py --workers 1 2 4 8      # also with this many workers

The script makes its own data: 640x480 JPEGs with the spectrum of photographs (amplitude ~ 1/f).
They are about as large as those of COCO (its 82,783 training images of 2014 take 13 GB: 160 kB
each), and are stored in every format that can be read. The result is compared with the target speed
of training on one H200: 620 images/s for the 385M base at 64x64, 115 images/s for the upsampler at
256x256.
"""

import io
import shutil
import tarfile
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import tyro
from PIL import Image

from glide_jax.data.batches import Prepare, make_batches
from glide_jax.data.data_config import DataConfig
from glide_jax.data.sources import open_source
from glide_jax.errors import one_line_errors
from glide_jax.models.tokenizers import GPT2Tokenizer

NEED = {64: 620, 256: 115}  # images/s
Store = Literal["folder", "tar", "array_record", "tfrecord"]


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        sizes: heights and widths of the images that the pipeline makes.
        stores: formats of the data.
        workers: also measure batches with these numbers of worker processes.
        crop: crop of the images, as in training.
        images: number of different images in the data.
        seconds: length of each measurement.
        batch_size: images per batch.
        keep: folder for the data, which are not deleted then. Empty: a temporary folder.
        caption: caption of every image.
    """

    sizes: tuple[int, ...] = (64, 256)
    stores: tuple[Store, ...] = get_args(Store)
    workers: tuple[int, ...] = ()
    crop: Literal["centre", "random"] = "random"
    images: int = 200
    seconds: float = 10.0
    batch_size: int = 64
    keep: str = ""
    caption: str = field(default="a photograph of nothing in particular, but of natural spectrum")


def photo(rng: np.random.Generator, height: int, width: int) -> bytes:
    """Return a JPEG of mostly grey noise with an amplitude of 1/f, like a photograph."""
    fy, fx = np.fft.fftfreq(height) * height, np.fft.fftfreq(width) * width
    f = np.hypot(fy[:, None], fx)
    f[0, 0] = 1

    def noise(power: float) -> np.ndarray:
        x = np.fft.ifft2(np.fft.fft2(rng.standard_normal((height, width))) / f**power).real
        return x / x.std()

    grey = noise(1.1)
    image = np.stack([128 + 45 * grey + 18 * noise(1.5) for _ in range(3)], -1)
    data = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
    return data.getvalue()


def make_data(folder: Path, options: Options) -> dict[str, str]:
    """Write the images in every wanted format, and return the source of each."""
    rng = np.random.default_rng(0)
    shapes = [(480, 640), (480, 640), (640, 480)]
    images = [photo(rng, *shapes[i % 3]) for i in range(options.images)]
    print(f"{len(images)} JPEGs of {np.mean([len(data) for data in images]) / 1e3:.0f} kB")
    sources = {}
    for store in options.stores:
        subfolder = folder / store
        shutil.rmtree(subfolder, ignore_errors=True)
        subfolder.mkdir(parents=True)
        sources[store] = str(WRITERS[store](subfolder, images, options.caption))
    return sources


def write_folder(folder: Path, images: list[bytes], caption: str) -> Path:
    """Write `0000.jpg`, `0000.txt` and so on."""
    for i, image in enumerate(images):
        (folder / f"{i:04}.jpg").write_bytes(image)
        (folder / f"{i:04}.txt").write_text(caption)
    return folder


def write_tar(folder: Path, images: list[bytes], caption: str) -> Path:
    """Write one tar shard."""
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i, image in enumerate(images):
            for name, data in ((f"{i:04}.jpg", image), (f"{i:04}.txt", caption.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def write_array_record(folder: Path, images: list[bytes], caption: str) -> Path:
    """Write a data set of tensorflow-datasets."""
    import tensorflow_datasets as tfds

    class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Images with captions."""

        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
            features = tfds.features.FeaturesDict({"image": image, "caption": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, image in enumerate(images):
                yield i, {"image": image, "caption": caption}

    tfds.disable_progress_bar()
    Photos(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def write_tfrecord(folder: Path, images: list[bytes], caption: str) -> Path:
    """Write the same data set in TensorFlow's format, but without checksums."""
    from array_record.python.array_record_module import ArrayRecordReader

    write_array_record(folder, images, caption)
    for path in [*folder.rglob("*.array_record-*")]:
        records = ArrayRecordReader(str(path)).read_all()
        pieces = (len(r).to_bytes(8, "little") + bytes(4) + r + bytes(4) for r in records)
        Path(str(path).replace("array_record", "tfrecord")).write_bytes(b"".join(pieces))
        path.unlink()
    (info,) = folder.rglob("dataset_info.json")
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    return folder


WRITERS = {
    "folder": write_folder,
    "tar": write_tar,
    "array_record": write_array_record,
    "tfrecord": write_tfrecord,
}


def per_core(config: DataConfig, size: int, options: Options) -> tuple[float, float]:
    """Return images per second of processor time: prepared, and only read."""
    source = open_source(config)
    prepare = Prepare(source, config, GPT2Tokenizer(128), size, 0)
    read = [source.records[i] for i in range(len(source))]  # also fills the page cache
    start = time.process_time()
    for i in range(len(read)):
        source.records[i]
    reading = len(read) / (time.process_time() - start)
    start, until, done = time.process_time(), time.monotonic() + options.seconds, 0
    while time.monotonic() < until:
        prepare(done)
        done += 1
    return done / (time.process_time() - start), reading


def with_workers(config: DataConfig, size: int, options: Options) -> float:
    """Return images per second in batches, when the workers are running."""
    batches = make_batches(
        open_source(config),
        config,
        batch_size=options.batch_size,
        tokenizer=GPT2Tokenizer(128),
        size=size,
        seed=0,
    )
    try:
        for _ in range(3 * max(1, config.workers)):  # batches made while other workers started
            next(batches)
        start, done = time.monotonic(), 0
        while time.monotonic() < start + options.seconds:
            next(batches)
            done += options.batch_size
        return done / (time.monotonic() - start)
    finally:
        batches.close()


def main(options: Options) -> None:
    """Print a line for each size and format."""
    folder = Path(options.keep or tempfile.mkdtemp(prefix="input_pipeline_"))
    try:
        sources = make_data(folder, options)
        for size in options.sizes:
            need = NEED.get(size)
            for store, source in sources.items():
                config = DataConfig(source=source, crop=options.crop)
                made, reading = per_core(config, size, options)
                line = f"{size:4} {store:13} {made:6.0f} images/s per core"
                line += f" (only reading {reading:,.0f})"
                if need:
                    line += f"; {need} need {need / made:.1f} cores"
                print(line, flush=True)
                for workers in options.workers:
                    speed = with_workers(replace(config, workers=workers), size, options)
                    print(f"{'':18} {speed:6.0f} images/s with {workers} workers", flush=True)
    finally:
        if not options.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Options, description=__doc__))
