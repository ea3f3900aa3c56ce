"""Weights by name, folder or file, or those of a training run: what `glide.load` opens."""

from pathlib import Path
from typing import Any

from glide_jax.errors import GlideError
from glide_jax.training.config import TrainConfig, read_config
from glide_jax.weights.clip_registry import CLIPModel, load_clip_model
from glide_jax.weights.registry import Model, defaults_of, load_model


def is_run(folder: str | Path) -> bool:
    """Whether a folder is a training run, rather than weights."""
    return (Path(folder).expanduser() / "checkpoints").is_dir()


def open_model(weights: str | Path) -> Model:
    """Return a model by name ("emoji64"), from a folder, a `.pt` file, or a run of `train.py`.

    Raises:
        UsageError: there is no such name, folder or file.
        GlideError: the files are missing, broken, or do not fit together.
    """
    if not is_run(weights):
        return load_model(weights)
    # Orbax takes most of a second to import, and only runs need it.
    from glide_jax.training.export import load_run

    return load_run(Path(weights).expanduser())


def open_clip(weights: str | Path) -> CLIPModel:
    """Return a noised CLIP by name ("openai/clip"), from a folder, or a run of `train.py`.

    Raises:
        UsageError: there is no such name or folder.
        GlideError: the weights are broken, or cannot be downloaded.
    """
    if not is_run(weights):
        return load_clip_model(weights)
    from glide_jax.training.export import load_clip_run

    return CLIPModel(str(weights), *load_clip_run(Path(weights).expanduser()))


def model_of(config: TrainConfig, params: Any, name: str = "") -> Model:
    """Return the model that a recipe trains, with these parameters."""
    return Model(
        name=name or config.name,
        config=config.model,
        params=params,
        schedule=config.schedule,
        diffusion_steps=config.diffusion_steps,
        prediction=config.prediction,
        defaults=run_defaults(config),
        prompts=config.sample_prompts,
    )


def run_defaults(config: TrainConfig) -> dict[str, Any]:
    """Return the sampling settings that a recipe recommends."""
    found: dict[str, Any] = {
        "steps": config.sample_steps,
        "guidance_scale": config.sample_guidance_scale,
    }
    if config.sample_clip_scale:
        found["clip_scale"] = config.sample_clip_scale
    if config.sample_strength is not None:
        found["strength"] = config.sample_strength
    return found


def sampling_defaults(weights: str | Path) -> dict[str, Any]:
    """Return the sampling settings that weights or a run bring, without reading their arrays.

    Empty where there are none, or where the weights cannot be read.
    """
    try:
        if not is_run(weights):
            return defaults_of(weights)
        config = read_config(Path(weights).expanduser() / "config.json")
    except GlideError:
        return {}
    return run_defaults(config) if isinstance(config, TrainConfig) else {}
