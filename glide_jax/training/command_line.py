"""The command line of training: `--config recipe --any.field value`."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from glide_jax.devices.processes import Membership
from glide_jax.errors import UsageError
from glide_jax.folders import expand_words
from glide_jax.training.config import RunConfig
from glide_jax.training.recipes import load_recipe
from glide_jax.training.unused_fields import check_no_unused_fields, without_leftovers
from glide_jax.weights.registry import NONE


@dataclass(frozen=True)
class StartOptions:
    """How to start.

    Attributes:
        config: The recipe: its name in configs/ (cfg64), or the path of your own (my/recipe.py). A
            size may follow a colon (cfg64:paper).
        dry_run: Train nothing. Print an estimate of the memory and the time of a training step on
            this hardware: a TPU slice such as v5e:4x4, or cpu for this machine.
        coordinator: How several processes find each other. HOST:PORT is the address of process 0,
            and needs --num-processes and --process-id. auto: jax finds the other processes by
            itself. none: this process trains alone. Default: as the cluster says (TPU slices,
            Slurm, Open MPI, Kubernetes), otherwise alone.
        num_processes: Number of processes, at least 1, with --coordinator HOST:PORT.
        process_id: Index of this process, from 0, with --coordinator HOST:PORT.
    """

    config: Annotated[str, tyro.conf.arg(metavar="RECIPE", help_behavior_hint="")] = ""
    dry_run: Annotated[str, tyro.conf.arg(metavar="HARDWARE", help_behavior_hint="")] = ""
    coordinator: Annotated[str, tyro.conf.arg(metavar="ADDRESS", help_behavior_hint="")] = ""
    num_processes: Annotated[str, tyro.conf.arg(metavar="N", help_behavior_hint="")] = ""
    process_id: Annotated[str, tyro.conf.arg(metavar="I", help_behavior_hint="")] = ""


def parse_recipe(arguments: Sequence[str], description: str) -> tuple[RunConfig, str | None]:
    """Return the recipe that `--config` names, with the other arguments set, and `--dry-run`.

    Unknown fields and values of the wrong type end the program with exit code 2 and a message that
    names the nearest field. `--help` lists every field with the recipe's own values.

    Args:
        arguments: of the command line, without the program.
        description: text at the top of `--help`.

    Raises:
        UsageError: no recipe is named, or there is none of that name; or an option that starts the
            training is given twice.
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
    with _options_in_the_help(recipe):
        chosen: Any = tyro.cli(
            _options(recipe),
            prog=f"{program} --config {name}",
            description=description,
            args=arguments,
            registry=_registry(),
        )
    if again := [option for option, value in vars(chosen.start).items() if value]:
        raise UsageError(f"--{again[0].replace('_', '-')} is given twice")
    config = without_leftovers(chosen.recipe, recipe)
    check_no_unused_fields(config)
    return config, hardware


def _options(recipe: RunConfig) -> type:
    """Return the options of the command line: how to start, and the fields of the recipe."""
    unprefixed = tyro.conf.arg(name="")
    return make_dataclass(
        "Options",
        [
            # The caller has taken their values already: here they are for the help.
            ("start", Annotated[StartOptions, unprefixed], field(default=StartOptions())),
            ("recipe", Annotated[type(recipe), unprefixed], field(default=recipe)),
        ],
        frozen=True,
    )


@contextmanager
def _options_in_the_help(recipe: RunConfig) -> Iterator[None]:
    """Let the docstrings of a recipe, which the help shows, name options in place of fields.

    `ema_widths` of the optimiser becomes `--optimiser.ema-widths`, and None becomes none.
    """
    parts = {name: part for name, part in vars(recipe).items() if is_dataclass(part)}
    options = {
        f.name: f"--{f.name}.*" if f.name in parts else f"--{f.name}" for f in fields(recipe)
    }
    own = {
        name: {f.name: f"--{name}.{f.name}" for f in fields(part)} for name, part in parts.items()
    }
    options |= {f"{name}.{field}": own[name][field] for name in own for field in own[name]}
    named = {type(part): options | own[name] for name, part in parts.items()}
    named |= dict.fromkeys(type(recipe).__mro__[:-1], options)
    texts = {kind: kind.__doc__ or "" for kind in named}
    try:
        for kind, names in named.items():
            kind.__doc__ = _with_options(texts[kind], names)
        yield
    finally:
        for kind, text in texts.items():
            kind.__doc__ = text


def _with_options(text: str, names: Mapping[str, str]) -> str:
    def option(word: re.Match[str]) -> str:
        return f"`{names[word[1]].replace('_', '-')}`" if word[1] in names else word[0]

    return re.sub(r"\bNone\b", NONE, re.sub(r"`([a-z0-9_.]+)`", option, text))


def _registry() -> ConstructorRegistry:
    """Return how numbers that can be off are read and shown: `none`, as in `glide-jax sample`."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def number_or_none(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[float | None] | None:
        if info.type != float | None:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=f"FLOAT|{{{NONE}}}",
            instance_from_str=lambda words: None if words[0].lower() == NONE else float(words[0]),
            is_instance=lambda value: value is None or isinstance(value, float | int),
            str_from_instance=lambda value: [NONE if value is None else str(value)],
        )

    return registry


def called_as() -> str:
    """Return the command of this process: `python train.py`, or `glide-jax train`."""
    program = Path(sys.argv[0]).name
    return f"python {program}" if program.endswith(".py") else program


def take_process_options(arguments: Sequence[str]) -> tuple[list[str], Membership | None]:
    """Split off the options by which processes find each other.

    Returns:
        The other arguments; and the place of this process, None if no option names it.

    Raises:
        UsageError: the options are incomplete, or not numbers where numbers belong.
    """
    arguments = list(arguments)
    coordinator = _take(arguments, "--coordinator")
    numbers = [_take(arguments, option) for option in ("--num-processes", "--process-id")]
    if coordinator is None and numbers == [None, None]:
        return arguments, None
    if coordinator in ("auto", "none") and numbers == [None, None]:
        return arguments, Membership(coordinator)
    coordinator = coordinator or ""
    host, _, port = coordinator.rpartition(":")
    try:
        count, index = (int(number or "") for number in numbers)
    except ValueError:
        count, index = 0, 0
    if not (host and port.isdigit() and 0 <= index < count):
        raise UsageError(
            "processes find each other by --coordinator HOST:PORT --num-processes N --process-id I "
            "with I from 0 to N - 1, or by --coordinator auto; "
            "--coordinator none is a process alone"
        )
    return arguments, Membership(coordinator, count, index)


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
