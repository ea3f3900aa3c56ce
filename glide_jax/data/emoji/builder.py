"""tensorflow-datasets builders of emoji64. Importing this module imports tensorflow-datasets.

Neither writing nor reading needs TensorFlow if the format is array_record and images are passed
as PNG bytes: `tfds.features.Image` encodes arrays with TensorFlow.
"""

import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.registered import DatasetNotFoundError

from glide_jax.data.emoji.art import VENDORS
from glide_jax.data.emoji.npz import SPLITS, fingerprint, iter_images, read_fields
from glide_jax.errors import GlideError, UsageError

TEXTS = ("caption", "caption_styled", "style", "family", "concept")


class Emoji64(tfds.core.GeneratorBasedBuilder):
    """Captioned 64x64 emoji, icons and clip art, made from an .npz file by `prepare`.

    A record has `image` (64, 64, 3) uint8, `caption`, `caption_styled`, `style`, `family`,
    `concept` and `license` str, `keywords` a list of str, `tone` uint8 (0: none; 1 to 5: light
    to dark; two digits: a couple). Within a split records keep the order of the file.
    """

    VERSION = tfds.core.Version("1.0.0")
    SIZE = 64
    # tensorflow-datasets would look for checksums of downloads beside its own idea of this file,
    # through importlib_resources, which it does not install (tensorflow/datasets #11212).
    code_path = None

    def __init__(self, *, npz: str | os.PathLike | None = None, **kwargs) -> None:
        self._npz = npz
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {
            "image": tfds.features.Image(
                shape=(self.SIZE, self.SIZE, 3), dtype=np.uint8, encoding_format="png"
            ),
            **dict.fromkeys((*TEXTS, "license"), text),
            "keywords": tfds.features.Sequence(text),
            "tone": np.uint8,
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Captioned emoji, icons and clip art in eleven styles, with held-out "
            "concept-style pairs.",
            license="MIT, Apache-2.0, CC-BY-4.0 and public domain; see the field `license`",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("caption", "image"),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(
                {"npz": fingerprint(self._npz)} if self._npz is not None else {}
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        if self._npz is None:
            raise UsageError("this data set is made from an .npz file: Emoji64(npz=..., ...)")
        fields = read_fields(self._npz)
        present = [split for split in SPLITS if (fields["split"] == split).any()]
        return {split: self._generate_examples(self._npz, fields, split) for split in present}

    def _generate_examples(
        self, npz: str | os.PathLike, fields: dict[str, np.ndarray], split: str
    ) -> Iterator:
        i = 0
        for block in iter_images(npz):
            for image in block:
                if fields["split"][i] == split:
                    yield i, self._record(fields, i, image)
                i += 1

    def _record(self, fields: dict[str, np.ndarray], i: int, image: np.ndarray) -> dict:
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        vendor = str(fields["vendor"][i])
        return {
            "image": png.getvalue(),
            **{name: str(fields[name][i]) for name in TEXTS},
            "keywords": [k for k in str(fields["keywords"][i]).split(", ") if k],
            "tone": int(fields["tone"][i]),
            # Not the file's: early files label the art of FxEmoji with the licence of its code.
            "license": VENDORS[vendor].license if vendor in VENDORS else str(fields["license"][i]),
        }


class Emoji256(Emoji64):
    """Captioned 256x256 emoji, icons and clip art: the records of `Emoji64` in a larger size."""

    VERSION = tfds.core.Version("1.0.0")
    SIZE = 256


BUILDERS = {64: Emoji64, 256: Emoji256}


def prepare(npz: str | os.PathLike, data_dir: str | os.PathLike) -> Path:
    """Write the images as a tensorflow-datasets data set in array_record format.

    The data set is written under another name and moved when it is complete, so an interrupted
    run never leaves one that looks complete. If it exists already, nothing is done.

    Args:
        npz: file that `rasterise` wrote.
        data_dir: folder of data sets.

    Returns:
        The folder: `data_dir`/emoji64/1.0.0, or `data_dir`/emoji256/1.0.0 for 256x256 images.

    Raises:
        GlideError: the .npz file is broken, or the folder has other images.
        UsageError: the images have another size.
    """
    size = next(iter_images(npz)).shape[1]
    if size not in BUILDERS:
        raise UsageError(f"{npz}: {size}x{size} images; a data set is made of 64x64 or 256x256")
    builder = BUILDERS[size]
    folder = Path(data_dir) / builder.name / str(builder.VERSION)
    if folder.exists():
        _check_made_from(folder, npz)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the data set, not in it: the remains of a killed run must not be found as a data set.
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".partial-") as temporary:
        made = builder(npz=npz, data_dir=temporary, file_format="array_record")
        made.download_and_prepare()
        os.replace(made.data_dir, folder)
    return folder


def _check_made_from(folder: Path, npz: str | os.PathLike) -> None:
    """Raise GlideError unless the data set in a folder was made from the images in `npz`."""
    try:
        info = tfds.builder_from_directory(folder).info
    except (OSError, ValueError, DatasetNotFoundError) as error:
        raise GlideError(
            f"{folder}: not a data set ({error}); delete it and run this again"
        ) from error
    if (info.metadata or {}).get("npz") != fingerprint(npz):
        raise GlideError(f"{folder}: has a data set of other images; delete it or choose another")
