"""The registry of named models: sizes, weights and default sampling settings."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from glide_jax.errors import GlideError, UsageError, did_you_mean
from glide_jax.folders import expand_home
from glide_jax.models.presets import PRESETS, ModelConfig, model_config
from glide_jax.weights.choosing import read_released, split_choice
from glide_jax.weights.hub import config_of, download
from glide_jax.weights.hub_names import on_hub
from glide_jax.weights.released import from_released, misfits, to_released
from glide_jax.weights.released_files import (
    PRESET_OF,
    fetch,
    recognise,
    released_defaults,
    schedule_of,
)
from glide_jax.weights.store import (
    CONFIG,
    MODEL,
    flatten,
    load_weights,
    read_config_json,
    save_weights,
    unflatten,
)
from glide_jax.weights.token_rows import expand
from glide_jax.weights.torch_writer import write_torch_file

ASSETS = Path(__file__).parent.parent / "assets"
# The small models that this installation contains.
EMBEDDED, EMBEDDED_CLIPS = (
    tuple(name for name in names if (ASSETS / name).is_dir())
    for names in (
        ("emoji64", "emoji_upsample256"),
        ("emoji_clip64", "emoji_scorer64"),
    )
)
# Default upsampler and default noised CLIP of some weights. The scorer never guides: it measures.
_FAMILY = {"upsampler": "emoji_upsample256", "clip": "emoji_clip64"}
COMPANIONS = {"emoji64": _FAMILY}
NONE = "none"
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Model:
    """The weights of a network and what is needed to use them.

    Attributes:
        name: the name, folder or file that it was loaded from; of weights on the Hub, with the
            commit.
        config: its sizes.
        params: nested dictionaries of float32 arrays.
        noise_schedule, diffusion_steps: the noise schedule that it was trained with.
        prediction_type: the meaning of its output, "eps", "v" or "x_0".
        defaults: default sampling settings, by name.
        prompts: example captions.
    """

    name: str
    config: ModelConfig
    params: dict[str, Any]
    noise_schedule: str = "cosine"
    diffusion_steps: int = 1000
    prediction_type: str = "eps"
    defaults: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()


def companion(weights: str | Path, kind: str, chosen: str | Path | None) -> str | Path | None:
    """Return the upsampler or the noised CLIP to use with some weights, or None for no such model.

    Args:
        kind: "upsampler" or "clip".
        chosen: a name, a folder or a file; "none": no such model; None: the default of the weights.
    """
    if chosen is None:
        default = COMPANIONS.get(str(weights), {}).get(kind)
        return default if default in (*EMBEDDED, *EMBEDDED_CLIPS) else None
    return None if str(chosen) == NONE else chosen


def load_model(name: str | Path) -> Model:
    """Load a model by name ("emoji64"), from a folder of weights, a file, or the Hub.

    A file has OpenAI's parameter names and is a `.pt`, `.ckpt` or `.safetensors` file;
    `FILE:MODEL` chooses one of several models in it. `hf://user/name` is a repository of the
    Hugging Face Hub: see `glide_jax.weights.hub.download`.

    Raises:
        UsageError: there is no such name, folder or file.
        GlideError: the files are missing, broken, do not fit together, or cannot be downloaded.
    """
    if on_hub(name):
        downloaded = download(name)
        return replace(load_model(downloaded.path), name=downloaded.name)
    if str(name) in EMBEDDED:
        return _load_exported(str(name), ASSETS / str(name))
    if str(name) in PRESET_OF:
        return load_torch(fetch(str(name)), str(name), PRESETS[PRESET_OF[str(name)]]())
    folder = expand_home(name)
    if folder.name == MODEL and (folder.parent / CONFIG).is_file():
        folder = folder.parent
    if split_choice(name)[0].is_file() and not folder.is_dir():
        return load_torch(name, str(name))
    if folder.is_dir():
        return _load_exported(str(name), folder)
    known = (*EMBEDDED, *PRESET_OF)
    hint = did_you_mean(str(name), known) or f"; names are {', '.join(known)}"
    raise UsageError(f"there are no weights {str(name)!r}, by name or as a folder or file{hint}")


def defaults_of(name: str | Path) -> dict[str, Any]:
    """Return the default sampling settings of weights, without reading their arrays.

    Without such settings the dictionary is empty.

    Raises:
        GlideError: the folder's `config.json` cannot be read, or not downloaded.
    """
    if on_hub(name):
        return dict(config_of(name).get("defaults", {}))
    if str(name) in PRESET_OF:
        return released_defaults(PRESETS[PRESET_OF[str(name)]]())
    folder = ASSETS / str(name) if str(name) in EMBEDDED else expand_home(name)
    if not (folder / CONFIG).is_file():
        return {}
    return dict(read_config_json(folder / CONFIG).get("defaults", {}))


def load_torch(path: str | Path, name: str, config: ModelConfig | None = None) -> Model:
    """Load a model from a file under OpenAI's parameter names; runs no code of the file.

    Args:
        path: a `.pt`, `.ckpt` or `.safetensors` file; `FILE:MODEL` chooses one of several models.
        config: its sizes; None: recognised by names and shapes.

    Raises:
        UsageError: the file holds several models, and none of them is chosen.
        GlideError: the file is broken or hostile, or holds another model.
    """
    state_dict = read_released(path)
    config = config or recognise(state_dict)
    params = from_released(config, state_dict)
    return Model(name, config, params, schedule_of(config), defaults=released_defaults(config))


def save_torch(model: Model, path: Path) -> None:
    """Write a model as a `.pt` file under OpenAI's parameter names, for the original code.

    Raises:
        GlideError: the original code has no such model, or the file cannot be written.
    """
    for wrong, what in (
        (model.prediction_type != "eps", f"predicts {model.prediction_type}, not the noise"),
        (model.config.low_res_timestep, "takes the noise level of the low-resolution image"),
        (model.config.patch > 1, "works on blocks of pixels"),
        (model.config.residual, "predicts a residual"),
        (model.config.guidance_scale_input, "takes the scale of guidance"),
    ):
        if wrong:
            raise GlideError(f"the original code cannot use {model.name}: it {what}")
    write_torch_file(path, to_released(model.params))


def save_model(model: Model, folder: Path) -> None:
    """Write a model as a folder that `load_model` reads, in float32.

    Raises:
        GlideError: the folder cannot be written.
    """
    description = {
        "format": FORMAT,
        "model": asdict(model.config),
        "noise_schedule": model.noise_schedule,
        "diffusion_steps": model.diffusion_steps,
        "prediction_type": model.prediction_type,
        "defaults": model.defaults,
        "prompts": model.prompts,
    }
    save_weights(folder, json.loads(json.dumps(description)), flatten(model.params))


def _load_exported(name: str, folder: Path) -> Model:
    config, flat, _ = load_weights(folder)
    if config.get("format") != FORMAT:
        raise GlideError(
            f"{folder} is in format {config.get('format')}, this version reads {FORMAT}"
        )
    try:
        sizes = model_config(config["model"])
        schedule, steps = config["noise_schedule"], int(config["diffusion_steps"])
        prediction_type = config["prediction_type"]
        defaults, prompts = dict(config["defaults"]), tuple(config["prompts"])
    except (KeyError, TypeError, ValueError) as error:
        raise GlideError(f"{folder / 'config.json'} does not describe a model: {error}") from None
    flat = expand(flat, sizes.n_vocab)
    # Tracing the network for its shapes takes a second; the tests do that for the embedded weights.
    if name not in EMBEDDED and (wrong := misfits(flat, sizes)):
        raise GlideError(
            f"the weights in {folder} do not fit its config.json: {len(wrong)} parameters are "
            f"missing, unexpected or of the wrong shape ({', '.join(wrong[:3])})"
        )
    params = unflatten({k: np.asarray(v, np.float32) for k, v in flat.items()})
    return Model(name, sizes, params, schedule, steps, prediction_type, defaults, prompts)
