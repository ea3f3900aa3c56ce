"""The noised CLIP against outputs of the original code, and weights under OpenAI's names."""

import json
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glide_jax.errors import GlideError
from glide_jax.models.clip import NoisedCLIP, init_params
from glide_jax.models.presets import CLIP_PRESETS, CLIPConfig
from glide_jax.models.tokenizers import CLIPTokenizer
from glide_jax.weights import clip_from_released, clip_to_released
from glide_jax.weights.released_clip import clip_abstract_params, clip_released_shapes
from glide_jax.weights.store import flatten
from tests.support.commands import first_weights
from tests.support.golden import FOLDER, assert_close, error, load, nhwc

SIDES = ("image", "text")


@cache
def config() -> CLIPConfig:
    """Return the sizes of the tiny CLIP of the references."""
    sizes = json.loads((FOLDER / "config_clip.json").read_text())
    assert sizes["heads_i"] == sizes["heads_t"] and sizes["hs_i"] == sizes["hs_t"]
    return CLIPConfig(
        image_size=sizes["image_size"],
        patch_size=sizes["patch"],
        n_timestep=sizes["n_t"],
        image_width=sizes["heads_i"] * sizes["hs_i"],
        image_layers=sizes["blocks_i"],
        text_width=sizes["heads_t"] * sizes["hs_t"],
        text_layers=sizes["blocks_t"],
        head_size=sizes["hs_i"],
        n_vocab=sizes["vocab"],
        max_text_len=sizes["max_text"],
        embed_width=sizes["n_embd"],
        logit_scale=sizes["logit_scale"],
    )


def state_dicts() -> tuple[dict, dict]:
    return tuple(dict(load(f"weights_clip_{side}")) for side in SIDES)


@cache
def params() -> dict:
    return clip_from_released(config(), *state_dicts())


@partial(jax.jit, static_argnums=(0, 1))
def _apply(model, method, params, *inputs):
    return model.apply({"params": params}, *inputs, method=method)


def apply(method, *inputs, model=None, weights=None):
    weights = params() if weights is None else weights
    return _apply(model or NoisedCLIP(config()), method, weights, *inputs)


def inputs():
    reference = load("clip")
    return nhwc(reference["x"]), *(reference[k].astype(np.int32) for k in ("t", "tokens", "lens"))


# --- outputs


def test_the_image_encoder():
    reference, (x, t, _, _) = load("clip"), inputs()
    features = apply("image_features", x, t)
    assert_close(features.probe, reference["image_probe"], 2e-5)
    assert_close(features.raw, reference["image_raw"], 1e-5)
    assert_close(apply("encode_image", x, t), reference["image_emb"], 4e-6)


def test_the_text_encoder():
    reference, (_, _, tokens, lengths) = load("clip"), inputs()
    features = apply("text_features", tokens, lengths)
    assert_close(features.probe, reference["text_probe"], 1e-5)
    assert_close(features.raw, reference["text_raw"], 1e-5)
    assert_close(apply("encode_text", tokens, lengths), reference["text_emb"], 4e-6)


def test_an_image_encoder_without_timesteps():
    reference = load("clip_image_no_t")
    weights = {k.removeprefix("sd."): v for k, v in reference.items() if k.startswith("sd.")}
    sizes = replace(config(), n_timestep=0, image_layers=1)
    tree = clip_from_released(sizes, weights, state_dicts()[1])
    x = nhwc(reference["x255"] / np.float32(127.5) - 1)
    features = apply("image_features", x, model=NoisedCLIP(sizes), weights=tree)
    assert_close(features.raw, reference["out"], 1e-5)
    back, _ = clip_to_released(tree)
    assert back.keys() == weights.keys()


def test_the_similarity_and_its_gradient():
    reference, (x, t, tokens, lengths) = load("clip"), inputs()
    text = apply("encode_text", tokens, lengths)

    def loss(x):
        return apply("similarity", x, t, text).sum()

    value, slope = jax.value_and_grad(loss)(x)
    assert_close(value, reference["loss"], 4e-4)
    assert_close(np.log(apply("scale")), reference["logit_scale"], 2e-5)
    for scale, tolerance in ((3, 5e-5), (15, 3e-4)):
        assert np.abs(reference[f"cond_grad_scale{scale}"]).max() > 100 * tolerance
        assert_close(scale * slope, nhwc(reference[f"cond_grad_scale{scale}"]), tolerance)


def test_the_logits_compare_every_image_with_every_caption():
    reference, (x, t, tokens, lengths) = load("clip"), inputs()
    logits = apply("__call__", x, t, tokens[:3], lengths[:3])
    wanted = 100 * reference["image_emb"] @ reference["text_emb"][:3].T
    assert logits.shape == (4, 3) and logits.dtype == np.float32
    assert_close(logits, wanted, 4e-4)


@pytest.mark.parametrize(("dtype", "worst"), [("float16", 1e-2), ("bfloat16", 8e-2)])
def test_a_sixteen_bit_trunk(dtype, worst):
    reference, (x, t, tokens, lengths) = load("clip"), inputs()
    model = NoisedCLIP(config(), jnp.dtype(dtype))
    for found, name in (
        (apply("encode_image", x, t, model=model), "image_emb"),
        (apply("encode_text", tokens, lengths, model=model), "text_emb"),
    ):
        assert found.dtype == np.float32
        assert worst / 100 < error(found, reference[name]) < worst
        assert_close(np.linalg.norm(found, axis=-1), np.ones(4), 1e-6)


# --- properties


def test_parameters_may_be_numpy_arrays():
    """A file gives numpy arrays, and they stay so unless they are arguments of a jitted call."""
    bound = NoisedCLIP(config()).bind({"params": params()})
    assert isinstance(params()["image"]["timestep_embedding"], np.ndarray)
    assert jax.eval_shape(bound, *inputs()).shape == (4, 4)


def test_padding_cannot_change_a_caption():
    _, _, tokens, lengths = inputs()
    padded = np.arange(tokens.shape[1]) >= lengths[:, None]
    assert padded.any()
    other = np.where(padded, 7, tokens)
    assert error(apply("encode_text", other, lengths), apply("encode_text", tokens, lengths)) == 0
    other = np.where(padded, tokens, 7)
    assert error(apply("encode_text", other, lengths), apply("encode_text", tokens, lengths)) > 0.1


def test_similarity_takes_the_nearest_timestep():
    x, t, tokens, lengths = inputs()
    text = apply("encode_text", tokens, lengths)
    near = np.float32(t) + np.float32([0.3, -0.4, 0.4, -0.2])
    assert error(apply("similarity", x, near, text), apply("similarity", x, t, text)) == 0
    assert (
        error(apply("similarity", x, (t + 1) % 1000, text), apply("similarity", x, t, text)) > 0.1
    )


def test_an_index_outside_its_table_gives_nan():
    """NaN is noticed; by default jax would use another row without an error."""
    x, t, tokens, lengths = inputs()
    found = apply("encode_image", x, t.copy() + np.int32([1, -2, 0, 1]))
    assert np.isnan(found).all(-1).tolist() == [False, True, False, True]
    found = apply("encode_text", tokens, np.int32([0, 3, 14, 13]))
    assert np.isnan(found).all(-1).tolist() == [True, False, True, False]
    tokens[0, 0] = 211
    assert np.isnan(apply("encode_text", tokens, lengths)).all(-1).tolist() == [True] + [False] * 3


@pytest.mark.parametrize("n_timestep", [1000, 0])
def test_a_new_model_can_learn(n_timestep):
    """Every parameter has a gradient, and the contrastive loss starts near chance."""
    x, t, tokens, lengths = inputs()
    sizes = replace(config(), n_timestep=n_timestep, image_layers=1, text_layers=1)
    model = NoisedCLIP(replace(sizes, learn_logit_scale=True, logit_scale=1 / 0.07))
    # One compiled program is faster than many operations.
    fresh = first_weights(init_params, model)
    noise = np.random.default_rng(0).standard_normal(x.shape, np.float32)

    @jax.jit
    @jax.value_and_grad
    def loss(weights):
        time = t if n_timestep else None
        logits = model.apply({"params": weights}, noise, time, tokens, lengths)
        right = jnp.arange(len(logits))
        rows, columns = (jax.nn.log_softmax(logits, axis)[right, right] for axis in (0, 1))
        return -(rows.mean() + columns.mean()) / 2

    value, slopes = loss(fresh)
    assert abs(value - np.log(4)) < 2  # The cosines of random embeddings, times 14.
    dead = [path for path, slope in flatten(slopes).items() if not np.abs(slope).max() > 1e-8]
    assert not dead
    assert ("timestep_embedding" in slopes["image"]) == bool(n_timestep)


def test_a_learned_scale_stops_at_100_and_can_decrease_again():
    model = NoisedCLIP(replace(config(), learn_logit_scale=True, logit_scale=20.0))
    tree = clip_from_released(model.config, *state_dicts())

    @jax.jit
    @jax.value_and_grad
    def scale(log_scale):
        return model.apply({"params": tree | {"log_scale": log_scale}}, method="scale")

    assert np.allclose(scale(tree["log_scale"]), (20, 20), rtol=1e-6)
    assert np.allclose(scale(jnp.log(150.0)), (100, 100), rtol=1e-6)
    assert clip_to_released(tree)[0].keys() == state_dicts()[0].keys()


# --- names and sizes


@pytest.mark.parametrize(
    ("name", "image", "text"),
    [("clip64", 86_443_776, 71_679_488), ("clip64-paper", 304_411_648, 123_641_088)],
)
def test_parameter_counts(name, image, text):
    tree = clip_abstract_params(CLIP_PRESETS[name]())
    assert set(tree) == set(SIDES)
    counts = {k: sum(leaf.size for leaf in jax.tree.leaves(v)) for k, v in tree.items()}
    assert counts == {"image": image, "text": text}
    assert f"{image:,}" in CLIP_PRESETS[name].__doc__ and f"{text:,}" in CLIP_PRESETS[name].__doc__


@pytest.mark.parametrize("side", SIDES)
def test_openai_names_and_shapes(side):
    lines = (FOLDER / f"keys_clip_{side}.txt").read_text().splitlines()
    wanted = {}
    for line in lines:
        name, rest = line.split(" ", 1)
        wanted[name] = tuple(map(int, rest[1 : rest.index(")")].replace(",", " ").split()))
    assert clip_released_shapes(clip_abstract_params(CLIP_PRESETS["clip64"]()))[side] == wanted


def test_there_and_back():
    for found, wanted in zip(clip_to_released(params()), state_dicts(), strict=True):
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            assert found[name].dtype == np.float32
            assert np.array_equal(found[name], array), name


def test_weights_that_do_not_fit_are_named():
    image, text = state_dicts()
    del image["blocks.input.w_t"]
    image["blocks.block_2.f_mlp.f_1.w"] = np.zeros((128, 32))
    image["blocks.input.w_pos"] = np.zeros((65, 32))
    with pytest.raises(GlideError) as caught:
        clip_from_released(config(), image, text)
    assert str(caught.value) == (
        "these weights do not fit the noised CLIP's image encoder: "
        "1 missing (blocks.input.w_t); 1 unexpected (blocks.block_2.f_mlp.f_1.w); "
        "1 of the wrong shape (blocks.input.w_pos (65, 32), not (17, 32))"
    )
    image, text = state_dicts()
    text["blocks.output.f.w"] = np.zeros((24, 32, 1))
    with pytest.raises(GlideError, match=r"text encoder: 1 of the wrong shape \(blocks.output.f"):
        clip_from_released(config(), image, text)
    with pytest.raises(GlideError, match=r"image encoder: 4 missing .* unexpected .*w_voc"):
        clip_from_released(config(), text, image)


# --- wrong inputs


def test_inputs_that_raise():
    x, t, tokens, lengths = inputs()
    timeless = NoisedCLIP(replace(config(), n_timestep=0))

    def refused(message, method, *arrays, **options):
        with pytest.raises(ValueError, match=message):
            apply(method, *arrays, **options)

    refused(
        r"x must be \(B, 16, 16, 3\), not \(4, 3, 16, 16\)",
        "encode_image",
        np.moveaxis(x, -1, 1),
        t,
    )
    refused(r"x must be \(B, 16, 16, 3\), not \(4, 8, 8, 3\)", "encode_image", x[:, ::2, ::2], t)
    refused(r"x must be float, in \[-1, 1\], not uint8", "encode_image", x.astype(np.uint8), t)
    refused("this CLIP needs timesteps t", "encode_image", x, None)
    refused("this CLIP takes no timesteps t", "encode_image", x, t, model=timeless)
    refused("t must be integer .*not float32", "encode_image", x, np.float32(t))
    refused(r"t must be \(B,\), not \(\)", "encode_image", x, np.int32(3))
    refused(r"tokens must be \(B, 13\), not \(4, 12\)", "encode_text", tokens[:, 1:], lengths)
    refused("tokens must be integer, not float32", "encode_text", np.float32(tokens), lengths)
    refused(r"lengths must be \(B,\), not \(4, 1\)", "encode_text", tokens, lengths[:, None])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "image_size 64 is not a multiple of patch_size 5"),
        ({"image_width": 800}, "image_width 800 is not a multiple of head_size 64"),
        ({"text_width": 500}, "text_width 500 is not a multiple of head_size 64"),
        ({"logit_scale": 0.0}, "logit_scale must be positive"),
    ],
)
def test_sizes_that_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        CLIPConfig(**changes)


def test_the_tokenizer_fits_the_presets():
    tokenizer = CLIPTokenizer()
    for name, preset in CLIP_PRESETS.items():
        # The embedded one takes only short captions, with a tokenizer of that length.
        assert name == "emoji_clip64" or preset().max_text_len == tokenizer.context
        assert preset().n_vocab >= tokenizer.vocab_size
