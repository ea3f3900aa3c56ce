"""Thousands of images into tar shards: interrupted and continued, by one process or by many."""

import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from glide_jax.data.records import digest
from glide_jax.devices.placement import Placement
from glide_jax.devices.runtime import trunk_dtype
from glide_jax.errors import GlideError, UsageError
from glide_jax.folders import check_writable, expand_home
from glide_jax.pipeline.batching import chosen_batch_size
from glide_jax.pipeline.images import Images
from glide_jax.pipeline.pipeline import Pipeline
from glide_jax.pipeline.plan_checks import chosen_upsampler
from glide_jax.pipeline.prompts import Prompt, read_prompts
from glide_jax.pipeline.runner import check_32_bits, select_settings
from glide_jax.pipeline.settings import describe
from glide_jax.pipeline.shard_files import add_images, check_same_run, claimed, shard_path
from glide_jax.training.checksums import checksums


def sample_shards(
    pipe: Pipeline,
    prompts: Sequence[str],
    folder: str | Path,
    *,
    shard_size: int = 1000,
    process: tuple[int, int] = (0, 1),
    num: int = 1,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int | None = None,
    upsampler: Any = None,
    progress: bool = True,
    **settings: Any,
) -> str:
    """Generate `num` images of each prompt into tar shards, and return one line on what is there.

    An image depends on its prompt, its index and the seed alone: shards are the same to the byte
    whatever process generates them, in one run or in several. Another batch size or number of
    devices changes an image by at most rounding. Shards that are there are kept. Several processes
    may work in one folder: each shard is written by one of them.

    Args:
        pipe: generates the images.
        folder: gets `000000.tar`, ... and `shards.json`, which describes the run.
        shard_size: images of a shard.
        process: (i, n), index of this process and number of processes: it writes the shards i,
            i + n, i + 2n, ...
        batch_size, upsampler, **settings: see `Pipeline.stream`.

    Raises:
        UsageError: the folder has shards of another run; or see `Pipeline.stream`.
        GlideError: the folder cannot be written, or the disk is full.
        KeyboardInterrupt: with one line that says how many shards are there.
    """
    folder = expand_home(folder)
    if shard_size < 1:
        raise UsageError(f"a shard has at least 1 image, not {shard_size}")
    parsed = read_prompts(prompts, num)
    whole = pipe.settings.changed(**settings)
    select_settings(whole, np.arange(0), len(parsed))  # for its errors
    check_32_bits("seed", seed)
    for index in (first_index, first_index + len(parsed) - 1):
        check_32_bits("first_index", index)
    check_writable(folder)
    count = -(-len(parsed) // shard_size)
    check_same_run(
        folder,
        {
            "images": len(parsed),
            "shards": count,
            "shard_size": shard_size,
            "num": num,
            "seed": seed,
            "first_index": first_index,
            "prompts digest": digest(prompts),
            **_identity(pipe, upsampler, settings),
        },
    )

    def done_line() -> str:
        done = sum(shard_path(folder, number).exists() for number in range(count))
        return f"{done:,} of {count:,} shards of {len(parsed):,} images are in {folder}"

    def span_of(number: int) -> range:
        return range(number * shard_size, min((number + 1) * shard_size, len(parsed)))

    def values_of(indices: range) -> dict[str, Any]:
        chosen = select_settings(whole, np.array(indices), len(parsed))
        names = ("guidance_scale", "guidance")
        return {name: getattr(chosen, name) for name in names if settings.get(name) is not None}

    def images_of(indices: range) -> Images:
        return pipe(
            [_unpadded(parsed[i]) for i in indices],
            seed=seed,
            first_index=[first_index + i for i in indices],
            batch_size=batch_size,
            upsampler=upsampler,
            progress=False,
            **settings | values_of(indices),
        )

    todo = [k for k in range(process[0], count, process[1]) if not shard_path(folder, k).exists()]
    devices = Placement(pipe.devices).mesh.size
    size = chosen_batch_size(batch_size, pipe.model.config.image_size, devices)
    busy = 0
    try:
        total = sum(len(span_of(number)) for number in todo)
        with tqdm.tqdm(total=total, unit="image", disable=not progress or not todo) as bar:
            for number in todo:
                path, span = shard_path(folder, number), span_of(number)
                bar.set_description(path.name)
                batches = [span[i : i + size] for i in range(0, len(span), size)]
                if not _write_shard(path, batches, images_of, bar.update):
                    busy += not path.exists()
                    bar.total -= len(span)
    except OSError as error:
        why = error.strerror or error
        raise GlideError(
            f"cannot write shards: {why}; {done_line()}, and the same command continues"
        ) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {done_line()}, and the same command continues") from None
    return done_line() + (f"; other processes write {busy:,} of the missing ones" if busy else "")


def _write_shard(
    path: Path,
    batches: Sequence[range],
    images_of: Callable[[range], Images],
    advance: Callable[[int], Any],
) -> bool:
    """Write a shard batch by batch; return False if it is there or another process writes it.

    Args:
        batches: the indices of its images.
        images_of: generates the images of a batch.
        advance: is told how many images were added.
    """
    with claimed(path) as file:
        if file is None:
            return False
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for indices in batches:
                add_images(tar, images_of(indices))
                advance(len(indices))
    return True


def _unpadded(prompt: Prompt) -> Prompt:
    """Remove the weight-0 parts that pad all prompts to one length.

    A plain caption then costs what it costs alone.
    """
    kept = tuple(p for i, p in enumerate(prompt.parts) if i == 0 or p.text or p.weight)
    return Prompt(prompt.text, kept)


def _identity(pipe: Pipeline, upsampler: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what else the images depend on: settings, and checksums of the weights."""
    call_settings = pipe.settings.changed(**settings)
    upsampler_pipeline = chosen_upsampler(pipe.upsampler, upsampler)
    identity: dict[str, Any] = {"settings": describe(call_settings)}
    used: dict[str, tuple[str, Any]] = {"weights": (pipe.model.name, pipe.model.params)}
    if upsampler_pipeline is not None:
        changed = upsampler if isinstance(upsampler, Mapping) else {}
        identity["upsampler"] = describe(upsampler_pipeline.settings.changed(**changed))
        used["upsampler weights"] = upsampler_pipeline.model.name, upsampler_pipeline.model.params
    if call_settings.clip_guidance_scale and pipe.clip is not None:
        used["CLIP"] = pipe.clip.name, pipe.clip.params
    if call_settings.autoguidance_scale != 1 and pipe.weak_stage is not None:
        used["weak model"] = pipe.weak_stage.model.name, pipe.weak_stage.model.params
    for what, (_, params) in used.items():
        sums = checksums(params)
        identity[f"{what} digest"] = digest(f"{name} {value}" for name, value in sums.items())
    identity["dtype"] = trunk_dtype(pipe.dtype).__name__
    return identity | {"names": {what: name for what, (name, _) in used.items()}}
