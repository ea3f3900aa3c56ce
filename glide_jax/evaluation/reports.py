"""Files that an evaluation writes: JSON and PNG."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from glide_jax.errors import GlideError


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: an interrupted run leaves the old file or the new one.

    Raises:
        GlideError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}")
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise GlideError(f"cannot write {path}: {error}") from None


def write_png(path: Path, image: Image.Image) -> None:
    """Write an image as PNG.

    Raises:
        GlideError: the file cannot be written.
    """
    try:
        image.save(path, "PNG", optimize=True)
    except OSError as error:
        raise GlideError(f"cannot write {path}: {error}") from None
