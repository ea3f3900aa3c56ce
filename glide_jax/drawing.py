"""Runs the sampler for a pipeline, one batch after another."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from glide_jax.batches import Place, batches, rows_of, usual_batch
from glide_jax.diffusion.guidance import Branch, Guidance, branches_of
from glide_jax.diffusion.sampling import State, stream
from glide_jax.diffusion.solvers import ddim_reverse
from glide_jax.errors import UsageError
from glide_jax.given import Given
from glide_jax.pictures import from_uint8
from glide_jax.prompts import Part, Prompt, encode_parts
from glide_jax.settings import Settings

if TYPE_CHECKING:
    from glide_jax.noised_clip import CLIP
    from glide_jax.pipeline import Pipeline
    from glide_jax.weights.registry import Model


def check_32_bits(name: str, value: int) -> None:
    """Raises UsageError for a seed, or a picture's number, that jax would cut to 32 bits."""
    if not 0 <= value < 2**32:
        raise UsageError(f"{name} lies between 0 and 2^32 - 1, not at {value}")


def picture_keys(seed: int, numbers: Sequence[int] | np.ndarray) -> jax.Array:
    """`(B, 2)` keys of pictures: for the noise that each begins with, and for that of its steps.

    Raises:
        UsageError: a seed or a number that jax would cut to 32 bits.
    """
    for name, value in (("seed", seed), *(("first", number) for number in numbers)):
        check_32_bits(name, value)
    key, numbers = jax.random.key(np.uint32(operator.index(seed))), jnp.asarray(numbers, jnp.uint32)
    return jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(numbers)


def start_noise(keys: jax.Array, size: int) -> jax.Array:
    """`(B, size, size, 3)` standard normal, a picture from each key."""
    return jax.vmap(lambda key: jax.random.normal(key, (size, size, 3)))(keys)


def run(
    pipe: Pipeline,
    prompts: Sequence[Prompt],
    keys: jax.Array,
    given: Given,
    settings: Settings,
    *,
    batch_size: int | None = None,
    every: int | None = None,
    progress: bool = False,
    reverse: bool = False,
) -> Iterator[tuple[np.ndarray, State, bool]]:
    """Runs the batches, and yields which pictures a state is of, and whether it is their last.

    Args:
        prompts: all of as many parts.
        reverse: from the image to its noise.
    """
    count, place = len(prompts), Place(pipe.devices)
    if batch_size is None:
        batch_size = usual_batch(pipe.model.config.image_size) * place.mesh.size
    todo = batches(count, batch_size, place.mesh.size)
    with tqdm.tqdm(unit="step", desc=f"{count} pictures", disable=not progress) as bar:
        for index in todo:
            mine = settings
            if settings.guidance is not None:
                mine = replace(settings, guidance=rows_of(settings.guidance, index, count))
            captions = [prompts[i] for i in index]
            batch = _batch(pipe, captions, keys[index], given.rows(index), mine, reverse)
            length = len(batch[2])
            bar.total = len(todo) * length
            # One compiled program of one row serves every number of steps, and previews.
            for done, state in stream(*batch, rows=1 if progress or every else length):
                jax.block_until_ready(state.x)
                bar.update(done - bar.n % length)
                if done == length or (every and done % every == 0):
                    yield index, state, done == length


def _batch(
    pipe: Pipeline,
    prompts: Sequence[Prompt],
    keys: jax.Array,
    given: Given,
    settings: Settings,
    reverse: bool,
) -> tuple[Any, ...]:
    """What the sampler runs for one batch: its arguments, on the devices."""
    place, config = Place(pipe.devices), pipe.model.config
    guidances = _guidances(pipe, prompts, settings, given)
    run = settings.plan(pipe.schedule, guidances, ddim_reverse if reverse else None)
    if reverse:
        x = from_uint8(given.image)
    else:
        x = given.start(run, settings, start_noise(keys[:, 0], config.image_size))

    networks, conds, inputs = {}, {}, given.inputs(config)
    for name, model in {"main": pipe, "guide": pipe.guide}.items():
        branches = [b for b in branches_of(guidances) if b.network == name]
        if not branches:
            continue
        networks[name] = model.network
        parts = [part for branch in branches for part in _parts_of(branch, prompts)]
        features = encode_parts(model.text_features, parts)
        for i, branch in enumerate(branches):
            rows = slice(i * len(prompts), (i + 1) * len(prompts))
            conds[branch.name] = {
                "text": jax.tree.map(lambda leaf, r=rows: leaf[r], features)
            } | inputs
    run = replace(run, table=place.everywhere(run.table), guidance=place.spread(run.guidance))
    return networks, place.spread(conds), run, *place.spread((x, keys[:, 1]))


def _guidances(
    pipe: Pipeline, prompts: Sequence[Prompt], settings: Settings, given: Given
) -> tuple[Guidance, ...]:
    """What acts on the prediction; a score last, after all that maps x_0."""
    if settings.autoguidance_scale != 1 and pipe.guide is None:
        raise UsageError("autoguidance_scale needs a worse model: load one with guide=")
    guidances = settings.guidances(prompts, *given.maps())
    if not settings.clip_scale:
        return guidances
    if pipe.clip is None:
        raise UsageError("clip_scale needs a noised CLIP: load one with clip=")
    _check_guide(pipe.clip, pipe.model)
    return (*guidances, pipe.clip.guidance(prompts, settings.clip_scale))


def _check_guide(clip: CLIP, model: Model) -> None:
    """Raises UsageError where a noised CLIP does not see what the model draws."""
    sides = clip.config.image_size, model.config.image_size
    chains = clip.config.n_timestep, model.diffusion_steps
    if sides[0] != sides[1]:
        what = f"{clip.name} sees pictures of {sides[0]} pixels, {model.name} draws {sides[1]}"
    elif chains[0] not in (0, chains[1]):
        what = f"{clip.name} knows {chains[0]} noise levels, {model.name} has {chains[1]}"
    else:
        return
    raise UsageError(f"{what}: load another CLIP, or set clip_scale to 0")


def _parts_of(branch: Branch, prompts: Sequence[Prompt]) -> Sequence[Part]:
    """The captions of a branch: of each picture, or one for all."""
    if branch.prompt is None:
        return [prompt.parts[0] for prompt in prompts]
    if isinstance(branch.prompt, str):
        return [Part(branch.prompt)] * len(prompts)
    return branch.prompt
