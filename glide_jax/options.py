"""The options of `sample.py`, by group; each left out takes the value that suits the weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, get_type_hints

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from glide_jax.errors import UsageError
from glide_jax.settings import Settings
from glide_jax.weights.registry import EMBEDDED


@dataclass(frozen=True)
class Weights:
    """What draws, and where."""

    weights: str | None = None
    """A name, a folder of weights, or a run of train.py; left out, embedded ones are taken:
    emoji64, or with --mask emoji_inpaint64 where it is shipped."""
    upsampler: str | None = None
    """Weights of an upsampler, which enlarges each picture, or none; left out, the one that belongs
    to the weights, where it is shipped."""
    upsampler_steps: str | None = None
    """Its --steps."""
    upsampler_sampler: str | None = None
    """Its --sampler."""
    clip: str | None = None
    """Weights of a noised CLIP (openai/clip, or a folder), or none, for --clip-scale; left out, the
    one that belongs to the weights, where it is shipped."""
    guide: str | None = None
    """Weights of a worse model of the same kind, for --autoguidance-scale."""
    dtype: str = "auto"
    """float32, bfloat16 or float16; auto chooses by device."""
    devices: str = "1"
    """Over how many devices to spread each batch, or all; it changes no picture."""
    batch_size: int | None = None
    """How many to draw at a time (64x64 on a CPU: 16); it changes no picture."""


@dataclass(frozen=True)
class Editing:
    """Changing pictures."""

    init_image: Path | None = None
    """The picture to change: with --mask, --strength or --variation."""
    mask: Path | None = None
    """The hole in it: white is drawn anew, black is kept."""
    variation: float | None = None
    """Draw pictures near it: from 0, itself as the prompt has it, to 1, any other."""
    init_caption: str | None = None
    """What it shows, for --variation, where the prompt says something else."""
    between: bool = False
    """Draw --num pictures from one prompt to another, or from --seed to --to-seed."""
    to_seed: int | None = None
    """Where --between ends."""


def _each_or_none(settings: type) -> type:
    """The fields of the settings as options, None where the weights are to decide."""
    hints = get_type_hints(settings)
    options = []
    for f in fields(settings):
        if f.name != "guidance":
            default = arg(help_behavior_hint=f"(default: {f.default})" if f.default else "")
            options.append((f.name, Annotated[hints[f.name] | None, default], None))
    first, rest = settings.__doc__.split("\n", 1)
    about = f"{first.rstrip('.')}; weights may bring defaults of their own.\n{rest}"
    return make_dataclass("Sampling", options, namespace={"__doc__": about}, frozen=True)


Sampling = _each_or_none(Settings)


@dataclass(frozen=True)
class Options:
    """What to draw."""

    prompts: Positional[tuple[str, ...]] = ()
    """What to draw, e.g. "a red apple" "a rocket, Twitter flat style"."""
    prompts_file: Path | None = None
    """A text file with one prompt a line."""
    num: Annotated[int, arg(aliases=["-n"])] = 1
    """Pictures of each prompt."""
    seed: int = 0
    """The same seed and settings draw the same pictures."""
    first: int = 0
    """Number of the first picture of the run, to make one of them again."""
    out: Annotated[Path, arg(aliases=["-o"])] = Path("samples")
    """Folder for the pictures; files that are there stay."""
    preview: bool = False
    """Show in preview.png, in that folder, what is becoming of them."""
    editing: OmitArgPrefixes[Editing] = Editing()
    model: OmitArgPrefixes[Weights] = Weights()
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=Sampling)


def read_options(description: str, arguments: Sequence[str] | None = None) -> Options:
    """The options of a command line, this process's unless others are given."""
    plain = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(Options, description=description, args=arguments, config=plain)


def chosen_weights(options: Options) -> str:
    """The weights that were named, or the embedded ones for what is to be done."""
    if options.model.weights is not None:
        return options.model.weights
    learned = "emoji_inpaint64" in EMBEDDED and options.editing.mask is not None
    return "emoji_inpaint64" if learned else "emoji64"


def refuse(options: Options) -> None:
    """Options that do not go together, or have no effect."""
    e, varies = options.editing, options.editing.variation is not None
    for wrong, says in (
        (varies and e.init_image is None, "--variation is of a picture: give --init-image"),
        (varies and e.mask is not None, "--variation changes all of a picture: it has no --mask"),
        (e.init_caption is not None and not varies, "--init-caption is for --variation"),
        (e.to_seed is not None and not e.between, "--to-seed is for --between"),
        (e.between and e.init_image is not None, "--between draws anew: it has no --init-image"),
    ):
        if wrong:
            raise UsageError(says)


def read_prompts(options: Options) -> tuple[str, ...]:
    """The prompts of the command line, then those of the file."""
    if options.prompts_file is None:
        return options.prompts
    try:
        lines = options.prompts_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the prompts in {options.prompts_file}: {error}") from None
    lines = tuple(line.strip() for line in lines if line.strip())
    if not lines and not options.prompts:
        raise UsageError(f"{options.prompts_file} holds no prompt")
    return options.prompts + lines
