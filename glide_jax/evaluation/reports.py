"""Files that an evaluation writes: JSON and PNG."""

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from glide_jax.errors import GlideError
from glide_jax.folders import write_atomically


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: an interrupted run leaves the old file or the new one.

    Raises:
        GlideError: the file cannot be written.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise GlideError(f"cannot write {path}: {error.strerror}") from None


def write_png(path: Path, image: Image.Image) -> None:
    """Write an image as PNG, whole or not at all.

    Raises:
        GlideError: the file cannot be written.
    """
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    try:
        write_atomically(path, data.getvalue())
    except OSError as error:
        raise GlideError(f"cannot write {path}: {error.strerror}") from None
