"""Sampling of one stage, one batch of images after another."""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from glide_jax.data.decoding import from_uint8
from glide_jax.devices.placement import Placement
from glide_jax.diffusion.guidance import (
    CAPTION,
    WEAK,
    Branch,
    Guidance,
    Network,
    branches_of,
    is_network,
)
from glide_jax.diffusion.sampling import Plan, State, stream_plan
from glide_jax.diffusion.solvers import ddim_reverse
from glide_jax.errors import UsageError
from glide_jax.pipeline.batching import batches, chosen_batch_size, select_images
from glide_jax.pipeline.clip_guide import CLIP, clip_guidance
from glide_jax.pipeline.prompts import Part, Prompt, clean, encode_parts
from glide_jax.pipeline.sampling_inputs import SamplingInputs
from glide_jax.pipeline.settings import Settings
from glide_jax.pipeline.stage import Stage


class BatchState(NamedTuple):
    """The state of one batch while it is sampled.

    Attributes:
        index: which images of the run the batch holds.
        state: state of the sampler.
        is_last: whether it is the last state of this batch.
        evaluations: table rows (network evaluations) per image.
    """

    index: np.ndarray
    state: State
    is_last: bool
    evaluations: int


def check_32_bits(name: str, value: int) -> None:
    """Check a seed or an image's index.

    Raises:
        UsageError: it is not a whole number, or jax would cut it to 32 bits.
    """
    try:
        operator.index(value)
    except TypeError:
        raise UsageError(f"{name} is a whole number, not {value}") from None
    if not 0 <= value < 2**32:
        raise UsageError(f"{name} must be between 0 and 2^32 - 1, not {value}")


class ImageKeys(NamedTuple):
    """The keys of images, `(B,)` each.

    Attributes:
        start: of the initial noise.
        steps: of the noise of the steps.
    """

    start: jax.Array
    steps: jax.Array


def image_keys(
    seed: int, indices: Sequence[int] | np.ndarray, *, upsampler: bool = False
) -> ImageKeys:
    """Return the keys of images, from the seed of the run and the index of each.

    Args:
        upsampler: whether they are for the upsampler, whose noise is independent of the base's.

    Raises:
        UsageError: jax would cut the seed or an index to 32 bits.
    """
    for name, value in (("seed", seed), *(("first_index", index) for index in indices)):
        check_32_bits(name, value)
    return _image_keys(np.uint32(operator.index(seed)), np.asarray(indices, np.uint32), upsampler)


@partial(jax.jit, static_argnums=2)
def _image_keys(seed: jax.Array, indices: jax.Array, upsampler: bool) -> ImageKeys:
    def keys(index: jax.Array) -> ImageKeys:
        key = jax.random.fold_in(jax.random.key(seed), index)
        # Children 0 and 1 of an image's key are the base's, 2 and 3 the upsampler's.
        return ImageKeys(*(jax.random.fold_in(key, 2 * upsampler + i) for i in range(2)))

    return jax.vmap(keys)(indices)


@partial(jax.jit, static_argnums=1)
def start_noise(keys: jax.Array, size: int) -> jax.Array:
    """Sample `(B, size, size, 3)` standard normal noise, one image from each key."""
    return jax.vmap(lambda key: jax.random.normal(key, (size, size, 3)))(keys)


def run(
    stage: Stage,
    prompts: Sequence[Prompt],
    seed: int,
    indices: np.ndarray,
    sampling_inputs: SamplingInputs,
    settings: Settings,
    *,
    clip: CLIP | None = None,
    weak_stage: Stage | None = None,
    batch_size: int | None = None,
    preview_every: int | None = None,
    progress: bool = False,
    reverse: bool = False,
) -> Iterator[BatchState]:
    """Sample the images, batch by batch.

    Args:
        prompts: one per image, all with the same number of parts.
        seed, indices: of the run, and of each image in it: see `image_keys`.
        clip: used if the settings have a `clip_guidance_scale`.
        weak_stage: the weak model of autoguidance.
        preview_every: yield after so many evaluations too, not only at the end of a batch.
        reverse: DDIM inversion, from the image to its noise.
    """
    count, placement = len(prompts), Placement(stage.devices)
    devices = placement.mesh.size
    batch_size = chosen_batch_size(batch_size, stage.model.config.image_size, devices)
    index_batches = batches(count, batch_size, devices)
    bar_label = "1 image" if count == 1 else f"{count} images"
    with tqdm.tqdm(unit="evaluation", desc=bar_label, disable=not progress) as bar:
        for index in index_batches:
            batch = _Batch(
                stage,
                [prompts[i] for i in index],
                image_keys(seed, indices[index], upsampler=stage.model.config.upsamples),
                sampling_inputs.select(index),
                select_settings(settings, index, count),
                clip=clip,
                weak_stage=weak_stage,
            )
            arguments = batch.arguments(reverse)
            length = len(arguments.plan)
            bar.total = len(index_batches) * length
            # One compiled program, of one row, serves every number of steps, and previews. The
            # host queues the next row before it waits for the previous one, so that the device
            # never idles.
            pending: list[jax.Array] = []
            for rows_done, state in stream_plan(*arguments):
                if pending:
                    jax.block_until_ready(pending.pop())
                    bar.update()
                pending.append(state.x)
                is_last = rows_done == length
                if is_last or (preview_every and rows_done % preview_every == 0):
                    yield BatchState(index, state, is_last, length)
            bar.update()


def select_settings(settings: Settings, index: np.ndarray, count: int) -> Settings:
    """Return the settings of some of `count` images: a value per image is selected.

    Raises:
        UsageError: a setting has neither one value nor one per image.
    """
    if np.ndim(settings.guidance_scale):
        scale = np.asarray(settings.guidance_scale, np.float32)
        if len(scale) not in (1, count):
            raise UsageError(
                f"guidance_scale has {len(scale)} values for {count} images: give one each"
            )
        settings = replace(settings, guidance_scale=np.broadcast_to(scale, count)[index])
    if settings.guidance is None:
        return settings
    return replace(settings, guidance=select_images(settings.guidance, index, count))


class SamplerArguments(NamedTuple):
    """The arguments of `glide_jax.diffusion.sampling.stream_plan`, in its order; see there."""

    networks: dict[str, Network]
    conds: dict[str, Any]
    plan: Plan
    x: jax.Array
    noise: jax.Array


class _Batch(NamedTuple):
    """The inputs of one batch of images, from which the arguments of the sampler are made."""

    stage: Stage
    prompts: Sequence[Prompt]
    keys: ImageKeys
    sampling_inputs: SamplingInputs
    settings: Settings
    clip: CLIP | None
    weak_stage: Stage | None

    def arguments(self, reverse: bool) -> SamplerArguments:
        """Return the arguments of the sampler, on the devices."""
        stage, config = self.stage, self.stage.model.config
        settings, scale = self.settings, np.float32(1)
        if config.guidance_scale_input and settings.scale_can_be_input(self.prompts):
            scale = np.asarray(settings.guidance_scale, np.float32)
            settings = replace(settings, guidance_scale=1.0)
        guidances = self.guidances(settings, reverse)
        plan = self.settings.plan(stage.schedule, guidances, ddim_reverse if reverse else None)
        if reverse:
            assert self.sampling_inputs.image is not None
            x = from_uint8(self.sampling_inputs.image)
        else:
            initial_noise = start_noise(self.keys.start, config.image_size)
            x = self.sampling_inputs.initial_x(plan, self.settings, initial_noise)

        networks, conds, inputs = {}, {}, self.sampling_inputs.inputs(config)
        stages = {CAPTION.network: stage, WEAK.network: self.weak_stage}
        for name, network_stage in stages.items():
            branches = [b for b in branches_of(guidances) if b.network == name]
            if network_stage is None or not branches:
                continue
            networks[name] = network_stage.network
            parts = [part for branch in branches for part in branch_captions(branch, self.prompts)]
            features = encode_parts(network_stage.encode_captions, parts)
            for i, branch in enumerate(branches):
                rows = slice(i * len(self.prompts), (i + 1) * len(self.prompts))
                text = jax.tree.map(lambda leaf, r=rows: leaf[r], features)
                conds[branch.name] = {"text": text} | inputs
                if network_stage.model.config.guidance_scale_input:
                    scales = np.broadcast_to(scale, len(self.prompts))
                    conds[branch.name] |= {"guidance_scale": scales}

        placement = Placement(stage.devices)
        plan = replace(plan, guidances=placement.split(plan.guidances, unsplit=is_network))
        x, noise = placement.split((x, self.keys.steps))
        return SamplerArguments(networks, placement.split(conds), plan, x, noise)

    def guidances(self, settings: Settings, reverse: bool) -> tuple[Guidance, ...]:
        """Return what acts on the prediction; CLIP guidance is last, after all maps of x_0."""
        if settings.autoguidance_scale != 1 and self.weak_stage is None:
            raise UsageError(
                "autoguidance_scale needs a weak model: load one as weak_model (--weak-model)"
            )
        guidances = settings.guidances(self.prompts, *self.sampling_inputs.known_pixel_guidance())
        model = self.stage.model
        return *guidances, *clip_guidance(self.clip, model, self.prompts, settings, reverse)


def branch_captions(branch: Branch, prompts: Sequence[Prompt]) -> Sequence[Part]:
    """Return the caption of a branch for each image.

    Raises:
        UsageError: a caption of the branch is no string.
    """
    own = [prompt.parts[0] for prompt in prompts]
    given = branch.prompt
    given = [given] * len(own) if given is None or isinstance(given, str) else given
    return [_caption_of(branch, *pair) for pair in zip(given, own, strict=True)]


def _caption_of(branch: Branch, given: Any, own: Part) -> Part:
    if given is None or isinstance(given, Part):
        return own if given is None else given
    if not isinstance(given, str):
        raise UsageError(
            f"a caption of branch {branch.name!r} must be a string, not {type(given).__name__}"
        )
    return Part(clean(given))
