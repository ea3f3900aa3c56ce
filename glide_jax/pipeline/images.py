"""What a run returns: images that know how they were made."""

import io
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from glide_jax.errors import GlideError

# The text chunk of a PNG file that holds an image's metadata, as JSON.
METADATA = "glide_jax"


def package_version() -> str:
    """Return the installed version, or "source" in a checkout that is not installed."""
    try:
        return version("glide-jax")
    except PackageNotFoundError:
        return "source"


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
        """Return what is needed to reproduce image i: prompt, seed, index, weights, settings.

        The dtype and the names of the CLIP and of the weak model are not in it.
        """
        return {
            "prompt": self.prompts[i],
            "seed": self.seed,
            "index": self.indices[i],
            "weights": self.weights,
            **self.settings,
            **(self.details[i] if self.details else {}),
            "version": package_version(),
        }

    def summary(self) -> str:
        """Return one line on how the images were sampled, with the number of evaluations."""

        def stage(settings: dict[str, Any]) -> str:
            found = f"{settings['sampler']}, {settings['evaluations']} network evaluations"
            for name, off in (("guidance_scale", 1.0), ("clip_scale", 0.0)):
                if settings.get(name, off) != off:
                    found += f", {name.replace('_', ' ')} {settings[name]:g}"
            return found

        line = f"{self.weights}: {stage(self.settings)}"
        if upsampler := self.settings.get("upsampler"):
            line += f"; {upsampler['weights']}: {stage(upsampler)}"
        return line

    def save(self, folder: str | Path) -> list[Path]:
        """Write each image as a PNG file, and a grid of them where there are several.

        File numbers continue from those in the folder; no file is overwritten. Each file holds
        `metadata(i)` in its text chunk "glide_jax".

        Returns:
            The files, the grid last.

        Raises:
            GlideError: the folder cannot be written.
        """
        folder = Path(folder).expanduser()
        check_writable(folder)
        start = next_number(folder)
        files = []
        try:
            for i, image in enumerate(self.pil()):
                path = folder / f"{start + i:05}_{slug(self.prompts[i])}.png"
                _write(path, image, self.metadata(i))
                files.append(path)
            if len(self) > 1:
                path = folder / f"{start:05}-{start + len(self) - 1:05}_grid.png"
                _write(path, self.grid(), {"images": [f.name for f in files]})
                files.append(path)
        except OSError as error:
            raise GlideError(f"cannot write images to {folder}: {error}") from None
        return files

    def preview(self, folder: str | Path) -> Path:
        """Write the grid as `preview.png`; it replaces an older one.

        Raises:
            GlideError: the folder cannot be written.
        """
        folder = Path(folder).expanduser()
        path, part = folder / "preview.png", folder / ".preview.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.grid().save(part, "PNG")
            # A rename: a viewer never sees half an image.
            part.replace(path)
        except OSError as error:
            raise GlideError(f"cannot write {path}: {error}") from None
        return path

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.grid().save(buffer, "PNG")
        return buffer.getvalue()


def to_uint8(x: jax.Array | np.ndarray) -> np.ndarray:
    """Convert `[-1, 1] -> 0..255`, rounded to even as in OpenAI's code."""
    return np.clip(np.round((np.asarray(x) + 1) * np.float32(127.5)), 0, 255).astype(np.uint8)


def from_uint8(images: np.ndarray) -> np.ndarray:
    """Convert `0..255 -> [-1, 1]` float32."""
    return np.asarray(images, np.float32) / np.float32(127.5) - 1


def check_writable(folder: Path) -> None:
    """Create a folder, and check that it can be written before anything is computed.

    Raises:
        GlideError: it cannot.
    """
    probe = folder / ".glide_jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise GlideError(f"cannot write images to {folder}: {error.strerror}") from None


def next_number(folder: Path) -> int:
    """Return one more than the largest number that a file in the folder begins with."""
    numbers = (re.match(r"(\d+)(?:-(\d+))?_", p.name) for p in folder.glob("*.png"))
    return 1 + max((int(m[2] or m[1]) for m in numbers if m), default=-1)


def slug(prompt: str) -> str:
    """Return a prompt as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:50].strip("-") or "empty"


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


def _write(path: Path, image: Image.Image, metadata: dict[str, Any]) -> None:
    info = PngInfo()
    info.add_text(METADATA, json.dumps(metadata))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    # Exclusive creation: two runs at once cannot take each other's names.
    with path.open("xb") as file:
        file.write(buffer.getvalue())
