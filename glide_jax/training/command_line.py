"""`--config recipe.py --any.field value`: a recipe from a file, changed on the command line."""

from collections.abc import Sequence

import tyro

from glide_jax.errors import UsageError
from glide_jax.training.config import TrainConfig, load_recipe


def parse_recipe(arguments: Sequence[str], description: str) -> TrainConfig:
    """The recipe named by `--config`, with the other arguments set on it.

    Unknown fields and values of the wrong type end the program with exit code 2 and a
    message that names the nearest field.

    Raises:
        UsageError: no recipe is named, or there is none of that name.
    """
    arguments = list(arguments)
    path = _take_config(arguments)
    if path is None:
        if "-h" in arguments or "--help" in arguments:
            print(description.strip())
            raise SystemExit(0)
        raise UsageError("name a recipe: python train.py --config configs/emoji64.py")
    return tyro.cli(
        TrainConfig,
        prog=f"train.py --config {path}",
        description=description,
        default=load_recipe(path),
        args=arguments,
    )


def _take_config(arguments: list[str]) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            path = arguments[i + 1]
            del arguments[i : i + 2]
            return path
        if argument.startswith("--config="):
            del arguments[i]
            return argument.removeprefix("--config=")
    return None
