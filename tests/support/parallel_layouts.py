"""Tiny runs over all devices of this process and its peers; what they did, as JSON.

    python -m tests.support.parallel_layouts PICTURES RUNS REPORT JOB ... [--coordinator ...]

Jobs, one after the other:
    RUN:SPREAD:STEPS        trains `RUNS/RUN` so far, or on from its newest checkpoint; a CLIP where
                            the name begins with "clip"
    RUN:SPREAD:STEPS:stop   the same, and SIGTERM to the last process after three steps
    copy:RUN:NEW            copies a run
    damage:RUN              shortens the largest file of a run's newest checkpoint
    facts                   `sharding_facts`

The report has the losses of each training job by step, and the facts.
"""

import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.devices import parallel
from glide_jax.models.presets import CLIPConfig
from glide_jax.devices.runtime import enable_compilation_cache
from glide_jax.training.checkpoint import checksums, steps_in
from glide_jax.training.command_line import take_peers
from glide_jax.training.config import CLIPTrainConfig, OptimiserConfig, RunConfig
from glide_jax.training.logger import Logger
from glide_jax.training.objectives import Batch
from glide_jax.training.recipes import load_recipe
from glide_jax.training.state import init_state, make_optimiser
from glide_jax.training.step import train_step
from tests.support.commands import RECIPE
from train import train

CLIP = CLIPConfig(
    image_size=16,
    image_width=32,
    image_layers=1,
    text_width=32,
    text_layers=1,
    head_size=16,
    max_text_len=16,
    embed_width=16,
)


def recipe(name: str, pictures: Path) -> RunConfig:
    """A recipe without dropout, whose draws belong to devices."""
    if name.startswith("clip"):
        config = CLIPTrainConfig(
            name="clip", model=CLIP, batch_size=8, optimiser=OptimiserConfig(learning_rate=1e-3)
        )
    else:
        config = load_recipe(RECIPE)
        config = replace(config, model=replace(config.model, dropout=0.0))
    data = replace(config.data, source=str(pictures))
    return replace(config, data=data, save_every=5, sample_every=0)


def losses(config: RunConfig, *, stop: bool = False) -> dict[int, float]:
    """The loss of each step of a run."""
    found, logged = {}, Logger.step

    def step(self, number, metrics, *more):
        found[number] = float(metrics["loss"])
        if stop and number == 3 and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        logged(self, number, metrics, *more)

    Logger.step = step
    try:
        train(config)
    finally:
        Logger.step = logged
    return found


class Toy(nn.Module):
    """Three matrices, of which the largest shards over eight devices."""

    @nn.compact
    def __call__(self, x):
        for width in (512, 1024, 3):
            x = jnp.tanh(nn.Dense(width)(x))
        return x


def toy_loss(params, batch, key, *, dropout_key=None, axis=None):
    """Of any picture; its gradient reaches all parameters."""
    x = batch.image.reshape(len(batch.image), -1).astype(jnp.float32) / 255
    value = ((Toy().apply({"params": params}, x) - 1) ** 2).mean()
    return value, {"loss": value}


def sharding_facts() -> dict[str, Any]:
    """What the two spreads do with a state, on these devices."""
    config = OptimiserConfig()
    optimiser = make_optimiser(config, 10)
    # 40 rows: no size of a parameter.
    image = np.arange(40 * 192, dtype=np.uint32).astype(np.uint8).reshape(40, 8, 8, 3)
    batch = Batch(image, np.zeros((40, 2), np.int32), np.ones((40, 2), bool), np.arange(40))

    def make(key):
        params = Toy().init(key, jnp.zeros((1, 192)))["params"]
        return init_state(params, optimiser, config)

    facts, key = {}, jax.random.key(0)
    for kind, accumulate in (("pmap", 1), ("fsdp", 1), ("fsdp", 5)):
        step = partial(
            train_step, loss=toy_loss, optimiser=optimiser, averages=config, accumulate=accumulate
        )
        spread = parallel.spread(kind, step, len(image) // accumulate)
        state, rows = spread.make_state(make, key), spread.place_batch(batch)
        one = jax.tree.leaves(spread.one_copy(state))
        fact = {
            "whole": sum(x.nbytes for x in one),
            "device": sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(state)),
            "checksums": checksums(spread.saved(state)),
            "host": checksums(jax.device_get(spread.whole(state))),
        }
        if kind == "fsdp":
            compiled = spread.step.lower(state, rows, key).compile()
            moved = re.findall(
                r"= \(?(\w+\[[\d,]*\]).* (all-\w+|collective-\w+)\(", compiled.as_text()
            )
            made = parallel.fsdp_make(make, (key,), parallel.device_mesh(jax.devices()))
            memory = made.lower(key).compile().memory_analysis()
            fact |= {
                "moved": [(kind, shape) for shape, kind in moved],
                "made": memory.output_size_in_bytes + memory.temp_size_in_bytes,
                "temporary": compiled.memory_analysis().temp_size_in_bytes,
                "kernel": list(state.params["Dense_1"]["kernel"].addressable_data(0).shape),
            }
        after, metrics = spread.step(state, rows, key)
        fact["loss"] = float(spread.one_copy(metrics)["loss"])
        leaves = jax.tree.leaves(state)
        reused = sum(x.nbytes for x in leaves if x.is_deleted())
        fact["reused"] = reused / sum(x.nbytes for x in leaves)
        back = spread.place_state(jax.device_get(spread.whole(after)))
        fact["placed"] = all(
            jax.tree.leaves(jax.tree.map(lambda x, y: x.sharding == y.sharding, after, back))
        )
        facts[f"{kind}:{accumulate}"] = fact
    return facts


def damage(run: Path) -> None:
    """Shortens the largest file of a run's newest checkpoint."""
    newest = run / "checkpoints" / str(steps_in(run / "checkpoints")[0])
    largest = max(newest.rglob("*"), key=lambda path: path.is_file() * path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def main() -> None:
    """The command line."""
    (pictures, runs, report, *jobs), peers = take_peers(sys.argv[1:])
    if peers:
        parallel.join(peers)
    enable_compilation_cache()
    found: dict[str, Any] = {}
    for job in jobs:
        name, *words = job.split(":")
        if name == "copy":
            parallel.on_first(partial(shutil.copytree, *(Path(runs) / word for word in words)))
        elif name == "damage":
            parallel.on_first(partial(damage, Path(runs) / words[0]))
        elif name == "facts":
            found[job] = sharding_facts()
        else:
            spread, steps, *stop = words
            config = replace(recipe(name, Path(pictures)), out=str(Path(runs) / name))
            config = replace(config, spread=spread, steps=int(steps))
            found[job] = losses(config, stop=bool(stop))
    if jax.process_index() == 0:
        Path(report).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
