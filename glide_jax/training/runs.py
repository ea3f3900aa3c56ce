"""Weights of training runs, and of everything else that a weights argument can name."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glide_jax.errors import GlideError
from glide_jax.folders import expand_home
from glide_jax.models.presets import CLIPConfig
from glide_jax.training.config import CLIPTrainConfig, RunConfig, TrainConfig, read_config
from glide_jax.weights.clip_registry import CLIPModel, load_clip_model
from glide_jax.weights.registry import Model, defaults_of, load_model

if TYPE_CHECKING:
    from glide_jax.training.state import TrainState


def is_run(folder: str | Path) -> bool:
    """Whether a folder is a training run, rather than weights."""
    return (expand_home(folder) / "checkpoints").is_dir()


def open_model(weights: str | Path) -> Model:
    """Return a model by name ("emoji64"), from a folder, a `.pt` file, or a run of `train.py`.

    Raises:
        UsageError: there is no such name, folder or file.
        GlideError: the files are missing, broken, or do not fit together.
    """
    return load_run(expand_home(weights)) if is_run(weights) else load_model(weights)


def open_clip(weights: str | Path) -> CLIPModel:
    """Return a noised CLIP by name ("openai/clip"), from a folder, or a run of `train.py`.

    Raises:
        UsageError: there is no such name or folder.
        GlideError: the weights are broken, or cannot be downloaded.
    """
    if not is_run(weights):
        return load_clip_model(weights)
    return CLIPModel(str(weights), *load_clip_run(expand_home(weights)))


def load_run(folder: Path) -> Model:
    """Return the newest EMA weights of a training run.

    Raises:
        GlideError: the run has saved nothing yet, or cannot be read.
    """
    config, state = restore_run(folder, is_average)
    if not isinstance(config, TrainConfig):
        raise GlideError(f"{folder} is a run of a noised CLIP: load it with clip=")
    return model_of(config, state.ema, str(folder))


def load_clip_run(folder: Path) -> tuple[CLIPConfig, dict[str, Any]]:
    """Return sizes and newest EMA weights of a training run of a noised CLIP.

    Raises:
        GlideError: the run has saved nothing yet, cannot be read, or is of another kind.
    """
    config, state = restore_run(folder, is_average)
    if isinstance(config, TrainConfig):
        raise GlideError(
            f"{folder} is a run of a {config.model.variant} model, not of a noised CLIP"
        )
    assert isinstance(config, CLIPTrainConfig)
    return config.model, state.ema


def is_average(path: str) -> bool:
    """Whether an array of a training state belongs to the EMA weights, or is the step."""
    return path == "step" or path.startswith("ema/")


def restore_run(
    folder: Path, wanted: Callable[[str], bool] | None = None
) -> tuple[RunConfig, "TrainState"]:
    """Return the recipe of a run and its newest state, as numpy arrays.

    Args:
        folder: of the run.
        wanted: whether the array of a path is read, such as `is_average`; the others, mostly of
            the optimiser, are `...` in the state. None: all.

    Raises:
        GlideError: the run has saved nothing yet, or cannot be read.
    """
    # Orbax takes most of a second to import, and only runs need it.
    import jax

    from glide_jax.training.checkpoint import newest, steps_in
    from glide_jax.training.objectives import make_objective
    from glide_jax.training.state import abstract_state

    config = read_config(folder / "config.json")
    shapes = abstract_state(config, make_objective(config))
    like = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    checkpoints = folder.absolute() / "checkpoints"
    if not steps_in(checkpoints):
        raise GlideError(f"{folder} has no checkpoint yet: let train.py save one first")
    state, _, _ = newest(checkpoints, like, wanted)
    return config, state


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
    if config.sample_sampler:
        found["sampler"] = config.sample_sampler
    if config.sample_spacing:
        found["spacing"] = config.sample_spacing
    return found


def sampling_defaults(weights: str | Path) -> dict[str, Any]:
    """Return the sampling settings that weights or a run bring, without reading their arrays.

    Empty if there are none, or if the weights cannot be read.
    """
    try:
        if not is_run(weights):
            return defaults_of(weights)
        config = read_config(expand_home(weights) / "config.json")
    except GlideError:
        return {}
    return run_defaults(config) if isinstance(config, TrainConfig) else {}
