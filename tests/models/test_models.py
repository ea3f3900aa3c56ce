"""Whole networks against outputs of the original code, and weights under OpenAI's names."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glide_jax.errors import GlideError
from glide_jax.models.presets import PRESETS, ModelConfig, model_config
from glide_jax.models.unet import GLIDE, init_params
from glide_jax.weights import abstract_params, count_params, from_released, to_released
from glide_jax.weights.store import flatten, unflatten
from tests.support import golden
from tests.support.commands import TINY, first_weights, quick_key
from tests.support.golden import assert_close, encode, error, forward, load, nhwc

# Several times the largest measured error.
TOLERANCE = 2e-5
VARIANTS = ("base", "superres", "inpaint", "superres_inpaint")


def text_of(name: str, some=slice(None)):
    """Return the text features of captions of the reference."""
    reference = load(f"unet_{name}")
    return encode(name, reference["tokens"][some], reference["mask"][some])


def images_of(name: str) -> dict:
    """Return the inputs of a variant besides the noised image, channels first."""
    reference = load(f"unet_{name}")
    return {new: reference[old] for old, new in golden.IMAGES.items() if old in reference}


# --- outputs


def test_every_stage_of_the_base_network():
    reference, trace = load("unet_base"), load("trace_base")
    row = slice(1, 2)

    @jax.jit
    def run(params, tokens, mask, x, t):
        apply = partial(golden.model("base").apply, {"params": params}, capture_intermediates=True)
        text, text_seen = apply(tokens, mask, method=GLIDE.encode_text)
        out, seen = apply(x, t, text)
        return out, seen, text_seen

    out, seen, text_seen = run(
        golden.weights("base"),
        np.asarray(reference["tokens"][row], np.int32),
        reference["mask"][row],
        nhwc(reference["x"][row]),
        reference["t"][row],
    )
    stages = {**seen["intermediates"]["unet"], **text_seen["intermediates"]["text"]}

    def stage(*names):
        """Return the output of the last of these modules that the network has."""
        return [stages[name]["__call__"][0] for name in names if name in stages][-1]

    assert_close(stage("time_2"), trace["time_embed"], TOLERANCE)
    assert_close(stage("block_0"), trace["transformer.resblocks.0"], TOLERANCE)
    assert_close(stage("block_1"), trace["transformer.resblocks.1"], TOLERANCE)
    assert_close(stage("final_norm"), trace["final_ln"], TOLERANCE)
    assert_close(stage("pooled"), trace["transformer_proj"], TOLERANCE)
    for i in range(4):
        found = stage(f"down_{i}", f"down_{i}_res", f"down_{i}_attn")
        assert_close(found, nhwc(trace[f"input_blocks.{i}"]), TOLERANCE)
    assert_close(stage("mid_res_2"), nhwc(trace["middle_block"]), TOLERANCE)
    for i in range(4):
        found = stage(f"up_{i}_res", f"up_{i}_attn", f"up_{i}_up")
        assert_close(found, nhwc(trace[f"output_blocks.{i}"]), TOLERANCE)
    assert_close(out, nhwc(trace["out"]), TOLERANCE)


@pytest.mark.parametrize("name", VARIANTS)
def test_whole_network(name):
    """The base is tested with six kinds of caption mask: full, prefix, empty, one token, ..."""
    reference = load(f"unet_{name}")
    text = text_of(name)
    assert_close(text.pooled, reference["xf_proj"], TOLERANCE)
    assert_close(text.sequence, nhwc(reference["xf_out"]), TOLERANCE)
    found = forward(name, reference["x"], reference["t"], text, **images_of(name))
    assert found.dtype == np.float32
    assert_close(found, nhwc(reference["out"]), TOLERANCE)
    assert_close(found, nhwc(reference["out_f64"]), TOLERANCE)


def test_fractional_timesteps():
    reference = load("unet_base")
    found = forward("base", reference["x"], reference["tf"], text_of("base"))
    assert_close(found, nhwc(reference["out_tf"]), TOLERANCE)


def test_an_image_that_is_not_square():
    reference = load("unet_base")
    some = slice(0, 2)
    found = forward("base", reference["x_rect"], reference["t"][some], text_of("base", some))
    assert_close(found, nhwc(reference["out_rect"]), TOLERANCE)


@pytest.mark.parametrize("name", ["inpaint", "superres_inpaint"])
def test_without_known_pixels_the_whole_image_is_generated(name):
    reference = load(f"unet_{name}")
    images = {k: v for k, v in images_of(name).items() if k == "low_res"}
    found = forward(name, reference["x"], reference["t"], text_of(name), **images)
    assert_close(found, nhwc(reference["out_no_inpaint"]), TOLERANCE)


@pytest.mark.parametrize("name", ["alt_add", "alt_notext"])
def test_switches_that_no_model_of_openai_uses(name):
    """Added time embedding, convolutions to resample, fixed head counts, no padding embedding."""
    reference = load(f"unet_{name}")
    text = text_of(name) if name == "alt_add" else None
    found = forward(name, reference["x"], reference["t"], text)
    assert_close(found, nhwc(reference["out"]), TOLERANCE)


@pytest.mark.parametrize(
    ("dtype", "worst", "rms"), [("float16", 8e-3, 2e-3), ("bfloat16", 8e-2, 1.5e-2)]
)
def test_a_sixteen_bit_trunk(dtype, worst, rms):
    """The error is at most twice that of the original code in that dtype; the output is float32."""
    reference = load("unet_base")
    model = GLIDE(golden.config("base"), jnp.dtype(dtype))

    @jax.jit
    def run(params, tokens, mask, x, t):
        text = model.apply({"params": params}, tokens, mask, method=GLIDE.encode_text)
        return text, model.apply({"params": params}, x, t, text)

    tokens = np.asarray(reference["tokens"], np.int32)
    text, found = run(
        golden.weights("base"), tokens, reference["mask"], nhwc(reference["x"]), reference["t"]
    )
    assert found.dtype == text.pooled.dtype == np.float32
    assert text.sequence.dtype == dtype
    assert error(found, nhwc(reference["out"])) < worst
    off = np.sqrt(((found - nhwc(reference["out"])) ** 2).mean())
    assert rms / 10 < off < rms


# --- properties


def test_the_tokens_of_padded_positions_do_not_matter():
    reference = load("unet_base")
    tokens, mask = reference["tokens"], reference["mask"]
    text = encode("base", tokens, mask)
    other = encode("base", np.where(mask, tokens, 7), mask)
    assert error(other.sequence, text.sequence) == error(other.pooled, text.pooled) == 0


def test_a_new_network_predicts_zero():
    """Training then starts at the mean; every residual branch starts at zero too."""
    reference = load("unet_base")
    params = first_weights(init_params, golden.model("base"))
    for path, leaf in flatten(params).items():
        starts_at_zero = path.endswith("/bias") or path.endswith(
            ("conv_2/kernel", "attn/proj/kernel", "unet/head/kernel")
        )
        assert starts_at_zero == (not np.asarray(leaf).any()), path
    text = text_of("base")
    assert not forward("base", reference["x"], reference["t"], text, params=params).any()


def test_a_new_guidance_scale_input_changes_no_bit_and_a_trained_one_does():
    plain, scaled = (replace(golden.config("base"), guidance_scale_input=g) for g in (False, True))
    x = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    t, text = jnp.array([10.0, 900.0]), text_of("base", slice(2))
    params = golden.weights("base")

    def run(config, params, **inputs):
        return GLIDE(config).apply({"params": params}, x, t, text, **inputs)

    extended = flatten(first_weights(init_params, GLIDE(scaled))) | flatten(params)
    before = run(plain, params)
    for scale in (None, jnp.array([1.0, 4.0])):
        found = run(scaled, unflatten(extended), guidance_scale=scale)
        np.testing.assert_array_equal(found, before)
    extended["unet/guidance_2/kernel"] = 0.1 + extended["unet/guidance_2/kernel"]
    trained = [
        run(scaled, unflatten(extended), guidance_scale=scale)
        for scale in (None, jnp.ones(2), jnp.array([1.0, 4.0]))
    ]
    np.testing.assert_array_equal(trained[0], trained[1])
    np.testing.assert_allclose(trained[0][0], trained[2][0], atol=1e-5)
    assert np.abs(trained[0][1] - trained[2][1]).max() > 1e-3
    with pytest.raises(ValueError, match="takes no guidance_scale"):
        run(plain, params, guidance_scale=jnp.ones(2))


def test_dropout_acts_only_in_training():
    reference = load("unet_base")
    text = text_of("base")

    @jax.jit
    def run(key):
        return golden.model("base").apply(
            {"params": golden.weights("base")},
            nhwc(reference["x"]),
            reference["t"],
            text,
            dropout_keys=jax.random.split(key, len(reference["x"])),
        )

    one, two = run(quick_key(0)), run(quick_key(1))
    assert error(one, two) > 0.01
    assert error(one, nhwc(reference["out"])) > 0.01


@pytest.mark.parametrize(
    ("name", "images", "text", "message"),
    [
        ("superres", {}, True, "needs low_res"),
        ("base", {"low_res": (4, 4, 3)}, True, "takes no low_res"),
        ("base", {"inpaint_image": (16, 16, 3)}, True, "takes no inpaint_image"),
        ("superres", {"low_res": (4, 4, 3), "inpaint_known": (16, 16, 1)}, True, "inpaint_known"),
        ("inpaint", {"inpaint_image": (16, 16, 3)}, True, "inpaint_known go together"),
        ("inpaint", {"inpaint_known": (16, 16, 1)}, True, "inpaint_known go together"),
        ("base", {}, False, "needs text features"),
        ("alt_notext", {}, True, "takes no text features"),
    ],
)
def test_inputs_that_a_variant_does_not_take(name, images, text, message):
    features = text_of("base", slice(0, 1)) if text else None
    images = {k: np.zeros((1, *shape), np.float32) for k, shape in images.items()}
    with pytest.raises(ValueError, match=message):
        golden.model(name).apply(
            {"params": golden.weights(name)},
            np.zeros((1, 16, 16, 3)),
            np.zeros(1),
            features,
            **images,
        )


def test_sizes_that_do_not_fit():
    text = text_of("base", slice(0, 1))
    with pytest.raises(ValueError, match="multiples of 2"):
        forward("base", np.zeros((1, 3, 16, 15), np.float32), np.zeros(1), text)
    with pytest.raises(ValueError, match="tokens must be"):
        encode("base", np.zeros((1, 15)), np.zeros((1, 15), bool))
    with pytest.raises(ValueError, match="one of base"):
        ModelConfig(variant="upscale")
    with pytest.raises(ValueError, match="multiple of 32"):
        ModelConfig(model_channels=48)
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1, not 1"):
        ModelConfig(dropout=1)
    with pytest.raises(ValueError, match="num_head_channels 128 does not divide the 192 channels"):
        ModelConfig(model_channels=64, num_head_channels=128, channel_mult=(1, 2, 3))
    small = ModelConfig(model_channels=64, channel_mult=(1, 2), num_head_channels=-1, num_heads=4)
    for fields, message in [
        ({"out_channels": 4}, "out_channels must be 6, with learned variance, or 3, not 4"),
        ({"image_size": 65}, "image_size must be a multiple of 2, not 65"),
        ({"image_size": 0}, "image_size must be a multiple of 2, not 0"),
        ({"image_size": -2}, "image_size must be a multiple of 2, not -2"),
        ({"num_heads": 7}, "num_heads 7 does not divide the 128 channels"),
        ({"num_heads": 0}, "num_heads 0 does not divide the 128 channels"),
        ({"num_heads_upsample": 3}, "num_heads_upsample 3 does not divide the 128 channels"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(small, **fields)
    # Without attention in the decoder its number of heads has no effect.
    assert replace(small, num_heads_upsample=3, attention_ds=()).num_heads_upsample == 3
    with pytest.raises(
        ValueError, match="unknown field 'chanel_mult', did you mean 'channel_mult'"
    ):
        model_config({"chanel_mult": [1, 2]})


# --- weights


def test_parameter_counts_of_openai_models():
    counts = {
        "base64": 385_030_726,
        "upsample256": 398_361_286,
        "inpaint64": 385_037_638,
        "inpaint256": 398_368_198,
    }
    assert {name: count_params(PRESETS[name]()) for name in counts} == counts


def test_parameter_counts_of_the_paper():
    """3.5 billion: "2.3 billion" for the image, "1.2 billion" for the text transformer (4.1)."""
    flat = flatten(abstract_params(PRESETS["base64-paper"]()))

    def count(prefix):
        return sum(leaf.size for path, leaf in flat.items() if path.startswith(prefix))

    assert count("") == 3_554_414_086
    assert count("unet/") == 2_238_164_486
    assert count("text/block_") == 1_208_598_528
    assert count_params(PRESETS["upsample256-paper"]()) == 1_540_932_998


@pytest.mark.parametrize("name", [*VARIANTS, "alt_add", "alt_notext"])
def test_round_trip_to_openai_names(name):
    wanted = golden.state_dict(name)
    back = to_released(golden.weights(name))
    assert set(back) == set(wanted)
    for key, array in back.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, wanted[key], key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("out.2.bias"), r"1 missing \(out\.2\.bias\)"),
        (lambda w: w.update(extra=np.zeros(3)), r"1 unexpected \(extra\)"),
        (
            lambda w: w.update({"out.2.bias": np.zeros(5)}),
            r"1 of the wrong shape \(out\.2\.bias \(5,\), not \(6,\)\)",
        ),
    ],
)
def test_weights_that_do_not_fit(change, message):
    weights = dict(golden.state_dict("base"))
    change(weights)
    with pytest.raises(GlideError, match=message) as caught:
        from_released(golden.config("base"), weights)
    assert str(caught.value).isprintable()


def test_weights_of_another_variant():
    """The message lists all kinds of faults, each with its first names."""
    with pytest.raises(GlideError, match=r"wrong shape \(input_blocks\.0\.0\.weight"):
        from_released(golden.config("inpaint"), golden.state_dict("base"))
    with pytest.raises(GlideError, match=r"2 missing \(.*\); 99 of the wrong shape .*, \.\.\.\)"):
        from_released(golden.config("base"), golden.state_dict("superres"))
    bigger = replace(golden.config("base"), xf_layers=3)
    with pytest.raises(GlideError, match=r"12 missing \(transformer\.resblocks\.2\.attn"):
        from_released(bigger, golden.state_dict("base"))


# --- patches and residuals


def test_a_residual_upsampler_begins_as_the_bicubic_enlargement():
    config = replace(
        TINY, variant="superres", image_size=16, patch=4, residual=True, out_channels=3
    )
    model = GLIDE(config)
    params = init_params(model, jax.random.key(0))
    small = jax.random.uniform(jax.random.key(1), (2, 4, 4, 3)) * 2 - 1
    text = model.apply(
        {"params": params}, jnp.zeros((2, 8), int), jnp.ones((2, 8), bool), method=GLIDE.encode_text
    )
    x = jax.random.normal(jax.random.key(2), (2, 16, 16, 3))
    out = model.apply({"params": params}, x, jnp.array([3, 900]), text, low_res=small)
    np.testing.assert_allclose(
        out, jax.image.resize(small, (2, 16, 16, 3), "bicubic", antialias=False), atol=1e-6
    )


def test_sizes_and_options_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="patch divides the image size 16, not 3"):
        replace(TINY, patch=3)
    with pytest.raises(ValueError, match="residual is for upsamplers"):
        replace(TINY, residual=True)
    config = replace(TINY, patch=2, channel_mult=(1, 2))
    assert config.size_multiple == 4
    shapes = flatten(abstract_params(config))
    assert shapes["unet/down_0/kernel"].shape[2:] == (12, 32)
    assert shapes["unet/head/kernel"].shape[-1] == 24
