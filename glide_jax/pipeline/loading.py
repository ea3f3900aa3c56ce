"""From a name, a folder, a file or a run to a pipeline."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from PIL import Image

from glide_jax.devices.placement import chosen_devices
from glide_jax.devices.runtime import enable_compilation_cache
from glide_jax.errors import UsageError
from glide_jax.folders import expand_home
from glide_jax.pipeline.clip_guide import load_clip
from glide_jax.pipeline.pipeline import Pipeline
from glide_jax.pipeline.settings import Settings
from glide_jax.training.runs import open_lora, open_model
from glide_jax.weights.lora import merge, print_other_base
from glide_jax.weights.registry import Model, companion

# What `load` takes as its `lora`.
LoRAName = str | Path | tuple[str | Path, float]
LoRAs = LoRAName | Sequence[LoRAName]


def load(
    weights: str | Path = "emoji64",
    *,
    upsampler: str | Path | None = None,
    clip_model: str | Path | None = None,
    weak_model: str | Path | None = None,
    lora: LoRAs = (),
    dtype: str = "auto",
    devices: int | str = 1,
) -> Pipeline:
    """Load weights as a pipeline.

    It also turns on the cache of compiled programs: see `enable_compilation_cache`.

    Args:
        weights: a name ("emoji64", "openai/base", ...), a folder of weights, a `.pt` file under
            OpenAI's parameter names, `hf://user/name` (the Hugging Face Hub), or a run of
            `train.py`.
        upsampler: weights of an upsampler, which then enlarges each image; None: the one that
            belongs to the weights, if any; "none": no upsampler.
        clip_model: weights of a noised CLIP, for `clip_guidance_scale`; see `glide_jax.load_clip`;
            None and "none" as above. Without a CLIP, a `clip_guidance_scale` among the weights' own
            settings has no effect.
        weak_model: weights of a weaker model of the same kind, for `autoguidance_scale`.
        lora: low-rank pairs that are added to the weights: a run with LoRA or a file of its pairs,
            or several of them. Each may have a weight, which may be negative:
            `("runs/mine", 0.5)` or `"runs/mine:0.5"`. The weights become `W + sum_i w_i scale_i A_i
            B_i`.
        dtype: dtype of the trunk: "float32", "bfloat16", "float16" or "auto" (by device, or by the
            variable GLIDE_JAX_DTYPE; see `trunk_dtype`).
        devices: number of this process's devices that share a batch, or "all".

    Raises:
        UsageError: there are no such weights, or fewer devices.
        GlideError: the weights are broken, or cannot be downloaded, or a LoRA does not fit them.
    """
    enable_compilation_cache()
    # Called for its error, before anything expensive.
    chosen_devices(devices)
    upsampler = companion(weights, "upsampler", upsampler)
    clip = companion(weights, "clip", clip_model)
    placement_arguments: dict[str, Any] = {"dtype": dtype, "devices": devices}
    model = merge_loras(open_model(weights), lora)
    larger = None if upsampler is None else load(upsampler, **placement_arguments)
    if larger is not None and not larger.model.config.upsamples:
        raise UsageError(f"{upsampler} is not an upsampler")
    alone: dict[str, Any] = {"upsampler": "none", "clip_model": "none"}
    weak = None if weak_model is None else load(weak_model, **alone, **placement_arguments)
    if weak is not None and _kind(weak.model) != _kind(model):
        raise UsageError(
            f"{weak_model} cannot be the weak model of {weights}: variant, size or schedule differ"
        )
    settings = Settings().changed(**model.defaults)
    return Pipeline(
        model,
        settings=settings if clip else settings.changed(clip_guidance_scale=0.0),
        upsampler=larger,
        clip=None if clip is None else load_clip(clip, **placement_arguments),
        weak_stage=weak,
        **placement_arguments,
    )


def merge_loras(model: Model, lora: LoRAs) -> Model:
    """Return a model with low-rank pairs merged into its weights; see `load`.

    Raises:
        UsageError: there is no such LoRA, or a weight is not a finite number.
        GlideError: a LoRA cannot be read, or does not fit the model.
    """
    single = isinstance(lora, (str, Path)) or _is_weighted(lora)
    weighted = [_weighted(item) for item in ([lora] if single else lora)]  # pyright: ignore
    if not weighted:
        return model
    loras = [(open_lora(source), weight) for source, weight in weighted]
    merged = merge(model.params, loras)
    print_other_base([adapter for adapter, weight in loras if weight], model.params, model.name)
    return replace(model, params=merged)


def _is_weighted(lora: Any) -> bool:
    """Whether this is one LoRA with its weight, rather than several."""
    return isinstance(lora, tuple) and len(lora) == 2 and isinstance(lora[1], (int, float))


def _weighted(lora: str | Path | tuple[str | Path, float]) -> tuple[str | Path, float]:
    """Return the source and the weight of `"NAME"`, `"NAME:WEIGHT"` or `(NAME, WEIGHT)`.

    Raises:
        UsageError: the weight is not a finite number.
    """
    if _is_weighted(lora):
        source, weight = cast(tuple[str | Path, float], lora)
    else:
        source, weight = cast(str | Path, lora), 1.0
        name, colon, text = str(source).rpartition(":")
        if colon and not expand_home(source).exists():
            source = name
            try:
                weight = float(text)
            except ValueError:
                raise UsageError(f"the weight of {name} must be a number, not {text!r}") from None
    if not math.isfinite(weight):
        raise UsageError(f"the weight of {source} must be finite, not {weight}")
    return source, float(weight)


def _kind(model: Model) -> tuple[Any, ...]:
    """Return what must be equal in two models for one to guide the other."""
    return (
        model.config.variant,
        model.config.image_size,
        model.noise_schedule,
        model.diffusion_steps,
    )


def sample_grid(
    model: Model, prompts: Sequence[str], *, seed: int = 0, dtype: str = "auto"
) -> Image.Image:
    """Return a grid of samples of a model without CLIP guidance, one per prompt.

    All of this process's devices share the batch. Weights that are split over them stay split.
    """
    settings = Settings().changed(**model.defaults | {"clip_guidance_scale": 0.0})
    pipe = Pipeline(model, dtype, "all", settings=settings)
    return pipe(prompts, seed=seed, progress=False).grid()
