"""The rows of glide-jax for `benchmarks.gpu_minutes`, which starts this module as a process.

Networks have the released sizes and random weights. They run as a pipeline makes them: nothing
here chooses kernels, layouts or flags.
"""

import json
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_minutes import Result, Row, say, serve, timed
from benchmarks.speed_parts import TOY_STEPS, config_of, random_params, training_step
from glide_jax.devices.hardware import peak_flops
from glide_jax.devices.placement import Placement
from glide_jax.diffusion.guidance import branches_of
from glide_jax.diffusion.sampling import run_rows, start
from glide_jax.models.presets import ModelConfig
from glide_jax.models.unet import GLIDE
from glide_jax.pipeline.images import package_version, to_uint8
from glide_jax.pipeline.pipeline import Pipeline
from glide_jax.pipeline.prompts import read_prompts
from glide_jax.pipeline.runner import image_keys, start_noise
from glide_jax.pipeline.settings import Settings
from glide_jax.training.flops import count_flops, flops_per_image
from glide_jax.weights import abstract_params
from glide_jax.weights.registry import Model
from glide_jax.weights.released_files import released_defaults, schedule_of

PROMPT = "a corgi wearing a red bowtie"
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

TASK = json.loads(sys.argv[1]) if __name__ == "__main__" else {"size": "toy", "out": "."}
# Programs whose text is not written yet, by name.
unwritten: dict[str, Any] = {}


@cache
def weights_of(name: str) -> dict[str, Any]:
    """Return the random weights of base or upsampler, on the host."""
    return random_params(config_of(name, TASK["size"]))


@cache
def pipeline(name: str, dtype: str) -> Pipeline:
    """Return the pipeline of base or upsampler, with the settings of OpenAI's notebook."""
    config = config_of(name, TASK["size"])
    defaults = released_defaults(config)
    if TASK["size"] == "toy" and name == "base":
        defaults["steps"] = TOY_STEPS
    model = Model(f"random {name}", config, weights_of(name), schedule_of(config))
    return Pipeline(model, dtype, settings=Settings().changed(**defaults))


def program(row: Row, function: Any, *arguments: Any, flops: Callable[[], float]) -> tuple[Any, Result]:
    """Compile a jitted function for the arguments of a row.

    Args:
        flops: counts the operations of a call; it runs beside the compiler.

    Returns:
        The compiled program, and what is known of it before it runs.
    """
    say(stage="tracing")
    began = time.perf_counter()
    lowered = function.lower(*arguments)
    traced = time.perf_counter()
    say(stage="compiling")
    with ThreadPoolExecutor(1) as pool:
        counted = pool.submit(flops)
        compiled = lowered.compile()
        compile_s = time.perf_counter() - traced
    say(stage="running")
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    unwritten[f"{row.kind}_{row.model}_{row.dtype}_{row.batch}"] = compiled
    return compiled, {
        "trace_s": round(traced - began, 2),
        "compile_s": round(compile_s, 2),
        "bytes": cost.get("bytes accessed"),
        "temporary_bytes": memory and memory.temp_size_in_bytes,
        "argument_bytes": memory and memory.argument_size_in_bytes,
        "flops": None if counted.exception() else counted.result(),
    }


def write_programs(row: Row) -> None:
    """Add the text of the compiled programs to `programs.zip`."""
    del row
    while unwritten:
        name, compiled = unwritten.popitem()
        with zipfile.ZipFile(Path(TASK["out"]) / "programs.zip", "a", zipfile.ZIP_DEFLATED) as file:
            if f"{name}.hlo.txt" not in file.namelist():
                file.writestr(f"{name}.hlo.txt", compiled.as_text())


@cache
def forward_flops(name: str) -> float:
    """Return the operations of a forward pass of one image: of the plain float32 network."""
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
    x, t = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32), jax.ShapeDtypeStruct((1,), "int32")
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


def forward(row: Row) -> Result:
    """Measure a forward pass, text features precomputed."""
    network, config = pipeline(row.model, row.dtype).network, config_of(row.model, TASK["size"])
    text = pipeline(row.model, row.dtype).text_features([PROMPT] * row.batch)
    cond = {"text": text} | jax.device_put(conditioning(config, row.batch))
    side = config.image_size
    x = jax.random.normal(jax.random.key(0), (row.batch, side, side, 3))
    arguments = network.params, x, jnp.full(row.batch, 500), cond
    run = jax.jit(lambda params, x, t, cond: network.fn(params, x, t, cond))
    compiled, found = program(
        row, run, *arguments, flops=lambda: row.batch * forward_flops(row.model)
    )
    return found | timed(lambda: compiled(*arguments), jax.block_until_ready)


def sampler_arguments(row: Row) -> tuple[int, int, tuple[Any, ...]]:
    """Return the rows of a sampling run, the branches of each, and the arguments of `run_rows`."""
    stage = pipeline(row.model, row.dtype)
    config, settings, captions = stage.model.config, stage.settings, [PROMPT] * row.batch
    guidances = settings.guidances(read_prompts(captions))
    plan = settings.plan(stage.schedule, guidances)
    plan = replace(plan, table=Placement().replicate(plan.table))
    inputs = jax.device_put(conditioning(config, row.batch))
    branches, conds = branches_of(guidances), {}
    for branch in branches:
        text = stage.text_features([""] * row.batch if branch.prompt == "" else captions)
        conds[branch.name] = {"text": text} | inputs
    keys = image_keys(0, np.arange(row.batch))
    x = settings.temperature * start_noise(keys[:, 0], config.image_size)
    arguments = {"main": stage.network}, conds, plan, start(plan, x), keys[:, 1]
    return len(plan), len(branches), arguments


def step(row: Row) -> Result:
    """Measure a step of the notebook's sampler inside its compiled loop."""
    length, branches, arguments = sampler_arguments(row)
    compiled, found = program(
        row,
        run_rows,
        *arguments,
        flops=lambda: branches * row.batch * forward_flops(row.model),
    )
    times = timed(lambda: compiled(*arguments), jax.block_until_ready, queued=1, parts=length)
    return found | times | {"branches": branches, "steps": length}


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
    return from_text(row, QUICK_UPSAMPLER, **(QUICK | toy)) | {"note": "25 steps, 10 upsampler steps"}


def numerics(row: Row) -> Result:
    """Compare the images of a sampling run with those of float32, from the same noise."""
    images = {}
    for dtype, precision in (("float32", "highest"), (row.dtype, None)):
        here = replace(row, dtype=dtype)
        with jax.default_matmul_precision(precision):
            _, _, arguments = sampler_arguments(here)
            compiled, _ = program(here, run_rows, *arguments, flops=lambda: 0.0)
        images[dtype] = to_uint8(compiled(*arguments).x).astype(int)
    difference = np.abs(images["float32"] - images[row.dtype])
    largest, mean = int(difference.max()), float(difference.mean())
    above = float((difference > 2).mean())
    note = f"largest difference {largest} of 255, mean {mean:.3f}, {100 * above:.3g}% above 2"
    return {"largest": largest, "mean": mean, "above_2": above, "note": note}


def training(row: Row) -> Result:
    """Measure a training step of the recipe of base or upsampler, its batch on the device."""
    config, step, arguments = training_step(row.model, row.dtype, row.batch, TASK["size"])
    compiled, found = program(
        row,
        step,
        *arguments,
        flops=lambda: row.batch * flops_per_image(replace(config, dtype="float32")),
    )
    state, rest = arguments[0], arguments[1:]

    def once() -> Any:
        nonlocal state
        state, metrics = compiled(state, *rest)
        return metrics

    return found | timed(once, jax.block_until_ready)


KINDS: dict[str, Callable[[Row], Result]] = {
    "forward": forward,
    "step": step,
    "procedure": procedure,
    "quick": quick,
    "numerics": numerics,
    "training": training,
}


def measure(row: Row) -> Result:
    """Measure a row of any kind."""
    device = jax.devices()[0]
    found = KINDS[row.kind](row)
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
    # A process that goes on after a crash compiles nothing again; the next run compiles everything.
    jax.config.update("jax_compilation_cache_dir", f"{TASK['cache']}/xla")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    serve(measure, write_programs)


if __name__ == "__main__":
    main()
