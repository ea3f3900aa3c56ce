"""Draws pictures from text: python sample.py "a red apple"

Without a prompt it draws a few that show the model well. Each picture is saved with its prompt,
seed and settings in its PNG metadata; --seed and --first from there make it again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro

import glide_jax as glide
from glide_jax.errors import UsageError, one_line_errors
from glide_jax.pictures import Pictures, writable
from glide_jax.runtime import enable_compilation_cache


@dataclass(frozen=True)
class Options:
    """Each setting left out takes the value that suits the weights."""

    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to draw, e.g. "a red apple" "a rocket, Twitter flat style"."""
    prompts_file: Path | None = None
    """A text file with one prompt a line."""
    weights: str = "emoji64"
    """A name (emoji64 is embedded), a folder of weights, or a run of train.py."""
    upsampler: str | None = None
    """Weights of an upsampler, which enlarges each picture."""
    clip: str | None = None
    """Weights of a noised CLIP (openai/clip, or a folder), for --clip-scale."""
    init_image: Path | None = None
    """A picture to fill the hole of (weights of an inpainting model)."""
    mask: Path | None = None
    """The hole in it: white is drawn anew, black is kept."""
    num: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """Pictures of each prompt."""
    seed: int = 0
    """The same seed and settings draw the same pictures."""
    first: int = 0
    """Number of the first picture of the run, to make one of them again."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("samples")
    """Folder for the pictures; files that are there stay."""
    steps: str | None = None
    """Network evaluations (25), or a spacing of the released code (100, ddim50, fast27)."""
    sampler: str | None = None
    """dpm++2m, ddim, or ddpm (the paper's)."""
    guidance_scale: float | None = None
    """Strength of classifier-free guidance; 1 is none, higher follows the prompt more closely."""
    clip_scale: float | None = None
    """Strength of CLIP guidance; the release shows 3 with --guidance-scale 1 --sampler ddpm."""
    spacing: str | None = None
    """logsnr (even in log signal-to-noise) or uniform (even in time)."""
    eta: float | None = None
    """Noise of ddim, from 0 to 1."""
    dtype: str = "auto"
    """float32, bfloat16 or float16; auto chooses by device."""


def draw(options: Options) -> None:
    """Draws what the options ask for."""
    # -- weights, settings, prompts -----------------------------------------------------------
    writable(options.out)
    pipe = glide.load(
        options.weights, upsampler=options.upsampler, clip=options.clip, dtype=options.dtype
    )
    prompts = read_prompts(options) or pipe.model.prompts or ("",)
    for prompt in prompts:
        if cut := pipe.tokenizer.overflow(prompt):
            print(f"note: the last {cut} tokens of {prompt[:40]!r}... are beyond the model's reach")

    # -- draw -----------------------------------------------------------------------------------
    device = jax.devices()[0]
    print(f"{options.weights} on {device.device_kind}; the first run compiles, later ones do not")
    pictures = pipe(
        prompts,
        num=options.num,
        seed=options.seed,
        first=options.first,
        image=options.init_image,
        mask=options.mask,
        steps=options.steps,
        sampler=options.sampler,
        guidance_scale=options.guidance_scale,
        clip_scale=options.clip_scale,
        spacing=options.spacing,
        eta=options.eta,
    )

    # -- save -----------------------------------------------------------------------------------
    report(pictures, pictures.save(options.out))


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


def report(pictures: Pictures, files: list[Path]) -> None:
    """Says where the pictures are."""
    for path, prompt in zip(files, pictures.prompts, strict=False):
        print(f"{path}  {prompt}")
    if len(files) > len(pictures):
        print(f"{files[-1]}  all of them")


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    with one_line_errors("stopped; nothing was written"):
        enable_compilation_cache()
        draw(options)


if __name__ == "__main__":
    main()
