"""Runs of `train.py` as models: loaded where they are, or exported to be passed on."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.errors import GlideError
from glide_jax.models.presets import CLIPConfig
from glide_jax.training.checkpoint import newest, steps_in
from glide_jax.training.config import CLIPTrainConfig, RunConfig, TrainConfig, read_config
from glide_jax.training.initial import abstract_state
from glide_jax.training.objectives import make_objective
from glide_jax.training.runs import is_run, model_of, run_defaults
from glide_jax.training.state import TrainState
from glide_jax.weights.token_rows import ROWS, TABLE, compact
from glide_jax.weights.registry import ASSETS, EMBEDDED, EMBEDDED_CLIPS, FORMAT, Model
from glide_jax.weights.store import flatten, load_weights, save_weights


def load_run(folder: Path) -> Model:
    """The newest averaged weights of a training run.

    Raises:
        GlideError: the run has saved nothing yet, or cannot be read.
    """
    config, state = restore_run(folder)
    if not isinstance(config, TrainConfig):
        raise GlideError(f"{folder} is a run of a noised CLIP: load it with clip=")
    return model_of(config, state.ema, str(folder))


def load_clip_run(folder: Path) -> tuple[CLIPConfig, dict[str, Any]]:
    """Sizes and newest averaged weights of a training run of a noised CLIP.

    Raises:
        GlideError: the run has saved nothing yet, cannot be read, or is of another kind.
    """
    config, state = restore_run(folder)
    if not isinstance(config, CLIPTrainConfig):
        raise GlideError(
            f"{folder} is a run of a {config.model.variant} model, not of a noised CLIP"
        )
    return config.model, state.ema


def restore_run(folder: Path) -> tuple[RunConfig, TrainState]:
    """The recipe of a run and its newest state, as numpy arrays."""
    config = read_config(folder / "config.json")
    like = _zeros(abstract_state(config, make_objective(config)))
    checkpoints = folder.absolute() / "checkpoints"
    if not steps_in(checkpoints):
        raise GlideError(f"{folder} has no checkpoint yet: let train.py save one first")
    state, _, _ = newest(checkpoints, like)
    return config, state


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)


def seen_tokens(config: RunConfig, state: TrainState) -> np.ndarray | None:
    """`(n_vocab,)` bool: token rows that training has seen, in this run or in what it began from.

    Adam's second moment knows which had a gradient. None where any row may mean something: the run
    began from weights with a whole table, or the table was frozen as it was drawn.
    """
    seen = None
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith(f"nu/{TABLE}"):
            seen = np.asarray(leaf).any(axis=1)
    if not config.init_from:
        return seen
    before = _seen_before(config.init_from, config.model.n_vocab)
    return before if before is None or seen is None else seen | before


def _seen_before(weights: str, n_vocab: int) -> np.ndarray | None:
    """`seen_tokens` of the weights that a run began from."""
    embedded = weights in (*EMBEDDED, *EMBEDDED_CLIPS)
    folder = ASSETS / weights if embedded else Path(weights).expanduser()
    if is_run(folder):
        return seen_tokens(*restore_run(folder))
    if not folder.is_dir():
        return None
    _, flat, _ = load_weights(folder)
    if ROWS not in flat:
        return None
    seen = np.zeros(n_vocab, bool)
    seen[flat[ROWS]] = True
    return seen


def export(run: Path, to: Path) -> int:
    """Writes a run's averaged weights as a folder of bfloat16 safetensors, ready to ship.

    Returns:
        The number of parameters written.

    Raises:
        GlideError: the run cannot be read, or the folder not written.
    """
    config, state = restore_run(run)
    flat = flatten(state.ema)
    seen = seen_tokens(config, state) if TABLE in flat else None
    if seen is not None and seen.any():
        flat = compact(flat, seen)
    flat = {
        k: v
        if np.issubdtype(np.asarray(v).dtype, np.integer)
        else np.asarray(v).astype(jnp.bfloat16)
        for k, v in flat.items()
    }
    save_weights(to, description(config, int(state.step)), flat)
    return sum(np.size(v) for v in flat.values())


def description(config: RunConfig, step: int) -> dict[str, Any]:
    """`config.json` of weights that a run made, as JSON holds it."""
    made_by = {"format": FORMAT, "recipe": config.name, "steps": step}
    return json.loads(json.dumps(made_by | _sizes(config)))


def _sizes(config: RunConfig) -> dict[str, Any]:
    if isinstance(config, CLIPTrainConfig):
        return {"clip": asdict(config.model)}
    return {
        "model": asdict(config.model),
        "schedule": config.schedule,
        "diffusion_steps": config.diffusion_steps,
        "prediction": config.prediction,
        "defaults": run_defaults(config),
        "prompts": config.sample_prompts,
    }
