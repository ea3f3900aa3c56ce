"""Time and memory of models of full size: python -m benchmarks.full_size base64 --folder FOLDER

A `.pt` file of random weights of the size of OpenAI's model is written, converted to a folder,
loaded, and run for one step of one image (with classifier-free guidance in the base models). Each
stage runs in its own process. Its peak memory is the count of the kernel, which includes mapped
pages of files.
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
    """Measure a model of one size; the disk needs space for two copies of it."""

    preset: tyro.conf.Positional[Literal["base64", "inpaint64", "upsample256", "inpaint256"]]
    """The model whose size is measured."""
    folder: Path
    """Folder for the files. They are kept, and existing files are used again."""
    file_dtype: Literal["float32", "float16"] = "float32"
    """Dtype of the .pt file; float16 halves its size."""
    stage: Annotated[Literal["all", "make", "step"], tyro.conf.arg(help_behavior_hint="")] = "all"
    """Run all stages, each in its own process, or one of them in this process."""


def make(options: Options) -> None:
    """Write the `.pt` file: normal weights of variance 1 / inputs keep the activations finite."""
    import numpy as np

    from glide_jax.models.presets import PRESETS
    from glide_jax.weights import abstract_params, write_torch_file
    from glide_jax.weights.released import released_shapes

    rng = np.random.default_rng(0)

    def sample(shape: tuple[int, ...]) -> np.ndarray:
        scale = np.float32(np.prod(shape[1:], dtype=np.float32) ** -0.5)
        return (scale * rng.standard_normal(shape, np.float32)).astype(options.file_dtype)

    shapes = released_shapes(abstract_params(PRESETS[options.preset]()))
    write_torch_file(released_file(options), {name: sample(s) for name, s in shapes.items()})


def step(options: Options) -> None:
    """Load the folder and generate one image in one step, twice: the first time compiles."""
    import numpy as np

    import glide_jax as glide

    def timed(what: str, work: Callable[[], Any]) -> Any:
        begun, processor = time.perf_counter(), time.process_time()
        result = work()
        show(what, time.perf_counter() - begun, time.process_time() - processor)
        return result

    pipe = timed("load", lambda: glide.load(converted(options)))
    low_res = np.full((64, 64, 3), 128, np.uint8) if pipe.model.config.upsamples else None
    generate = partial(pipe, "a corgi", steps=1, progress=False, low_res=low_res)
    timed("first step, with compilation", generate)
    assert timed("step", generate).images.std() > 0


def released_file(options: Options) -> Path:
    """Return the path of the `.pt` file."""
    return options.folder / f"{options.preset}-{options.file_dtype}.pt"


def converted(options: Options) -> Path:
    """Return the folder to which the `.pt` file is converted."""
    return released_file(options).with_suffix("")


def show(what: str, seconds: float, processor: float, peak: int | None = None) -> None:
    """Print one row of the table."""
    memory = "" if peak is None else f"{peak / 1e9:.2f} GB"
    print(f"| {what} | {seconds:.0f} s | {processor:.0f} s | {memory} |", flush=True)


def measured(what: str, *arguments: object) -> None:
    """Run a process, and print its time and its peak memory."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{what} failed")
    processor = usage.ru_utime + usage.ru_stime
    show(what, time.perf_counter() - begun, processor, usage.ru_maxrss * 1024)


def main() -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, prog="python -m benchmarks.full_size")
    if options.stage != "all":
        {"make": make, "step": step}[options.stage](options)
        return
    again = [options.preset, "--folder", options.folder, "--file-dtype", options.file_dtype]
    again = ["-m", "benchmarks.full_size", *again, "--stage"]
    if not released_file(options).exists():
        measured("make the file", *again, "make")
    file = released_file(options)
    print(f"{file.name}: {file.stat().st_size / 1e9:.2f} GB\n")
    print("| | time | processor time | peak memory |\n|---|---:|---:|---:|", flush=True)
    if not converted(options).exists():
        measured("convert", "-m", "glide_jax", "weights", "convert", file, converted(options))
    measured("load and run, in total", *again, "step")


if __name__ == "__main__":
    main()
