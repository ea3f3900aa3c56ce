"""Runs of `train.py` as models: loaded where they are, or exported to be passed on."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.errors import GlideError
from glide_jax.training.checkpoint import Checkpoints
from glide_jax.training.config import CLIPTrainConfig, RunConfig, TrainConfig, read_config
from glide_jax.training.initial import abstract_state
from glide_jax.training.objectives import make_objective
from glide_jax.training.state import TrainState
from glide_jax.weights.embedding import TABLE, compact
from glide_jax.weights.registry import FORMAT, Model
from glide_jax.weights.store import flatten, save_weights


def load_run(folder: Path) -> Model:
    """The newest averaged weights of a training run.

    Raises:
        GlideError: the run has saved nothing yet, or cannot be read.
    """
    config, state = restore_run(folder)
    if not isinstance(config, TrainConfig):
        raise GlideError(f"{folder} is a run of a noised CLIP: load it with clip=")
    return Model(
        name=str(folder),
        config=config.model,
        params=state.ema,
        schedule=config.schedule,
        diffusion_steps=config.diffusion_steps,
        prediction=config.prediction,
        defaults=run_defaults(config),
        prompts=config.sample_prompts,
    )


def run_defaults(config: TrainConfig) -> dict[str, Any]:
    """The sampling settings that a recipe recommends."""
    return {"steps": config.sample_steps, "guidance_scale": config.sample_guidance_scale}


def restore_run(folder: Path) -> tuple[RunConfig, TrainState]:
    """The recipe of a run and its newest state, as numpy arrays."""
    config = read_config(folder / "config.json")
    like = _zeros(abstract_state(config, make_objective(config)))
    with Checkpoints(folder.absolute() / "checkpoints", config.keep) as checkpoints:
        if checkpoints.latest is None:
            raise GlideError(f"{folder} has no checkpoint yet: let train.py save one first")
        return config, checkpoints.restore_state(like)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)


def seen_tokens(state: TrainState) -> np.ndarray | None:
    """`(n_vocab,)` bool: token rows that ever had a gradient; None where they were frozen.

    Adam's second moment knows.
    """
    paths = jax.tree_util.tree_leaves_with_path(state.opt_state)
    for path, leaf in paths:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("nu/text/token_embedding"):
            return np.asarray(leaf).any(axis=1)
    return None


def export(run: Path, to: Path) -> int:
    """Writes a run's averaged weights as a folder of bfloat16 safetensors, ready to ship.

    Returns:
        The number of parameters written.

    Raises:
        GlideError: the run cannot be read, or the folder not written.
    """
    config, state = restore_run(run)
    flat = flatten(state.ema)
    seen = seen_tokens(state)
    if TABLE in flat and seen is not None:
        flat = compact(flat, seen)
    flat = {
        k: v
        if np.issubdtype(np.asarray(v).dtype, np.integer)
        else np.asarray(v).astype(jnp.bfloat16)
        for k, v in flat.items()
    }
    made_by = {"format": FORMAT, "recipe": config.name, "steps": int(state.step)}
    save_weights(to, json.loads(json.dumps(made_by | _description(config))), flat)
    return sum(np.size(v) for v in flat.values())


def _description(config: RunConfig) -> dict[str, Any]:
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
