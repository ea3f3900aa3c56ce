"""Reference values: outputs of the original PyTorch code (float32 on a CPU, dropout off).

`fixtures/golden/*.npz` hold inputs and outputs of openai/glide-text2im and openai/guided-diffusion
for tiny networks with random weights, in torch's layout: images `(B, C, H, W)`, sequences
`(B, W, L)`, convolutions OIHW. The helpers here turn them into ours.
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

FOLDER = Path(__file__).parent / "fixtures" / "golden"
SCHEDULES = {"squaredcos_cap_v2": "cosine", "cosine": "cosine", "linear": "linear"}
# A variant's file of weights holds its stem alone; all else is shared.
SHARED_WEIGHTS = {"inpaint": "base", "superres_inpaint": "superres"}
TEXT_SIDE = ("transformer", "token_embedding", "positional_embedding", "final_ln")


# Which array of which file owns some memory: `{id of the owner: (file, key)}`.
_OWNERS: dict[int, tuple[str, str]] = {}


@cache
def load(name: str) -> MappingProxyType:
    """All arrays of `fixtures/golden/<name>.npz`, read-only."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    for key, array in arrays.items():
        array.flags.writeable = False
        _OWNERS[id(_owner(array))] = (name, key)
    return MappingProxyType(arrays)


def _owner(array: np.ndarray) -> np.ndarray:
    """What a view is a view of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def nhwc(x: np.ndarray) -> np.ndarray:
    """Channels last, from `(B, C, H, W)` or `(B, W, L)`."""
    return np.moveaxis(x, 1, -1)


def steps_nhwc(x: np.ndarray) -> np.ndarray:
    """Channels last, from `(N, B, C, H, W)`."""
    return np.moveaxis(x, 2, -1)


def error(found, wanted) -> float:
    """`max |found - wanted|`; shapes must agree, and nothing may be NaN."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    return np.abs(found - wanted).max()


class Comparison(NamedTuple):
    """What an assertion found; `file` and `key` name the reference, where it is a view of one."""

    test: str
    file: str
    key: str
    error: float
    tolerance: float


# For the report of `python -m tests.tools.parity`.
COMPARISONS: list[Comparison] = []


def note(wanted, worst: float, tolerance: float) -> None:
    """Remembers a comparison."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
    file, key = "", ""
    if isinstance(wanted, np.ndarray):
        file, key = _OWNERS.get(id(_owner(wanted)), ("", ""))
    COMPARISONS.append(Comparison(test, file, key, float(worst), float(tolerance)))


def assert_close(found, wanted, tolerance: float) -> None:
    """`|found - wanted| <= tolerance` everywhere."""
    worst = error(found, wanted)
    note(wanted, worst, tolerance)
    assert worst <= tolerance, f"off by {worst:.2e}, more than {tolerance:.0e}"


def assert_relative(found, wanted, tolerance: float, floor: float = 0.0) -> None:
    """`|found - wanted| <= tolerance max|wanted|`, for each entry of the first axis on its own.

    Row by row, since pictures at noisy steps are thousands of times larger than the others.
    """
    assert len(found) == len(wanted)
    for row, (a, b) in enumerate(zip(found, wanted, strict=True)):
        scale = max(np.abs(b).max(), floor)
        worst = error(a, b)
        note(wanted, worst, tolerance * scale)
        assert worst <= tolerance * scale, f"row {row}: {worst / scale:.2e} of the largest value"


def config(name: str) -> ModelConfig:
    """The tiny model of that name in configs.json."""
    given = json.loads((FOLDER / "configs.json").read_text())[name]
    known = {field.name for field in fields(ModelConfig)}
    return model_config({"image_size": 16} | {k: v for k, v in given.items() if k in known})


@cache
def state_dict(name: str) -> MappingProxyType:
    """Its weights, under the released names."""
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
    """Its weights as our tree."""
    return from_released(config(name), state_dict(name))


@cache
def model(name: str, dtype: str = "float32") -> GLIDE:
    """The tiny model of that name, its trunk in `dtype`."""
    return GLIDE(config(name), jnp.dtype(dtype))


@partial(jax.jit, static_argnums=0)
def _encode(network: GLIDE, variables, tokens, mask):
    return network.apply(variables, tokens, mask, method=GLIDE.encode_text)


@partial(jax.jit, static_argnums=0)
def _forward(network: GLIDE, variables, x, t, text, images):
    return network.apply(variables, x, t, text, **images)


def encode(name: str, tokens, mask, dtype: str = "float32"):
    """Text features from the reference's tokens."""
    variables = {"params": weights(name)}
    return _encode(model(name, dtype), variables, np.asarray(tokens, np.int32), mask)


def forward(name: str, x, t, text, *, params=None, dtype="float32", **images) -> np.ndarray:
    """The network's output, channels last; `x` and `images` are channels first."""
    variables = {"params": weights(name) if params is None else params}
    images = {key: nhwc(image) for key, image in images.items()}
    return np.asarray(_forward(model(name, dtype), variables, nhwc(x), t, text, images))


def _apply(network: GLIDE, params, x, t, cond):
    text, images = cond
    return network.apply({"params": params}, x, t, text, **images)


def network(name: str, dtype: str = "float32") -> Network:
    """The tiny model as the sampler wants it; its conditioning is `(text, images)`."""
    return Network(_network_fn(name, dtype), weights(name))


@cache
def _network_fn(name: str, dtype: str):
    return partial(_apply, model(name, dtype))


def rows(plan: Plan, some: slice) -> Plan:
    """Some rows of a plan, as a plan."""
    return replace(plan, table=Table(*(column[some] for column in plan.table)))
