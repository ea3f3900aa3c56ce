"""Weights in the dtype of the trunk: which ones, and the same outputs as from float32 weights."""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glide_jax.models import clip
from glide_jax.models.clip import NoisedCLIP
from glide_jax.models.layers import Conv3x3, Projections
from glide_jax.models.precision import cast_trunk
from glide_jax.models.presets import CLIP_PRESETS, PRESETS
from glide_jax.models.unet import GLIDE, init_params
from glide_jax.weights.store import flatten
from tests.support import golden
from tests.support.golden import load, nhwc


def weights_in(initialise, dtype) -> tuple[set[str], set[str]]:
    """Return the weights that compute in a dtype, and those that `cast_trunk` casts to it."""
    found = set()

    def note(call, arguments, options, context):
        layer = context.module
        layers = nn.Dense, nn.Conv, Conv3x3, Projections
        if isinstance(layer, layers) and layer.dtype == dtype:
            names = ("kernel", "bias") if getattr(layer, "use_bias", True) else ("kernel",)
            found.update("/".join((*layer.path, name)) for name in names)
        return call(*arguments, **options)

    with nn.intercept_methods(note):
        params = jax.eval_shape(initialise, jax.random.key(0))
    cast = flatten(jax.eval_shape(partial(cast_trunk, dtype=dtype), params))
    return found, {path for path, leaf in cast.items() if leaf.dtype == dtype}


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("base64", {}),
        ("emoji64", {"resblock_updown": False}),
        ("emoji_upsample256", {"low_res_timestep": True}),
    ],
)
def test_the_trunk_of_a_network_is_what_computes_in_its_dtype(preset, options):
    config = replace(PRESETS[preset](), **options)
    found, cast = weights_in(partial(init_params, GLIDE(config, jnp.bfloat16)), jnp.bfloat16)
    assert cast == found and found


def test_the_trunk_of_a_clip_but_for_its_patches():
    """They are small, and the name belongs to no trunk elsewhere."""
    model = NoisedCLIP(CLIP_PRESETS["emoji_clip64"](), jnp.bfloat16)
    found, cast = weights_in(partial(clip.init_params, model), jnp.bfloat16)
    assert cast == found - {"image/patch/kernel"} and cast


def test_float32_stays_as_it_is():
    params = golden.weights("base")
    assert cast_trunk(params, jnp.float32) is params


@pytest.mark.parametrize(("name", "dtype"), [("base", "bfloat16"), ("superres", "float16")])
def test_outputs_are_the_same_to_the_bit(name, dtype):
    reference, params = load(f"unet_{name}"), golden.weights(name)
    network = golden.model(name, dtype)

    @jax.jit
    def run(params, tokens, mask, x, t, low_res):
        apply = partial(network.apply, {"params": params})
        text = apply(tokens, mask, method=GLIDE.encode_text)
        return apply(x, t, text, low_res=low_res), text

    low_res = nhwc(reference["low_res"]) if "low_res" in reference else None
    x, tokens, mask = nhwc(reference["x"]), reference["tokens"].astype(np.int32), reference["mask"]
    inputs = tokens, mask, x, reference["t"], low_res
    cast = cast_trunk(params, dtype)
    for found, wanted in zip(
        jax.tree.leaves(run(cast, *inputs)), jax.tree.leaves(run(params, *inputs)), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numpy_rounds_as_the_network_does(dtype):
    values = np.random.default_rng(0).standard_normal(1000, np.float32) ** 9
    params = {"unet": {"head": {"kernel": values}, "down_0": {"kernel": values}}}
    found = cast_trunk(params, dtype)["unet"]
    assert found["head"]["kernel"] is values
    wanted = jax.jit(lambda x: x.astype(dtype))(values)
    np.testing.assert_array_equal(found["down_0"]["kernel"], wanted)
