"""The object that a notebook holds: prompts in, pictures out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from glide_jax.diffusion.guidance import Guidance, Network, branches_of, known_pixels
from glide_jax.diffusion.sampling import sample, stream
from glide_jax.diffusion.schedule import Schedule, make_schedule
from glide_jax.errors import UsageError
from glide_jax.models.text import TextFeatures
from glide_jax.models.unet import GLIDE
from glide_jax.noised_clip import CLIP, load_clip
from glide_jax.pictures import Pictures, read_hole, read_pictures
from glide_jax.runtime import trunk_dtype
from glide_jax.settings import Settings, describe
from glide_jax.tokenizers import GPT2Tokenizer
from glide_jax.weights.registry import Model, load_model


@dataclass(frozen=True)
class Denoiser:
    """`Network.fn` of a GLIDE model: conditioning is a dictionary of its keyword arguments."""

    model: GLIDE

    def __call__(self, params: Any, x: jax.Array, t: jax.Array, cond: Mapping) -> jax.Array:
        return self.model.apply({"params": params}, x, t, **cond)


@partial(jax.jit, static_argnums=0)
def encode_text(model: GLIDE, params: Any, tokens: jax.Array, mask: jax.Array) -> TextFeatures:
    """Text features of captions: `tokens (B, L)` int32, `mask (B, L)` bool."""
    return model.apply({"params": params}, tokens, mask, method=GLIDE.encode_text)


@dataclass(frozen=True)
class Pipeline:
    """A model ready to draw; make one with `glide_jax.load`.

    Attributes:
        model: sizes and weights.
        dtype: of the trunk: "auto" (by device), "float32", "bfloat16" or "float16".
        settings: what is not said in a call.
        upsampler: draws the large picture from the small one, if there is one.
        clip: guides by `clip_scale`, if there is one.
    """

    model: Model
    dtype: str = "auto"
    settings: Settings = field(default_factory=Settings)
    upsampler: "Pipeline | None" = None
    clip: CLIP | None = None

    @cached_property
    def schedule(self) -> Schedule:
        """The noise schedule that the model was trained with."""
        return make_schedule(self.model.schedule, self.model.diffusion_steps)

    @cached_property
    def network(self) -> Network:
        """The network and its weights, on the device."""
        module = GLIDE(self.model.config, trunk_dtype(self.dtype))
        params = jax.device_put(self.model.params)
        return Network(Denoiser(module), params, self.model.prediction)

    @cached_property
    def tokenizer(self) -> GPT2Tokenizer:
        """The tokenizer of captions."""
        return GPT2Tokenizer(self.model.config.text_ctx)

    def text_features(self, prompts: Sequence[str]) -> TextFeatures:
        """`TextFeatures` of prompts; the empty prompt is the unconditional one."""
        tokens = self.tokenizer(list(prompts))
        return encode_text(self.network.fn.model, self.network.params, tokens.ids, tokens.mask)

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        num: int = 1,
        seed: int = 0,
        first: int = 0,
        image: Any = None,
        mask: Any = None,
        low_res: Any = None,
        progress: bool = True,
        **settings: Any,
    ) -> Pictures:
        """Draws `num` pictures of each prompt.

        Picture i of a run is drawn from `fold_in(key(seed), i)` alone, so that `first=i, num=1`
        makes it again, whatever was drawn beside it.

        Args:
            prompts: one, or several; "" is unconditional.
            seed: of the run.
            first: number of the first picture.
            image: picture to fill a hole of (inpainting models): a file, a `PIL.Image`, or an array
                `(H, W, 3)` or `(N, H, W, 3)` of uint8; scaled to the model's size.
            mask: the hole: a file, a `PIL.Image`, or an array `(H, W)` of bool or uint8; white
                (not zero) is drawn anew, black is kept.
            low_res: small pictures to enlarge (upsamplers): `Pictures`, or like `image`.
            progress: show a progress bar.
            **settings: any field of `Settings`.

        Raises:
            UsageError: a setting is unknown or cannot be carried out, there is no prompt, or the
                model does not take, or lacks, what is given.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or num < 1:
            raise UsageError("give at least one prompt, and a num of at least 1")
        settings = self.settings.changed(**settings)
        captions = [prompt for prompt in prompts for _ in range(num)]
        extras = self._extras(len(captions), image, mask, low_res)
        maps = ()
        if "inpaint_image" in extras:
            maps = (known_pixels(image=extras["inpaint_image"], mask=extras["inpaint_mask"]),)
        guidances = settings.guidances(*maps)
        if settings.clip_scale:
            if self.clip is None:
                raise UsageError("clip_scale needs a noised CLIP: load one with clip=")
            # Last: a score acts after all that maps x_0.
            guidances = (*guidances, self.clip.guidance(captions, settings.clip_scale))
        run = settings.plan(self.schedule, guidances)

        conds = self._conditions(captions, guidances, extras)
        keys = picture_keys(seed, first + np.arange(len(captions)))
        x = start_noise(keys[:, 0], self.model.config.image_size) * settings.temperature
        arguments = {"main": self.network}, conds, run, x, keys[:, 1]
        if progress:
            with tqdm.tqdm(total=len(run), unit="step", desc=f"{len(x)} pictures") as bar:
                for done, state in stream(*arguments):
                    jax.block_until_ready(state.x)
                    bar.update(done - bar.n)
        else:
            state = sample(*arguments)
        pictures = Pictures(
            images=to_uint8(state.x),
            prompts=tuple(captions),
            seed=seed,
            first=first,
            weights=self.model.name,
            settings=describe(settings),
        )
        if self.upsampler is None:
            return pictures
        up = self.upsampler
        large = {"image": image, "mask": mask} if up.model.config.inpaints else {}
        larger = up(captions, seed=seed, first=first, low_res=pictures, progress=progress, **large)
        both = pictures.settings | {"upsampler": {"weights": up.model.name} | larger.settings}
        return replace(larger, weights=self.model.name, settings=both)

    def _extras(self, batch: int, image: Any, mask: Any, low_res: Any) -> dict[str, jax.Array]:
        """What the network is given beside the caption, checked against its variant."""
        config, extras = self.model.config, {}
        for name, given, takes in (
            ("image", image, config.inpaints),
            ("mask", mask, config.inpaints),
            ("low_res", low_res, config.upsamples),
        ):
            if given is not None and not takes:
                raise UsageError(
                    f"{self.model.name} is a {config.variant} model: it takes no {name}"
                )
        if config.upsamples:
            if low_res is None:
                raise UsageError(f"{self.model.name} enlarges pictures: give it some as low_res")
            extras["low_res"] = from_uint8(read_pictures(low_res, None, batch))
        if config.inpaints and image is not None:
            if mask is None:
                raise UsageError("an image to inpaint needs a mask of the hole")
            size = config.image_size
            known = 1 - read_hole(mask, size, batch)
            extras["inpaint_image"] = from_uint8(read_pictures(image, size, batch)) * known
            extras["inpaint_mask"] = known
        return extras

    def _conditions(
        self, captions: Sequence[str], guidances: Sequence[Guidance], extras: dict[str, jax.Array]
    ) -> dict[str, Any]:
        """Conditioning of each branch; every distinct caption is encoded once."""
        branches = branches_of(guidances)
        texts = {
            b.name: captions if b.prompt is None else [b.prompt] * len(captions) for b in branches
        }
        distinct = list(dict.fromkeys(text for some in texts.values() for text in some))
        features = self.text_features(distinct)

        def rows(some: Sequence[str]) -> dict[str, Any]:
            index = np.array([distinct.index(text) for text in some])
            return {"text": jax.tree.map(lambda leaf: leaf[index], features)} | extras

        return {name: rows(some) for name, some in texts.items()}


def picture_keys(seed: int, numbers: np.ndarray) -> jax.Array:
    """`(B, 2)` keys of pictures: for the noise that each begins with, and for that of its steps."""
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(jnp.asarray(numbers))


def start_noise(keys: jax.Array, size: int) -> jax.Array:
    """`(B, size, size, 3)` standard normal, a picture from each key."""
    return jax.vmap(lambda key: jax.random.normal(key, (size, size, 3)))(keys)


def to_uint8(x: jax.Array) -> np.ndarray:
    """`[-1, 1] -> 0..255`, rounded to even as the released code does."""
    return np.asarray(jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8))


def from_uint8(images: np.ndarray) -> jax.Array:
    """`0..255 -> [-1, 1]` float32."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


def load(
    weights: str | Path = "emoji64",
    *,
    upsampler: str | Path | None = None,
    clip: str | Path | None = None,
    dtype: str = "auto",
) -> Pipeline:
    """A pipeline from weights.

    Args:
        weights: a name ("emoji64", "openai/base", ...), a folder of weights, a `.pt` file under the
            released names, or a run of `train.py`.
        upsampler: weights of an upsampler, which then enlarges each picture.
        clip: weights of a noised CLIP, for `clip_scale`; see `glide_jax.load_clip`.
        dtype: see `Pipeline`.

    Raises:
        UsageError: no such weights.
        GlideError: they are broken, or cannot be downloaded.
    """
    model = load_model(weights)
    larger = None if upsampler is None else load(upsampler, dtype=dtype)
    if larger is not None and not larger.model.config.upsamples:
        raise UsageError(f"{upsampler} is no upsampler")
    guide = None if clip is None else load_clip(clip, dtype=dtype)
    return Pipeline(model, dtype, Settings().changed(**model.defaults), larger, guide)
