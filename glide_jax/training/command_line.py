"""The command line of training: `--config recipe --any.field value`."""

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from glide_jax.devices.processes import Peers
from glide_jax.errors import UsageError
from glide_jax.folders import expand_words
from glide_jax.training.config import RunConfig
from glide_jax.training.recipes import load_recipe


def parse_recipe(arguments: Sequence[str], description: str) -> tuple[RunConfig, str | None]:
    """Return the recipe that `--config` names, with the other arguments set, and `--dry-run`.

    Unknown fields and values of the wrong type end the program with exit code 2 and a message that
    names the nearest field. `--help` lists every field with the recipe's own values.

    Args:
        arguments: of the command line, without the program.
        description: text at the top of `--help`.

    Raises:
        UsageError: no recipe is named, or there is none of that name.
    """
    arguments, program = expand_words(arguments), called_as()
    name = _take(arguments, "--config")
    hardware = _take(arguments, "--dry-run")
    if name is None:
        if "-h" in arguments or "--help" in arguments:
            print(f"usage: {program} --config RECIPE [OPTIONS]\n\n{description.strip()}")
            raise SystemExit(0)
        raise UsageError(f"name a recipe: {program} --config emoji64")
    recipe = load_recipe(name)
    config = tyro.cli(
        type(recipe),
        prog=f"{program} --config {name}",
        description=description,
        default=recipe,
        args=arguments,
    )
    return config, hardware


def called_as() -> str:
    """Return the command of this process: `python train.py`, or `glide-jax train`."""
    program = Path(sys.argv[0]).name
    return f"python {program}" if program.endswith(".py") else program


def take_peers(arguments: Sequence[str]) -> tuple[list[str], Peers | None]:
    """Split off the options by which processes find each other.

    Returns:
        The other arguments; and the peers, None if no option names them.

    Raises:
        UsageError: the options are incomplete, or not numbers where numbers belong.
    """
    arguments = list(arguments)
    coordinator = _take(arguments, "--coordinator")
    numbers = [_take(arguments, option) for option in ("--processes", "--process")]
    if coordinator is None and numbers == [None, None]:
        return arguments, None
    if coordinator in ("auto", "none") and numbers == [None, None]:
        return arguments, Peers(coordinator)
    coordinator = coordinator or ""
    host, _, port = coordinator.rpartition(":")
    try:
        count, index = (int(number or "") for number in numbers)
    except ValueError:
        count, index = 0, 0
    if not (host and port.isdigit() and 0 <= index < count):
        raise UsageError(
            "processes find each other by --coordinator HOST:PORT --processes N --process I with "
            "I from 0 to N - 1, or by --coordinator auto; --coordinator none is a process alone"
        )
    return arguments, Peers(coordinator, count, index)


def _take(arguments: list[str], option: str) -> str | None:
    """Remove `--option value` or `--option=value` from the arguments, and return the value."""
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            value = arguments[i + 1]
            del arguments[i : i + 2]
            return value
        if argument.startswith(f"{option}="):
            del arguments[i]
            return argument.removeprefix(f"{option}=")
    return None
