"""The registry of noised CLIPs: sizes and weights."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from glide_jax.errors import GlideError, UsageError
from glide_jax.folders import expand_home
from glide_jax.models.presets import CLIPConfig, clip64
from glide_jax.weights.choosing import read_released
from glide_jax.weights.hub import download
from glide_jax.weights.hub_names import on_hub
from glide_jax.weights.registry import ASSETS, EMBEDDED_CLIPS, FORMAT
from glide_jax.weights.released_clip import clip_from_released, clip_misfits
from glide_jax.weights.released_files import fetch
from glide_jax.weights.store import flatten, load_weights, save_weights, unflatten
from glide_jax.weights.token_rows import expand

RELEASED = "openai/clip"


@dataclass(frozen=True, eq=False)
class CLIPModel:
    """The weights of a noised CLIP and its sizes.

    Attributes:
        name: the name, folder or file that it was loaded from.
        config: its sizes.
        params: nested dictionaries of float32 arrays.
    """

    name: str
    config: CLIPConfig
    params: dict[str, Any]


def load_clip_model(weights: str | Path = RELEASED) -> CLIPModel:
    """Load a noised CLIP: "openai/clip", "emoji_clip64", a folder, or `hf://user/name`.

    The first and the last are downloaded.

    Raises:
        UsageError: there is no such name or folder.
        GlideError: the weights are broken, or cannot be downloaded.
    """
    if str(weights) == RELEASED:
        image, text = (fetch(f"openai/clip-{side}") for side in ("image", "text"))
        return clip_from_files(image, text)
    if on_hub(weights):
        downloaded = download(weights)
        return replace(load_clip_model(downloaded.path), name=downloaded.name)
    embedded = str(weights) in EMBEDDED_CLIPS
    folder = ASSETS / str(weights) if embedded else expand_home(weights)
    if not folder.is_dir():
        known = ", ".join((RELEASED, *EMBEDDED_CLIPS))
        raise UsageError(f"there is no noised CLIP {str(weights)!r}: name {known} or a folder")
    config, flat, _ = load_weights(folder)
    if config.get("format") != FORMAT or "clip" not in config:
        raise GlideError(f"{folder} does not hold a noised CLIP of this version's format")
    try:
        sizes = CLIPConfig(**config["clip"])
    except (TypeError, ValueError) as error:
        raise GlideError(f"{folder / 'config.json'} does not describe a CLIP: {error}") from None
    flat = expand(flat, sizes.n_vocab)
    # The embedded weights fit, as a test checks: to trace the network would double the start-up.
    if not embedded and (wrong := clip_misfits(flat, sizes)):
        raise GlideError(
            f"the weights in {folder} do not fit its config.json: {len(wrong)} parameters are "
            f"missing, unexpected or of the wrong shape ({', '.join(wrong[:3])})"
        )
    params = unflatten({k: np.asarray(v, np.float32) for k, v in flat.items()})
    return CLIPModel(str(weights), sizes, params)


def clip_from_files(
    image: str | Path, text: str | Path, config: CLIPConfig | None = None
) -> CLIPModel:
    """Load a noised CLIP from its two files under OpenAI's parameter names.

    Args:
        config: its sizes; None: those of OpenAI's noised CLIP.

    Raises:
        GlideError: a file is broken, or holds another model.
    """
    config = config or clip64()
    params = clip_from_released(config, read_released(image), read_released(text))
    return CLIPModel(RELEASED, config, params)


def save_clip(clip: CLIPModel, folder: Path) -> None:
    """Write a noised CLIP as a folder that `load_clip_model` reads, in float32.

    Raises:
        GlideError: the folder cannot be written.
    """
    save_weights(folder, {"format": FORMAT, "clip": asdict(clip.config)}, flatten(clip.params))
