"""python -m glide_jax.evaluation --recipe configs/emoji64.py --data emoji64.npz"""

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from glide_jax.errors import one_line_errors
from glide_jax.evaluation.nearest import report
from glide_jax.pipeline import load
from glide_jax.runtime import enable_compilation_cache
from glide_jax.training.recipes import load_recipe


@dataclass(frozen=True)
class Options:
    """Draws training captions and held-out pairs, and finds the nearest training pictures."""

    recipe: Path
    """The recipe that the weights were trained with: which data it saw."""
    data: str
    """The data set, an .npz file."""
    weights: str = "emoji64"
    """A name, a folder of weights, or a run of train.py."""
    out: Path = Path("evaluation")
    """Folder for the sheets and nearest.json."""
    seed: int = 0
    """Of the choice of captions, and of the pictures."""


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, prog="python -m glide_jax.evaluation")
    with one_line_errors():
        enable_compilation_cache()
        config = load_recipe(options.recipe)
        config = replace(config, data=replace(config.data, source=options.data))
        found = report(load(options.weights), config, options.out, seed=options.seed)
        for name in ("training_captions", "held_out_pairs"):
            right, of = found[name]["right"], found[name]["of"]
            print(f"{name}: the nearest training picture is right for {right} of {of}")
        print(f"sheets in {options.out}")


if __name__ == "__main__":
    main()
