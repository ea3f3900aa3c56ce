"""The project's commands as processes, and tiny models and data for them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from glide_jax.devices.runtime import fast_compile_options
from glide_jax.models.presets import ModelConfig
from glide_jax.models.unet import GLIDE, init_params
from glide_jax.weights.registry import FORMAT
from glide_jax.weights.store import flatten, save_weights
from tests.support.quick import QUICK

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tests" / "fixtures" / "tiny_recipe.py"

TINY = ModelConfig(
    image_size=16,
    model_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_ds=(1,),
    num_head_channels=32,
    text_ctx=8,
    xf_width=8,
    xf_layers=1,
    xf_heads=1,
)


def environment(devices: int = 1) -> dict[str, str]:
    """Return the environment of a command on the CPU, with so many virtual devices."""
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK}" if devices > 1 else QUICK
    threads = {"PJRT_NPROC": str(2 * devices)} if devices > 1 else {}
    changes = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    return os.environ | changes | threads


def run(*arguments: object, devices: int = 1, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run `python <arguments>` from the root of the project; output as text."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def one_line(result: subprocess.CompletedProcess, code: int) -> str:
    """Return the error of a command that must fail with one line."""
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    return errors[0]


def make_images(folder: Path, size: int = 16, count: int = 12) -> Path:
    """Write a folder of plain images with captions, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}
    for i in range(count):
        name, colour = list(colours.items())[i % 3]
        image = np.full((size, size, 3), colour, np.uint8)
        image[: 1 + i % size] = 255
        Image.fromarray(image).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(name)
    return folder


def quick_key(seed: int) -> jax.Array:
    """Return a key for random weights: the usual kind takes longer to compile."""
    return jax.random.key(seed, impl="rbg")


def first_weights(init: Callable[..., Any], model: Any, seed: int = 0) -> Any:
    """Return random weights `init(model, key)`, compiled quickly."""
    jitted = jax.jit(init, static_argnums=0, compiler_options=fast_compile_options())
    return jitted(model, quick_key(seed))


def make_weights(folder: Path, config: ModelConfig = TINY, seed: int = 0) -> Path:
    """Write a folder of random weights, none of them zero, and return it."""
    leaves, tree = jax.tree.flatten(first_weights(init_params, GLIDE(config), seed))
    rng = np.random.default_rng(seed)
    leaves = [np.asarray(a) + 0.05 * rng.standard_normal(a.shape, np.float32) for a in leaves]
    description = {
        "format": FORMAT,
        "model": {k: getattr(config, k) for k in config.__dataclass_fields__},
        "noise_schedule": "cosine",
        "diffusion_steps": 1000,
        "prediction_type": "eps",
        "defaults": {"steps": 4},
        "prompts": ["red", "a blue one"],
    }
    save_weights(folder, description, flatten(jax.tree.unflatten(tree, leaves)))
    return folder
