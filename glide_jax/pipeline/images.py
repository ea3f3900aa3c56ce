"""What a run returns: images that know how they were made."""

import io
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from glide_jax.errors import GlideError
from glide_jax.folders import (
    check_writable,
    expand_home,
    locked,
    package_version,
    write_atomically,
    write_new,
)

# The text chunk of a PNG file that holds an image's metadata, as JSON.
METADATA = "glide_jax"


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one run.

    Attributes:
        images: `(N, H, W, 3)` uint8.
        prompts: the prompt of each image.
        seed: of the run.
        indices: the index of each image in the run; with the seed it reproduces the image.
        weights: name of the model.
        settings: how the images were sampled.
        details: further metadata of each image, if any.
    """

    images: np.ndarray
    prompts: tuple[str, ...]
    seed: int
    indices: tuple[int, ...]
    weights: str
    settings: dict[str, Any]
    details: tuple[dict[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def pil(self) -> list[Image.Image]:
        """Return each image as a `PIL.Image`."""
        return [Image.fromarray(image) for image in self.images]

    def grid(self, columns: int | None = None) -> Image.Image:
        """Return all images side by side.

        Args:
            columns: images per row; None: one row per prompt where each prompt has several images,
                else about square.
        """
        runs = [len(list(run)) for _, run in itertools.groupby(self.prompts)]
        if columns is None and len(runs) > 1 and len(set(runs)) == 1 and runs[0] > 1:
            columns = runs[0]
        return Image.fromarray(image_grid(self.images, columns))

    def metadata(self, i: int) -> dict[str, Any]:
        """Return prompt, seed, index, weights and settings of image i.

        To reproduce it, also give the same dtype, CLIP and weak model.
        """
        return {
            "prompt": self.prompts[i],
            "seed": self.seed,
            "index": self.indices[i],
            "weights": self.weights,
            **self.settings,
            **self._own_scale(i),
            **(self.details[i] if self.details else {}),
            "version": package_version(),
        }

    def _own_scale(self, i: int) -> dict[str, float]:
        """The guidance scale of image i, where each image has one of its own."""
        scale = self.settings.get("guidance_scale")
        if not isinstance(scale, list):
            return {}
        return {"guidance_scale": scale[i if len(scale) == len(self) else 0]}

    def summary(self) -> str:
        """Return one line on how the images were sampled, with the number of evaluations."""

        def stage_text(settings: dict[str, Any]) -> str:
            text = f"{settings['sampler']}, {settings['evaluations']} network evaluations"
            for name, off in (("guidance_scale", 1.0), ("clip_guidance_scale", 0.0)):
                if settings.get(name, off) != off:
                    ends = sorted({np.min(settings[name]), np.max(settings[name])})
                    text += f", {name.replace('_', ' ')} {' to '.join(f'{end:g}' for end in ends)}"
            return text

        line = f"{self.weights}: {stage_text(self.settings)}"
        if upsampler := self.settings.get("upsampler"):
            line += f"; {upsampler['weights']}: {stage_text(upsampler)}"
        return line

    def save(self, folder: str | Path) -> list[Path]:
        """Write each image as a PNG file, and a grid of them where there are several.

        File numbers continue from those in the folder; no file is overwritten, also where several
        runs write to one folder at once. A file is whole or absent. Each file holds `metadata(i)`
        in its text chunk "glide_jax".

        Returns:
            The files, the grid last.

        Raises:
            GlideError: the folder cannot be written, or the disk is full.
        """
        folder = expand_home(folder)
        check_writable(folder)
        files: list[Path] = []
        try:
            with locked(folder):
                number = next_number(folder)
                for i, image in enumerate(self.pil()):
                    name = file_name_part(self.prompts[i])
                    data = png(image, self.metadata(i))
                    path = _claim(folder, number, f"{{number:05}}_{name}.png", data)
                    files.append(path)
                    number = _number(path) + 1
                if len(self) > 1:
                    first, last = _number(files[0]), _number(files[-1])
                    grid = png(self.grid(), {"images": [f.name for f in files]})
                    path = folder / f"{first:05}-{last:05}_grid.png"
                    write_new(path, grid)
                    files.append(path)
        except OSError as error:
            saved = f"; {len(files)} of {len(self)} images are saved" if files else ""
            raise GlideError(
                f"cannot write images to {folder}: {error.strerror or error}{saved}"
            ) from None
        return files

    def save_preview(self, folder: str | Path) -> Path:
        """Write the grid as `preview.png`; it replaces an older one.

        Raises:
            GlideError: the folder cannot be written.
        """
        folder = expand_home(folder)
        path = folder / "preview.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # A rename: a viewer never sees half an image.
            write_atomically(path, self._repr_png_())
        except OSError as error:
            raise GlideError(f"cannot write {path}: {error.strerror or error}") from None
        return path

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.grid().save(buffer, "PNG")
        return buffer.getvalue()


def to_uint8(x: jax.Array | np.ndarray) -> np.ndarray:
    """Convert `[-1, 1] -> 0..255`, rounded to even as in OpenAI's code."""
    return np.clip(np.round((np.asarray(x) + 1) * np.float32(127.5)), 0, 255).astype(np.uint8)


def next_number(folder: Path) -> int:
    """Return one more than the largest number that a file in the folder begins with."""
    numbers = (re.match(r"([0-9]+)(?:-([0-9]+))?_", p.name) for p in folder.glob("*.png"))
    return 1 + max((int(m[2] or m[1]) for m in numbers if m), default=-1)


def slug(text: str) -> str:
    """Return a text as a part of a file name, in ASCII."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:50].strip("-") or "empty"


def file_name_part(prompt: str) -> str:
    """Return a prompt as a part of a file name: letters, marks and digits of any script, NFC.

    At most 50 characters and 120 bytes: file systems limit a name to 255 bytes, some to 143.
    """
    text = unicodedata.normalize("NFC", prompt.lower())
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else "-" for c in text)
    name = re.sub("-+", "-", kept).strip("-")
    cut = name[:50]
    while len(cut.encode()) > 120:
        cut = cut[:-1]
    if len(cut) < len(name):
        # A letter is not parted from its marks.
        while cut and unicodedata.category(name[len(cut)])[0] == "M":
            cut = cut[:-1]
    cut = cut.strip("-")
    try:
        os.fsencode(cut)
    except UnicodeEncodeError:  # a locale whose file names are ASCII
        return slug(prompt)
    return cut or "empty"


def image_grid(images: np.ndarray | Sequence[np.ndarray], columns: int | None = None) -> np.ndarray:
    """Arrange `(N, H, W, 3)` uint8 images in one image, with white lines between them."""
    images = np.asarray(images)
    n, height, width, _ = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    canvas = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = 2 + i // columns * (height + 2), 2 + i % columns * (width + 2)
        canvas[y : y + height, x : x + width] = image
    return canvas


def png(image: Image.Image, metadata: dict[str, Any]) -> bytes:
    """Return an image as a PNG file with its metadata."""
    info = PngInfo()
    info.add_text(METADATA, json.dumps(metadata))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _claim(folder: Path, number: int, pattern: str, data: bytes) -> Path:
    """Write a file under the first free number, starting at `number`."""
    while True:
        path = folder / pattern.format(number=number)
        try:
            write_new(path, data)
        except FileExistsError:
            # On a file system without locks another run was faster.
            number = max(number + 1, next_number(folder))
        else:
            return path


def _number(path: Path) -> int:
    return int(path.name.partition("_")[0])
