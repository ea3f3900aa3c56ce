"""The operations and blocks of the networks, each against outputs of the original code."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glide_jax.models.attention import attend, split_heads
from glide_jax.models.blocks import (
    AttentionBlock,
    ResBlock,
    depth_to_space,
    downsample,
    drop,
    space_to_depth,
    upsample,
)
from glide_jax.models.layers import GroupNorm, Projections, conv3x3, dense, timestep_embedding
from glide_jax.models.platform import compile_for
from glide_jax.models.text import TextBlock
from glide_jax.models.unet import GLIDE
from glide_jax.weights import released
from glide_jax.weights.store import flatten, unflatten
from tests.support import golden
from tests.support.golden import assert_close, load, nhwc

FLOAT = jnp.float32


def weights_of(prefix: str) -> dict:
    """Return the arrays of `units.npz` whose names begin with a prefix, without the prefix."""
    units = load("units")
    return {k.removeprefix(prefix): v for k, v in units.items() if k.startswith(prefix)}


def block_variables(shapes: dict, names: dict[str, str], weights: dict) -> dict:
    """Return the variables of a block from torch arrays `<name>.<weight|bias>[.<shape>]`.

    Args:
        shapes: the variables of the block from `jax.eval_shape`. Of several arrays with one name,
            the one of the right shape is used.
        names: name here -> name in the original code.
    """
    wanted = flatten(shapes["params"])
    found = {}
    for path, leaf in wanted.items():
        ours, kind = path.rsplit("/", 1)
        name = f"{names[ours]}.{released._LEAVES[kind]}"
        for key, array in weights.items():
            array = released._to_ours(np.asarray(array, np.float32), kind == "kernel")
            if (key == name or key.startswith(f"{name}.")) and array.shape == leaf.shape:
                found[path] = array
    assert set(found) == set(wanted)
    return {"params": unflatten(found)}


@pytest.mark.parametrize("dim", [8, 31, 32, 192])
def test_timestep_embedding(dim):
    units = load("units")
    assert_close(timestep_embedding(units["temb.t"], dim), units[f"temb.out{dim}"], 1e-4)


def test_timestep_embedding_of_fractions():
    units = load("units")
    assert_close(timestep_embedding(units["temb.tf"], 32), units["temb.outf32"], 1e-4)


@pytest.mark.parametrize(("swish", "name"), [(0, "plain"), (1, "swish"), (1.702, "swish1702")])
def test_group_norm(swish, name):
    units = load("units")
    variables = {"params": {"norm": {"scale": units["gn.w"], "bias": units["gn.b"]}}}
    found = GroupNorm(swish=swish).apply(variables, nhwc(units["gn.x"]))
    assert_close(found, nhwc(units[f"gn.out_{name}"]), 4e-6)


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("film", [False, True])
def test_statistics_in_one_pass_equal_those_in_two(film, offset):
    """Also the gradients; the difference is the rounding of 16 bits."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = (jax.random.normal(keys[0], (2, 8, 8, 64)) + offset).astype(jnp.bfloat16)
    params = {
        "scale": 1 + 0.1 * jax.random.normal(keys[1], (64,)),
        "bias": jax.random.normal(keys[2], (64,)),
    }
    factors = jax.random.normal(keys[3], (2, 128)) if film else None
    direction = jax.random.normal(keys[1], x.shape)

    @jax.jit
    def run(x, params, factors):
        def norm(x, params, factors):
            found = GroupNorm(swish=1.0).apply({"params": {"norm": params}}, x, factors)
            return (found.astype(jnp.float32) * direction).sum(), found

        gradient, found = jax.grad(norm, (0, 1, 2) if film else (0, 1), has_aux=True)(
            x, params, factors
        )
        return found, gradient

    found, wanted = run(x, params, factors), run(x.astype(jnp.float32), params, factors)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(a, b, 1.1 * 2**-8 * float(jnp.abs(b).max()))


def test_norms_have_the_epsilon_of_openai_models():
    """An almost constant input distinguishes 1e-5 from flax's 1e-6; the references do not."""
    x = np.float32(1e-3) * np.arange(64, dtype=np.float32).reshape(1, 1, 1, 64)
    pairs = x.reshape(32, 2)
    wanted = (pairs - pairs.mean(1, keepdims=True)) / np.sqrt(pairs.var(1, keepdims=True) + 1e-5)
    norm = GroupNorm()
    found = norm.apply(norm.init(jax.random.key(0), x), x)
    assert_close(found, wanted.reshape(x.shape), 1e-4)


def test_parameter_free_resampling():
    units = load("units")
    x = nhwc(units["resize.x"])
    assert_close(upsample(x), nhwc(units["resize.nearest2x"]), 0)
    assert_close(downsample(x), nhwc(units["resize.avgpool2"]), 1e-6)


@pytest.mark.parametrize(
    ("name", "stride", "before"), [("downconv", 2, lambda x: x), ("upconv", 1, upsample)]
)
def test_convolutional_resampling(name, stride, before):
    units = load("units")
    kernel = units[f"resize.{name}.w"].transpose(2, 3, 1, 0)
    variables = {"params": {"kernel": kernel, "bias": units[f"resize.{name}.b"]}}
    conv = conv3x3(5, FLOAT, None, stride=stride)
    found = conv.apply(variables, before(nhwc(units["resize.x"])))
    assert_close(found, nhwc(units[f"resize.{name}.out"]), 8e-6)


@pytest.mark.parametrize(
    ("name", "shape"), [("bilinear4x", (32, 32)), ("bilinear_8_to_20x12", (20, 12))]
)
def test_the_low_resolution_image_is_enlarged_bilinearly(name, shape):
    """The test reads the input of the UNet, where it follows the noised image."""
    units = load("units")
    seen = []

    class Spy(GLIDE):
        def setup(self):
            self.unet = lambda x, *_: seen.append(x)

    x = np.ones((2, *shape, 3), np.float32)
    spy = Spy(replace(golden.config("superres"), xf_width=0))
    spy.apply({}, x, np.zeros(2), low_res=nhwc(units["resize.x"]))
    assert_close(seen[0][..., :3], x, 0)
    assert_close(seen[0][..., 3:], nhwc(units[f"resize.{name}"]), 1e-5)


@pytest.mark.parametrize("with_text", [False, True])
def test_attention_block(with_text):
    units = load("units")
    x = nhwc(units["ab.x"])
    text = nhwc(units["ab.enc"]) if with_text else None
    block = AttentionBlock(heads=x.shape[-1] // 16, dtype=FLOAT)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x, text)
    variables = block_variables(shapes, released._ATTN, weights_of("ab.sd."))
    wanted = units["ab.out" if with_text else "ab.out_noenc"]
    assert_close(block.apply(variables, x, text), nhwc(wanted), 1e-5)


@pytest.mark.parametrize("use_scale_shift_norm", [True, False])
@pytest.mark.parametrize("kind", ["same", "widen", "up", "down"])
def test_residual_block(kind, use_scale_shift_norm):
    units = load("units")
    x, emb = nhwc(units["rb.x"]), units["rb.emb"]
    block = ResBlock(
        features=64 if kind == "widen" else 32,
        dropout=0.1,
        dtype=FLOAT,
        use_scale_shift_norm=use_scale_shift_norm,
        resample={"up": upsample, "down": downsample}.get(kind),
    )
    shapes = jax.eval_shape(lambda key: block.init(key, x, emb), jax.random.key(0))
    variables = block_variables(shapes, released._RES, weights_of("rb.sd."))
    found = block.apply(variables, x, emb)
    assert_close(
        found, nhwc(units[f"rb.{kind}_{'film' if use_scale_shift_norm else 'add'}.out"]), 1e-5
    )


def test_text_block():
    units = load("units")
    x = units["tb.x"]
    block = TextBlock(int(units["tb.heads"]), FLOAT)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)
    variables = block_variables(shapes, released._TEXT, weights_of("tb.sd."))
    assert_close(block.apply(variables, x), units["tb.out"], 1e-5)

    def linear(name, x):
        layer = variables["params"][name]
        return x @ layer["kernel"] + layer["bias"]

    # In the reference of the attention alone, the input is x itself, not its norm.
    attention = attend(*split_heads(linear("qkv", x), block.heads, parts=3))
    assert_close(linear("proj", attention), units["tb.attn"], 4e-6)


def test_depth_to_space_undoes_space_to_depth_block_by_block():
    x = jnp.arange(2 * 4 * 6 * 3, dtype=FLOAT).reshape(2, 4, 6, 3)
    deep = space_to_depth(x, 2)
    assert deep.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(deep[1, 1, 2].reshape(2, 2, 3), x[1, 2:4, 4:6])
    np.testing.assert_array_equal(depth_to_space(deep, 2), x)


def test_dropout_of_a_record_depends_on_its_key_and_its_place_alone():
    keys = jax.random.split(jax.random.key(3), 6)
    x = jnp.ones((6, 16, 16, 8))
    found = np.asarray(drop(x, keys, 0.25, "unet/a"))
    assert set(np.unique(found)) == {0, np.float32(1 / 0.75)}
    # Six standard deviations of the share of 12,288 values.
    assert (found == 0).mean() == pytest.approx(0.25, abs=0.024)
    np.testing.assert_array_equal(drop(x[4:], keys[4:], 0.25, "unet/a"), found[4:])
    for other in (found[1], np.asarray(drop(x, keys, 0.25, "unet/b"))[0]):
        # Independent masks agree in 0.25^2 + 0.75^2 of the values.
        assert (other == found[0]).mean() == pytest.approx(0.625, abs=0.065)


@pytest.mark.parametrize("where", ["cpu", "tpu"])
def test_a_stored_pair_adds_its_product_to_the_kernel(where):
    rng = np.random.default_rng(0)
    shapes = {"kernel": (6, 24), "bias": (24,), "lora_a": (6, 2), "lora_b": (2, 24)}
    held = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    merged = {"kernel": held["kernel"] + held["lora_a"] @ held["lora_b"], "bias": held["bias"]}
    x = rng.standard_normal((2, 5, 6), np.float32)
    with compile_for(where):
        for layer in (Projections(8, 2, 3, FLOAT), dense(24, FLOAT, "fc_1")):
            beside, wanted = (layer.apply({"params": some}, x) for some in (held, merged))
            for a, b in zip(jax.tree.leaves(beside), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5)
