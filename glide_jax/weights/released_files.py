"""The six released files of GLIDE (filtered): where they are, and a cache of them."""

import base64
import hashlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tqdm

from glide_jax.errors import GlideError, nearest
from glide_jax.models.presets import PRESETS, ModelConfig
from glide_jax.folders import cache_folder
from glide_jax.weights.store import whole_files

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
# What a network does; all other errors of the operating system are of the disk.
_BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


def schedule_of(config: ModelConfig) -> str:
    """The noise schedule of a released model: linear for upsamplers, cosine for the others."""
    return "linear" if config.upsamples else "cosine"


def released_defaults(config: ModelConfig) -> dict[str, Any]:
    """How the release samples a model, in its notebooks `text2im` and `inpaint`."""
    if config.upsamples:
        sampler = "ddpm" if config.inpaints else "ddim"
        return {
            "steps": "fast27",
            "sampler": sampler,
            "guidance_scale": 1.0,
            "temperature": 0.997,
        }
    scale = 5.0 if config.inpaints else 3.0
    return {"steps": 100, "spacing": "uniform", "sampler": "ddpm", "guidance_scale": scale}


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
    if not (path.is_file() and record.is_file()):
        _download(f"{server}/{FILES[name]}", path, record)
    elif _digest(path) != _stated(record):
        raise GlideError(f"{path} is not what was downloaded: delete it and try again")
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stated(record: Path) -> str | None:
    try:
        return json.loads(record.read_text())["sha256"]
    except (ValueError, KeyError, TypeError):
        return None


def _download(url: str, path: Path, record: Path) -> None:
    with whole_files(path, record) as (data, note):
        try:
            with urllib.request.urlopen(url, timeout=30) as answer, data.open("wb") as file:
                sha256 = _copy(answer, file, path.name)
        except _BROKEN as error:
            clip = [name for name in FILES.values() if name.startswith("clip")]
            bring = " ".join(clip) if path.name in clip else path.name
            raise GlideError(
                f"cannot download {url} ({getattr(error, 'reason', error)}): bring {bring} from a "
                f"machine with a network and run `python -m glide_jax.weights convert {bring} "
                "FOLDER`"
            ) from None
        note.write_text(json.dumps({"url": url, "sha256": sha256}))


def _copy(answer: http.client.HTTPResponse, file: BinaryIO, name: str) -> str:
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
        raise urllib.error.URLError("it did not arrive whole; try again")
    return sha256.hexdigest()


def recognise(state_dict: Mapping[str, np.ndarray]) -> ModelConfig:
    """The preset that these released-style arrays are of, by its first convolution and its text.

    Whether the others fit is for `from_released` to say, which names those that do not.

    Raises:
        GlideError: there is none.
    """
    if side := clip_side(state_dict):
        raise GlideError(
            f"these are the arrays of a noised CLIP's {side} encoder: a CLIP is two files, "
            "`python -m glide_jax.weights convert IMAGE.pt TEXT.pt FOLDER`"
        )
    shapes = {name: tuple(array.shape) for name, array in state_dict.items()}
    for preset in PRESETS.values():
        c = preset()
        wanted = {
            "input_blocks.0.0.weight": (c.channel_mult[0] * c.model_channels, c.in_channels, 3, 3),
            "token_embedding.weight": (c.n_vocab, c.xf_width),
            "positional_embedding": (c.text_ctx, c.xf_width),
        }
        if wanted.items() <= shapes.items():
            return c
    raise GlideError(
        f"these {len(shapes)} arrays are none of the released models nor of the paper's: build a "
        "ModelConfig and call glide_jax.weights.from_released"
    )


def clip_side(state_dict: Mapping[str, np.ndarray]) -> str | None:
    """Which encoder of a noised CLIP these arrays are of: "image", "text", or None."""
    sides = {"blocks.input.patch_proj": "image", "blocks.input.w_voc": "text"}
    return next((side for name, side in sides.items() if name in state_dict), None)
