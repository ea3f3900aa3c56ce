"""The six released files of GLIDE (filtered): where they are, and a cache of them."""

import base64
import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tqdm

from glide_jax.errors import GlideError, nearest
from glide_jax.models.presets import PRESETS, ModelConfig
from glide_jax.runtime import cache_folder
from glide_jax.weights.released import abstract_params, released_shapes

SERVER = "https://openaipublic.blob.core.windows.net/diffusion/dec-2021"
FILES = {
    "openai/base": "base.pt",
    "openai/upsample": "upsample.pt",
    "openai/base-inpaint": "base_inpaint.pt",
    "openai/upsample-inpaint": "upsample_inpaint.pt",
    "openai/clip-image": "clip_image_enc.pt",
    "openai/clip-text": "clip_text_enc.pt",
}
PRESET_OF = {
    "openai/base": "base64",
    "openai/upsample": "upsample256",
    "openai/base-inpaint": "inpaint64",
    "openai/upsample-inpaint": "inpaint256",
}
_CHUNK = 1 << 20


def schedule_of(config: ModelConfig) -> str:
    """The noise schedule of a released model: linear for upsamplers, cosine for the others."""
    return "linear" if config.upsamples else "cosine"


def fetch(name: str, server: str = SERVER) -> Path:
    """The released file of that name, downloaded into the user's cache unless it is there.

    The release publishes no checksums. A download must have the length and the MD5 that the
    server states; its SHA-256 is written beside it, and checked each time it is used again.

    Raises:
        GlideError: it cannot be downloaded, arrives broken, or was altered in the cache.
    """
    if name not in FILES:
        raise GlideError(f"there is no released file {name!r}{nearest(name, FILES)}")
    path = cache_folder() / "released" / FILES[name]
    record = path.with_suffix(".json")
    if path.is_file() and record.is_file():
        stated = json.loads(record.read_text())["sha256"]
        if _digest(path) != stated:
            raise GlideError(f"{path} is not what was downloaded: delete it and try again")
        return path
    return _download(f"{server}/{FILES[name]}", path, record)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(url: str, path: Path, record: Path) -> Path:
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as answer, partial.open("wb") as file:
            sha256 = _copy(answer, file, path.name)
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise GlideError(
            f"cannot download {url} ({reason}): bring the file from a machine with a network and "
            f"run `python -m glide_jax.weights convert {path.name} FOLDER`"
        ) from None
    record.write_text(json.dumps({"url": url, "sha256": sha256}))
    partial.replace(path)
    return path


def _copy(answer, file: BinaryIO, name: str) -> str:
    total = int(answer.headers.get("Content-Length") or 0)
    md5, sha256, done = hashlib.md5(usedforsecurity=False), hashlib.sha256(), 0
    with tqdm.tqdm(total=total or None, unit="B", unit_scale=True, desc=name) as bar:
        while chunk := answer.read(_CHUNK):
            file.write(chunk)
            md5.update(chunk)
            sha256.update(chunk)
            done += len(chunk)
            bar.update(len(chunk))
    stated = answer.headers.get("Content-MD5")
    if (total and done != total) or (stated and base64.b64encode(md5.digest()).decode() != stated):
        raise OSError("it did not arrive whole; try again")
    return sha256.hexdigest()


def recognise(state_dict: Mapping[str, np.ndarray]) -> ModelConfig:
    """The preset whose names and shapes these released-style arrays have.

    Raises:
        GlideError: none has.
    """
    have = {name: tuple(array.shape) for name, array in state_dict.items()}
    for preset in PRESETS.values():
        config = preset()
        if released_shapes(abstract_params(config)) == have:
            return config
    raise GlideError(
        f"these {len(have)} arrays are none of the released models nor of the paper's: build a "
        "ModelConfig and call glide_jax.weights.from_released"
    )
