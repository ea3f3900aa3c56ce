"""The six files of GLIDE (filtered) that OpenAI published: download, cache, recognition."""

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

from glide_jax.errors import GlideError, did_you_mean
from glide_jax.folders import cache_folder
from glide_jax.models.presets import PRESETS, ModelConfig
from glide_jax.weights.store import atomic_files

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
# The errors of a network. Any other OSError comes from the disk.
_BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


def schedule_of(config: ModelConfig) -> str:
    """Return the noise schedule of OpenAI's models: "linear" for upsamplers, otherwise "cosine"."""
    return "linear" if config.upsamples else "cosine"


def released_defaults(config: ModelConfig) -> dict[str, Any]:
    """Return the sampling settings of OpenAI's notebooks `text2im` and `inpaint` for a model."""
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
    """Return the path of a file of OpenAI's, after a download into the cache if it is not there.

    OpenAI publishes no checksums. A download must have the length and the MD5 that the server
    states. Its SHA-256 is written to a file beside it and is verified at each later use.

    Args:
        name: a key of `FILES`, such as "openai/base".

    Raises:
        GlideError: the name is unknown, the download fails or arrives incomplete, or the file in
            the cache was changed.
    """
    if name not in FILES:
        raise GlideError(f"OpenAI released no file {name!r}{did_you_mean(name, FILES)}")
    path = cache_folder() / "released" / FILES[name]
    record = path.with_suffix(".json")
    if not (path.is_file() and record.is_file()):
        _download(f"{server}/{FILES[name]}", path, record)
    elif _digest(path) != _stated(record):
        raise GlideError(f"{path} was changed since its download: delete it and try again")
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
    with atomic_files(path, record) as (data, note):
        try:
            with urllib.request.urlopen(url, timeout=30) as answer, data.open("wb") as file:
                sha256 = _copy(answer, file, path.name)
        except _BROKEN as error:
            clip = [name for name in FILES.values() if name.startswith("clip")]
            files = " ".join(clip) if path.name in clip else path.name
            raise GlideError(
                f"cannot download {url} ({getattr(error, 'reason', error)}): copy {files} from a "
                f"machine with a network and run `glide-jax weights convert {files} FOLDER`"
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
        raise urllib.error.URLError("it arrived incomplete; try again")
    return sha256.hexdigest()


def recognise(state_dict: Mapping[str, np.ndarray]) -> ModelConfig:
    """Return the preset that arrays under OpenAI's names belong to.

    It compares the first convolution and the embeddings of the text. `from_released` then checks
    all arrays and names those that do not fit.

    Raises:
        GlideError: the arrays belong to no preset.
    """
    if side := clip_side(state_dict):
        raise GlideError(
            f"these are the arrays of a noised CLIP's {side} encoder: a CLIP is two files, "
            "`glide-jax weights convert IMAGE.pt TEXT.pt FOLDER`"
        )
    shapes = {name: tuple(array.shape) for name, array in state_dict.items()}
    for preset in PRESETS.values():
        c = preset()
        width, inputs = c.channel_mult[0] * c.model_channels, c.in_channels * c.patch**2
        wanted = {
            "input_blocks.0.0.weight": (width, inputs, 3, 3),
            "token_embedding.weight": (c.n_vocab, c.xf_width),
            "positional_embedding": (c.text_ctx, c.xf_width),
        }
        if wanted.items() <= shapes.items():
            return c
    raise GlideError(
        f"these {len(shapes)} arrays fit none of the known sizes: make a ModelConfig of their "
        "sizes and call glide_jax.weights.from_released"
    )


def clip_side(state_dict: Mapping[str, np.ndarray]) -> str | None:
    """Return the encoder of a noised CLIP that arrays belong to: "image", "text" or None."""
    sides = {"blocks.input.patch_proj": "image", "blocks.input.w_voc": "text"}
    return next((side for name, side in sides.items() if name in state_dict), None)
