"""LoRA in training: its first step, and runs from the command line."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

import glide_jax as glide
from glide_jax.errors import GlideError, UsageError
from glide_jax.models.presets import ModelConfig
from glide_jax.training.config import OptimiserConfig, TrainConfig, check_same_model, write_config
from glide_jax.training.export import export
from glide_jax.training.lora_config import LoRAConfig
from glide_jax.training.objectives import Batch, make_objective
from glide_jax.training.recipes import load_recipe
from glide_jax.training.runs import load_run, open_lora, restore_run
from glide_jax.training.state import recipe_state
from glide_jax.training.step import train_step
from glide_jax.weights import from_released, read_torch_file
from glide_jax.weights.lora import KERNEL, adapted_layers, checksum, merge, save_lora, to_pairs
from glide_jax.weights.registry import load_model
from glide_jax.weights.store import flatten
from tests.support.commands import RECIPE, make_images, make_weights, one_line, run

# So large that the changes are well above the rounding of the weights.
RATE = 1000.0
MODEL = load_recipe(RECIPE).model
assert isinstance(MODEL, ModelConfig)
TEXT = MODEL.xf_width


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the weights `base` and `other`, and with `images`."""
    folder = tmp_path_factory.mktemp("lora")
    make_weights(folder / "base", MODEL)
    make_weights(folder / "other", MODEL, seed=1)
    make_images(folder / "images")
    return folder


# --- the first step


def recipe(rank=0, **more):
    lora = LoRAConfig(rank, more.pop("alpha", float(rank or 1)), more.pop("layers", ("text",)))
    return TrainConfig(name="law", model=MODEL, batch_size=4, lora=lora, **more)


def batch():
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    tokens = rng.integers(0, 1000, (4, 8), dtype=np.int32)
    return Batch(image, tokens, np.ones((4, 8), bool), np.arange(4, dtype=np.int32))


def first_update(config, params, pairs=None):
    """Return the network's flat parameters before and after one step of gradient descent."""
    import optax

    objective, descent = make_objective(config), optax.sgd(RATE)
    state = recipe_state(config, objective, params if pairs is None else pairs, {})
    state = replace(
        state,
        opt_state=descent.init(state.params),
        reference_params={} if pairs is None else params,
    )
    with jax.default_matmul_precision("highest"):
        after, _ = jax.jit(
            lambda state, rows: train_step(
                state,
                rows,
                jax.random.key(1),
                loss=objective.loss,
                optimiser=descent,
                loss_inputs=objective.loss_inputs,
                config=OptimiserConfig(),
            )
        )(state, batch())
    whole = []
    for s in (state, after):
        if pairs is None:
            whole.append(flatten(s.params))
        else:
            lora = glide.weights.lora.LoRA("", to_pairs(s.params), config.lora.rank, 1.0)
            lora = replace(lora, alpha=config.lora.alpha)
            whole.append(flatten(merge(s.reference_params, [(lora, 1.0)])))
    return whole, after


@pytest.fixture(scope="module")
def base(folder):
    return load_model(folder / "base").params


@pytest.fixture(scope="module")
def usual(base):
    """The changes of the kernels by a first step of fine-tuning."""
    (before, after), _ = first_update(recipe(), base)
    return {path: np.asarray(after[path]) - before[path] for path in before}


def pairs_of(config):
    return make_objective(config).init(jax.random.key(0))


def test_the_first_step_at_full_rank_is_that_of_fine_tuning(base, usual):
    """All inputs of the text layers but that of fc_2 have the width of the text."""
    config = recipe(TEXT)
    (before, after), state = first_update(config, base, pairs_of(config))
    for layer in ("qkv", "proj", "fc_1"):
        path = f"text/block_0/{layer}/kernel"
        step = after[path] - before[path]
        assert np.abs(usual[path]).max() > 1e-5
        np.testing.assert_allclose(step, usual[path], atol=2e-3 * np.abs(usual[path]).max())
    # A does not move in the first step, since B is zero.
    first = flatten(pairs_of(config))
    for path, array in flatten(state.params).items():
        if path.endswith("lora_a"):
            np.testing.assert_array_equal(array, first[path])
        else:
            assert np.abs(array).max() > 0
    # Nor does anything that has no pair.
    unchanged = [p for p in before if not p.startswith("text/block_0")]
    assert all(np.array_equal(before[p], after[p]) for p in unchanged)


def test_a_rank_above_the_width_is_full_too(base, usual):
    config = recipe(TEXT + 8)
    (before, after), _ = first_update(config, base, pairs_of(config))
    path = "text/block_0/qkv/kernel"
    np.testing.assert_allclose(
        after[path] - before[path], usual[path], atol=2e-3 * np.abs(usual[path]).max()
    )


def test_the_first_step_at_a_lower_rank_is_its_projection(base, usual):
    """By `-lr s^2 A A^T G`, with s = alpha / rank = 2."""
    config = recipe(4, alpha=8.0, layers=("attention", "text"))
    pairs = pairs_of(config)
    (before, after), _ = first_update(config, base, pairs)
    a_of = {layer: a for layer, (a, _) in to_pairs(pairs).items()}
    assert set(a_of) == set(adapted_layers(base, ["attention", "text"]))
    for layer, a in a_of.items():
        np.testing.assert_allclose(a.T @ a, np.eye(4), atol=1e-5)
        step = after[layer + KERNEL] - before[layer + KERNEL]
        wanted = 4 * a @ a.T @ usual[layer + KERNEL]
        np.testing.assert_allclose(step, wanted, atol=4e-3 * np.abs(wanted).max())


def test_a_run_begins_as_its_base_whatever_the_rank(base):
    config = recipe(3)
    objective, plain = make_objective(config), make_objective(recipe())
    key = jax.random.key(2)
    ours = objective.loss(pairs_of(config), batch(), key, base=base)[0]
    theirs = plain.loss(base, batch(), key)[0]
    assert ours == theirs


def test_pairs_beside_kernels_compute_what_merged_kernels_do(base):
    config = recipe(4, alpha=6.0, layers=("attention", "text"))
    objective = make_objective(config)
    rng = np.random.default_rng(5)
    pairs = jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(np.float32) / 2, pairs_of(config)
    )
    lora = glide.weights.lora.LoRA("", to_pairs(pairs), 4, 6.0)
    with jax.default_matmul_precision("highest"):
        beside = objective.loss(pairs, batch(), jax.random.key(2), base=base)[0]
        merged = make_objective(recipe()).loss(
            merge(base, [(lora, 1.0)]), batch(), jax.random.key(2)
        )[0]
        plain = make_objective(recipe()).loss(base, batch(), jax.random.key(2))[0]
    np.testing.assert_allclose(beside, merged, rtol=1e-5)
    assert abs(beside - plain) > 2e-4


# --- runs


def arguments(folder, out, steps, *more):
    return [
        "train.py", "--config", RECIPE, "--data.source", folder / "images", "--out", out,
        "--init-from", folder / "base", "--lora.rank", 4, "--steps", steps, "--save-every", 20,
        "--sample-every", 0, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole_run(folder):
    """A run of 40 steps from `base`."""
    result = run(*arguments(folder, folder / "run", 40, "--sample-every", 40))
    assert result.returncode == 0, result.stderr
    return folder / "run"


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_run_learns_and_saves_the_pairs_alone(whole_run, folder, base):
    config, state = restore_run(whole_run)
    assert state.reference_params == {}
    # Pairs, EMA, and two moments, in float32.
    pairs = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert pairs == sum(
        4 * sum(flatten(base)[layer + KERNEL].shape)
        for layer in adapted_layers(base, ["attention", "text"])
    )
    numbers = sum(np.size(leaf) for leaf in jax.tree.leaves(state))
    assert 4 * pairs <= numbers <= 4 * pairs + 8
    assert size(whole_run / "checkpoints" / "40") < 0.1 * size(folder / "base")
    assert (whole_run / "samples" / "step_000040.png").exists()
    assert json.loads((whole_run / "base.json").read_text()) == {
        "base": str(folder / "base"),
        "checksum": checksum(base),
    }

    merged = load_run(whole_run).params
    changed = {path.removesuffix(KERNEL) for path, array in flatten(merged).items()
               if not np.array_equal(array, flatten(base)[path])}  # fmt: skip
    assert changed == set(adapted_layers(base, ["attention", "text"]))
    np.testing.assert_array_equal(
        flatten(load_model(folder / "base").params)["unet/mid_attn/qkv/kernel"],
        flatten(base)["unet/mid_attn/qkv/kernel"],
    )
    assert loss_of(folder, config, merged) < 0.97 * loss_of(folder, config, base)


def loss_of(folder, config, params):
    """The loss of the training images with fixed noise."""
    from glide_jax.training.validation import Validation

    data = replace(config.data, source=str(folder / "images"))
    config = replace(config, data=data, lora=LoRAConfig(), validation_split="train")
    return Validation(config, make_objective(config))(params, 8)["loss"]


def test_a_resumed_run_equals_an_uninterrupted_one(whole_run, folder):
    command = arguments(folder, folder / "cut", 20), arguments(folder, folder / "cut", 40)
    for some in command:
        result = run(*some)
        assert result.returncode == 0, result.stderr
    assert "step 20 of 40" in result.stdout
    states = [restore_run(folder / name)[1] for name in ("run", "cut")]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_is_sampled_exported_and_passed_on_as_a_small_file(whole_run, folder, base):
    found = open_lora(whole_run)
    (a, b) = found.pairs["unet/mid_attn/qkv"]
    kernel = base["unet"]["mid_attn"]["qkv"]["kernel"]
    by_hand = (kernel + (16 / 4) * a.astype(float) @ b).astype(np.float32)

    def kernel_of(pipe):
        return np.asarray(pipe.model.params["unet"]["mid_attn"]["qkv"]["kernel"])

    np.testing.assert_array_equal(kernel_of(glide.load(whole_run)), by_hand)
    file = folder / "pairs.safetensors"
    result = run("-m", "glide_jax", "weights", "lora", whole_run, file)
    assert result.returncode == 0 and "7 pairs" in result.stdout, result.stdout + result.stderr
    assert file.stat().st_size < 0.02 * size(folder / "base")
    halves = [(file, 0.5), f"{file}:0.5"]
    for lora in (whole_run, file, str(file), (file, 1.0), [file], f"{file}:1", halves):
        np.testing.assert_array_equal(kernel_of(glide.load(folder / "base", lora=lora)), by_hand)
    zero = glide.load(folder / "base", lora=[f"{file}:0"])
    np.testing.assert_array_equal(kernel_of(zero), kernel)

    export(whole_run, folder / "exported")
    exported = load_model(folder / "exported").params
    np.testing.assert_allclose(kernel_of(glide.load(folder / "exported")), by_hand, rtol=1e-2)
    assert set(flatten(exported)) == set(flatten(base))
    result = run("-m", "glide_jax", "weights", "convert", whole_run, folder / "merged.pt")
    assert result.returncode == 0, result.stderr
    back = from_released(MODEL, read_torch_file(folder / "merged.pt"))
    np.testing.assert_array_equal(flatten(back)["unet/mid_attn/qkv/kernel"], by_hand)


def test_pairs_are_given_on_the_command_line(whole_run, folder):
    images = []
    halves = ("--lora", f"{whole_run}:0.5") * 2
    for more in ((), ("--lora", whole_run), halves):
        out = folder / f"samples-{len(more)}"
        result = run(
            "sample.py", "red", *more, "--weights", folder / "base", "--steps", 2, "--out", out
        )
        assert result.returncode == 0 and "note:" not in result.stderr, result.stderr
        images.append(next(out.glob("*.png")).read_bytes()[-600:])
    assert images[0] != images[1] == images[2]


# --- errors


def test_pairs_on_other_weights_of_the_same_shape_are_a_note(whole_run, folder, capsys):
    glide.load(folder / "other", lora=whole_run)
    assert capsys.readouterr().err == (
        f"note: {whole_run} was trained on {folder / 'base'}, whose weights are not those of "
        f"{folder / 'other'}\n"
    )


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("nowhere", r"there is no LoRA 'nowhere': name a run or a \.safetensors file"),
        ("nowhere:0.5", r"there is no LoRA 'nowhere': name a run or a \.safetensors file"),
        ("{run}:nan", "the weight of .*run must be finite, not nan"),
        (("{run}", float("inf")), "the weight of .* must be finite, not inf"),
        ("{run}:half", "the weight of .*run must be a number, not 'half'"),
        ("{base}", "there is no LoRA .*base': name a run or a .safetensors file"),
        ("{base}/model.safetensors", "holds no pairs of glide-jax"),
    ],
)
def test_a_lora_that_is_none_is_one_line(whole_run, folder, lora, message):
    def named(text):
        return text.format(run=whole_run, base=folder / "base") if isinstance(text, str) else text

    lora = tuple(map(named, lora)) if isinstance(lora, tuple) else named(lora)
    with pytest.raises(GlideError, match=message) as error:
        glide.load(folder / "base", lora=lora)
    assert "\n" not in str(error.value)


def test_pairs_do_not_fit_another_size(whole_run, folder):
    message = (
        r"run does not fit these weights: its pair of text/block_0/fc_1 is for a kernel of "
        r"\(8, 32\), the network has a kernel of \(128, 512\)$"
    )
    with pytest.raises(GlideError, match=message):
        glide.load("emoji64", upsampler="none", clip_model="none", lora=whole_run)


def test_a_base_that_changed_or_vanished_is_named(whole_run, folder, tmp_path):
    import shutil

    copy = shutil.copytree(whole_run, tmp_path / "run")
    written = json.loads((copy / "config.json").read_text())
    for base, message in (
        ("nowhere", r"run is a LoRA, and its base cannot be read: there are no weights 'nowhere'"),
        (str(folder / "other"), r"run was trained on other weights than those of .*other"),
    ):
        (copy / "config.json").write_text(json.dumps(written | {"init_from": base}))
        with pytest.raises(GlideError, match=message) as error:
            load_run(copy)
        assert "\n" not in str(error.value)
    result = run(*arguments(folder, copy, 60, "--init-from", folder / "other"))
    assert "was trained on other weights than those of" in one_line(result, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora": {"rank": -1}}, "lora.rank cannot be negative"),
        ({"lora": {"rank": 1, "alpha": 0.0}}, "lora.alpha must be above 0, not 0"),
        ({"lora": {"layers": ("mlp",)}}, "layers are one or more of attention, text, not mlp"),
        ({"lora": {"layers": ()}}, "layers are one or more of attention, text, not none"),
        ({"optimiser": OptimiserConfig(freeze=("text",))}, "leave optimiser.freeze empty"),
        ({"optimiser": OptimiserConfig(ema_widths=(0.1,))}, "leave optimiser.ema_widths empty"),
        ({"optimiser": OptimiserConfig(kind="muon")}, "lora.rank is for optimiser.kind adamw"),
        ({"objective": "consistency"}, "lora.rank is for objective denoising"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        lora = LoRAConfig(**{"rank": 2} | fields.pop("lora", {}))
        TrainConfig(name="x", model=MODEL, lora=lora, **fields)


def test_a_run_keeps_its_lora_fields(tmp_path):
    config = replace(recipe(4), out=str(tmp_path))
    write_config(config)
    check_same_model(config)
    for lora in (LoRAConfig(4, 8.0, ("text",)), LoRAConfig(), LoRAConfig(2, 4.0, ("text",))):
        with pytest.raises(UsageError, match="holds a run with other lora fields"):
            check_same_model(replace(config, lora=lora))
    # Fields of what is off are none.
    write_config(replace(config, lora=LoRAConfig(0, 8.0)))
    check_same_model(replace(config, lora=LoRAConfig()))


def test_a_model_that_the_base_does_not_fit_is_refused(folder):
    from glide_jax.training.runs import base_of

    larger: ModelConfig = replace(MODEL, variant="inpaint")
    config = replace(recipe(2), model=larger, init_from=str(folder / "base"))
    with pytest.raises(GlideError, match=r"base cannot be the base of this model: 1 parameters"):
        base_of(config)


def test_a_file_without_the_ending_or_in_the_way_is_refused(whole_run, folder):
    taken = folder / "taken.safetensors"
    save_lora(taken, open_lora(whole_run))
    for to, message in ((folder / "pairs.pt", "must end in"), (taken, "exists: remove it")):
        assert message in one_line(run("-m", "glide_jax", "weights", "lora", whole_run, to), 2)
