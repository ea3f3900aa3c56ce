"""The released sizes on this machine: python -m benchmarks.full_size base64 --folder FOLDER

A `.pt` file of random weights of full size is made, converted to a folder, loaded, and run for one
step of one picture (classifier-free guidance in the base models). Each part is a process of its
own, whose peak memory is what the kernel counted (mapped pages of files included).
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclass(frozen=True)
class Options:
    """Measures one released size; needs disk for two copies of it."""

    preset: tyro.conf.Positional[Literal["base64", "inpaint64", "upsample256", "inpaint256"]]
    """Which."""
    folder: Path
    """Where the files go; they stay, and are made only where they are missing."""
    file_dtype: Literal["float32", "float16"] = "float32"
    """Of the .pt file."""
    part: Annotated[Literal["all", "make", "step"], tyro.conf.arg(help_behavior_hint="")] = "all"
    """all, or one of the processes: make, step."""


def make(options: Options) -> None:
    """Writes the `.pt` file: normal weights of variance 1 / inputs, so that nothing explodes."""
    import numpy as np

    from glide_jax.models.presets import PRESETS
    from glide_jax.weights import abstract_params, write_torch_file
    from glide_jax.weights.released import released_shapes

    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        scale = np.float32(np.prod(shape[1:], dtype=np.float32) ** -0.5)
        return (scale * rng.standard_normal(shape, np.float32)).astype(options.file_dtype)

    shapes = released_shapes(abstract_params(PRESETS[options.preset]()))
    write_torch_file(released_file(options), {name: draw(s) for name, s in shapes.items()})


def step(options: Options) -> None:
    """Loads the folder and draws one picture in one step, twice: the first time compiles."""
    import numpy as np

    import glide_jax as glide

    def part(what: str, work: Callable[[], Any]) -> Any:
        begun, processor = time.perf_counter(), time.process_time()
        result = work()
        show(what, time.perf_counter() - begun, time.process_time() - processor)
        return result

    pipe = part("load", lambda: glide.load(converted(options)))
    small = np.full((64, 64, 3), 128, np.uint8)
    given = {"low_res": small} if pipe.model.config.upsamples else {}
    draw = partial(pipe, "a corgi", steps=1, progress=False, **given)
    part("first step, with compilation", draw)
    assert part("step", draw).images.std() > 0


def released_file(options: Options) -> Path:
    """The `.pt` file."""
    return options.folder / f"{options.preset}-{options.file_dtype}.pt"


def converted(options: Options) -> Path:
    """The folder that it is converted to."""
    return released_file(options).with_suffix("")


def show(what: str, seconds: float, processor: float, peak: int | None = None) -> None:
    """One row of the table."""
    memory = "" if peak is None else f"{peak / 1e9:.2f} GB"
    print(f"| {what} | {seconds:.0f} s | {processor:.0f} s | {memory} |", flush=True)


def measured(what: str, *arguments: object) -> None:
    """Runs a process and shows its time and its peak memory."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{what} failed")
    processor = usage.ru_utime + usage.ru_stime
    show(what, time.perf_counter() - begun, processor, usage.ru_maxrss * 1024)


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, prog="python -m benchmarks.full_size")
    if options.part != "all":
        {"make": make, "step": step}[options.part](options)
        return
    again = [options.preset, "--folder", options.folder, "--file-dtype", options.file_dtype]
    again = ["-m", "benchmarks.full_size", *again, "--part"]
    if not released_file(options).exists():
        measured("make the file", *again, "make")
    file = released_file(options)
    print(f"{file.name}: {file.stat().st_size / 1e9:.2f} GB\n")
    print("| | time | processor time | peak memory |\n|---|---:|---:|---:|", flush=True)
    if not converted(options).exists():
        measured("convert", "-m", "glide_jax.weights", "convert", file, converted(options))
    measured("load and run, in all", *again, "step")


if __name__ == "__main__":
    main()
