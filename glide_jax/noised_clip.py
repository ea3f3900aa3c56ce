"""The noised CLIP, ready to guide: captions in, a guidance out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glide_jax.batches import Place
from glide_jax.diffusion.guidance import Guidance, Network, gradient
from glide_jax.errors import GlideError, UsageError
from glide_jax.models.clip import NoisedCLIP
from glide_jax.models.presets import CLIPConfig, clip64
from glide_jax.prompts import Prompt, encode_parts, read_prompt
from glide_jax.runtime import trunk_dtype
from glide_jax.tokenizers import CLIPTokenizer
from glide_jax.weights.embedding import expand
from glide_jax.weights.registry import ASSETS, EMBEDDED_CLIPS
from glide_jax.weights.released_clip import clip_from_released, clip_misfits
from glide_jax.weights.released_files import fetch
from glide_jax.weights.store import flatten, load_weights, save_weights, unflatten
from glide_jax.weights.torch_file import read_torch_file

RELEASED = "openai/clip"
FORMAT = 1


@dataclass(frozen=True)
class Similarity:
    """`Network.fn` of a noised CLIP: `scale f(x_t, t) . g(c)`, conditioned on `g(c)`."""

    model: NoisedCLIP

    def __call__(self, params: Any, x: jax.Array, t: jax.Array, cond: jax.Array) -> jax.Array:
        return self.model.apply({"params": params}, x, t, cond, method=NoisedCLIP.similarity)


@partial(jax.jit, static_argnums=0)
def _encode_text(model: NoisedCLIP, params: Any, ids: jax.Array, lengths: jax.Array) -> jax.Array:
    return model.apply({"params": params}, ids, lengths, method=NoisedCLIP.encode_text)


@dataclass(frozen=True)
class CLIP:
    """A noised CLIP with its weights.

    Attributes:
        name: what the user called it.
        config: its sizes.
        params: nested dictionaries of float32 arrays.
        dtype, devices: of its trunks, and where it runs; see `glide_jax.pipeline.Pipeline`.
    """

    name: str
    config: CLIPConfig
    params: dict[str, Any]
    dtype: str = "auto"
    devices: int | str = 1

    @cached_property
    def network(self) -> Network:
        """The similarity as a network of the sampler."""
        model = NoisedCLIP(self.config, trunk_dtype(self.dtype))
        return Network(Similarity(model), Place(self.devices).everywhere(self.params))

    def encode_text(self, prompts: Sequence[str]) -> jax.Array:
        """`g(c)` of prompts: `(B, embed_width)` float32, of length 1."""
        tokens = CLIPTokenizer(self.config.max_text_len)(list(prompts))
        return _encode_text(self.network.fn.model, self.network.params, tokens.ids, tokens.lengths)

    def guidance(self, prompts: Sequence[str | Prompt], scale: float) -> Guidance:
        """`mu + s Sigma grad(f(x_t) . g(c))`  (GLIDE, sec. 2.4), each picture to its prompt.

        Of a prompt of several parts g is their sum by weight, which adds up their gradients. The
        empty caption asks for nothing: its g is 0.
        """

        def encode(texts: list[str]) -> jax.Array:
            asks = np.array([bool(text) for text in texts], np.float32)
            return asks[:, None] * self.encode_text(texts)

        prompts = [read_prompt(prompt) for prompt in prompts]
        count = max(len(prompt.parts) for prompt in prompts)
        cond = 0.0
        for parts in zip(*(prompt.padded(count).parts for prompt in prompts), strict=True):
            weights = np.array([part.weight for part in parts], np.float32)
            cond = cond + weights[:, None] * encode_parts(encode, parts)
        return gradient(log_prob=self.network, cond=cond, scale=scale)


def load_clip(
    weights: str | Path = RELEASED, *, dtype: str = "auto", devices: int | str = 1
) -> CLIP:
    """A noised CLIP: "openai/clip", which is downloaded, "emoji_clip64", a folder, or a run.

    Args:
        dtype, devices: see `glide_jax.load`.

    Raises:
        UsageError: there is no such name or folder.
        GlideError: the weights are broken, or cannot be downloaded.
    """
    if str(weights) == RELEASED:
        image, text = (fetch(f"openai/clip-{side}") for side in ("image", "text"))
        return clip_from_files(image, text, dtype=dtype, devices=devices)
    embedded = str(weights) in EMBEDDED_CLIPS
    folder = ASSETS / str(weights) if embedded else Path(weights).expanduser()
    if not folder.is_dir():
        known = ", ".join((RELEASED, *EMBEDDED_CLIPS))
        raise UsageError(f"there is no noised CLIP {str(weights)!r}: name {known} or a folder")
    if (folder / "checkpoints").is_dir():
        # Orbax takes most of a second to import, and only runs need it.
        from glide_jax.training.export import load_clip_run

        return CLIP(str(weights), *load_clip_run(folder), dtype, devices)
    config, flat, _ = load_weights(folder)
    if config.get("format") != FORMAT or "clip" not in config:
        raise GlideError(f"{folder} does not hold a noised CLIP of this version's format")
    try:
        sizes = CLIPConfig(**config["clip"])
    except (TypeError, ValueError) as error:
        raise GlideError(f"{folder / 'config.json'} does not describe a CLIP: {error}") from None
    flat = expand(flat, sizes.n_vocab)
    if wrong := clip_misfits(flat, sizes):
        raise GlideError(
            f"the weights in {folder} do not fit its config.json: {len(wrong)} parameters are "
            f"missing, unexpected or of the wrong shape ({', '.join(wrong[:3])})"
        )
    params = unflatten({k: np.asarray(v, np.float32) for k, v in flat.items()})
    return CLIP(str(weights), sizes, params, dtype, devices)


def clip_from_files(
    image: Path,
    text: Path,
    config: CLIPConfig | None = None,
    *,
    dtype: str = "auto",
    devices: int | str = 1,
) -> CLIP:
    """A noised CLIP from its two `.pt` files under the released names.

    Args:
        config: its sizes; None: the released ones.
    """
    config = config or clip64()
    params = clip_from_released(config, read_torch_file(image), read_torch_file(text))
    return CLIP(RELEASED, config, params, dtype, devices)


def save_clip(clip: CLIP, folder: Path) -> None:
    """Writes a noised CLIP as a folder that `load_clip` reads, in float32.

    Raises:
        GlideError: the folder cannot be written.
    """
    save_weights(folder, {"format": FORMAT, "clip": asdict(clip.config)}, flatten(clip.params))
