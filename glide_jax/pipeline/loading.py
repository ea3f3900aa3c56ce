"""From a name, a folder, a file or a run to a pipeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from glide_jax.devices.placement import local_devices
from glide_jax.devices.runtime import enable_compilation_cache
from glide_jax.errors import UsageError
from glide_jax.pipeline.clip_guide import load_clip
from glide_jax.pipeline.pipeline import Pipeline
from glide_jax.pipeline.settings import Settings
from glide_jax.training.runs import open_model
from glide_jax.weights.registry import Model, companion


def load(
    weights: str | Path = "emoji64",
    *,
    upsampler: str | Path | None = None,
    clip: str | Path | None = None,
    weak_model: str | Path | None = None,
    dtype: str = "auto",
    devices: int | str = 1,
) -> Pipeline:
    """Load weights as a pipeline.

    It also turns on the cache of compiled programs: see `enable_compilation_cache`.

    Args:
        weights: a name ("emoji64", "openai/base", ...), a folder of weights, a `.pt` file under
            OpenAI's parameter names, or a run of `train.py`.
        upsampler: weights of an upsampler, which then enlarges each image; None: the one that
            belongs to the weights, if any; "none": no upsampler.
        clip: weights of a noised CLIP, for `clip_scale`; see `glide_jax.load_clip`; None and "none"
            as above. Without a CLIP, a `clip_scale` among the weights' own settings has no effect.
        weak_model: weights of a weaker model of the same kind, for `autoguidance_scale`.
        dtype: see `Pipeline`.
        devices: number of this process's devices that share a batch, or "all".

    Raises:
        UsageError: there are no such weights, or fewer devices.
        GlideError: the weights are broken, or cannot be downloaded.
    """
    enable_compilation_cache()
    # Called for its error, before anything expensive.
    local_devices(devices)
    upsampler, clip = companion(weights, "upsampler", upsampler), companion(weights, "clip", clip)
    where: dict[str, Any] = {"dtype": dtype, "devices": devices}
    model = open_model(weights)
    larger = None if upsampler is None else load(upsampler, **where)
    if larger is not None and not larger.model.config.upsamples:
        raise UsageError(f"{upsampler} is not an upsampler")
    weak = None if weak_model is None else load(weak_model, **where)
    if weak is not None and _kind(weak.model) != _kind(model):
        raise UsageError(
            f"{weak_model} cannot be the weak model of {weights}: variant, size or schedule differ"
        )
    settings = Settings().changed(**model.defaults)
    return Pipeline(
        model,
        settings=settings if clip else settings.changed(clip_scale=0.0),
        upsampler=larger,
        clip=None if clip is None else load_clip(clip, **where),
        weak_model=weak,
        **where,
    )


def _kind(model: Model) -> tuple[Any, ...]:
    """What two models share that predict the same noise."""
    return model.config.variant, model.config.image_size, model.schedule, model.diffusion_steps


def sample_grid(
    model: Model, prompts: Sequence[str], *, seed: int = 0, dtype: str = "auto"
) -> Image.Image:
    """Return a grid of samples of a model without CLIP guidance, one per prompt.

    All of this process's devices share the batch. Weights that lie on them in parts stay so.
    """
    settings = Settings().changed(**model.defaults | {"clip_scale": 0.0})
    pipe = Pipeline(model, dtype, "all", settings=settings)
    return pipe(prompts, seed=seed, progress=False).grid()
