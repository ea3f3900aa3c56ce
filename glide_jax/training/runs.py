"""Weights of training runs, and of everything else that a weights argument can name."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glide_jax.errors import GlideError, UsageError
from glide_jax.folders import expand_home, write_atomically
from glide_jax.models.presets import CLIPConfig
from glide_jax.models.unet import GLIDE, init_params
from glide_jax.training.config import (
    CLIPTrainConfig,
    RunConfig,
    TrainConfig,
    read_config,
    trains_lora,
)
from glide_jax.weights.clip_registry import CLIPModel, load_clip_model
from glide_jax.weights.lora import LoRA, checksum, merge, read_lora, to_pairs
from glide_jax.weights.registry import Model, defaults_of, load_model
from glide_jax.weights.released import misfits
from glide_jax.weights.store import CONFIG, flatten, read_config_json

if TYPE_CHECKING:
    from glide_jax.training.state import TrainState

# Name and checksum of the weights that a run with LoRA adapts.
BASE = "base.json"


def is_run(folder: str | Path) -> bool:
    """Whether a folder is a training run, rather than weights."""
    return (expand_home(folder) / "checkpoints").is_dir()


def open_model(weights: str | Path) -> Model:
    """Return a model by name ("emoji64"), from a folder, a `.pt` file, the Hub, or a run.

    Raises:
        UsageError: there is no such name, folder or file.
        GlideError: the files are missing, broken, or do not fit together.
    """
    return load_run(expand_home(weights)) if is_run(weights) else load_model(weights)


def open_clip(weights: str | Path) -> CLIPModel:
    """Return a noised CLIP by name ("openai/clip"), from a folder, the Hub, or a run of `train.py`.

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
        raise GlideError(
            f"{folder} is a run of a noised CLIP: load it as clip_model (--clip-model)"
        )
    return model_of(config, network_params(config, state, folder), str(folder))


def network_params(config: RunConfig, state: "TrainState", folder: Path) -> Any:
    """Return the EMA parameters of a run's network; pairs of LoRA are merged into their base.

    Raises:
        GlideError: the base is missing, or has changed.
    """
    if not isinstance(config, TrainConfig) or not trains_lora(config):
        return state.ema
    try:
        base = base_of(config)
    except GlideError as error:
        raise GlideError(f"{folder} is a LoRA, and its base cannot be read: {error}") from None
    check_base(config, folder, base)
    return merge(base, [(_lora_of(config, state, folder), 1.0)])


def open_lora(source: str | Path) -> LoRA:
    """Return the pairs of a run with LoRA, or of a file that `glide-jax weights lora` wrote.

    Raises:
        UsageError: there is no such run or file, or it is no run with LoRA.
        GlideError: it cannot be read.
    """
    path = expand_home(source)
    if is_run(path):
        config = read_config(path / CONFIG)
        if not isinstance(config, TrainConfig) or not trains_lora(config):
            raise UsageError(f"{source} is a run without LoRA: use it as the weights themselves")
        return _lora_of(config, restore_run(path, is_average)[1], path)
    if not path.is_file():
        raise UsageError(f"there is no LoRA {str(source)!r}: name a run or a .safetensors file")
    return read_lora(path)


def _lora_of(config: TrainConfig, state: "TrainState", folder: Path) -> LoRA:
    base = _read_base(folder)
    pairs, lora = to_pairs(state.ema), config.lora
    return LoRA(str(folder), pairs, lora.rank, lora.alpha, base["base"], base["checksum"])


def base_of(config: TrainConfig) -> dict[str, Any]:
    """Return the weights that a run with LoRA adapts, float32: those of `init_from`.

    Without, they are the random ones of the recipe's seed.

    Raises:
        UsageError: there are no such weights.
        GlideError: the weights cannot be read, or are of another model.
    """
    import jax

    from glide_jax.devices.runtime import fast_compile_options

    if not config.init_from:
        # Compiled like this everywhere: other options could round differently.
        options = fast_compile_options()
        make = jax.jit(partial(init_params, GLIDE(config.model)), compiler_options=options)
        return jax.tree.map(np.asarray, make(jax.random.key(config.seed)))
    params = open_model(config.init_from).params
    if wrong := misfits(flatten(params), config.model):
        raise GlideError(
            f"{config.init_from} cannot be the base of this model: {len(wrong)} parameters are "
            f"missing, unexpected or of another shape ({', '.join(wrong[:3])})"
        )
    return params


def write_base(config: TrainConfig, params: dict[str, Any]) -> None:
    """Write the name and the checksum of a base into the folder of a run.

    Raises:
        GlideError: the file cannot be written.
    """
    text = json.dumps({"base": config.init_from, "checksum": checksum(params)})
    path = config.folder / BASE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise GlideError(f"cannot write {path}: {error}") from None


def _read_base(folder: Path) -> dict[str, str]:
    base = read_config_json(folder / BASE)
    if not all(isinstance(base.get(name), str) for name in ("base", "checksum")):
        raise GlideError(f"{folder / BASE} names no base and checksum: copy it again")
    return base


def check_base(config: TrainConfig, folder: Path, params: dict[str, Any]) -> None:
    """Check that a base is the one that a run began with.

    Raises:
        GlideError: it is another one.
    """
    if checksum(params) != _read_base(folder)["checksum"]:
        base = config.init_from or f"the random weights of seed {config.seed}"
        raise GlideError(
            f"{folder} was trained on other weights than those of {base}: bring its base back, or "
            "choose another --out"
        )


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
    from glide_jax.training.state import abstract_state, saved_part

    config = read_config(folder / "config.json")
    objective = make_objective(config)
    shapes = saved_part(abstract_state(config, objective), objective)
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
        noise_schedule=config.noise_schedule,
        diffusion_steps=config.diffusion_steps,
        prediction_type=config.prediction_type,
        defaults=run_defaults(config),
        prompts=config.sample_prompts,
    )


def run_defaults(config: TrainConfig) -> dict[str, Any]:
    """Return the sampling settings that a recipe recommends."""
    settings: dict[str, Any] = {
        "steps": config.sample_steps,
        "guidance_scale": config.sample_guidance_scale,
    }
    if config.sample_clip_guidance_scale:
        settings["clip_guidance_scale"] = config.sample_clip_guidance_scale
    if config.sample_strength is not None:
        settings["strength"] = config.sample_strength
    if config.sample_sampler:
        settings["sampler"] = config.sample_sampler
    if config.sample_spacing:
        settings["spacing"] = config.sample_spacing
    return settings


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
