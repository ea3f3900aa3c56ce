"""Run tiny trainings over all devices of this process and its peers, and report as JSON.

    python -m tests.support.parallel_layouts IMAGES RUNS REPORT JOB ... [--coordinator ...]

Jobs, one after the other:
    RUN:PARALLELISM:STEPS        train `RUNS/RUN` to this step, from its newest checkpoint if it has
                                 one; a CLIP if the name begins with "clip", pairs of LoRA if
                                 with "lora"; "hybrid4": copies on four devices each
    RUN:PARALLELISM:STEPS:stop   the same, with SIGTERM to the last process after three steps
    copy:RUN:NEW                 copy a run
    damage:RUN                   truncate the largest file of a run's newest checkpoint
    facts                        `sharding_facts`

The report has the losses of each training job by step, and the facts.
"""

import json
import math
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

from glide_jax.devices import fsdp, mesh, parallel, processes
from glide_jax.devices.runtime import enable_compilation_cache
from glide_jax.models.presets import CLIPConfig
from glide_jax.training.checkpoint import steps_in
from glide_jax.training.checksums import checksums
from glide_jax.training.command_line import take_process_options
from glide_jax.training.config import CLIPTrainConfig, OptimiserConfig, RunConfig
from glide_jax.training.logger import Logger
from glide_jax.training.lora_config import LoRAConfig
from glide_jax.training.objectives import Batch
from glide_jax.training.optimiser import make_optimiser
from glide_jax.training.recipes import load_recipe
from glide_jax.training.state import new_state
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


def recipe(name: str, images: Path) -> RunConfig:
    """Return a tiny recipe: GLIDE with dropout, trained whole or by LoRA, or a CLIP."""
    if name.startswith("clip"):
        config = CLIPTrainConfig(
            name="clip", model=CLIP, batch_size=8, optimiser=OptimiserConfig(learning_rate=1e-3)
        )
    else:
        config = load_recipe(RECIPE)
    if name.startswith("lora"):
        config = replace(config, lora=LoRAConfig(rank=2))
    data = replace(config.data, source=str(images))
    return replace(config, data=data, save_every=5, sample_every=0)


def losses(config: RunConfig, *, stop: bool = False) -> dict[int, float]:
    """Train, and return the loss of each step."""
    found, logged = {}, Logger.steps

    def steps(self, number, count, metrics, *more):
        found[number] = float(metrics["loss"])
        if stop and number == 3 and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        logged(self, number, count, metrics, *more)

    Logger.steps = steps
    try:
        train(config)
    finally:
        Logger.steps = logged
    return found


class Toy(nn.Module):
    """Three matrices; the largest is sharded over eight devices."""

    @nn.compact
    def __call__(self, x):
        for width in (512, 1024, 3):
            x = jnp.tanh(nn.Dense(width)(x))
        return x


def toy_loss(params, batch, key, *, train=False, axis=None):
    """Return a loss whose gradient reaches all parameters."""
    x = batch.image.reshape(len(batch.image), -1).astype(jnp.float32) / 255
    value = ((Toy().apply({"params": params}, x) - 1) ** 2).mean()
    return value, {"loss": value}


def sharding_facts() -> dict[str, Any]:
    """Return what both kinds of parallelism do with a state on these devices."""
    config = OptimiserConfig()
    optimiser = make_optimiser(config, 10)
    # 40 rows: no size of a parameter.
    image = np.arange(40 * 192, dtype=np.uint32).astype(np.uint8).reshape(40, 8, 8, 3)
    batch = Batch(image, np.zeros((40, 2), np.int32), np.ones((40, 2), bool), np.arange(40))

    def make(key):
        params = Toy().init(key, jnp.zeros((1, 192)))["params"]
        return new_state(params, optimiser, config)

    facts, key = {}, jax.random.key(0)
    for kind, accumulate in (("pmap", 1), ("fsdp", 1), ("fsdp", 5), ("hybrid4", 1)):
        step = partial(
            train_step, loss=toy_loss, optimiser=optimiser, config=config, accumulate=accumulate
        )
        layout = parallel.make_parallel(*split_kind(kind, len(image) // accumulate))
        compiled_step: Any = layout.compile(step)
        state, rows = layout.initialise(make, key), layout.put_batch(batch)
        fact: dict[str, Any] = {
            "whole": sum(x.nbytes for x in jax.tree.leaves(layout.gather(state))),
            "device": sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(state)),
            "checksums": checksums(layout.for_checkpoint(state)),
            "host": checksums(jax.device_get(layout.gather(state))),
        }
        if kind != "pmap":
            compiled = compiled_step.lower(state, rows, key).compile()
            moved = re.findall(
                r"= \(?(\w+\[[\d,]*\]).* (all-\w+|collective-\w+)\(.*replica_groups=(.*)",
                compiled.as_text(),
            )
            made = fsdp.fsdp_make(make, (key,), mesh.device_mesh(jax.devices()))
            memory = made.lower(key).compile().memory_analysis()
            fact |= {
                "moved": [(kind, shape) for shape, kind, _ in moved],
                "groups": [(kind, replica_groups(groups)) for _, kind, groups in moved],
                "made": memory.output_size_in_bytes + memory.temp_size_in_bytes,
                "temporary": compiled.memory_analysis().temp_size_in_bytes,
                "kernel": list(state.params["Dense_1"]["kernel"].addressable_data(0).shape),
            }
        after, metrics = compiled_step(state, rows, key)
        fact["loss"] = float(layout.gather(metrics)["loss"])
        leaves = jax.tree.leaves(state)
        reused = sum(x.nbytes for x in leaves if x.is_deleted())
        fact["reused"] = reused / sum(x.nbytes for x in leaves)
        back = layout.put_state(jax.device_get(layout.gather(after)))
        fact["placed"] = all(
            jax.tree.leaves(jax.tree.map(lambda x, y: x.sharding == y.sharding, after, back))
        )
        facts[f"{kind}:{accumulate}"] = fact
    return facts


def replica_groups(text: str) -> list[list[int]]:
    """Return the groups of devices of a collective, from any of the three notations of HLO.

    They are `{{0,1},{2,3}}`, `[2,2]<=[4]`, and `mesh['a'=2,'b'=2] {'b'}`; the devices of the last
    two are in ascending order, or in that of `[2,2]T(1,0)`: reshaped and transposed.
    """

    def ordered(shape: str, axes: str | None) -> np.ndarray:
        grid = np.arange(jax.device_count()).reshape(*map(int, shape.split(",")))
        return grid.transpose(*map(int, axes.split(","))) if axes else grid

    order = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if found := re.match(rf"mesh\[(.*?)\](?:, device_ids=\({order}\))? {{(.*?)}}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        inner = re.findall(r"'(\w+)'", found[4])
        axes = [[*sizes].index(name) for name in (*(set(sizes) - set(inner)), *inner)]
        devices = ordered(found[2] or str(jax.device_count()), found[3])
        devices = devices.reshape(*sizes.values()).transpose(*axes)
        groups = devices.reshape(-1, math.prod(sizes[name] for name in inner)).tolist()
    elif found := re.match(rf"\[\d+,(\d+)\]<={order}", text):
        groups = ordered(found[2], found[3]).reshape(-1, int(found[1])).tolist()
    else:
        written = re.findall(r"{([\d,]+)}", text.partition("}}")[0] + "}")
        groups = [list(map(int, group.split(","))) for group in written]
    return sorted(map(sorted, groups))


def split_kind(kind: str, batch_size: int) -> tuple[str, int, int]:
    """Return the arguments of `make_parallel` for a kind such as "fsdp" or "hybrid4"."""
    name = kind.rstrip("0123456789")
    return name, batch_size, int(kind[len(name) :] or 0)


def damage(run: Path) -> None:
    """Truncate the largest file of a run's newest checkpoint."""
    newest = run / "checkpoints" / str(steps_in(run / "checkpoints")[0])
    largest = max(newest.rglob("*"), key=lambda path: path.is_file() * path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def main() -> None:
    """Run the command line."""
    (images, runs, report, *jobs), membership = take_process_options(sys.argv[1:])
    if membership:
        processes.join(membership)
    enable_compilation_cache()
    found: dict[str, Any] = {}
    for job in jobs:
        name, *words = job.split(":")
        if name == "copy":
            processes.on_first_process(
                partial(shutil.copytree, *(Path(runs) / word for word in words))
            )
        elif name == "damage":
            processes.on_first_process(partial(damage, Path(runs) / words[0]))
        elif name == "facts":
            found[job] = sharding_facts()
        else:
            kind, steps, *stop = words
            config = replace(recipe(name, Path(images)), out=str(Path(runs) / name))
            kind, _, per_copy = split_kind(kind, 0)
            config = replace(config, parallelism=kind, devices_per_copy=per_copy, steps=int(steps))
            found[job] = losses(config, stop=bool(stop))
    if jax.process_index() == 0:
        Path(report).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
