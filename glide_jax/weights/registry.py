"""From a name or a folder to a model: its sizes, its weights, how it likes to be sampled."""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from glide_jax.errors import GlideError, UsageError
from glide_jax.models.presets import ModelConfig, model_config
from glide_jax.weights.embedding import expand
from glide_jax.weights.released import abstract_params
from glide_jax.weights.store import flatten, load_weights, unflatten

ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = ("emoji64",)
FORMAT = 1


@dataclass(frozen=True)
class Model:
    """A network's weights and all that is needed to use them.

    Attributes:
        name: what the user called it.
        config: its sizes.
        params: nested dictionaries of float32 arrays.
        schedule, diffusion_steps: the noise schedule that it was trained with.
        prediction: what its output means, "eps" or "v".
        defaults: sampling settings that suit it, by name.
        prompts: captions that show it well.
    """

    name: str
    config: ModelConfig
    params: dict[str, Any]
    schedule: str = "cosine"
    diffusion_steps: int = 1000
    prediction: str = "eps"
    defaults: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()


def load_model(name: str | Path) -> Model:
    """A model by name ("emoji64"), or from a folder: exported weights, or a run of `train.py`.

    Raises:
        UsageError: no such name or folder.
        GlideError: the folder's files are missing, broken, or do not fit together.
    """
    if str(name) in EMBEDDED:
        return _load_exported(str(name), ASSETS / str(name))
    folder = Path(name).expanduser()
    if (folder / "checkpoints").is_dir():
        # Orbax takes most of a second to import, and only runs need it.
        from glide_jax.training.export import load_run

        return load_run(folder)
    if folder.is_dir():
        return _load_exported(str(name), folder)
    near = difflib.get_close_matches(str(name), EMBEDDED, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"embedded: {', '.join(EMBEDDED)}"
    raise UsageError(f"there are no weights {str(name)!r}, neither a name nor a folder ({hint})")


def _load_exported(name: str, folder: Path) -> Model:
    config, flat, _ = load_weights(folder)
    if config.get("format") != FORMAT:
        raise GlideError(
            f"{folder} is in format {config.get('format')}, this version reads {FORMAT}"
        )
    try:
        sizes = model_config(config["model"])
        schedule, steps = config["schedule"], int(config["diffusion_steps"])
        prediction = config["prediction"]
        defaults, prompts = dict(config["defaults"]), tuple(config["prompts"])
    except (KeyError, TypeError, ValueError) as error:
        raise GlideError(f"{folder / 'config.json'} does not describe a model: {error}") from None
    flat = expand(flat, sizes.n_vocab)
    _check(folder, sizes, flat)
    params = unflatten({k: np.asarray(v, np.float32) for k, v in flat.items()})
    return Model(name, sizes, params, schedule, steps, prediction, defaults, prompts)


def _check(folder: Path, sizes: ModelConfig, flat: dict[str, np.ndarray]) -> None:
    wanted = {k: v.shape for k, v in flatten(abstract_params(sizes)).items()}
    have = {k: v.shape for k, v in flat.items()}
    if wanted != have:
        wrong = sorted(k for k in wanted | have if wanted.get(k) != have.get(k))
        raise GlideError(
            f"the weights in {folder} do not fit its config.json: {len(wrong)} parameters are "
            f"missing, unexpected or of the wrong shape ({', '.join(wrong[:3])})"
        )
