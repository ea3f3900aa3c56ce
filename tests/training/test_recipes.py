"""The recipes: what each is made of, and whether it learns."""

import ast
import re
import shlex
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from glide_jax.errors import UsageError
from glide_jax.models.presets import PRESETS, clip64, clip64_paper
from glide_jax.pipeline.clip_guide import load_clip
from glide_jax.training.command_line import parse_recipe
from glide_jax.training.config import CLIPTrainConfig, OptimiserConfig, read_config, save_config
from glide_jax.training.export import export, seen_tokens
from glide_jax.training.initial import new_state
from glide_jax.training.objectives import make_objective
from glide_jax.training.recipes import load_recipe, toy
from glide_jax.weights import load_weights
from glide_jax.weights.token_rows import ROWS, TABLE
from glide_jax.weights.store import flatten
from tests import toy_runs
from tests.support.commands import ROOT, TINY, make_weights, one_line, run

FILES = sorted((ROOT / "configs").glob("*.py"))
each_recipe = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)

# Steps and pictures a step, stated in the paper (4.1 to 4.4, B.1) or the recipe's own; and the
# model, whose parameters tests/models/test_models.py counts.
FACTS = {
    "text64": (1_100_000, 2048, "base64"),
    "text64:paper": (2_500_000, 2048, "base64-paper"),
    "cfg64": (500_000, 2048, "base64"),
    "cfg64:paper": (500_000, 2048, "base64-paper"),
    "upsample256": (400_000, 512, "upsample256"),
    "upsample256:paper": (1_600_000, 512, "upsample256-paper"),
    "inpaint64": (500_000, 2048, "inpaint64"),
    "inpaint256": (100_000, 512, "inpaint256"),
    "finetune64": (10_000, 32, "base64"),
}


def recipe(name):
    file, _, size = name.partition(":")
    return load_recipe(f"{ROOT / 'configs' / file}.py" + (size and f":{size}"))


@pytest.mark.parametrize("name", FACTS)
def test_a_recipe_is_of_the_size_that_the_paper_or_the_release_says(name):
    steps, batch_size, preset = FACTS[name]
    config = recipe(name)
    assert (config.steps, config.batch_size) == (steps, batch_size)
    assert config.model == PRESETS[preset]()


@pytest.mark.parametrize(("name", "preset"), [("clip64", clip64), ("clip64:paper", clip64_paper)])
def test_a_clip_learns_its_scale_as_the_original_does(name, preset):
    config = recipe(name)
    assert (config.steps, config.batch_size) == (390_000, 32_768)
    assert config.model == replace(preset(), learn_logit_scale=True, logit_scale=1 / 0.07)


def test_every_recipe_of_the_paper_has_both_sizes():
    for name in ("text64", "cfg64", "upsample256", "inpaint64", "inpaint256", "clip64"):
        released, paper = recipe(f"{name}:released"), recipe(f"{name}:paper")
        assert recipe(name) == released != paper
        assert paper.name == f"{released.name}-paper" and paper.spread == "fsdp"
        variants = [getattr(config.model, "variant", "") for config in (released, paper)]
        assert variants[0] == variants[1]


def test_recipes_differ_in_what_the_paper_says_they_do():
    assert recipe("text64").caption_dropout == 0 and recipe("cfg64").caption_dropout == 0.2
    assert {recipe(f"{n}64").schedule for n in ("text", "cfg", "inpaint", "clip")} == {"cosine"}
    assert {recipe(f"{n}256").schedule for n in ("upsample", "inpaint")} == {"linear"}
    assert recipe("inpaint64").model.variant == "inpaint"
    assert recipe("inpaint256").model.variant == "superres_inpaint"
    assert recipe("clip64:paper").optimiser.weight_decay == 0.0125
    for name in ("text64", "cfg64", "upsample256", "inpaint64", "inpaint256", "finetune64"):
        assert (recipe(name).prediction, recipe(name).weighting) == ("eps", "none")
    for name in ("improved64", "improved256"):
        assert (recipe(name).prediction, recipe(name).weighting) == ("v", "min-snr")
        assert recipe(name).optimiser.ema_power == (0.05, 0.10)
    assert recipe("finetune64").optimiser.freeze == ("text",)


@each_recipe
def test_a_recipe_says_what_to_expect_of_it(file):
    text = file.read_text()
    for what in ("Result:", "Hardware:", "Time:", "Command:"):
        assert what in text
    assert len(text.splitlines()) <= 90


@each_recipe
def test_the_commands_of_a_recipe_are_commands(file):
    """They name recipes that are there, and fields that these have."""
    text = file.read_text().replace("\\\\\n", " ")
    commands = re.findall(r"python train\.py (--config .*)", text)
    assert commands
    for command in commands:
        config, hardware = parse_recipe(shlex.split(command), "")
        assert hardware is None and config.steps > 1


@each_recipe
def test_a_recipe_of_any_size_is_read_back_as_it_was_written(file, tmp_path):
    named = re.search(r"^SIZES = (\(.*\))$", file.read_text(), re.MULTILINE)
    for size in ("", "toy", *(ast.literal_eval(named[1]) if named else ())):
        config = load_recipe(f"{file}:{size}" if size else file)
        save_config(config, tmp_path / "config.json")
        assert read_config(tmp_path / "config.json") == config


@each_recipe
def test_a_toy_is_the_recipe_but_for_its_size(file):
    whole, small = load_recipe(file), load_recipe(f"{file}:toy")
    assert small == toy(whole) and small.name == f"{whole.name}-toy"
    assert not small.init_from
    same = ["schedule", "spread", "diffusion_steps"]
    if not isinstance(whole, CLIPTrainConfig):
        same += ["prediction", "weighting", "caption_dropout", "low_res_noise", "mask_all"]
        assert small.model.variant == whole.model.variant
        assert small.model.low_res_level == whole.model.low_res_level
    for field in same:
        assert getattr(small, field) == getattr(whole, field)
    for field in ("freeze", "ema_power", "moments", "clip", "beta_2", "weight_decay"):
        assert getattr(small.optimiser, field) == getattr(whole.optimiser, field)


def test_a_size_that_a_recipe_lacks_is_named_with_those_it_has():
    with pytest.raises(UsageError, match=r"no size 'papr': choose one of released, paper, toy"):
        recipe("text64:papr")
    with pytest.raises(UsageError, match=r"no size 'paper': choose one of toy"):
        recipe("emoji_inpaint64:paper")
    with pytest.raises(UsageError, match=r"choose one of released, 16gb, 24gb, paper, toy"):
        recipe("finetune64:8gb")


# --- exports


@pytest.fixture
def begun():
    """The state of a run before its first step, of which a few token rows have been seen."""

    def begin(config, rows):
        objective = make_objective(config)
        state = new_state(config, objective, jax.jit(objective.init)(jax.random.key(0)))
        moments = state.opt_state[1][0]
        flat = flatten(moments.nu)
        flat[TABLE] = flat[TABLE].at[np.array(rows)].set(1e-9)
        return replace(state, opt_state=(None, (moments._replace(nu=flat),)))

    return begin


def test_rows_that_the_first_weights_may_know_are_kept(begun, tmp_path, monkeypatch):
    config = replace(recipe("text64"), model=TINY, optimiser=OptimiserConfig())
    state = begun(config, [3, 5])
    assert np.flatnonzero(seen_tokens(config, state)).tolist() == [3, 5]

    # Weights with a whole table, as the released ones have.
    whole = make_weights(tmp_path / "whole")
    assert seen_tokens(replace(config, init_from=str(whole)), state) is None
    assert seen_tokens(replace(config, init_from="openai/base"), state) is None

    # The embedded model has some rows alone.
    embedded = seen_tokens(replace(config, init_from="emoji64"), state)
    _, flat, _ = load_weights(ROOT / "glide_jax" / "assets" / "emoji64")
    assert set(np.flatnonzero(embedded)) == {3, 5} | set(flat[ROWS].tolist())


# --- does it learn


def check(name, result):
    """Raises unless a toy learned its pictures, and from what it was meant to."""
    assert result.after < 0.3 * result.before, result
    for what, loss in result.without.items():
        # Always the same noise: so small a share is no chance.
        assert loss > 1.05 * result.after, (name, what, result)
    if name == "clip64":
        assert result.ranked[0] >= 0.9, result


def test_the_shortest_recipe_learns_is_resumed_exported_and_guides(tmp_path):
    """clip64, from the command line; see `tests.tools.toy_runs` for the others."""
    make_weights(tmp_path / "text64" / "weights")
    result = toy_runs.try_recipe("clip64", tmp_path, steps=150)
    check("clip64", result)

    run_folder, weights = tmp_path / "clip64" / "run", tmp_path / "clip64" / "weights"
    whole, exported = load_clip(run_folder), load_clip(weights)
    assert whole.config == exported.config == load_recipe("configs/clip64.py:toy").model
    _, flat, _ = load_weights(weights)
    assert len(flat[TABLE]) < 20 and exported.params["text"]["token_embedding"].shape[0] > 49_000
    a, b = (np.asarray(clip.encode_text([toy_runs.PROMPT])) for clip in (whole, exported))
    np.testing.assert_allclose(a, b, atol=0.02)
    error = one_line(run("sample.py", "red", "--weights", run_folder, "--out", tmp_path / "s"), 1)
    assert "noised CLIP" in error and "clip" in error


def test_a_clip_is_not_loaded_from_a_run_of_another_kind(tmp_path):
    config = replace(load_recipe("configs/text64.py:toy"), out=str(tmp_path))
    save_config(config, Path(tmp_path) / "config.json")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(Exception, match="no checkpoint"):
        load_clip(tmp_path)
    with pytest.raises(Exception, match="no checkpoint"):
        export(tmp_path, tmp_path / "weights")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toys")


@pytest.mark.slow
@pytest.mark.parametrize("name", toy_runs.TOYS)
def test_a_recipe_learns_is_resumed_exported_and_sampled(name, folder):
    check(name, toy_runs.try_recipe(name, folder))
