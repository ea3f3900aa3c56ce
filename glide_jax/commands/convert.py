"""Convert weights, make a post-hoc EMA, export a run or its LoRA, push to the Hub."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from glide_jax.commands.push import push
from glide_jax.devices.runtime import find_devices
from glide_jax.errors import UsageError, one_line_errors
from glide_jax.folders import expand_home, expand_words
from glide_jax.training.config import CLIPTrainConfig, read_config
from glide_jax.training.runs import is_run, open_clip, open_model
from glide_jax.weights.choosing import SAFETENSORS, read_released, split_choice
from glide_jax.weights.clip_registry import RELEASED, CLIPModel, clip_from_files, save_clip
from glide_jax.weights.hub import local
from glide_jax.weights.hub_names import on_hub
from glide_jax.weights.lora import save_lora
from glide_jax.weights.registry import EMBEDDED_CLIPS, Model, save_model, save_torch
from glide_jax.weights.released_clip import clip_to_released
from glide_jax.weights.released_files import clip_side
from glide_jax.weights.store import CONFIG, MODEL, load_weights
from glide_jax.weights.torch_writer import write_torch_file

ENDINGS = (".pt", ".pth")
READABLE = (*ENDINGS, ".ckpt", SAFETENSORS)
Paths = Annotated[
    tuple[str, ...],
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="FROM... TO...",
        help_behavior_hint="",
        help="FROM: a .pt, .ckpt or .safetensors file with OpenAI's parameter names (for a noised "
        "CLIP both files; FILE:MODEL for one of several models in a file), a name (openai/base, "
        "openai/clip, emoji64, hf://user/name), a folder of weights, or a run of train.py. "
        "TO: a name that ends in .pt (for a noised CLIP two, for image and text), or else a "
        "folder, which gets config.json and model.safetensors. Existing files are never replaced.",
    ),
]
Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
To = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TO")]


def export_run(run: Run, to: To) -> None:
    """Write the EMA weights of a training run as bfloat16 safetensors.

    Args:
        run: Folder of a run of train.py.
        to: Folder for config.json and model.safetensors; created if needed.
    """
    # Orbax takes most of a second to import.
    from glide_jax.training.export import export

    _refuse_to_replace(to)
    count = export(run, to)
    print(f"{count:,} parameters, {_megabytes(to / MODEL)}: {to}")


def lora(run: Run, to: To) -> None:
    """Write the LoRA of a training run as one small safetensors file.

    To sample with it: glide-jax sample --lora FILE.

    Args:
        run: Folder of a run of train.py with --lora.rank.
        to: The file; its name ends in .safetensors.
    """
    from glide_jax.training.runs import open_lora

    if to.suffix != SAFETENSORS:
        raise UsageError(f"{to} must end in {SAFETENSORS}")
    if to.exists():
        raise UsageError(f"{to} exists: remove it, or write elsewhere")
    adapter = open_lora(run)
    save_lora(to, adapter)
    count = sum(a.size + b.size for a, b in adapter.pairs.values())
    print(f"{count:,} parameters in {len(adapter.pairs)} pairs, {_megabytes(to)}: {to}")


def ema(
    run: Run,
    *,
    width: float,
    out: Path,
    step: Annotated[int | None, tyro.conf.arg(help_behavior_hint="")] = None,
) -> None:
    """Make a post-hoc EMA of any width, from a run that saved power-function EMAs.

    The width should lie between the saved widths, or close to them. Larger averages over more
    steps.

    Args:
        run: Folder of a run of train.py with --optimiser.ema-widths.
        width: Width of the EMA, as a share of the training: above 0 and below 0.28.
        out: Folder for config.json and model.safetensors; created if needed.
        step: Last training step of the EMA. Default: the last step at which EMAs were saved.
    """
    from glide_jax.training.post_hoc_ema import write_ema

    _refuse_to_replace(out)
    left = write_ema(run, out, width, step)
    print(f"EMA of width {width}, {left:.1%} from the exact profile: {out}")


def convert(paths: Paths) -> None:
    """Convert weights: a .pt file to a folder, or a folder, a name or a run to a .pt file.

    For example:
      convert base.pt base           OpenAI's base, for glide-jax
      convert image.pt text.pt clip  OpenAI's noised CLIP
      convert runs/mine mine.pt      your model, for OpenAI's code
      convert clip image.pt text.pt  your noised CLIP
    """
    sources, targets = _split(paths)
    for target in targets:
        _refuse_to_replace(target)
    for file in _write(_read(sources), targets):
        print(f"{_megabytes(file)}: {file}")


def _is_torch(path: str | Path) -> bool:
    return str(path).endswith(ENDINGS)


def _is_readable(path: str) -> bool:
    return split_choice(path)[0].suffix in READABLE


def _split(paths: tuple[str, ...]) -> tuple[list[str], list[Path]]:
    """Split the paths into sources and targets; a noised CLIP has two as .pt files."""
    reads = 2 if len(paths) in (3, 4) and all(map(_is_readable, paths[:2])) else 1
    targets = paths[reads:]
    if len(targets) != 1 and (len(targets) != 2 or not all(map(_is_torch, targets))):
        raise UsageError("name what to read, then what to write: convert base.pt FOLDER")
    if wrong := [path for path in targets if on_hub(path)]:
        raise UsageError(f"to upload, use glide-jax weights push FOLDER {wrong[0]}")
    if wrong := [path for path in targets if path.endswith((".ckpt", SAFETENSORS))]:
        raise UsageError(
            f"{wrong[0]} is the name of a file: name a folder, which gets {CONFIG} and {MODEL}, or "
            "a .pt file"
        )
    return list(paths[:reads]), [expand_home(path) for path in targets]


def _refuse_to_replace(to: Path) -> None:
    files = [to] if to.is_file() else [to / name for name in (CONFIG, MODEL)]
    for path in files:
        if path.exists():
            raise UsageError(f"{path} exists: remove it, or write elsewhere")


def _read(sources: list[str]) -> Model | CLIPModel:
    sources = [str(local(source)) for source in sources]
    if len(sources) == 2:
        by_side = {clip_side(read_released(source)): source for source in sources}
        if set(by_side) != {"image", "text"}:
            raise UsageError("two files are a noised CLIP: give its image and its text encoder")
        return clip_from_files(by_side["image"], by_side["text"])
    (source,) = sources
    if source in (RELEASED, *EMBEDDED_CLIPS) or _holds_clip(expand_home(source)):
        return open_clip(source)
    return open_model(source)


def _holds_clip(folder: Path) -> bool:
    if is_run(folder):
        return isinstance(read_config(folder / CONFIG), CLIPTrainConfig)
    return (folder / MODEL).is_file() and "clip" in load_weights(folder)[0]


def _write(model: Model | CLIPModel, targets: list[Path]) -> list[Path]:
    """Write a model and return the files that contain its arrays."""
    if not _is_torch(targets[0]):
        if isinstance(model, CLIPModel):
            save_clip(model, targets[0])
        else:
            save_model(model, targets[0])
        return [targets[0] / MODEL]
    is_clip = isinstance(model, CLIPModel)
    if len(targets) != 1 + is_clip:
        what = "two files, for image and text" if is_clip else "one file"
        raise UsageError(f"{model.name} is written to {what}, not {len(targets)}: name as many")
    if isinstance(model, CLIPModel):
        for target, state_dict in zip(targets, clip_to_released(model.params), strict=True):
            write_torch_file(target, state_dict)
    else:
        save_torch(model, targets[0])
    return targets


def _megabytes(file: Path) -> str:
    return f"{file.stat().st_size / 1e6:.1f} MB"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; on an error print one line and exit with code 1 or 2."""
    with one_line_errors():
        find_devices()
        tyro.extras.subcommand_cli_from_dict(
            {
                "convert": convert,
                "ema": ema,
                "export": export_run,
                "lora": lora,
                "push": push,
            },
            prog="glide-jax weights",
            description=__doc__,
            args=expand_words(sys.argv[1:] if arguments is None else arguments),
            config=(tyro.conf.DisallowNone,),
        )


if __name__ == "__main__":
    main()
