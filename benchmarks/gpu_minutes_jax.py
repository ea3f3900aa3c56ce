"""The rows of glide-jax for `benchmarks.gpu_minutes`, which starts this module as a process.

Networks have the released sizes and random weights. They run as a pipeline makes them: nothing
here chooses kernels, layouts or flags.
"""

import json
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_minutes_programs import moved_bytes, write_profile, write_program
from benchmarks.gpu_minutes_rows import Result, Row, end_with_parent, say, serve, timed
from benchmarks.speed_parts import TOY_STEPS, config_of, random_params, training_step
from glide_jax.devices.hardware import peak_flops
from glide_jax.devices.placement import Placement
from glide_jax.diffusion.guidance import branches_of
from glide_jax.diffusion.sampling import run_rows, start_state
from glide_jax.folders import package_version
from glide_jax.models.presets import ModelConfig
from glide_jax.models.unet import GLIDE
from glide_jax.pipeline.images import to_uint8
from glide_jax.pipeline.loading import load
from glide_jax.pipeline.pipeline import Pipeline
from glide_jax.pipeline.prompts import read_prompts
from glide_jax.pipeline.runner import image_keys, start_noise
from glide_jax.pipeline.settings import Settings
from glide_jax.training.flops import count_flops, flops_per_image
from glide_jax.weights import abstract_params
from glide_jax.weights.registry import Model
from glide_jax.weights.released_files import released_defaults, schedule_of

PROMPT = "a corgi wearing a red bowtie"
# Captions for the embedded models.
TRAINED = ("a red apple", "a cat", "a green tree", "a smiling face")
# Fewer network evaluations: guided at middle noise levels alone, and a short run of the upsampler.
QUICK: Any = {
    "steps": 25,
    "sampler": "dpm++2m",
    "spacing": "logsnr",
    "guidance_interval": (0.3, 5.0),
}
QUICK_UPSAMPLER: Any = {"steps": 10}
# A run of text to image is long: a few timings suffice.
PROCEDURE = {"queued": 1, "warm": 1, "seconds": 3.0}

TASK: dict[str, Any] = {"size": "toy", "out": ".", "threads": 1, "profile": False}
# Kinds whose programs may be compiled side by side; states of training are large.
SIDE_BY_SIDE = ("forward", "step")


class Program(NamedTuple):
    """A compiled program with its arguments.

    Attributes:
        call: one call.
        parts: equal parts of a call: the steps of a sampling run.
        known: what is known of it before it runs.
        text: the program as text.
    """

    call: Callable[[], Any]
    parts: int
    known: Result
    text: str


prepared: dict[Row, Future[Program]] = {}
counting = threading.Lock()
# What is done once the result of a row is out.
later: list[Callable[[], None]] = []


@cache
def weights_of(name: str) -> dict[str, Any]:
    """Return the random weights of base or upsampler, on the host."""
    return random_params(config_of(name, TASK["size"]))


@cache
def pipeline(name: str, dtype: str, head: float = 1.0) -> Pipeline:
    """Return the pipeline of base or upsampler, with the settings of OpenAI's notebook.

    Args:
        head: factor on the weights of the last layer.
    """
    config = config_of(name, TASK["size"])
    defaults = released_defaults(config)
    if TASK["size"] == "toy" and name == "base":
        defaults["steps"] = TOY_STEPS
    params = weights_of(name)
    last = jax.tree.map(lambda leaf: leaf * np.float32(head), params["unet"]["head"])
    params = params | {"unet": params["unet"] | {"head": last}}
    model = Model(f"random {name}", config, params, schedule_of(config))
    return Pipeline(model, dtype, settings=Settings().changed(**defaults))


def compiled(
    function: Any, arguments: Any, flops: Callable[[], float], loop: bool = False
) -> tuple[Any, Result, str]:
    """Compile a jitted function for its arguments.

    Args:
        flops: counts the operations; it runs beside the compiler.
        loop: whether bytes are those of a round of its loop.

    Returns:
        The compiled program, what is known of it before it runs, and its text.
    """
    say(stage="tracing")
    began = time.perf_counter()
    lowered = function.lower(*arguments)
    traced = time.perf_counter()
    say(stage="compiling")
    with ThreadPoolExecutor(1) as pool:
        counted = pool.submit(flops)
        program = lowered.compile()
        compile_s = time.perf_counter() - traced
    if error := counted.exception():
        traceback.print_exception(error)
    memory, text = program.memory_analysis(), program.as_text() or ""
    known = {
        "trace_s": round(traced - began, 2),
        "compile_s": round(compile_s, 2),
        "bytes": moved_bytes(text, loop),
        "temporary_bytes": memory and memory.temp_size_in_bytes,
        "argument_bytes": memory and memory.argument_size_in_bytes,
        "flops": None if error else counted.result(),
    }
    return program, known, text


def after(row: Row) -> None:
    """Write what is known of a row besides its result."""
    del row
    while later:
        later.pop(0)()


def forward_flops(name: str) -> float:
    """Return the operations of a forward pass of one image: of the plain float32 network."""
    with counting:
        return _forward_flops(name)


@cache
def _forward_flops(name: str) -> float:
    config = config_of(name, TASK["size"])
    module, params = GLIDE(config), abstract_params(config)
    tokens = jax.ShapeDtypeStruct((1, config.text_ctx), jnp.int32)
    text = jax.eval_shape(
        lambda p, t, m: module.apply({"params": p}, t, m, method=GLIDE.encode_text),
        params,
        tokens,
        jax.ShapeDtypeStruct(tokens.shape, bool),
    )
    side = config.image_size
    x, t = (
        jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),
        jax.ShapeDtypeStruct((1,), "int32"),
    )
    cond = {"text": text} | {
        key: jax.ShapeDtypeStruct(value.shape, value.dtype)
        for key, value in conditioning(config, 1).items()
    }
    run = jax.jit(lambda params, x, t, cond: module.apply({"params": params}, x, t, **cond))
    return count_flops(run, params, x, t, cond)


def conditioning(config: ModelConfig, batch: int) -> dict[str, np.ndarray]:
    """Return the inputs of a network besides its text: for upsamplers, small images."""
    if not config.upsamples:
        return {}
    side = config.image_size // 4
    small = np.random.default_rng(0).uniform(-1, 1, (batch, side, side, 3))
    return {"low_res": small.astype(np.float32)}


def forward(row: Row) -> Program:
    """Return a forward pass, text features precomputed."""
    network, config = pipeline(row.model, row.dtype).network, config_of(row.model, TASK["size"])
    text = pipeline(row.model, row.dtype).encode_captions([PROMPT] * row.batch)
    cond = {"text": text} | jax.device_put(conditioning(config, row.batch))
    side = config.image_size
    x = jax.random.normal(jax.random.key(0), (row.batch, side, side, 3))
    arguments = network.params, x, jnp.full(row.batch, 500), cond
    run = jax.jit(lambda params, x, t, cond: network.fn(params, x, t, cond))
    program, known, text = compiled(run, arguments, lambda: row.batch * forward_flops(row.model))
    return Program(lambda: program(*arguments), 1, known, text)


def sampler_arguments(stage: Pipeline, batch: int) -> tuple[int, int, tuple[Any, ...]]:
    """Return the rows of a sampling run, the branches of each, and the arguments of `run_rows`."""
    config, settings, captions = stage.model.config, stage.settings, [PROMPT] * batch
    guidances = settings.guidances(read_prompts(captions))
    plan = settings.plan(stage.schedule, guidances)
    plan = replace(plan, table=Placement().replicate(plan.table))
    inputs = jax.device_put(conditioning(config, batch))
    branches, conds = branches_of(guidances), {}
    for branch in branches:
        text = stage.encode_captions([""] * batch if branch.prompt == "" else captions)
        conds[branch.name] = {"text": text} | inputs
    keys = image_keys(0, np.arange(batch))
    x = settings.temperature * start_noise(keys.start, config.image_size)
    arguments = {"main": stage.network}, conds, plan, start_state(plan, x), keys.steps
    return len(plan), len(branches), arguments


def step(row: Row) -> Program:
    """Return a run of the notebook's sampler; its steps are the parts."""
    stage = pipeline(row.model, row.dtype)
    length, branches, arguments = sampler_arguments(stage, row.batch)
    program, known, text = compiled(
        run_rows, arguments, lambda: branches * row.batch * forward_flops(row.model), loop=True
    )
    known |= {"branches": branches, "steps": length}
    return Program(lambda: program(*arguments), length, known, text)


def training(row: Row) -> Program:
    """Return a training step of the recipe of base or upsampler, its batch on the device."""
    # Large batches need the memory of the pipelines.
    pipeline.cache_clear()
    config, function, (state, *rest) = training_step(row.model, row.dtype, row.batch, TASK["size"])
    program, known, text = compiled(
        function,
        (state, *rest),
        lambda: row.batch * flops_per_image(replace(config, dtype="float32")),
    )

    def once() -> Any:
        nonlocal state
        state, metrics = program(state, *rest)
        return metrics

    return Program(once, 1, known, text)


def from_text(row: Row, upsampler: Any, **settings: Any) -> Result:
    """Measure from text to 256x256 images on the host."""
    pipe = replace(pipeline("base", row.dtype), upsampler=pipeline("upsampler", row.dtype))

    def generate() -> np.ndarray:
        found = pipe(
            PROMPT,
            num=row.batch,
            batch_size=row.batch,
            progress=False,
            upsampler=upsampler,
            **settings,
        )
        return found.images

    say(stage="compiling")
    began = time.perf_counter()
    generate()
    first = time.perf_counter() - began
    say(stage="running")
    times = timed(generate, lambda images: images, **PROCEDURE)
    return {"compile_s": round(first - times["ms"] / 1000, 2)} | times


def procedure(row: Row) -> Result:
    """Measure OpenAI's notebook: 100 guided steps, and 27 of the upsampler."""
    return from_text(row, {})


def quick(row: Row) -> Result:
    """Measure the same with the settings QUICK."""
    toy = {"steps": TOY_STEPS} if TASK["size"] == "toy" else {}
    return from_text(row, QUICK_UPSAMPLER, **(QUICK | toy)) | {
        "note": "25 steps, 10 upsampler steps"
    }


def numerics(row: Row) -> Result:
    """Compare images with those of float32, from the same noise.

    The random networks predict a tenth of their usual noise: nothing in a later step corrects an
    error of theirs, as a trained network would. The trained ones are the embedded models.
    """
    images: dict[str, np.ndarray] = {}
    for dtype, precision in (("float32", "highest"), (row.dtype, None)):
        with jax.default_matmul_precision(precision):
            say(stage=f"sampling in {dtype}")
            images[dtype] = _images(replace(row, dtype=dtype))
    difference = np.abs(images["float32"].astype(int) - images[row.dtype])
    largest, mean = int(difference.max()), float(difference.mean())
    above = float((difference > 2).mean())
    note = f"largest difference {largest} of 255, mean {mean:.3f}, {100 * above:.3g}% above 2"
    return {"largest": largest, "mean": mean, "above_2": above, "note": note}


def _images(row: Row) -> np.ndarray:
    """Return images of a row's model; embedded upsamplers enlarge those of emoji64 in float32."""
    if row.model in ("base", "upsampler"):
        _, _, arguments = sampler_arguments(pipeline(row.model, row.dtype, head=0.1), row.batch)
        return to_uint8(run_rows(*arguments).x)
    alone: Any = {"upsampler": "none", "clip_model": "none"}
    small = None
    if row.model != "emoji64":
        with jax.default_matmul_precision("highest"):
            small = load("emoji64", dtype="float32", **alone)(TRAINED, progress=False)
    pipe = load(row.model, dtype=row.dtype, **alone)
    return pipe(TRAINED, low_res=small, progress=False).images


PROGRAMS: dict[str, Callable[[Row], Program]] = {
    "forward": forward,
    "step": step,
    "training": training,
}
OTHERS: dict[str, Callable[[Row], Result]] = {
    "procedure": procedure,
    "quick": quick,
    "numerics": numerics,
}


def prepare(first: Row) -> None:
    """Compile the programs of a row and of those that follow it side by side."""
    rows = [Row(**fields) for fields in TASK["rows"]]
    several = list(takewhile(lambda row: row.kind in SIDE_BY_SIDE, rows[rows.index(first) :]))
    for row in several:
        # Made once, rather than by each thread.
        pipeline(row.model, row.dtype).encode_captions([PROMPT])
    with ThreadPoolExecutor(TASK["threads"]) as pool:
        prepared.update({row: pool.submit(PROGRAMS[row.kind], row) for row in several})


def run(row: Row) -> Result:
    """Time the program of a row."""
    if TASK["threads"] > 1 and row not in prepared:
        prepare(row)
    program = prepared.pop(row).result() if row in prepared else PROGRAMS[row.kind](row)
    say(stage="running")
    # A sampling run is one long call.
    once = {"queued": 1} if program.parts > 1 else {}
    times = timed(program.call, jax.block_until_ready, parts=program.parts, **once)
    folder, name = Path(TASK["out"]), f"{row.kind}_{row.model}_{row.dtype}_{row.batch}"
    later.append(partial(write_program, folder, name, program.text))
    if TASK["profile"]:
        later.append(partial(write_profile, folder, name, program.call))
    return program.known | times


def measure(row: Row) -> Result:
    """Measure a row of any kind."""
    device = jax.devices()[0]
    found = run(row) if row.kind in PROGRAMS else OTHERS[row.kind](row)
    used = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return found | {
        "device": device.device_kind,
        "peak": peak_flops(device.device_kind),
        # The process's, so far.
        "peak_bytes": used,
        "machine": f"{device.device_kind}; glide-jax {package_version()}, jax {jax.__version__}",
    }


def main() -> None:
    """Measure the rows of the command line."""
    end_with_parent()
    TASK.update(json.loads(sys.argv[1]))
    # A process that goes on after a crash compiles nothing again; the next run compiles everything.
    jax.config.update("jax_compilation_cache_dir", f"{TASK['cache']}/xla")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    serve(TASK["rows"], measure, after)


if __name__ == "__main__":
    main()
