"""Validation and samples on all devices of this process, as JSON.

python -m tests.support.mesh_evaluation IMAGES REPORT
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glide_jax.devices import mesh, parallel
from glide_jax.models.precision import cast_trunk
from glide_jax.pipeline import runner
from glide_jax.pipeline.loading import sample_grid
from glide_jax.pipeline.pipeline import Pipeline
from glide_jax.pipeline.settings import Settings
from glide_jax.training.config import RunConfig, TrainConfig
from glide_jax.training.initial import initial_state
from glide_jax.training.objectives import make_objective
from glide_jax.training.runs import model_of
from glide_jax.training.validation import Validation
from tests.support.parallel_layouts import recipe

# Four on eight devices: the last one is repeated to fill the batch.
PROMPTS = ("red", "blue", "", "green")


def bytes_of(tree: Any) -> dict[str, int]:
    """Return the bytes of a tree, and those that the fullest device holds of it."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return {"whole": sum(x.nbytes for x in jax.tree.leaves(tree)), "device": max(held.values())}


def measured(config: RunConfig) -> dict[str, Any]:
    """Return the held-out loss on one device and on all, for weights of a state."""
    objective = make_objective(config)
    layout = parallel.make_parallel(config.parallelism, config.batch_size)
    ema = initial_state(config, objective, layout).ema
    host = jax.device_get(layout.gather(ema))
    gather, moved = layout.gather, []

    def counted(tree: Any) -> Any:
        moved.append(sum(x.nbytes for x in jax.tree.leaves(tree)))
        return gather(tree)

    layout.gather = counted  # type: ignore[method-assign]
    found = {
        "one": Validation(config, objective)(host),
        "all": Validation(config, objective, parallel=layout)(ema),
        "bytes": bytes_of(ema),
    }
    if isinstance(config, TrainConfig):
        found |= sampled(config, host, layout.for_sampling(ema))
    return found | {"moved": max(moved)}


def sampled(config: TrainConfig, host: Any, spread: Any) -> dict[str, Any]:
    """Return grids of samples of weights on the host and on all devices, and where arrays lay."""
    devices, stream = set(), runner.stream_plan

    def seen(*arguments: Any, **options: Any) -> Any:
        for done, state in stream(*arguments, **options):
            devices.add((len(state.x.sharding.device_set), state.x.is_fully_replicated))
            yield done, state

    model = model_of(config, spread)
    runner.stream_plan = seen
    grid = sample_grid(model, PROMPTS, dtype=config.dtype)
    facts: dict[str, Any] = {"grid": np.asarray(grid).tolist(), "devices": sorted(devices)}
    runner.stream_plan = stream
    pipe = Pipeline(model, "bfloat16", "all")
    settings = Settings().changed(**model.defaults)
    one = Pipeline(model_of(config, host), config.dtype, settings=settings)
    facts |= {
        "spread": bytes_of(spread),
        "network": bytes_of(pipe.network.params),
        "cast": sum(x.nbytes for x in jax.tree.leaves(cast_trunk(host, "bfloat16"))),
        "one_grid": np.asarray(one(PROMPTS, progress=False).grid()).tolist(),
    }
    return facts


def main() -> None:
    """Run the command line."""
    images, report = map(Path, sys.argv[1:])
    mesh.MIN_SHARDED = 1
    found = {}
    for name in ("pmap", "fsdp", "clip-pmap", "clip-fsdp"):
        config = recipe(name, images)
        data = replace(config.data, split="train")
        config = replace(
            config,
            data=data,
            parallelism=name.removeprefix("clip-"),
            validation_split="train",
            validation_batches=2,
            dtype="float32",
        )
        found[name] = measured(config)
    report.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
