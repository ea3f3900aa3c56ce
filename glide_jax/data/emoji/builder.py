"""The tensorflow-datasets builders of emoji64; importing this imports tensorflow-datasets.

Neither writing nor reading needs TensorFlow as long as the format is array_record and pictures
are handed over as PNG bytes: `tfds.features.Image` encodes arrays through TensorFlow.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from glide_jax.data.emoji.npz import SPLITS, fingerprint, iter_images, read_fields
from glide_jax.data.emoji.art import VENDORS
from glide_jax.errors import GlideError, UsageError

TEXTS = ("caption", "caption_styled", "style", "family", "concept")


class Emoji64(tfds.core.GeneratorBasedBuilder):
    """Captioned 64x64 emoji, icons and clip art; made of an .npz file by `emoji64.prepare`.

    A record has `image` (64, 64, 3) uint8, `caption`, `caption_styled`, `style`, `family`,
    `concept` and `license` str, `keywords` a list of str, `tone` uint8 (0: none; 1 to 5: light
    to dark; two digits: a couple). Within a split records keep the order of the file.
    """

    VERSION = tfds.core.Version("1.0.0")
    SIZE = 64
    # tensorflow-datasets would look for checksums of downloads beside its own idea of this file,
    # by way of importlib_resources, which it does not install (tensorflow/datasets #11212).
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
            description="Captioned emoji, icons and clip art in eleven styles, with held-out cells "
            "for new combinations of object and style.",
            license="MIT, Apache-2.0, CC-BY-4.0 and public domain; see the field `license`",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("caption", "image"),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(
                {"npz": fingerprint(self._npz)} if self._npz is not None else {}
            ),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        if self._npz is None:
            raise UsageError("this data set is made of an .npz file: Emoji64(npz=..., ...)")
        fields = read_fields(self._npz)
        present = [split for split in SPLITS if (fields["split"] == split).any()]
        return {split: self._generate_examples(fields, split) for split in present}

    def _generate_examples(self, fields: dict[str, np.ndarray], split: str) -> Iterator:
        i = 0
        for block in iter_images(self._npz):
            for picture in block:
                if fields["split"][i] == split:
                    yield i, self._record(fields, i, picture)
                i += 1

    def _record(self, fields: dict[str, np.ndarray], i: int, picture: np.ndarray) -> dict:
        png = io.BytesIO()
        Image.fromarray(picture).save(png, "PNG")
        vendor = str(fields["vendor"][i])
        return {
            "image": png.getvalue(),
            **{name: str(fields[name][i]) for name in TEXTS},
            "keywords": [k for k in str(fields["keywords"][i]).split(", ") if k],
            "tone": int(fields["tone"][i]),
            # Not the file's: early files labelled FxEmoji's art with the licence of its code.
            "license": VENDORS[vendor].license if vendor in VENDORS else str(fields["license"][i]),
        }


class Emoji256(Emoji64):
    """The same records at 256x256."""

    VERSION = tfds.core.Version("1.0.0")
    SIZE = 256


BUILDERS = {64: Emoji64, 256: Emoji256}


def prepare(npz: str | os.PathLike, data_dir: str | os.PathLike) -> Path:
    """Writes the pictures as a tensorflow-datasets data set in array_record format: its folder.

    64x64 pictures become `data_dir`/emoji64/1.0.0, 256x256 ones `data_dir`/emoji256/1.0.0. The
    folder is made under another name and moved there when it is whole, so that an interrupted
    run never leaves a data set that looks complete; if it is there already, nothing is done.

    Raises GlideError if the .npz file is broken or the folder holds other pictures, UsageError
    if the pictures have another size.
    """
    size = next(iter(iter_images(npz))).shape[1]
    if size not in BUILDERS:
        raise UsageError(f"{npz}: {size}x{size} pictures; a data set is made of 64x64 or 256x256")
    builder = BUILDERS[size]
    place = Path(data_dir) / builder.name / str(builder.VERSION)
    if place.exists():
        _is_of(place, npz)
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    # Beside the data set, not in it: what a killed run leaves there must not be found as one.
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".partial-") as temporary:
        made = builder(npz=npz, data_dir=temporary, file_format="array_record")
        made.download_and_prepare()
        os.replace(made.data_dir, place)
    return place


def _is_of(place: Path, npz: str | os.PathLike) -> None:
    """Raises GlideError unless the data set in `place` was made of the pictures in `npz`."""
    try:
        info = tfds.builder_from_directory(place).info
    except (OSError, ValueError, tfds.core.registered.DatasetNotFoundError) as error:
        raise GlideError(
            f"{place}: not a data set ({error}); delete it and run this again"
        ) from error
    if (info.metadata or {}).get("npz") != fingerprint(npz):
        raise GlideError(
            f"{place}: holds a data set of other pictures; delete it or choose another"
        )
