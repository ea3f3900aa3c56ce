"""What an evaluation leaves: JSON and PNG."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from glide_jax.errors import GlideError


def write_json(path: Path, found: Any) -> None:
    """Writes JSON at once: a run that is stopped leaves the old file or the new one.

    Raises:
        GlideError: it cannot be written.
    """
    part = path.with_name(f".{path.name}")
    try:
        part.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise GlideError(f"cannot write {path}: {error}") from None


def write_png(path: Path, picture: Image.Image) -> None:
    """Writes a picture.

    Raises:
        GlideError: it cannot be written.
    """
    try:
        picture.save(path, "PNG", optimize=True)
    except OSError as error:
        raise GlideError(f"cannot write {path}: {error}") from None
