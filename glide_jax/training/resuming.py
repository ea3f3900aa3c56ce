"""Notes of a resumed run on changes of its recipe."""

import sys

import jax
import numpy as np

from glide_jax.training.config import RunConfig, read_config
from glide_jax.training.optimiser import decay_factor, learning_rate


def print_changes(config: RunConfig, step: int, seconds: float = 0.0) -> None:
    """Print one line on stderr for each change that matters, in the first process.

    Args:
        config: the recipe as it is now; the folder still has the one before.
        step: the steps that are done.
        seconds: the training time so far, for a run with a time limit.
    """
    path = config.folder / "config.json"
    if jax.process_index() == 0 and path.exists():
        for note in changes(read_config(path), config, step, seconds):
            print(f"note: {note}", file=sys.stderr)


def changes(before: RunConfig, config: RunConfig, step: int, seconds: float = 0.0) -> list[str]:
    """Return one note for each change that affects a run resumed after `step` steps."""
    notes = []
    if config.steps < step:
        notes.append(
            f"step {step:,} is done and --steps is {config.steps:,}: there is nothing to train"
        )
    if before.seed != config.seed:
        notes.append(
            f"the seed is {config.seed}, it was {before.seed}: the order of the data and the noise "
            f"are others from step {step:,} on"
        )
    if config.starts_from != before.starts_from:
        notes.append(
            f"the run resumes from step {step:,}: --init-from {_name(config.starts_from)} has no "
            f"effect (it began with {_name(before.starts_from)}); to start anew, choose another "
            "--out"
        )
    if config.steps > step and (note := _rate_note(before, config, step, seconds)):
        notes.append(note)
    return notes


def _name(weights: str) -> str:
    return weights or "random weights"


def _rate_note(before: RunConfig, config: RunConfig, step: int, seconds: float) -> str:
    """Return what becomes of the learning rate; "" if it goes on as it was planned."""
    # A longer run may have the same rate now, and another one later.
    ahead = np.arange(step, max(step + 1, min(before.steps, config.steps)))
    now, then = (_rates(recipe, ahead, seconds) for recipe in (config, before))
    different = np.flatnonzero(np.abs(now - then) > 1e-3 * np.abs(then))
    if not len(different):
        return ""
    i = int(different[0])
    return (
        f"the learning rate of step {ahead[i] + 1:,} is {now[i]:.3g}, it was planned as "
        f"{then[i]:.3g} ({_plan(config)}, before {_plan(before)})"
    )


def _rates(config: RunConfig, steps: np.ndarray, seconds: float) -> np.ndarray:
    schedule = learning_rate(config.optimiser, config.steps, bool(config.minutes))
    rates = np.broadcast_to(np.asarray(schedule(steps)), steps.shape)
    if config.minutes and config.optimiser.lr_decay == "wsd":
        done = seconds / (60 * config.minutes)
        rates = rates * float(decay_factor(done, config.optimiser.lr_decay_share))
    return rates


def _plan(config: RunConfig) -> str:
    o = config.optimiser
    over = f"{config.minutes:g} minutes" if config.minutes else f"{config.steps:,} steps"
    warmup = f", warm-up {o.warmup:,}" if o.warmup else ""
    return f"{o.lr_decay} {o.learning_rate:g} over {over}{warmup}"
