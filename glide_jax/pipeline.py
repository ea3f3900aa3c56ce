"""The object that a notebook holds: prompts in, pictures out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glide_jax.batches import Place, local_devices
from glide_jax.diffusion.guidance import Network
from glide_jax.diffusion.schedule import Schedule, make_schedule
from glide_jax.drawing import picture_keys, run
from glide_jax.editing import between, noise_of, variations
from glide_jax.errors import UsageError
from glide_jax.given import name_of, read_given
from glide_jax.models.text import TextFeatures
from glide_jax.models.unet import GLIDE
from glide_jax.noised_clip import CLIP, load_clip
from glide_jax.pictures import Pictures, read_pictures, to_uint8
from glide_jax.prompts import Prompt, read_prompts
from glide_jax.runtime import trunk_dtype
from glide_jax.settings import Settings, describe
from glide_jax.tokenizers import GPT2Tokenizer
from glide_jax.weights.registry import Model, companion, load_model


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
        guide: the worse model of `autoguidance_scale`, if there is one.
        devices: over how many of this process's devices a batch is spread, or "all".
    """

    model: Model
    dtype: str = "auto"
    settings: Settings = field(default_factory=Settings)
    upsampler: "Pipeline | None" = None
    clip: CLIP | None = None
    guide: "Pipeline | None" = None
    devices: int | str = 1

    @cached_property
    def schedule(self) -> Schedule:
        """The noise schedule that the model was trained with."""
        return make_schedule(self.model.schedule, self.model.diffusion_steps)

    @cached_property
    def network(self) -> Network:
        """The network and its weights, on the devices."""
        module = GLIDE(self.model.config, trunk_dtype(self.dtype))
        params = Place(self.devices).everywhere(self.model.params)
        return Network(Denoiser(module), params, self.model.prediction)

    @cached_property
    def tokenizer(self) -> GPT2Tokenizer:
        """The tokenizer of captions."""
        return GPT2Tokenizer(self.model.config.text_ctx)

    def text_features(self, captions: Sequence[str]) -> TextFeatures:
        """`TextFeatures` of captions; the empty one is the unconditional one."""
        tokens = self.tokenizer(list(captions))
        return encode_text(self.network.fn.model, self.network.params, tokens.ids, tokens.mask)

    # --- drawing

    def __call__(
        self,
        prompts: str | Prompt | Sequence[str | Prompt],
        *,
        progress: bool = True,
        preview: Callable[[Pictures], None] | None = None,
        **call: Any,
    ) -> Pictures:
        """Draws `num` pictures of each prompt: `pipe("a red apple", num=4, seed=0, steps=20)`.

        Args:
            progress: show a progress bar.
            preview: called, while they are drawn, with the pictures as they then seem to be.
            **call: everything else that `stream` takes: `num`, `seed`, `image`, any field of
                `Settings`, ...

        Raises:
            UsageError, GlideError: see `stream`.
        """
        if preview is not None:
            call = {"every": 5} | call
        for pictures in self.stream(prompts, progress=progress, **call):
            if preview is not None:
                preview(pictures)
        return pictures

    def stream(
        self,
        prompts: str | Prompt | Sequence[str | Prompt],
        *,
        num: int = 1,
        seed: int = 0,
        first: int | Sequence[int] = 0,
        image: Any = None,
        mask: Any = None,
        low_res: Any = None,
        noise: Any = None,
        upsampler: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        every: int | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> Iterator[Pictures]:
        """Draws, and yields the pictures as they become clear; the last are the result.

        Picture i of a run is drawn from `fold_in(key(seed), i)` alone, so that `first=i, num=1`
        makes it again, whatever was drawn beside it, in whatever batches, on however many devices.

        Args:
            prompts: one, or several; "" is unconditional. "a red apple AND a leaf :0.5 NOT a worm"
                is several captions with their weights: see `glide_jax.prompts`.
            num: pictures of each prompt.
            seed: of the run.
            first: number of the first picture, or of each.
            image: what to change: a file, a `PIL.Image`, or an array `(H, W, 3)` or `(N, H, W, 3)`
                of uint8; scaled to the model's size. It takes a mask, or a `strength`, or both.
            mask: the hole in it: a file, a `PIL.Image`, or an array `(H, W)` of bool or uint8;
                white (not zero) is drawn anew, black is kept to the byte.
            low_res: small pictures to enlarge (upsamplers): `Pictures`, or like `image`.
            noise: what to begin with, `(H, W, 3)` or `(N, H, W, 3)` float: see `noise_of`.
            upsampler: settings of the upsampler.
            batch_size: how many to draw at a time; None: see `glide_jax.batches.usual_batch`.
            every: yield every so many evaluations, rather than after each batch.
            progress: show a progress bar.
            **settings: any field of `Settings`.

        Raises:
            UsageError: a setting is unknown or cannot be carried out, there is no prompt, or the
                model does not take, or lacks, what is given.
            GlideError: a file cannot be read.
        """
        settings = self.settings.changed(**settings)
        prompts = read_prompts(prompts, num)
        numbers = np.arange(len(prompts)) + first if np.ndim(first) == 0 else np.asarray(first)
        if numbers.shape != (len(prompts),):
            raise UsageError(f"first numbers {len(numbers)} of {len(prompts)} pictures")
        if upsampler and self.upsampler is None:
            raise UsageError("settings of an upsampler, but there is none: load one")
        config, sources = self.model.config, {"image": image, "mask": mask, "noise": noise}
        sources = {name: name_of(source) for name, source in sources.items() if source is not None}
        given = read_given(
            self.model, settings, len(prompts), image=image, mask=mask, low_res=low_res, noise=noise
        )
        if mask is not None and not (config.inpaints or config.upsamples):
            settings = settings.resampled(self.schedule)

        side = config.image_size
        blank = np.full((len(prompts), side, side, 3), 127, np.uint8)
        images = blank if low_res is None else read_pictures(low_res, side, len(prompts)).copy()
        pictures = Pictures(
            images=images,
            prompts=tuple(prompt.text for prompt in prompts),
            seed=seed,
            numbers=tuple(numbers.tolist()),
            weights=self.model.name,
            settings=describe(settings) | sources,
        )
        keys = picture_keys(seed, numbers)
        running = run(
            self,
            prompts,
            keys,
            given,
            settings,
            batch_size=batch_size,
            every=every,
            progress=progress,
        )
        for index, state, done in running:
            images[index] = to_uint8(state.x if done else state.x_0)
            pictures = replace(pictures, images=given.kept(images.copy()))
            yield pictures
        if self.upsampler is None:
            return
        for larger in self.upsampler.stream(
            [prompt.joined() for prompt in prompts],
            seed=seed,
            first=numbers,
            low_res=pictures,
            image=None if mask is None else image,
            mask=mask,
            batch_size=batch_size,
            every=every,
            progress=progress,
            **(upsampler or {}),
        ):
            enlarged = {"weights": larger.weights} | larger.settings
            yield replace(
                pictures,
                images=larger.images,
                settings=pictures.settings | {"upsampler": enlarged},
            )

    noise_of = noise_of
    variations = variations
    between = between


def load(
    weights: str | Path = "emoji64",
    *,
    upsampler: str | Path | None = None,
    clip: str | Path | None = None,
    guide: str | Path | None = None,
    dtype: str = "auto",
    devices: int | str = 1,
) -> Pipeline:
    """A pipeline from weights.

    Args:
        weights: a name ("emoji64", "openai/base", ...), a folder of weights, a `.pt` file under the
            released names, or a run of `train.py`.
        upsampler: weights of an upsampler, which then enlarges each picture; None: the one that
            belongs to the weights, if one does; "none": none.
        clip: weights of a noised CLIP, for `clip_scale`; see `glide_jax.load_clip`; None and "none"
            as above. Without one, a `clip_scale` among the weights' own settings does not act.
        guide: weights of a worse model of the same kind, for `autoguidance_scale`.
        dtype: see `Pipeline`.
        devices: over how many of this process's devices to spread a batch, or "all".

    Raises:
        UsageError: no such weights, or not as many devices.
        GlideError: they are broken, or cannot be downloaded.
    """
    local_devices(devices)
    upsampler, clip = companion(weights, "upsampler", upsampler), companion(weights, "clip", clip)
    where = {"dtype": dtype, "devices": devices}
    model = load_model(weights)
    larger = None if upsampler is None else load(upsampler, **where)
    if larger is not None and not larger.model.config.upsamples:
        raise UsageError(f"{upsampler} is no upsampler")
    worse = None if guide is None else load(guide, **where)
    if worse is not None and kind_of(worse.model) != kind_of(model):
        raise UsageError(f"{guide} cannot guide {weights}: variant, size or schedule differ")
    settings = Settings().changed(**model.defaults)
    return Pipeline(
        model,
        settings=settings if clip else settings.changed(clip_scale=0.0),
        upsampler=larger,
        clip=None if clip is None else load_clip(clip, **where),
        guide=worse,
        **where,
    )


def kind_of(model: Model) -> tuple[Any, ...]:
    """What two models share that predict the same noise."""
    return model.config.variant, model.config.image_size, model.schedule, model.diffusion_steps
