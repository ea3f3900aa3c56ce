"""`--config recipe.py --any.field value`: a recipe from a file, changed on the command line."""

from collections.abc import Sequence

import tyro

from glide_jax.errors import UsageError
from glide_jax.training.config import RunConfig
from glide_jax.training.recipes import load_recipe


def parse_recipe(arguments: Sequence[str], description: str) -> tuple[RunConfig, str | None]:
    """The recipe named by `--config`, with the other arguments set on it; and `--dry-run`'s value.

    Unknown fields and values of the wrong type end the program with exit code 2 and a
    message that names the nearest field.

    Raises:
        UsageError: no recipe is named, or there is none of that name.
    """
    arguments = list(arguments)
    path = _take(arguments, "--config")
    hardware = _take(arguments, "--dry-run")
    if path is None:
        if "-h" in arguments or "--help" in arguments:
            print(description.strip())
            raise SystemExit(0)
        raise UsageError("name a recipe: python train.py --config configs/emoji64.py")
    recipe = load_recipe(path)
    config = tyro.cli(
        type(recipe),
        prog=f"train.py --config {path}",
        description=description,
        default=recipe,
        args=arguments,
    )
    return config, hardware


def _take(arguments: list[str], option: str) -> str | None:
    """Takes `--option value` or `--option=value` out of the arguments."""
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            value = arguments[i + 1]
            del arguments[i : i + 2]
            return value
        if argument.startswith(f"{option}="):
            del arguments[i]
            return argument.removeprefix(f"{option}=")
    return None
