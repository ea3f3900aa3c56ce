"""What sampling returns: pictures that know how they were made."""

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
import jax.numpy as jnp
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from glide_jax.errors import GlideError, UsageError

# The text chunk of a PNG file under which a picture's making is kept, as JSON.
METADATA = "glide_jax"


def package_version() -> str:
    """The installed version, or "source" in a checkout that is not installed."""
    try:
        return version("glide-jax")
    except PackageNotFoundError:
        return "source"


@dataclass(frozen=True)
class Pictures:
    """Pictures of one run.

    Attributes:
        images: `(N, H, W, 3)` uint8.
        prompts: the caption of each.
        seed, numbers: picture i is number `numbers[i]` of the run of `seed`.
        weights: name of the model.
        settings: how they were sampled.
        details: what there is to say of each beside that, if anything.
    """

    images: np.ndarray
    prompts: tuple[str, ...]
    seed: int
    numbers: tuple[int, ...]
    weights: str
    settings: dict[str, Any]
    details: tuple[dict[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def pil(self) -> list[Image.Image]:
        """Each picture as a `PIL.Image`."""
        return [Image.fromarray(image) for image in self.images]

    def grid(self, columns: int | None = None) -> Image.Image:
        """All pictures side by side: a row a prompt where each has several, else about square."""
        runs = [len(list(run)) for _, run in itertools.groupby(self.prompts)]
        if columns is None and len(runs) > 1 and set(runs) == {runs[0]} != {1}:
            columns = runs[0]
        return Image.fromarray(image_grid(self.images, columns))

    def metadata(self, i: int) -> dict[str, Any]:
        """What makes picture i again."""
        return {
            "prompt": self.prompts[i],
            "seed": self.seed,
            "first": self.numbers[i],
            "weights": self.weights,
            **self.settings,
            **(self.details[i] if self.details else {}),
            "version": package_version(),
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Writes each picture, and a grid of them where there are several, as PNG.

        Names go on counting from those in the folder; nothing is ever overwritten. Each
        file carries `metadata(i)` in its text chunk "glide_jax".

        Returns:
            The files, the grid last.

        Raises:
            GlideError: the folder cannot be written.
        """
        folder = Path(folder).expanduser()
        writable(folder)
        start = next_number(folder)
        files = []
        try:
            for i, picture in enumerate(self.pil()):
                path = folder / f"{start + i:05}_{slug(self.prompts[i])}.png"
                _write(path, picture, self.metadata(i))
                files.append(path)
            if len(self) > 1:
                path = folder / f"{start:05}-{start + len(self) - 1:05}_grid.png"
                _write(path, self.grid(), {"pictures": [f.name for f in files]})
                files.append(path)
        except OSError as error:
            raise GlideError(f"cannot write pictures to {folder}: {error}") from None
        return files

    def preview(self, folder: str | Path) -> Path:
        """Writes the grid as `preview.png`, in the place of one that is there.

        Raises:
            GlideError: the folder cannot be written.
        """
        folder = Path(folder).expanduser()
        path, part = folder / "preview.png", folder / ".preview.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.grid().save(part, "PNG")
            # At once: a viewer never sees half a picture.
            part.replace(path)
        except OSError as error:
            raise GlideError(f"cannot write {path}: {error}") from None
        return path

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.grid().save(buffer, "PNG")
        return buffer.getvalue()


def to_uint8(x: jax.Array) -> np.ndarray:
    """`[-1, 1] -> 0..255`, rounded to even as the released code does."""
    return np.asarray(jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8))


def from_uint8(images: np.ndarray) -> jax.Array:
    """`0..255 -> [-1, 1]` float32."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


def _open(given: Any, what: str) -> Image.Image:
    if isinstance(given, Image.Image):
        return given
    try:
        picture = Image.open(Path(given).expanduser())
        picture.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise GlideError(f"cannot read the {what} {given}: {error}") from None
    return picture


def read_pictures(given: Any, size: int | None, batch: int | None) -> np.ndarray:
    """Pictures for a batch: `(batch, H, W, 3)` uint8.

    Args:
        given: `Pictures`, a file, a `PIL.Image`, or a uint8 array `(H, W, 3)` or `(N, H, W, 3)`.
        size: side to scale them to (bicubic, as the release does); None: left as they are.
        batch: how many there must be, unless there is one; None: any number.

    Raises:
        GlideError: a file that is no picture.
        UsageError: an array of another kind, or neither one picture nor one for each of the batch.
    """
    if isinstance(given, Pictures):
        given = given.images
    if not isinstance(given, np.ndarray):
        given = np.asarray(_open(given, "picture").convert("RGB"))
    images = given[None] if given.ndim == 3 else given
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UsageError(f"a picture is (H, W, 3) uint8, not {given.shape} {given.dtype}")
    batch = len(images) if batch is None else batch
    if len(images) not in (1, batch):
        raise UsageError(f"{len(images)} pictures for {batch} prompts: give one, or one each")
    if size is not None and images.shape[1:3] != (size, size):
        scale = [Image.fromarray(i).resize((size, size), Image.Resampling.BICUBIC) for i in images]
        images = np.stack([np.asarray(i) for i in scale])
    return np.broadcast_to(images, (batch, *images.shape[1:]))


def read_hole(given: Any, size: int, batch: int) -> np.ndarray:
    """A mask for a batch: `(batch, size, size, 1)` float32, 1 in the hole.

    Args:
        given: a file, a `PIL.Image`, or an array `(H, W)` or `(N, H, W)`; not zero is hole.

    Raises:
        GlideError: a file that is no picture.
        UsageError: an array of another shape.
    """
    if not isinstance(given, np.ndarray):
        given = np.asarray(_open(given, "mask").convert("L")) > 127
    masks = (given[None] if given.ndim == 2 else given) != 0
    if masks.ndim != 3 or len(masks) not in (1, batch):
        raise UsageError(f"a mask is (H, W), or one for each of {batch} prompts, not {given.shape}")
    # Nearest, as the release enlarges masks: a mask has no grey.
    rows, columns = (np.arange(size) * n // size for n in masks.shape[1:])
    masks = masks[:, rows][:, :, columns].astype(np.float32)[..., None]
    return np.broadcast_to(masks, (batch, *masks.shape[1:]))


def writable(folder: Path) -> None:
    """Makes a folder, and makes sure that it can be written before anything is computed.

    Raises:
        GlideError: it cannot.
    """
    probe = folder / ".glide_jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise GlideError(f"cannot write pictures to {folder}: {error.strerror}") from None


def next_number(folder: Path) -> int:
    """One more than the largest number that a file in the folder begins with."""
    numbers = (re.match(r"(\d+)(?:-(\d+))?_", p.name) for p in folder.glob("*.png"))
    return 1 + max((int(m[2] or m[1]) for m in numbers if m), default=-1)


def slug(prompt: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:50].strip("-") or "empty"


def image_grid(images: np.ndarray | Sequence[np.ndarray], columns: int | None = None) -> np.ndarray:
    """`(N, H, W, 3)` uint8 -> one picture, a white line between them."""
    images = np.asarray(images)
    n, height, width, _ = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    canvas = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = 2 + i // columns * (height + 2), 2 + i % columns * (width + 2)
        canvas[y : y + height, x : x + width] = image
    return canvas


def _write(path: Path, picture: Image.Image, metadata: dict[str, Any]) -> None:
    info = PngInfo()
    info.add_text(METADATA, json.dumps(metadata))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info)
    # Exclusive creation: two runs at once cannot take each other's names.
    with path.open("xb") as file:
        file.write(buffer.getvalue())
