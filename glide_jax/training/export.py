"""Runs of `train.py` as models: loaded where they are, or exported to be passed on."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glide_jax.errors import GlideError
from glide_jax.training.checkpoint import Checkpoints
from glide_jax.training.config import TrainConfig, read_config
from glide_jax.training.state import TrainState, init_state, make_optimiser
from glide_jax.weights.embedding import TABLE, compact
from glide_jax.weights.registry import FORMAT, Model
from glide_jax.weights.released import abstract_params
from glide_jax.weights.store import flatten, save_weights


def load_run(folder: Path) -> Model:
    """The newest averaged weights of a training run.

    Raises:
        GlideError: the run has saved nothing yet, or cannot be read.
    """
    config, state = restore_run(folder)
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


def restore_run(folder: Path) -> tuple[TrainConfig, TrainState]:
    """The recipe of a run and its newest state, as numpy arrays."""
    config = read_config(folder / "config.json")
    optimiser = make_optimiser(config.optimiser, config.steps)
    zeros = _zeros(abstract_params(config.model))
    with Checkpoints(folder.absolute() / "checkpoints", config.keep) as checkpoints:
        if checkpoints.latest is None:
            raise GlideError(f"{folder} has no checkpoint yet: let train.py save one first")
        return config, checkpoints.restore_state(init_state(zeros, optimiser))


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)


def seen_tokens(state: TrainState) -> np.ndarray:
    """`(n_vocab,)` bool: token rows that ever had a gradient (Adam's second moment knows)."""
    moments = optax.tree.get(state.opt_state, "nu")
    return np.asarray(moments["text"]["token_embedding"]).any(axis=1)


def export(run: Path, to: Path) -> int:
    """Writes a run's averaged weights as a folder of bfloat16 safetensors, ready to ship.

    Returns:
        The number of parameters written.

    Raises:
        GlideError: the run cannot be read, or the folder not written.
    """
    config, state = restore_run(run)
    flat = flatten(state.ema)
    if TABLE in flat:
        flat = compact(flat, seen_tokens(state))
    flat = {
        k: v
        if np.issubdtype(np.asarray(v).dtype, np.integer)
        else np.asarray(v).astype(jnp.bfloat16)
        for k, v in flat.items()
    }
    description = {
        "format": FORMAT,
        "model": asdict(config.model),
        "schedule": config.schedule,
        "diffusion_steps": config.diffusion_steps,
        "prediction": config.prediction,
        "defaults": run_defaults(config),
        "prompts": config.sample_prompts,
        "recipe": config.name,
        "steps": int(state.step),
    }
    save_weights(to, json.loads(json.dumps(description)), flat)
    return sum(np.size(v) for v in flat.values())
