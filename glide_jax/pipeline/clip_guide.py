"""CLIP guidance: `--clip-guidance-scale s` adds `g = s grad(k f(x_t) . g(c))`  (GLIDE, sec. 2.4).

Ancestral samplers move their mean by `Sigma g`; all others move x_0 by `sigma^2/alpha g`, limited
(`MAX_X_0_CHANGE`). f and g are the embeddings of image and caption, of length 1, and k is the logit
scale. `glide_jax.diffusion.guidance.gradients` has the gradient, the limit, and how the
sampler adds them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glide_jax.devices.placement import Placement
from glide_jax.devices.runtime import trunk_dtype
from glide_jax.diffusion.guidance import Guidance, Network, classifier_guidance
from glide_jax.diffusion.solvers import traits_of
from glide_jax.errors import UsageError
from glide_jax.models.clip import NoisedCLIP
from glide_jax.models.precision import cast_trunk
from glide_jax.models.presets import CLIPConfig
from glide_jax.models.tokenizers import CLIPTokenizer
from glide_jax.pipeline.prompts import Prompt, encode_parts, read_prompt
from glide_jax.pipeline.settings import Settings
from glide_jax.training.runs import open_clip
from glide_jax.weights.clip_registry import RELEASED
from glide_jax.weights.registry import Model

# Limit of the pipeline where the sampler is not ancestral. With the embedded models, 8 steps of
# dpm++2m and scale 3, 0.5 still damages images and 0.25 does not (docs/guide/guidance.md).
MAX_X_0_CHANGE = 0.25


@dataclass(frozen=True)
class Similarity:
    """The log-probability of a caption, up to a constant: `k sum_i f(x_t, round(t))_i g(c)_i`.

    A `Network.fn`, conditioned on `g(c)`. t is rounded, since a CLIP knows whole timesteps.
    """

    module: NoisedCLIP

    def __call__(self, params: Any, x: jax.Array, t: jax.Array, cond: jax.Array) -> jax.Array:
        similarity: Any = self.module.apply(
            {"params": params}, x, t, cond, method=NoisedCLIP.similarity
        )
        return similarity


@partial(jax.jit, static_argnums=0)
def _encode_text(model: NoisedCLIP, params: Any, ids: jax.Array, lengths: jax.Array) -> jax.Array:
    features: Any = model.apply({"params": params}, ids, lengths, method=NoisedCLIP.encode_text)
    return features


@dataclass(frozen=True, eq=False)
class CLIP:
    """A noised CLIP with its weights, on its devices.

    Attributes:
        name: the name, folder or file that it was loaded from.
        config: its sizes.
        params: nested dictionaries of float32 arrays.
        dtype, devices: dtype of its trunks, and where it runs; see `Pipeline`.
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
        params = cast_trunk(self.params, model.dtype)
        return Network(Similarity(model), Placement(self.devices).replicate(params))

    def encode_captions(self, captions: Sequence[str]) -> np.ndarray:
        """Return `g(c)` of captions: `(B, embed_width)` float32, of length 1, on the host.

        One caption at a time: the same compiled program then serves every number of captions.
        """
        tokens = CLIPTokenizer(self.config.max_text_len)(list(captions))
        network = self.network
        features = [
            _encode_text(network.fn.module, network.params, ids[None], length[None])
            for ids, length in zip(tokens.ids, tokens.lengths, strict=True)
        ]
        return np.concatenate(features)

    def guidance(
        self, prompts: Sequence[str | Prompt], scale: float, limit: float | None = None
    ) -> Guidance:
        """CLIP guidance: `mu + s Sigma grad(k f(x_t) . g(c))`  (GLIDE, sec. 2.4).

        k is the CLIP's logit scale; each image is guided to its own prompt. For a prompt of several
        parts, g is their sum by weight, which adds up their gradients. The empty caption has g = 0:
        it guides nowhere.

        Args:
            prompts: one for each image.
            scale: s; larger follows the prompts more closely.
            limit: largest change of x_0 in a step, for samplers that are not ancestral: see
                `glide_jax.diffusion.guidance.gradients.limit_gradient`; None: no limit.
        """

        def encode(texts: list[str]) -> np.ndarray:
            filled = np.array([bool(text) for text in texts], np.float32)
            return self.encode_captions(texts) * filled[:, None]

        parsed = [read_prompt(prompt) for prompt in prompts]
        count = max(len(prompt.parts) for prompt in parsed)
        cond = 0.0
        for parts in zip(*(prompt.padded(count).parts for prompt in parsed), strict=True):
            weights = np.array([part.weight for part in parts], np.float32)
            cond = cond + weights[:, None] * encode_parts(encode, parts)
        return classifier_guidance(log_prob=self.network, cond=cond, scale=scale, limit=limit)


def clip_guidance(
    clip: CLIP | None,
    model: Model,
    prompts: Sequence[Prompt],
    settings: Settings,
    reverse: bool = False,
) -> tuple[Guidance, ...]:
    """Return the CLIP guidance of a batch, to be listed last; none for `clip_guidance_scale` 0.

    Args:
        reverse: DDIM inversion, whatever the sampler of the settings.

    Raises:
        UsageError: there is no CLIP, or it sees other images or noise levels than the model.
    """
    if not settings.clip_guidance_scale:
        return ()
    if clip is None:
        raise UsageError(
            "clip_guidance_scale needs a noised CLIP: load one as clip_model (--clip-model)"
        )
    sides = clip.config.image_size, model.config.image_size
    timesteps = clip.config.n_timestep, model.diffusion_steps
    problem = ""
    if sides[0] != sides[1]:
        problem = f"{clip.name} sees images of {sides[0]} pixels, {model.name} generates {sides[1]}"
    elif timesteps[0] not in (0, timesteps[1]):
        problem = f"{clip.name} knows {timesteps[0]} timesteps, {model.name} has {timesteps[1]}"
    if problem:
        raise UsageError(f"{problem}: load another CLIP, or set clip_guidance_scale to 0")
    # A gradient that moves the mean, as in the paper, needs no limit.
    moves_mean = traits_of(settings.sampler).guides_mean and not reverse
    limit = None if moves_mean else MAX_X_0_CHANGE
    return (clip.guidance(prompts, settings.clip_guidance_scale, limit),)


def load_clip(
    weights: str | Path = RELEASED, *, dtype: str = "auto", devices: int | str = 1
) -> CLIP:
    """Load a noised CLIP: "openai/clip", "emoji_clip64", `hf://user/name`, a folder, or a run.

    Args:
        dtype, devices: see `glide_jax.load`.

    Raises:
        UsageError: there is no such name or folder.
        GlideError: the weights are broken, or cannot be downloaded.
    """
    model = open_clip(weights)
    return CLIP(model.name, model.config, model.params, dtype, devices)
