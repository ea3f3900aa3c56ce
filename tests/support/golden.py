"""Reference values: outputs of the original PyTorch code (float32 on a CPU, dropout off).

`fixtures/golden/*.npz` contain inputs and outputs of openai/glide-text2im and
openai/guided-diffusion for tiny networks with random weights, in torch's layout: images
`(B, C, H, W)`, sequences `(B, W, L)`, convolutions OIHW. The helpers here convert them.
"""

import json
import os
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.diffusion.guidance import Network
from glide_jax.diffusion.sampling import Plan
from glide_jax.diffusion.solvers import Table
from glide_jax.models.presets import ModelConfig, model_config
from glide_jax.models.unet import GLIDE
from glide_jax.weights.released import from_released

FOLDER = Path(__file__).parents[1] / "fixtures" / "golden"
SCHEDULES = {"squaredcos_cap_v2": "cosine", "cosine": "cosine", "linear": "linear"}
# The weights of these variants are those of another one, except for the first convolution.
SHARED_WEIGHTS = {"inpaint": "base", "superres_inpaint": "superres"}
# The images that a network takes, by their names in OpenAI's code and in this package.
IMAGES = {
    "low_res": "low_res",
    "inpaint_image": "inpaint_image",
    "inpaint_mask": "inpaint_known",
}
TEXT_SIDE = ("transformer", "token_embedding", "positional_embedding", "final_ln")


# The array of a file that owns some memory: `{id of the owner: (file, key)}`.
_OWNERS: dict[int, tuple[str, str]] = {}


@cache
def load(name: str) -> MappingProxyType:
    """Return all arrays of `fixtures/golden/<name>.npz`, read-only."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    for key, array in arrays.items():
        array.flags.writeable = False
        _OWNERS[id(_owner(array))] = (name, key)
    return MappingProxyType(arrays)


def _owner(array: np.ndarray) -> np.ndarray:
    """Return the array that owns the memory of a view."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def nhwc(x: np.ndarray) -> np.ndarray:
    """Move the channels of `(B, C, H, W)` or `(B, W, L)` to the end."""
    return np.moveaxis(x, 1, -1)


def steps_nhwc(x: np.ndarray) -> np.ndarray:
    """Move the channels of `(N, B, C, H, W)` to the end."""
    return np.moveaxis(x, 2, -1)


def error(found, wanted) -> float:
    """`max |found - wanted|`; the shapes must be equal. NaN gives NaN, which is never close."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    return np.abs(found - wanted).max()


class Comparison(NamedTuple):
    """The result of an assertion; `file` and `key` name the golden array of the comparison."""

    test: str
    file: str
    key: str
    error: float
    tolerance: float


# All comparisons of this process, for the report of `python -m tests.tools.parity`.
COMPARISONS: list[Comparison] = []


def note(wanted, worst: float, tolerance: float) -> None:
    """Add a comparison to `COMPARISONS`."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
    file, key = "", ""
    if isinstance(wanted, np.ndarray):
        file, key = _OWNERS.get(id(_owner(wanted)), ("", ""))
    COMPARISONS.append(Comparison(test, file, key, float(worst), float(tolerance)))


def assert_close(found, wanted, tolerance: float) -> None:
    """Assert `|found - wanted| <= tolerance` everywhere."""
    worst = error(found, wanted)
    note(wanted, worst, tolerance)
    assert worst <= tolerance, f"off by {worst:.2e}, more than {tolerance:.0e}"


def assert_relative(found, wanted, tolerance: float, floor: float = 0.0) -> None:
    """Assert `|found - wanted| <= tolerance max|wanted|` for each entry of the first axis.

    Each entry has its own maximum: images at noisy steps are thousands of times larger than others.
    """
    assert len(found) == len(wanted)
    for row, (a, b) in enumerate(zip(found, wanted, strict=True)):
        scale = max(np.abs(b).max(), floor)
        worst = error(a, b)
        note(wanted, worst, tolerance * scale)
        assert worst <= tolerance * scale, f"row {row}: {worst / scale:.2e} of the largest value"


def config(name: str) -> ModelConfig:
    """Return the config of a tiny model in configs.json."""
    values = json.loads((FOLDER / "configs.json").read_text())[name]
    known = {field.name for field in fields(ModelConfig)}
    return model_config({"image_size": 16} | {k: v for k, v in values.items() if k in known})


@cache
def state_dict(name: str) -> MappingProxyType:
    """Return the weights of a tiny model under OpenAI's parameter names."""
    if name.startswith("alt"):
        arrays = load("unet_alt_add")
        found = {k.removeprefix("sd."): v for k, v in arrays.items() if k.startswith("sd.")}
        if name == "alt_notext":
            found = {
                k: v
                for k, v in found.items()
                if "encoder_kv" not in k and not k.startswith(TEXT_SIDE)
            }
    else:
        shared = load(f"weights_{SHARED_WEIGHTS[name]}") if name in SHARED_WEIGHTS else {}
        found = {**shared, **load(f"weights_{name}")}
    return MappingProxyType(found)


@cache
def weights(name: str) -> dict:
    """Return the weights of a tiny model as a parameter tree."""
    return from_released(config(name), state_dict(name))


@cache
def model(name: str, dtype: str = "float32") -> GLIDE:
    """Return a tiny model with its trunk in `dtype`."""
    return GLIDE(config(name), jnp.dtype(dtype))


@partial(jax.jit, static_argnums=0)
def _encode(network: GLIDE, variables, tokens, mask):
    return network.apply(variables, tokens, mask, method=GLIDE.encode_text)


@partial(jax.jit, static_argnums=0)
def _forward(network: GLIDE, variables, x, t, text, images):
    return network.apply(variables, x, t, text, **images)


def encode(name: str, tokens, mask, dtype: str = "float32"):
    """Return the text features of tokens."""
    variables = {"params": weights(name)}
    return _encode(model(name, dtype), variables, np.asarray(tokens, np.int32), mask)


def forward(name: str, x, t, text, *, params=None, dtype="float32", **images) -> np.ndarray:
    """Return the output of a tiny model, channels last; `x` and `images` are channels first."""
    variables = {"params": weights(name) if params is None else params}
    images = {key: nhwc(image) for key, image in images.items()}
    return np.asarray(_forward(model(name, dtype), variables, nhwc(x), t, text, images))


def _apply(network: GLIDE, params, x, t, cond):
    text, images = cond
    return network.apply({"params": params}, x, t, text, **images)


def network(name: str, dtype: str = "float32") -> Network:
    """Return a tiny model as a network of the sampler; its conditioning is `(text, images)`."""
    return Network(_network_fn(name, dtype), weights(name))


@cache
def _network_fn(name: str, dtype: str):
    return partial(_apply, model(name, dtype))


def rows(plan: Plan, some: slice) -> Plan:
    """Return a plan with some of the rows of another."""
    return replace(plan, table=Table(*(column[some] for column in plan.table)))
