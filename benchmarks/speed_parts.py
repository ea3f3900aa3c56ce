"""The measurements of glide-jax for `benchmarks.speed`, each in its own process."""

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.devices.hardware import peak_flops
from glide_jax.folders import package_version
from glide_jax.models.presets import ModelConfig, base64, upsample256
from glide_jax.pipeline.pipeline import Pipeline
from glide_jax.pipeline.settings import Settings
from glide_jax.pipeline.stage import Stage, encode_text
from glide_jax.training.config import RunConfig
from glide_jax.training.flops import count_flops, flops_per_image
from glide_jax.training.objectives import Batch, make_objective
from glide_jax.training.recipes import load_recipe
from glide_jax.training.state import recipe_state
from glide_jax.training.step import make_step
from glide_jax.weights import abstract_params
from glide_jax.weights.registry import Model
from glide_jax.weights.released_files import released_defaults, schedule_of

RECIPES = {"base": "configs/text64.py", "upsampler": "configs/upsample256.py"}
TOY_STEPS = 10
# Calls in a row before one waits for the device, on accelerators.
QUEUED = 10


def toy(config: ModelConfig) -> ModelConfig:
    """Return a small network of the same variant: 16x16 pixels, or 64x64 for an upsampler."""
    small = {
        "model_channels": 32,
        "num_res_blocks": 1,
        "num_head_channels": 32,
        "text_ctx": 32,
        "xf_width": 64,
        "xf_layers": 2,
        "xf_heads": 2,
    }
    if config.upsamples:
        shape = {"image_size": 64, "channel_mult": (1, 1, 2, 2), "attention_ds": (8,)}
    else:
        shape = {"image_size": 16, "channel_mult": (1, 2), "attention_ds": (2,)}
    return replace(config, **small, **shape)


def config_of(model: str, size: str) -> ModelConfig:
    """Return the config of "base" or "upsampler", of the size "released" or "toy"."""
    config = {"base": base64, "upsampler": upsample256}[model]()
    return toy(config) if size == "toy" else config


def random_params(config: ModelConfig) -> dict[str, Any]:
    """Return normal weights of variance 1 / inputs, and norms with a scale of 1.

    Zeros would be no fair test: GPUs multiply them at a higher clock.
    """
    numbers = np.random.default_rng(0).standard_normal(2**20 + 7, np.float32)

    def sample(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if len(leaf.shape) < 2:
            value = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
            return np.full(leaf.shape, value, np.float32)
        return np.resize(numbers, leaf.shape) * np.float32(np.prod(leaf.shape[:-1]) ** -0.5)

    return jax.tree_util.tree_map_with_path(sample, abstract_params(config))


def measure(
    *, code: str, kind: str, model: str, dtype: str, batch: int, size: str, repeats: int
) -> dict[str, Any]:
    """Make one measurement; the arguments are those of `benchmarks.speed.Measurement`."""
    del code
    # Without a cache, so that the compiler runs and its time is measured.
    jax.config.update("jax_enable_compilation_cache", False)
    found = {
        "forward": partial(forward, model=model),
        "procedure": procedure,
        "training": partial(training, model=model),
    }[kind](dtype=dtype, batch=batch, size=size, repeats=repeats)
    flops, device = found.pop("flops", None), jax.devices()[0]
    # Multiplications and additions of a call, divided by its time.
    rate = flops and flops * 1000 / found["ms"]
    peak = peak_flops(device.device_kind)
    versions = f"glide-jax {package_version()}, jax {jax.__version__}"
    return (
        found
        | peak_memory()
        | {
            "images_s": batch * 1000 / found["ms"],
            "tflops": rate and rate / 1e12,
            "utilisation": rate / peak if rate and peak else None,
            "machine": f"{device.device_kind}; {versions}",
        }
    )


def forward(*, model: str, dtype: str, batch: int, size: str, repeats: int) -> dict[str, Any]:
    """Measure a forward pass of the UNet, with precomputed text features as in sampling."""
    config = config_of(model, size)
    # Weights in the dtype and layout of a pipeline's.
    network = Stage(Model(f"random {model}", config, random_params(config)), dtype).network
    module, params = network.fn.module, network.params
    side, rng = config.image_size, np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, config.n_vocab, (batch, config.text_ctx)), jnp.int32)
    inputs = {"text": encode_text(module, params, tokens, jnp.ones(tokens.shape, bool))}
    if config.upsamples:
        small = (batch, side // 4, side // 4, 3)
        inputs["low_res"] = jnp.asarray(rng.uniform(-1, 1, small), jnp.float32)
    x = jnp.asarray(rng.standard_normal((batch, side, side, 3)), jnp.float32)
    t = jnp.full(batch, 500)
    run = jax.jit(lambda params, x, t, inputs: module.apply({"params": params}, x, t, **inputs))
    arguments = params, x, t, inputs
    compiled, seconds = compiled_in(run.lower(*arguments))
    ms = medians(lambda: compiled(*arguments), repeats)
    return {"compile_s": seconds, **ms, "flops": count_flops(run, *arguments)}


def procedure(*, dtype: str, batch: int, size: str, repeats: int) -> dict[str, Any]:
    """Measure from text to 256x256 images, with both networks, as in OpenAI's notebook."""
    pipes = []
    for name in ("upsampler", "base"):
        config = config_of(name, size)
        defaults = released_defaults(config)
        if size == "toy" and name == "base":
            defaults["steps"] = TOY_STEPS
        model = Model(f"random {name}", config, random_params(config), schedule_of(config))
        pipes.append(Pipeline(model, dtype, settings=Settings().changed(**defaults)))
    pipe = replace(pipes[1], upsampler=pipes[0])

    def generate() -> np.ndarray:
        prompt = "a corgi wearing a red bowtie"
        return pipe(prompt, num=batch, batch_size=batch, progress=False, upsampler={}).images

    start = time.perf_counter()
    generate()
    first = time.perf_counter() - start
    times = medians(generate, min(repeats, 3), queued=1, warm=0)
    return {"compile_s": first - times["ms"] / 1000, **times}


def training(*, model: str, dtype: str, batch: int, size: str, repeats: int) -> dict[str, Any]:
    """Measure a training step of the recipe of base or upsampler on the first device."""
    config, step, (state, rows, key) = training_step(model, dtype, batch, size)
    compiled, seconds = compiled_in(step.lower(state, rows, key))

    def once() -> Any:
        nonlocal state
        state, metrics = compiled(state, rows, key)
        return metrics

    times = medians(once, repeats)
    return {"compile_s": seconds, **times, "flops": batch * flops_per_image(config)}


def training_step(model: str, dtype: str, batch: int, size: str) -> tuple[RunConfig, Any, Any]:
    """Return a recipe, its training step as a jitted function, and the arguments of that.

    The arguments are state, batch and key; the state is donated.
    """
    config = load_recipe(RECIPES[model])
    network = config_of(model, size)
    config = replace(config, model=network, batch_size=batch, dtype=dtype, accumulate=1)
    objective = make_objective(config)
    state = recipe_state(config, objective, jax.device_put(random_params(network)))
    rng, side = np.random.default_rng(0), network.image_size
    rows = Batch(
        image=jnp.asarray(rng.integers(0, 256, (batch, side, side, 3)), jnp.uint8),
        tokens=jnp.asarray(rng.integers(0, network.n_vocab, (batch, network.text_ctx)), jnp.int32),
        caption_mask=jnp.ones((batch, network.text_ctx), bool),
        row=jnp.arange(batch),
    )
    step = jax.jit(make_step(config, objective), donate_argnums=0)
    return config, step, (state, rows, jax.random.key(0))


def compiled_in(lowered: Any) -> tuple[Any, float]:
    """Return a compiled program, and the seconds of its compilation without tracing."""
    start = time.perf_counter()
    compiled = lowered.compile()
    return compiled, time.perf_counter() - start


def medians(
    call: Callable[[], Any], repeats: int, queued: int | None = None, warm: int = 2
) -> dict[str, Any]:
    """Measure milliseconds per call: the median of `repeats` means over `queued` calls in a row."""
    if queued is None:
        queued = 1 if jax.default_backend() == "cpu" else QUEUED
    for _ in range(warm):
        jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(queued - 1):
            call()
        jax.block_until_ready(call())
        times.append((time.perf_counter() - start) * 1000 / queued)
    return {"ms": statistics.median(times), "all_ms": times}


def peak_memory() -> dict[str, Any]:
    """Return the peak memory of the device if it is counted, else that of this process."""
    counted = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in counted:
        return {"peak_bytes": counted["peak_bytes_in_use"], "peak_of": "device"}
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_bytes": 1024 * kilobytes, "peak_of": "process"}
