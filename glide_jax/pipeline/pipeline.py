"""`Pipeline`, the user API: prompts in, images out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Unpack

import numpy as np

from glide_jax.devices.runtime import in_32_bits
from glide_jax.errors import UsageError
from glide_jax.pipeline.clip_guide import CLIP
from glide_jax.pipeline.editing import invert_images, slerp, unguided
from glide_jax.pipeline.image_files import Fit, ImageLike
from glide_jax.pipeline.images import Images, to_uint8
from glide_jax.pipeline.mask_files import MaskLike
from glide_jax.pipeline.plan_checks import chosen_upsampler
from glide_jax.pipeline.prompts import Prompt, interpolated, read_prompts
from glide_jax.pipeline.runner import image_keys, run, start_noise
from glide_jax.pipeline.sampling_inputs import read_input_images, read_sampling_inputs
from glide_jax.pipeline.settings import Settings, SettingsArguments, describe, lists_settings
from glide_jax.pipeline.stage import Stage

Preview = Callable[[Images], None]


@dataclass(frozen=True, eq=False)
class Pipeline(Stage):
    """A model ready to generate images; make one with `glide_jax.load`.

    Attributes:
        model, dtype, devices: see `Stage`.
        settings: the defaults of a call.
        upsampler: enlarges each image, if there is one.
        clip: the noised CLIP that guides by `clip_guidance_scale`, if there is one.
        weak_stage: the weak model of `autoguidance_scale`, if there is one.
    """

    settings: Settings = field(default_factory=Settings)
    upsampler: "Pipeline | None" = None
    clip: CLIP | None = None
    weak_stage: Stage | None = None

    @lists_settings
    def __call__(
        self,
        prompts: str | Prompt | Sequence[str | Prompt],
        *,
        num: int = 1,
        seed: int = 0,
        first_index: int | Sequence[int] | np.ndarray = 0,
        image: ImageLike | None = None,
        mask: MaskLike | None = None,
        low_res: ImageLike | None = None,
        fit: Fit = "crop",
        invert_mask: bool = False,
        allow_uniform_mask: bool = False,
        noise: np.ndarray | None = None,
        upsampler: SettingsArguments | Literal["none"] | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        preview: Preview | None = None,
        preview_every: int = 5,
        **settings: Unpack[SettingsArguments],
    ) -> Images:
        """Generate `num` images of each prompt: `pipe("a red apple", num=4, seed=0, steps=20)`.

        Args:
            progress: show a progress bar.
            preview: a function, called with the current estimates of the images.
            preview_every: network evaluations between two previews.
            **settings: any field of `Settings`. For the other arguments see `stream`.

        Raises:
            UsageError, GlideError: see `stream`.
        """
        images = None
        for images in self.stream(
            prompts,
            num=num,
            seed=seed,
            first_index=first_index,
            image=image,
            mask=mask,
            low_res=low_res,
            fit=fit,
            invert_mask=invert_mask,
            allow_uniform_mask=allow_uniform_mask,
            noise=noise,
            upsampler=upsampler,
            batch_size=batch_size,
            preview_every=None if preview is None else preview_every,
            progress=progress,
            **settings,
        ):
            if preview is not None:
                preview(images)
        assert images is not None
        return images

    @lists_settings
    @in_32_bits
    def stream(
        self,
        prompts: str | Prompt | Sequence[str | Prompt],
        *,
        num: int = 1,
        seed: int = 0,
        first_index: int | Sequence[int] | np.ndarray = 0,
        image: ImageLike | None = None,
        mask: MaskLike | None = None,
        low_res: ImageLike | None = None,
        fit: Fit = "crop",
        invert_mask: bool = False,
        allow_uniform_mask: bool = False,
        noise: np.ndarray | None = None,
        upsampler: SettingsArguments | Literal["none"] | None = None,
        batch_size: int | None = None,
        preview_every: int | None = None,
        progress: bool = False,
        **settings: Unpack[SettingsArguments],
    ) -> Iterator[Images]:
        """Generate images and yield intermediate estimates; the last value is the result.

        Image i of a run is generated from `fold_in(key(seed), i)` alone: `first_index=i, num=1`
        reproduces it, whatever the batch and the number of devices.

        Args:
            prompts: one or several; "" is unconditional. "a red apple AND a tulip :0.5 NOT a rose"
                joins several captions with weights: see `glide_jax.pipeline.prompts`.
            num: images per prompt.
            seed: seed of the run, from 0 to 2^32 - 1.
            first_index: index of the first image (the others count on), or one index per image.
            image: the image to edit: a file, a `PIL.Image`, or an array `(H, W, 3)` or
                `(N, H, W, 3)` of uint8. It is read as in training; one line on stderr says what was
                changed. It needs a mask (inpainting), a `strength` (img2img), or both.
            mask: the region to regenerate: a file, a `PIL.Image`, or an array `(H, W)`. White (or
                painted on a transparent layer, or erased from the image) is regenerated, black is
                kept byte for byte. See `glide_jax.pipeline.mask_files`.
            low_res: for an upsampler, the small images to enlarge: `Images`, or what `image` takes.
            fit: how images become squares: "crop" takes the centre, "pad" adds white.
            invert_mask: regenerate what the mask keeps, and keep the rest.
            allow_uniform_mask: accept a mask that keeps, or regenerates, the whole image.
            noise: the initial noise, `(H, W, 3)` or `(N, H, W, 3)` float: see `invert`.
            upsampler: settings of the upsampler; "none": the images are not enlarged.
            batch_size: images at a time; None: by their side (`default_batch_size`).
            preview_every: yield after this many network evaluations; None: after each batch.
            progress: show a progress bar.
            **settings: any field of `Settings`.

        Raises:
            UsageError: a setting is unknown, of a wrong type or length, or cannot be used; there is
                no prompt; an input is missing, or the model does not take it.
            GlideError: a file cannot be read.
        """
        call_settings = self.settings.changed(**settings)
        parsed = read_prompts(prompts, num)
        if np.ndim(first_index) == 0:
            indices = np.arange(len(parsed)) + first_index
        else:
            indices = np.asarray(first_index)
        if indices.shape != (len(parsed),):
            raise UsageError(f"first_index has {len(indices)} values for {len(parsed)} images")
        upsampler_pipeline = chosen_upsampler(self.upsampler, upsampler)
        config = self.model.config
        sampling_inputs, input_images = read_sampling_inputs(
            self.model,
            call_settings,
            len(parsed),
            side=(upsampler_pipeline or self).model.config.image_size,
            image=image,
            mask=mask,
            low_res=low_res,
            noise=noise,
            fit=fit,
            invert_mask=invert_mask,
            allow_uniform_mask=allow_uniform_mask,
        )
        keeps_known_without_repaint = config.inpaints or config.upsamples
        if mask is not None and not keeps_known_without_repaint and settings.get("repaint") is None:
            call_settings = call_settings.with_repaint(self.schedule)

        side = config.image_size
        if input_images.low_res is None:
            pixels = np.full((len(parsed), side, side, 3), 127, np.uint8)
        else:
            pixels = input_images.low_res.squares(side, len(parsed)).copy()
        images = Images(
            images=pixels,
            prompts=tuple(prompt.text for prompt in parsed),
            seed=seed,
            indices=tuple(indices.tolist()),
            weights=self.model.name,
            settings=describe(call_settings) | input_images.metadata(),
        )
        for index, state, is_last, evaluations in run(
            self,
            parsed,
            seed,
            indices,
            sampling_inputs,
            call_settings,
            clip=self.clip,
            weak_stage=self.weak_stage,
            batch_size=batch_size,
            preview_every=preview_every,
            progress=progress,
        ):
            pixels[index] = to_uint8(state.x if is_last else state.x_0)
            images = replace(
                images,
                images=sampling_inputs.restore_known(pixels.copy()),
                settings=images.settings | {"evaluations": evaluations},
            )
            yield images
        if upsampler_pipeline is None:
            return
        for enlarged in upsampler_pipeline.stream(
            [prompt.joined() for prompt in parsed],
            seed=seed,
            first_index=indices,
            low_res=images,
            image=None if mask is None else input_images.image,
            mask=input_images.mask,
            batch_size=batch_size,
            preview_every=preview_every,
            progress=progress,
            **(upsampler if isinstance(upsampler, Mapping) else {}),
        ):
            enlarged_settings = {"weights": enlarged.weights} | enlarged.settings
            yield replace(
                images,
                images=enlarged.images,
                settings=images.settings | {"upsampler": enlarged_settings},
            )

    @lists_settings
    @in_32_bits
    def invert(
        self,
        image: ImageLike,
        prompt: str | Prompt = "",
        *,
        fit: Fit = "crop",
        batch_size: int | None = None,
        progress: bool = False,
        **settings: Unpack[SettingsArguments],
    ) -> np.ndarray:
        """Return the noise that generates an image: DDIM inversion  (2010.02502, sec. 4.3).

        `pipe(prompt, noise=..., sampler="dpm++2m", guidance_scale=1, clip_guidance_scale=0)`
        reproduces the image approximately. Any deterministic sampler does; dpm++2m comes closer
        than ddim.

        Args:
            image, fit: one or several; see `stream`.
            prompt: the caption of the image.
            **settings: fields of `Settings`; more steps give a more exact result. Guidance is off
                unless it is set here. The sampler is always DDIM, run backwards.

        Returns:
            `(N, H, W, 3)` float32.

        Raises:
            UsageError, GlideError: see `stream`.
        """
        side = self.model.config.image_size
        source = read_input_images(image, None, None, side, fit=fit).image
        assert source is not None
        images = source.squares(side, None)
        return invert_images(
            self,
            images,
            read_prompts(prompt, len(images)),
            self.settings.changed(**unguided(settings)),
            clip=self.clip,
            weak_stage=self.weak_stage,
            batch_size=batch_size,
            progress=progress,
        )

    @lists_settings
    @in_32_bits
    def variations(
        self,
        image: ImageLike,
        prompt: str = "",
        *,
        variation: float = 0.3,
        image_caption: str | None = None,
        fit: Fit = "crop",
        num: int = 1,
        seed: int = 0,
        first_index: int = 0,
        upsampler: SettingsArguments | Literal["none"] | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        preview: Preview | None = None,
        preview_every: int = 5,
        **settings: Unpack[SettingsArguments],
    ) -> Images:
        """Generate variations of an image: its noise (`invert`), rotated towards fresh noise.

        Args:
            image, fit: one image; see `stream`.
            prompt: the prompt of the variations.
            variation: share of new noise, from 0 (approximately the image itself) to 1 (an
                unrelated image).
            image_caption: caption of the input image, if the prompt does not describe that image.
            **settings: fields of `Settings`; the sampler is dpm++2m and guidance is off unless set
                here. For the other arguments see `__call__` and `stream`.

        Raises:
            UsageError, GlideError: see `stream`.
        """
        if not 0 <= variation <= 1:
            raise UsageError(f"variation must be between 0 and 1, not {variation}")
        if any(settings.get(name) not in (None, "none") for name in ("strength", "repaint")):
            raise UsageError("variations take no strength or repaint: variation is their strength")
        side = self.model.config.image_size
        input_images = read_input_images(image, None, None, side, fit=fit)
        assert input_images.image is not None
        old = self.invert(
            input_images.image.squares(side, 1),
            prompt if image_caption is None else image_caption,
            batch_size=batch_size,
            progress=progress,
            steps=settings.get("steps"),
            spacing=settings.get("spacing"),
        )
        new = start_noise(image_keys(seed, first_index + np.arange(num)).start, side)
        images = self(
            prompt,
            num=num,
            seed=seed,
            first_index=first_index,
            noise=np.asarray(slerp(old, new, variation)),
            upsampler=upsampler,
            batch_size=batch_size,
            progress=progress,
            preview=preview,
            preview_every=preview_every,
            **{"sampler": "dpm++2m", **unguided(settings)},
        )
        made = {"variation": variation, "image_caption": image_caption, **input_images.metadata()}
        return replace(images, settings=images.settings | made)

    @lists_settings
    @in_32_bits
    def interpolate(
        self,
        start: str | Prompt,
        end: str | Prompt | None = None,
        *,
        num: int = 8,
        seed: int = 0,
        to_seed: int | None = None,
        first_index: int = 0,
        upsampler: SettingsArguments | Literal["none"] | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        preview: Preview | None = None,
        preview_every: int = 5,
        **settings: Unpack[SettingsArguments],
    ) -> Images:
        """Interpolate: `num` images from one prompt and seed to another, both ends included.

        Text features are interpolated linearly, initial noises along the arc between them
        (`slerp`). If the sampler adds noise at each step, all images share that noise.

        Args:
            end: the other prompt; None: `start`.
            to_seed: the other seed; None: `seed`.
            first_index: index of the initial noises of both seeds.
            **settings: fields of `Settings`. For the other arguments see `__call__` and `stream`.

        Raises:
            UsageError, GlideError: see `stream`.
        """
        if num < 2:
            raise UsageError(f"an interpolation has at least 2 images, not {num}")
        to_seed = seed if to_seed is None else to_seed
        first, last = read_prompts([start, start if end is None else end])
        shares = np.linspace(0, 1, num)
        side = self.model.config.image_size
        a, b = (start_noise(image_keys(s, [first_index]).start, side) for s in (seed, to_seed))
        images = self(
            [interpolated(first, last, share) for share in shares],
            seed=seed,
            first_index=[first_index] * num,
            noise=np.asarray(slerp(a, b, shares)),
            upsampler=upsampler,
            batch_size=batch_size,
            progress=progress,
            preview=preview,
            preview_every=preview_every,
            **settings,
        )
        path = {"prompts": [first.text, last.text], "seeds": [seed, to_seed]}
        details = tuple({"interpolation": path | {"share": share}} for share in shares.tolist())
        return replace(images, details=details)
