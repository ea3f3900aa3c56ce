"""Low-rank pairs as files, and merged into weights."""

import numpy as np
import pytest

from glide_jax.errors import GlideError, UsageError
from glide_jax.models.presets import PRESETS, toy_model
from glide_jax.weights.lora import (
    LoRA,
    adapted_layers,
    checksum,
    merge,
    print_other_base,
    read_lora,
    save_lora,
    to_pairs,
)
from glide_jax.weights.released import abstract_params
from glide_jax.weights.store import map_arrays, save_arrays, unflatten

RNG = np.random.default_rng(0)
LAYER = "unet/mid_attn/qkv"


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


PARAMS = unflatten(
    {
        f"{LAYER}/kernel": normal(6, 9),
        f"{LAYER}/bias": normal(9),
        "unet/mid_attn/proj/kernel": normal(6, 6),
        "unet/head/kernel": normal(3, 3, 6, 3),
    }
)
KERNEL = PARAMS["unet"]["mid_attn"]["qkv"]["kernel"]


def lora(name="a", rank=2, alpha=4.0, layer=LAYER, shape=(6, 9), **more):
    pairs = {layer: (normal(shape[0], rank), normal(rank, shape[1]))}
    return LoRA(name, pairs, rank, alpha, **more)


def kernel_of(params):
    return params["unet"]["mid_attn"]["qkv"]["kernel"]


def test_two_with_weights_are_the_sum_by_hand():
    one, two = lora(), lora("b", rank=3, alpha=1.5)
    merged = merge(PARAMS, [(one, 0.7), (two, -0.25)])
    (a, b), (c, d) = one.pairs[LAYER], two.pairs[LAYER]
    by_hand = KERNEL + 0.7 * (4 / 2) * a.astype(float) @ b - 0.25 * (1.5 / 3) * c.astype(float) @ d
    np.testing.assert_array_equal(kernel_of(merged), by_hand.astype(np.float32))
    assert kernel_of(merged).dtype == np.float32
    swapped = merge(PARAMS, [(two, -0.25), (one, 0.7)])
    np.testing.assert_allclose(kernel_of(swapped), kernel_of(merged), rtol=1e-6)
    # Everything else, and the weights given, are the same arrays.
    assert merged["unet"]["head"]["kernel"] is PARAMS["unet"]["head"]["kernel"]
    assert kernel_of(PARAMS) is KERNEL


def test_weight_zero_is_the_base_to_the_bit():
    merged = merge(PARAMS, [(lora(), 0.0), (lora("b"), -0.0)])
    assert kernel_of(merged) is KERNEL


def test_a_weight_and_its_negative_cancel():
    one = lora()
    merged = merge(PARAMS, [(one, 0.3), (one, -0.3)])
    np.testing.assert_array_equal(kernel_of(merged), KERNEL)


@pytest.mark.parametrize("weight", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused(weight):
    with pytest.raises(UsageError, match=r"^the weight of a must be finite, not -?(nan|inf)$"):
        merge(PARAMS, [(lora(), weight)])


@pytest.mark.parametrize(
    ("layer", "shape", "have"),
    [
        (LAYER, (6, 12), r"a kernel of \(6, 9\)"),
        (LAYER, (8, 9), r"a kernel of \(6, 9\)"),
        ("text/block_0/fc_1", (6, 9), "no such layer"),
        ("unet/head", (6, 9), r"a kernel of \(3, 3, 6, 3\)"),
    ],
)
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_pairs_of_another_network_are_one_line_with_the_layer(layer, shape, have, weight):
    wrong = rf"^a does not fit these weights: its pair of {layer} .* the network has {have}$"
    with pytest.raises(GlideError, match=wrong):
        merge(PARAMS, [(lora(layer=layer, shape=shape), weight)])


@pytest.mark.parametrize("preset", ["base64", "upsample256", "inpaint64", "inpaint256"])
def test_all_attention_and_text_layers_of_each_variant_are_found(preset):
    shapes = abstract_params(toy_model(PRESETS[preset]()))
    blocks = [name for name in shapes["unet"] if name.endswith("_attn")]
    attention = adapted_layers(shapes, ["attention"])
    assert len(blocks) > 3
    wanted = {f"unet/{b}/{part}" for b in blocks for part in ("qkv", "text_kv", "proj")}
    assert set(attention) == wanted
    text = adapted_layers(shapes, ["text"])
    assert set(text) == {f"text/block_0/{part}" for part in ("qkv", "proj", "fc_1", "fc_2")}
    assert adapted_layers(shapes, ["text", "attention"]) == adapted_layers(
        shapes, ["attention", "text"]
    )
    assert set(adapted_layers(shapes, ["attention", "text"])) == wanted | set(text)


def test_a_network_without_such_layers_is_refused():
    with pytest.raises(UsageError, match="the network has no text layers: change lora.layers"):
        adapted_layers(PARAMS, ["attention", "text"])


# --- files


def test_a_file_is_read_as_it_was_written(tmp_path):
    wrote = lora(alpha=0.1, base="emoji64", checksum=checksum(PARAMS))
    save_lora(tmp_path / "a.safetensors", wrote)
    found = read_lora(tmp_path / "a.safetensors")
    assert found.name == str(tmp_path / "a.safetensors")
    for name in ("rank", "alpha", "base", "checksum"):
        assert getattr(found, name) == getattr(wrote, name)
    for a, b in zip(found.pairs[LAYER], wrote.pairs[LAYER], strict=True):
        np.testing.assert_array_equal(a, b)
    arrays, metadata = map_arrays(tmp_path / "a.safetensors")
    assert list(arrays) == [f"{LAYER}/lora_a", f"{LAYER}/lora_b"]
    assert metadata["rank"] == "2" and metadata["base"] == "emoji64"


A, B = f"{LAYER}/lora_a", f"{LAYER}/lora_b"
GOOD = {"format": "glide-jax lora 1", "rank": "2", "alpha": "4.0"}


@pytest.mark.parametrize(
    ("arrays", "metadata", "message"),
    [
        ({A: normal(6, 2), B: normal(2, 9)}, {}, "holds no pairs of glide-jax"),
        ({A: normal(6, 2)}, GOOD, f"damaged .*{B} is no part of a pair"),
        ({A: normal(6, 2), B: normal(2, 9), "x": normal(1)}, GOOD, "no part of a pair"),
        ({}, GOOD, "no part of a pair"),
        ({A: normal(6, 3), B: normal(3, 9)}, GOOD, f"the pair of {LAYER} is not of rank 2"),
        ({A: normal(12), B: normal(2, 9)}, GOOD, f"the pair of {LAYER} is not of rank 2"),
        ({A: normal(6, 2) * np.nan, B: normal(2, 9)}, GOOD, f"pair of {LAYER} is not finite"),
        ({A: normal(6, 2), B: normal(2, 9)}, GOOD | {"rank": "0"}, "rank 0 and alpha 4.0"),
        ({A: normal(6, 2), B: normal(2, 9)}, GOOD | {"alpha": "nan"}, "alpha nan"),
        ({A: normal(6, 2), B: normal(2, 9)}, GOOD | {"rank": "two"}, "damaged"),
    ],
)
def test_another_file_is_one_line_with_its_name(tmp_path, arrays, metadata, message):
    save_arrays(tmp_path / "x.safetensors", arrays, metadata)
    with pytest.raises(GlideError, match=rf"x\.safetensors .*{message}") as error:
        read_lora(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


def test_an_altered_file_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    save_lora(file, lora())
    whole = file.read_bytes()
    for changed in (whole[:-1] + bytes([whole[-1] ^ 1]), whole.replace(b'"4.0"', b'"9.0"')):
        assert changed != whole
        file.write_bytes(changed)
        with pytest.raises(GlideError, match=r"a\.safetensors is incomplete or damaged"):
            read_lora(file)


def test_the_checksum_is_that_of_the_values():
    assert checksum(PARAMS) == checksum(dict(reversed(PARAMS.items())))
    changed = merge(PARAMS, [(lora(), 1e-3)])
    assert checksum(changed) != checksum(PARAMS)
    renamed = unflatten({"unet/other/kernel": KERNEL})
    assert checksum(renamed) != checksum(unflatten({"unet/name/kernel": KERNEL}))


def test_a_note_names_pairs_of_other_weights(capsys):
    print_other_base([lora(checksum=checksum(PARAMS), base="x"), lora("new")], PARAMS, "mine")
    assert capsys.readouterr().err == ""
    print_other_base([lora(checksum="00000000", base="x")], PARAMS, "mine")
    err = capsys.readouterr().err
    assert err == "note: a was trained on x, whose weights are not those of mine\n"


def test_a_tree_of_pairs_is_sorted_by_layer():
    tree = unflatten({B: normal(2, 9), A: normal(6, 2)})
    (a, b) = to_pairs(tree)[LAYER]
    assert a.shape == (6, 2) and b.shape == (2, 9)
