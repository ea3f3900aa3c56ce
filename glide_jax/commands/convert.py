"""`glide-jax weights`: converts, exports and averages weights."""

from pathlib import Path
from typing import Annotated

import tyro

from glide_jax.errors import UsageError, one_line_errors
from glide_jax.pipeline.clip_guide import CLIP, load_clip
from glide_jax.weights.clip_registry import RELEASED, clip_from_files, save_clip
from glide_jax.training.export import export
from glide_jax.training.post_hoc_ema import write_average
from glide_jax.weights.registry import load_model
from glide_jax.weights.registry import Model, save_model, save_torch
from glide_jax.weights.released_clip import clip_to_released
from glide_jax.weights.released_files import clip_side
from glide_jax.weights.store import CONFIG, MODEL, load_weights
from glide_jax.weights.torch_file import read_torch_file
from glide_jax.weights.torch_writer import write_torch_file

ENDINGS = (".pt", ".pth")
Paths = Annotated[
    tuple[str, ...],
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="FROM... TO...",
        help_behavior_hint="",
        help="From: a .pt file (of a noised CLIP: both), a name (openai/base, openai/clip, "
        "emoji64), a folder of weights, or a run of train.py. To: a name that ends in .pt (of a "
        "noised CLIP: two, for image and text), or else a folder, for config.json and "
        "model.safetensors. Nothing is replaced.",
    ),
]


def export_run(run: tyro.conf.Positional[Path], to: tyro.conf.Positional[Path]) -> None:
    """Writes the averaged weights of a training run as bfloat16 safetensors.

    Args:
        run: folder of a run of train.py.
        to: folder to write config.json and model.safetensors into.
    """
    _refuse_to_replace(to)
    count = export(run, to)
    print(f"{count:,} parameters, {_megabytes(to / MODEL)}: {to}")


def average(
    run: tyro.conf.Positional[Path], *, width: float, out: Path, step: int | None = None
) -> None:
    """Makes the average of any width of a run that kept power-function averages.

    Args:
        run: folder of a run of train.py with --optimiser.ema-power.
        width: of the average, as a share of the training; between those that were kept, or near.
        out: folder to write config.json and model.safetensors into.
        step: up to which to average; left out: the last at which averages were saved.
    """
    _refuse_to_replace(out)
    left = write_average(run, out, width, step)
    print(f"an average of width {width}, {left:.1%} from its profile: {out}")


def convert(paths: Paths) -> None:
    """Writes weights in another form: a .pt file as a folder, a folder as a .pt file.

    For example:
      convert base.pt base                             a released file, for this project
      convert clip_image_enc.pt clip_text_enc.pt clip  the same; a noised CLIP is two files
      convert runs/mine mine.pt                        what was trained here, for the original code
      convert clip image.pt text.pt                    the same of a noised CLIP
    """
    sources, targets = _split(paths)
    for target in targets:
        _refuse_to_replace(target)
    for file in _write(_read(sources), targets):
        print(f"{_megabytes(file)}: {file}")


def _is_torch(path: str | Path) -> bool:
    return str(path).endswith(ENDINGS)


def _split(paths: tuple[str, ...]) -> tuple[list[str], list[Path]]:
    """A noised CLIP is two files wherever it is .pt; all else is one path to another."""
    reads = 2 if len(paths) == 3 and _is_torch(paths[0]) and _is_torch(paths[1]) else 1
    targets = paths[reads:]
    if len(targets) != 1 and (len(targets) != 2 or not all(map(_is_torch, targets))):
        raise UsageError("say what to read, then what to write: convert base.pt FOLDER")
    return list(paths[:reads]), [Path(path).expanduser() for path in targets]


def _refuse_to_replace(to: Path) -> None:
    taken = [to] if to.is_file() else [to / name for name in (CONFIG, MODEL)]
    for path in taken:
        if path.exists():
            raise UsageError(f"{path} exists: remove it, or write elsewhere")


def _read(sources: list[str]) -> Model | CLIP:
    if len(sources) == 2:
        files = [Path(source).expanduser() for source in sources]
        by_side = {clip_side(read_torch_file(file)): file for file in files}
        if set(by_side) != {"image", "text"}:
            raise UsageError("two files are read as a noised CLIP: give its image and text encoder")
        return clip_from_files(by_side["image"], by_side["text"])
    (source,) = sources
    if source == RELEASED or _holds_clip(Path(source).expanduser()):
        return load_clip(source)
    return load_model(source)


def _holds_clip(folder: Path) -> bool:
    return (folder / MODEL).is_file() and "clip" in load_weights(folder)[0]


def _write(model: Model | CLIP, targets: list[Path]) -> list[Path]:
    """Writes a model, and returns the files that hold its arrays."""
    is_clip = isinstance(model, CLIP)
    if not _is_torch(targets[0]):
        (save_clip if is_clip else save_model)(model, targets[0])
        return [targets[0] / MODEL]
    if len(targets) != 1 + is_clip:
        what = "two files, of image and text" if is_clip else "one file"
        raise UsageError(f"{model.name} is {what}, not {len(targets)}: say where to write")
    if is_clip:
        for target, state_dict in zip(targets, clip_to_released(model.params), strict=True):
            write_torch_file(target, state_dict)
    else:
        save_torch(model, targets[0])
    return targets


def _megabytes(file: Path) -> str:
    return f"{file.stat().st_size / 1e6:.1f} MB"


def main() -> None:
    """The command line."""
    with one_line_errors():
        tyro.extras.subcommand_cli_from_dict(
            {"convert": convert, "ema": average, "export": export_run},
            prog="python -m glide_jax.weights",
            description=__doc__,
        )


if __name__ == "__main__":
    main()
