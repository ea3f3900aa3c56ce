"""The first losses of tiny recipes over all devices of this process and its peers, as JSON.

    python -m tests.layouts PICTURES OUT RECIPE:SPREAD ... [--coordinator ...]

writes `OUT/losses.json`; the runs are `OUT/RECIPE-SPREAD`.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax

from glide_jax import parallel
from glide_jax.models.presets import CLIPConfig
from glide_jax.runtime import enable_compilation_cache
from glide_jax.training.command_line import take_peers
from glide_jax.training.config import CLIPTrainConfig, OptimiserConfig, RunConfig
from glide_jax.training.metrics import Logger
from glide_jax.training.recipes import load_recipe
from tests.commands import RECIPE
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


def recipe(name: str, pictures: Path, out: Path) -> RunConfig:
    """A recipe without dropout, whose draws belong to devices."""
    if name == "clip":
        config = CLIPTrainConfig(
            name="clip", model=CLIP, batch_size=8, optimiser=OptimiserConfig(learning_rate=1e-3)
        )
    else:
        config = load_recipe(RECIPE)
        config = replace(config, model=replace(config.model, dropout=0.0))
    data = replace(config.data, source=str(pictures))
    return replace(config, data=data, steps=10, save_every=5, sample_every=0, out=str(out))


def losses(config: RunConfig) -> list[float]:
    """The loss of each step of a run."""
    found, logged = [], Logger.step

    def step(self, number, metrics, *more):
        found.append(float(metrics["loss"]))
        logged(self, number, metrics, *more)

    Logger.step = step
    try:
        train(config)
    finally:
        Logger.step = logged
    return found


def main() -> None:
    """The command line."""
    (pictures, out, *jobs), peers = take_peers(sys.argv[1:])
    if peers:
        parallel.join(peers)
    enable_compilation_cache()
    found = {}
    for job in jobs:
        name, _, spread = job.partition(":")
        config = recipe(name, Path(pictures), Path(out) / f"{name}-{spread}")
        found[job] = losses(replace(config, spread=spread))
    if jax.process_index() == 0:
        (Path(out) / "losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
