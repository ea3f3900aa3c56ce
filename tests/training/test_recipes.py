"""The recipes: how they are found, their fields, and whether they learn."""

import ast
import re
import shlex
from dataclasses import fields, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from glide_jax.data.data_config import DataConfig
from glide_jax.errors import GlideError, UsageError
from glide_jax.models.presets import PRESETS, CLIPConfig, clip64, clip64_paper
from glide_jax.pipeline.clip_guide import load_clip
from glide_jax.pipeline.image_files import read_images
from glide_jax.pipeline.loading import load
from glide_jax.training.command_line import parse_recipe
from glide_jax.training.config import CLIPTrainConfig, OptimiserConfig, read_config, save_config
from glide_jax.training.export import export, seen_tokens
from glide_jax.training.objectives import make_objective
from glide_jax.training.recipes import load_recipe, toy
from glide_jax.training.state import recipe_state
from glide_jax.weights import load_weights
from glide_jax.weights.store import flatten
from glide_jax.weights.token_rows import ROWS, TABLE
from tests.support.commands import ROOT, TINY, make_weights, one_line, run
from tests.tools import toy_runs

FILES = sorted((ROOT / "configs").glob("*.py"))
each_recipe = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)

# Steps and images a step, stated in the paper (4.1 to 4.4, B.1) or the recipe's own; and the model,
# whose parameters tests/models/test_models.py counts.
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
    "lora64": (5_000, 32, "base64"),
}


# --- finding recipes


@each_recipe
def test_a_recipe_is_found_by_name_and_by_path(file):
    for size in ("", ":toy"):
        assert load_recipe(f"{file.stem}{size}") == load_recipe(f"{file}{size}")


def test_a_recipe_of_ones_own_is_found_by_path_with_a_size(tmp_path):
    own = tmp_path / "recipe.py"
    own.write_text((ROOT / "configs" / "cfg64.py").read_text())
    assert load_recipe(own) == load_recipe("cfg64")
    assert load_recipe(f"{own}:paper") == load_recipe("cfg64:paper")


@pytest.mark.parametrize("name", ["cfg46", "cfg46:paper", "configs/cfg46"])
def test_an_unknown_name_is_one_line_with_the_nearest_one(name):
    with pytest.raises(UsageError, match=r"no recipe .*cfg46, did you mean 'cfg64'\?") as error:
        load_recipe(name)
    assert "clip64, emoji64" in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_path_is_one_line_with_the_recipes_beside_it(tmp_path):
    near = r"no recipe .*cfg46\.py, did you mean 'cfg64\.py'\? choose one of .* in .*configs$"
    with pytest.raises(UsageError, match=near):
        load_recipe(ROOT / "configs" / "cfg46.py")
    with pytest.raises(UsageError, match=r"no recipe .*own\.py: name one"):
        load_recipe(tmp_path / "own.py")


def test_a_size_that_a_recipe_lacks_is_one_line_with_those_it_has():
    near = r"no size 'papr', did you mean 'paper'\? choose one of released, paper, toy"
    with pytest.raises(UsageError, match=near):
        load_recipe("text64:papr")
    with pytest.raises(UsageError, match=r"no size 'paper': choose one of toy"):
        load_recipe("emoji_upsample256:paper")
    with pytest.raises(UsageError, match=r"choose one of released, 16gb, 24gb, paper, toy"):
        load_recipe("finetune64:8gb")


@pytest.mark.parametrize(
    "name",
    ["steps", "batch_size", "accumulate", "keep", "validation_batches", "save_every", "log_every"],
)
@pytest.mark.parametrize("value", [0, -1])
def test_a_number_that_counts_something_is_at_least_one(name, value):
    with pytest.raises(UsageError, match=f"^{name} must be at least 1$"):
        replace(load_recipe("emoji64"), validate_every=5, **{name: value})


def test_help_lists_the_options_that_are_no_fields(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse_recipe(["--config", "clip64", "--help"], "About training.")
    text = capsys.readouterr().out
    for option in (
        "--config RECIPE",
        "--dry-run HARDWARE",
        "--coordinator ADDRESS",
        "--num-processes N",
        "--process-id I",
    ):
        assert option in text


@pytest.mark.parametrize("option", ["--config", "--dry-run"])
def test_an_option_that_is_no_field_is_given_once(option):
    words = ["--config", "clip64", "--dry-run", "cpu", option, "clip64"]
    with pytest.raises(UsageError, match=f"^{option} is given twice$"):
        parse_recipe(words, "")


def test_help_shows_each_field_with_the_value_of_the_recipe(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["glide-jax train"])
    with pytest.raises(SystemExit) as end:
        parse_recipe(["--config", "clip64:paper", "--help"], "About training.")
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert text.startswith("usage: glide-jax train --config clip64:paper [-h] [OPTIONS]")
    assert "--batch-size INT Images per step" in text and "(default: 32768)" in text
    assert "(default: fsdp)" in text
    groups = {"optimiser": OptimiserConfig, "data": DataConfig, "model": CLIPConfig}
    options = [f.name for f in fields(CLIPTrainConfig) if f.name not in groups]
    options += [f"{group}.{f.name}" for group, kind in groups.items() for f in fields(kind)]
    for option in options:
        (shown,) = re.findall(rf" --{option.replace('_', '-')}[ ,](.*?) \(default:", text)
        assert len(re.findall(r"\b[a-z-]{2,}\b", shown)) >= 2, (option, shown)


def test_help_names_options_where_the_docstrings_name_fields(capsys, monkeypatch):
    before = OptimiserConfig.__doc__
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse_recipe(["--config", "upsample256", "--help"], "")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for phrase in (
        "(see `--spike-factor`)", "EMAs of `--optimiser.ema-widths`", "and `--model.residual`",
        "weights of `--init-from`", "the options `--distillation.*`", "instead of `--data.source`",
        "as multiples of `--model.model-channels`", "--sample-strength FLOAT|{none}",
    ):  # fmt: skip
        assert phrase in text, phrase
    assert not re.findall(r"`[a-z.]*_[a-z_.]*`", text.replace("`save_to_disk`", ""))
    assert not re.search(r"\bNone\b", text)
    assert OptimiserConfig.__doc__ == before and "`ema_widths`" in before


@pytest.mark.parametrize("word", ["none", "None"])
def test_the_word_none_turns_a_number_off(word):
    options = ["--config", "fewstep256:toy", "--data.min-score", "5", "--data.score-field", "a"]
    assert parse_recipe(options, "")[0].data.min_score == 5.0
    config, _ = parse_recipe(["--config", "fewstep256", "--sample-strength", word], "")
    assert load_recipe("fewstep256").sample_strength == 0.5 and config.sample_strength is None


# --- their fields


@pytest.mark.parametrize("name", FACTS)
def test_a_recipe_has_the_size_of_the_paper_or_of_the_released_model(name):
    steps, batch_size, preset = FACTS[name]
    config = load_recipe(name)
    assert (config.steps, config.batch_size) == (steps, batch_size)
    assert config.model == PRESETS[preset]()


@pytest.mark.parametrize(("name", "preset"), [("clip64", clip64), ("clip64:paper", clip64_paper)])
def test_a_clip_learns_its_scale_like_the_original(name, preset):
    config = load_recipe(name)
    assert (config.steps, config.batch_size) == (390_000, 32_768)
    assert config.model == replace(preset(), learn_logit_scale=True, logit_scale=1 / 0.07)


def test_every_recipe_of_the_paper_has_both_sizes():
    for name in ("text64", "cfg64", "upsample256", "inpaint64", "inpaint256", "clip64"):
        released, paper = load_recipe(f"{name}:released"), load_recipe(f"{name}:paper")
        assert load_recipe(name) == released != paper
        assert paper.name == f"{released.name}-paper" and paper.parallelism == "fsdp"
        variants = [getattr(config.model, "variant", "") for config in (released, paper)]
        assert variants[0] == variants[1]


def test_recipes_differ_as_the_paper_says():
    schedules = {name: load_recipe(name).noise_schedule for name in (*FACTS, "clip64")}
    assert {schedules[f"{n}64"] for n in ("text", "cfg", "inpaint", "clip")} == {"cosine"}
    assert {schedules[f"{n}256"] for n in ("upsample", "inpaint")} == {"linear"}
    assert load_recipe("text64").caption_dropout == 0
    assert load_recipe("cfg64").caption_dropout == 0.2
    assert load_recipe("inpaint64").model.variant == "inpaint"
    assert load_recipe("inpaint256").model.variant == "superres_inpaint"
    assert load_recipe("clip64:paper").optimiser.weight_decay == 0.0125
    for name in ("text64", "cfg64", "upsample256", "inpaint64", "inpaint256", "finetune64"):
        config = load_recipe(name)
        assert (config.prediction_type, config.weighting) == ("eps", "none")
    for name in ("improved64", "improved256"):
        config = load_recipe(name)
        assert (config.prediction_type, config.weighting) == ("v", "min-snr")
        assert config.optimiser.ema_widths == (0.05, 0.10)
    assert load_recipe("finetune64").optimiser.freeze == ("text",)
    lora = load_recipe("lora64")
    assert (lora.lora.rank, lora.lora.scale, lora.optimiser.learning_rate) == (16, 1.0, 1e-4)
    assert load_recipe("lora64:paper").init_from == "runs/cfg64-paper"


@each_recipe
def test_a_recipe_states_result_hardware_time_and_command(file):
    text = file.read_text()
    for what in ("Result:", "Hardware:", "Time:", "Command:"):
        assert what in text
    assert len(text.splitlines()) <= 90


@each_recipe
def test_the_commands_of_a_recipe_work(file):
    """They name recipes and fields that exist."""
    text = file.read_text().replace("\\\\\n", " ")
    commands = re.findall(r"glide-jax train (--config .*)", text)
    assert commands
    for command in commands:
        config, hardware = parse_recipe(shlex.split(command), "")
        assert hardware is None and config.steps > 1


@each_recipe
def test_a_recipe_of_any_size_is_saved_and_read_unchanged(file, tmp_path):
    named = re.search(r"^SIZES = (\(.*\))$", file.read_text(), re.MULTILINE)
    for size in ("", "toy", *(ast.literal_eval(named[1]) if named else ())):
        config = load_recipe(f"{file}:{size}" if size else file)
        save_config(config, tmp_path / "config.json")
        assert read_config(tmp_path / "config.json") == config


def test_a_stored_recipe_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "config.json"
    save_config(load_recipe("emoji64"), path)
    path.write_text(path.read_text().replace('"wsd"', '"linear"'))
    with pytest.raises(GlideError, match=r"cannot read the recipe .*config.json: lr_decay is"):
        read_config(path)


@each_recipe
def test_a_toy_is_the_recipe_except_for_its_size(file):
    whole, small = load_recipe(file), load_recipe(f"{file}:toy")
    assert small == toy(whole) and small.name == f"{whole.name}-toy"
    assert not small.init_from
    same = ["noise_schedule", "parallelism", "diffusion_steps"]
    if not isinstance(whole, CLIPTrainConfig):
        same += ["prediction_type", "weighting", "caption_dropout"]
        same += ["low_res_timestep_share", "mask_all_share"]
        assert small.model.variant == whole.model.variant
        assert small.model.low_res_timestep == whole.model.low_res_timestep
    for field in same:
        assert getattr(small, field) == getattr(whole, field)
    trained_with = ("freeze", "ema_widths", "first_moment_dtype", "grad_clip", "beta_2")
    for field in (*trained_with, "weight_decay"):
        assert getattr(small.optimiser, field) == getattr(whole.optimiser, field)


# --- exports


@pytest.fixture
def begun():
    """`(config, rows) -> state` before the first step, with token rows marked as seen."""

    def begin(config, rows):
        objective = make_objective(config)
        state = recipe_state(config, objective, jax.jit(objective.init)(jax.random.key(0)))
        moments = state.opt_state[1][0]
        flat = flatten(moments.nu)
        flat[TABLE] = flat[TABLE].at[np.array(rows)].set(1e-9)
        return replace(state, opt_state=(None, (moments._replace(nu=flat),)))

    return begin


def test_token_rows_of_the_first_weights_are_kept(begun, tmp_path, monkeypatch):
    config = replace(load_recipe("text64"), model=TINY, optimiser=OptimiserConfig())
    state = begun(config, [3, 5])
    assert np.flatnonzero(seen_tokens(config, state)).tolist() == [3, 5]

    # Weights with a whole table, as the released ones have.
    whole = make_weights(tmp_path / "whole")
    assert seen_tokens(replace(config, init_from=str(whole)), state) is None
    assert seen_tokens(replace(config, init_from="openai/base"), state) is None

    # The embedded model has only some rows.
    embedded = seen_tokens(replace(config, init_from="emoji64"), state)
    _, flat, _ = load_weights(ROOT / "glide_jax" / "assets" / "emoji64")
    assert set(np.flatnonzero(embedded)) == {3, 5} | set(flat[ROWS].tolist())


# --- does it learn


def check(name, result):
    """Check that a toy learned its images, and that it uses its conditioning."""
    assert result.after < 0.3 * result.before, result
    for what, loss in result.without.items():
        # With fixed noise, so small a difference is significant.
        assert loss > 1.05 * result.after, (name, what, result)
    if name == "clip64":
        assert result.ranked[0] >= 0.9, result


def test_the_shortest_recipe_learns_is_resumed_exported_and_guides(tmp_path):
    """Runs clip64 from the command line; `tests.tools.toy_runs` has the others."""
    make_weights(tmp_path / "text64" / "weights")
    result = toy_runs.try_recipe("clip64", tmp_path, steps=150)
    check("clip64", result)

    run_folder, weights = tmp_path / "clip64" / "run", tmp_path / "clip64" / "weights"
    whole, exported = load_clip(run_folder), load_clip(weights)
    assert whole.config == exported.config == load_recipe("clip64:toy").model
    _, flat, _ = load_weights(weights)
    assert len(flat[TABLE]) < 20 and exported.params["text"]["token_embedding"].shape[0] > 49_000
    a, b = (np.asarray(clip.encode_captions([toy_runs.PROMPT])) for clip in (whole, exported))
    np.testing.assert_allclose(a, b, atol=0.02)
    error = one_line(run("sample.py", "red", "--weights", run_folder, "--out", tmp_path / "s"), 1)
    assert "noised CLIP" in error and "clip" in error


@pytest.mark.slow
def test_a_student_is_nearer_to_its_images_in_one_step_than_its_teacher(tmp_path):
    images = toy_runs.write_images(tmp_path / "images")
    toy_runs.train("improved64", images, tmp_path / "teacher", steps=300)
    teacher = ("--distillation.teacher", tmp_path / "teacher")
    toy_runs.train("fewstep64", images, tmp_path / "student", *teacher)
    files = sorted(images.glob("*.png"))
    captions = [file.with_suffix(".txt").read_text() for file in files]
    wanted = np.concatenate([read_images(file, 16, 1) for file in files]).astype(float)

    def distance(run, **settings):
        found = load(tmp_path / run)(captions, progress=False, **settings).images
        return np.sqrt(((found - wanted) ** 2).mean())

    for scale in (1.0, 3.0):
        few = {"guidance_scale": scale, "sampler": "ddim", "spacing": "trailing-capped"}
        assert distance("student", steps=1, guidance_scale=scale) < 0.75 * distance(
            "teacher", steps=1, **few
        )


def test_a_clip_is_not_loaded_from_a_run_of_another_kind(tmp_path):
    config = replace(load_recipe("text64:toy"), out=str(tmp_path))
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
