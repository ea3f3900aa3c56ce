"""Runs of `train.py` as weights to pass on."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.folders import expand_home
from glide_jax.training.checksums import name_of
from glide_jax.training.config import CLIPTrainConfig, RunConfig, TrainConfig
from glide_jax.training.runs import is_average, is_run, network_params, restore_run, run_defaults
from glide_jax.training.state import TrainState
from glide_jax.weights.registry import ASSETS, EMBEDDED, EMBEDDED_CLIPS, FORMAT
from glide_jax.weights.store import flatten, load_weights, save_weights
from glide_jax.weights.token_rows import ROWS, TABLE, compact


def _exported(path: str) -> bool:
    """Whether an array is the EMA, the step, or the moment that `seen_tokens` reads."""
    return is_average(path) or path.endswith(f"nu/{TABLE}")


def seen_tokens(config: RunConfig, state: TrainState) -> np.ndarray | None:
    """Return the token rows that training has seen, in this run or in the weights it started from.

    Adam's second moment is zero for rows that never had a gradient.

    Returns:
        `(n_vocab,)` bool; None if any row may matter: the run started from weights with a whole
        table, or the table was frozen.
    """
    seen = None
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        if name_of(path).endswith(f"nu/{TABLE}"):
            seen = np.atleast_1d(np.asarray(leaf).any(axis=1))
    if not config.starts_from:
        return seen
    before = _seen_before(config.starts_from, config.model.n_vocab)
    return before if before is None or seen is None else seen | before


def _seen_before(weights: str, n_vocab: int) -> np.ndarray | None:
    """`seen_tokens` of the weights that a run started from."""
    embedded = weights in (*EMBEDDED, *EMBEDDED_CLIPS)
    folder = ASSETS / weights if embedded else expand_home(weights)
    if is_run(folder):
        return seen_tokens(*restore_run(folder, _exported))
    if not folder.is_dir():
        return None
    _, flat, _ = load_weights(folder)
    if ROWS not in flat:
        return None
    seen = np.zeros(n_vocab, bool)
    seen[flat[ROWS]] = True
    return seen


def export(run: Path, to: Path) -> int:
    """Write the EMA weights of a run as a folder of bfloat16 safetensors.

    Token rows that training never saw are left out where that is known.

    Returns:
        The number of parameters written.

    Raises:
        GlideError: the run cannot be read, or the folder not written.
    """
    config, state = restore_run(run, _exported)
    flat = flatten(network_params(config, state, expand_home(run)))
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
    """Return the `config.json` of weights that a run made, as plain JSON values."""
    made_by = {"format": FORMAT, "recipe": config.name, "steps": step}
    return json.loads(json.dumps(made_by | _sizes(config)))


def _sizes(config: RunConfig) -> dict[str, Any]:
    if isinstance(config, CLIPTrainConfig):
        return {"clip": asdict(config.model)}
    assert isinstance(config, TrainConfig)
    return {
        "model": asdict(config.model),
        "noise_schedule": config.noise_schedule,
        "diffusion_steps": config.diffusion_steps,
        "prediction_type": config.prediction_type,
        "defaults": run_defaults(config),
        "prompts": config.sample_prompts,
    }
