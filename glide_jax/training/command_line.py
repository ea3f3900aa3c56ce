"""`--config recipe.py --any.field value`: a recipe from a file, changed on the command line."""

from collections.abc import Sequence

import tyro

from glide_jax.errors import UsageError
from glide_jax.devices.processes import Peers
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


def take_peers(arguments: Sequence[str]) -> tuple[list[str], Peers | None]:
    """The arguments without those that say how processes find each other, and what they say.

    Raises:
        UsageError: these are incomplete, or no numbers where numbers belong.
    """
    arguments = list(arguments)
    coordinator = _take(arguments, "--coordinator")
    numbers = [_take(arguments, option) for option in ("--processes", "--process")]
    if coordinator is None and numbers == [None, None]:
        return arguments, None
    if coordinator == "auto" and numbers == [None, None]:
        return arguments, Peers(coordinator)
    host, _, port = (coordinator or "").rpartition(":")
    try:
        count, index = (int(number or "") for number in numbers)
    except ValueError:
        count, index = 0, 0
    if not (host and port.isdigit() and 0 <= index < count):
        raise UsageError(
            "processes find each other by --coordinator HOST:PORT --processes N --process I with "
            "I from 0 to N - 1, or by --coordinator auto"
        )
    return arguments, Peers(coordinator, count, index)


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
