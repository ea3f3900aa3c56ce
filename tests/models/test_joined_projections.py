"""Layers of all blocks joined into one: which weights they hold, and the same outputs."""

import jax
import numpy as np
import pytest

from glide_jax.models.joined_projections import JOINED, join_projections
from glide_jax.weights.store import flatten
from tests.support import golden
from tests.support.golden import load

ALL = tuple(JOINED)


@pytest.mark.parametrize("name", ["base", "superres", "alt_add", "alt_notext"])
def test_outputs_are_those_of_separate_layers(name):
    """`alt`: the embedding is added, and convolutions resample."""
    reference = load("unet_alt_add" if name.startswith("alt") else f"unet_{name}")
    text = None
    if name != "alt_notext":
        text = golden.encode(name, reference["tokens"], reference["mask"])
    images = {"low_res": reference["low_res"]} if "low_res" in reference else {}
    inputs = name, reference["x"], reference["t"], text
    joined = join_projections(golden.weights(name), ALL)
    found = golden.forward(*inputs, params=joined, **images)
    golden.assert_close(found, golden.forward(*inputs, **images), 1e-5)
    left = [path for path in flatten(joined) if {"emb", "text_kv"} & set(path.split("/"))]
    assert not left and JOINED["emb"] in joined["unet"]
    assert (JOINED["text_kv"] in joined["unet"]) == (text is not None)


def test_only_the_layers_that_are_named():
    params = golden.weights("base")
    joined = join_projections(params, ("emb",))["unet"]
    assert JOINED["text_kv"] not in joined
    blocks = "down_1_res", "down_2_res"
    kernels = [flatten(params)[f"unet/{block}/emb/kernel"] for block in blocks]
    width = sum(kernel.shape[1] for kernel in kernels)
    start = joined[JOINED["emb"]]["kernel"][:, :width]
    np.testing.assert_array_equal(start, np.concatenate(kernels, axis=1))


def test_layers_with_a_low_rank_pair_stay():
    params = golden.weights("base")
    block = params["unet"]["mid_attn"]
    shape = block["text_kv"]["kernel"].shape
    pair = {"lora_a": np.ones((shape[0], 2), np.float32), "lora_b": np.ones((2, shape[1]))}
    unet = params["unet"] | {"mid_attn": block | {"text_kv": block["text_kv"] | pair}}
    joined = join_projections(params | {"unet": unet}, ALL)["unet"]
    assert joined["mid_attn"] == unet["mid_attn"] and JOINED["text_kv"] not in joined
    assert JOINED["emb"] in joined


def test_weights_on_a_device_stay_there():
    params = jax.device_put(golden.weights("base"))
    joined = join_projections(params, ALL)["unet"][JOINED["emb"]]["kernel"]
    assert isinstance(joined, jax.Array)
