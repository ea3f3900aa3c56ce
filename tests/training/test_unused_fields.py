"""Fields of a recipe that have no effect are refused if they are set."""

import re
from dataclasses import replace

import pytest

from glide_jax.data.data_config import DataConfig
from glide_jax.errors import UsageError
from glide_jax.training.command_line import parse_recipe
from glide_jax.training.config import CLIPTrainConfig, TrainConfig
from glide_jax.training.distillation_config import DistillationConfig
from glide_jax.training.lora_config import LoRAConfig
from glide_jax.training.optimiser_config import OptimiserConfig
from glide_jax.training.recipes import load_recipe
from glide_jax.training.unused_fields import check_no_unused_fields
from tests.support.commands import RECIPE, ROOT, TINY, one_line, run
from train import check_recipe, train

PLAIN = TrainConfig(name="x", model=TINY)
STUDENT = replace(PLAIN, objective="consistency")
UPSAMPLER = replace(PLAIN, model=replace(TINY, variant="superres", image_size=64))

# A field that is set; its message; and the recipe in which it has an effect.
UNUSED = [
    (
        PLAIN, {"half_log_snr_mean": 1.0}, {"timestep_distribution": "log-normal"},
        "half_log_snr_mean is for timestep_distribution log-normal: choose that, or set it to 0.0",
    ),
    (
        replace(PLAIN, timestep_distribution="loss-aware"), {"half_log_snr_std": 2.0},
        {"timestep_distribution": "log-normal"},
        "half_log_snr_std is for timestep_distribution log-normal: choose that, or set it to 1.0",
    ),
    (
        PLAIN, {"uniform_timestep_share": 0.0}, {"timestep_distribution": "log-normal"},
        "uniform_timestep_share is for timestep_distribution log-normal: choose that, or set it to "
        "0.1",
    ),
    (
        replace(PLAIN, weighting="v"), {"snr_gamma": 3.0}, {"weighting": "min-snr"},
        "snr_gamma is for weighting min-snr: choose that, or set it to 5.0",
    ),
    (
        PLAIN, {"mask_all_share": 0.5}, {"model": replace(TINY, variant="inpaint")},
        "mask_all_share is for inpainting models: choose that, or set it to 0.1",
    ),
    (
        PLAIN, {"sample_strength": 0.5}, {"model": UPSAMPLER.model},
        "sample_strength is for upsamplers: choose that, or set it to None",
    ),
    (
        PLAIN, {"sample_every": 10}, {"sample_prompts": ("red",)},
        "sample_every is for models that generate from text, with sample_prompts: choose that, or "
        "set it to 5000",
    ),
    (
        PLAIN, {"validation_batches": 4}, {"validate_every": 10},
        "validation_batches is for a validate_every above 0: choose that, or set it to 16",
    ),
    (
        PLAIN, {"validation_split": "test"}, {"validate_every": 10},
        "validation_split is for a validate_every above 0: choose that, or set it to 'validation'",
    ),
    (
        PLAIN, {"data": DataConfig(min_crop=0.5)},
        {"data": DataConfig(min_crop=0.5, crop="random")},
        "data.min_crop is for data.crop random: choose that, or set it to 0.8",
    ),
    (
        PLAIN, {"data": DataConfig(source="images", mixture=("images:1", "more:2"))},
        {"data": DataConfig(source="images")},
        "data.source is for data without a mixture: choose that, or set it to ''",
    ),
    (
        PLAIN, {"data": DataConfig(on_device="yes", workers=2)},
        {"data": DataConfig(on_device="auto", workers=2)},
        "data.workers is for data.on_device auto or no: choose that, or set it to 0",
    ),
    *(
        (PLAIN, {"data": DataConfig(on_device="yes", **{name: 4})}, {"validate_every": 5},
         f"data.{name} is for data.on_device auto or no, or a validate_every above 0: choose that, "
         f"or set it to {default}")
        for name, default in (("threads", 1), ("prefetch", 2))
    ),
    *(
        (PLAIN, {"lora": LoRAConfig(**{name: value})},
         {"lora": LoRAConfig(rank=2, **{name: value})},
         f"lora.{name} is for a lora.rank above 0: choose that, or set it to {default}")
        for name, value, default in (
            ("alpha", 8.0, "16.0"), ("layers", ("text",), "('attention', 'text')"),
        )
    ),
    *(
        (PLAIN, {"optimiser": OptimiserConfig(**{name: value})},
         {"optimiser": OptimiserConfig(**{name: value} | owner)},
         f"optimiser.{name} is for {what}: choose that, or set it to {default}")
        for name, value, owner, what, default in (
            ("muon_lr_ratio", 2.0, {"kind": "muon"}, "optimiser.kind muon", "1.0"),
            ("lr_decay_share", 0.2, {"lr_decay": "wsd"}, "optimiser.lr_decay wsd", "0.4"),
            ("ema_snapshot_every", 9, {"ema_widths": (0.1,)}, "optimiser.ema_widths", "5000"),
        )
    ),
    *(
        (STUDENT, {"distillation": DistillationConfig(**{name: value})},
         {"distillation": DistillationConfig(**{name: value} | owner)},
         f"distillation.{name} is for {what}: choose that, or set it to {default}")
        for name, value, owner, what, default in (
            ("guidance_scales", (3.0, 3.0), {"teacher": "runs/x"}, "a distillation.teacher",
             "(1.0, 1.0)"),
        )
    ),
    (
        STUDENT, {"distillation": DistillationConfig(unguided_share=0.3)}, None,
        "distillation.unguided_share is for distillation.guidance_scales that are a range: choose "
        "that, or set it to 0.1",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "set_to", "owner", "message"), UNUSED, ids=[case[3].split()[0] for case in UNUSED]
)
def test_a_field_without_effect_is_refused_where_it_is_set(recipe, set_to, owner, message):
    check_no_unused_fields(recipe)
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        check_no_unused_fields(replace(recipe, **set_to))
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        train(replace(recipe, **set_to))
    if owner is not None:
        check_no_unused_fields(replace(recipe, **set_to | owner))


def test_samples_may_be_off_in_every_recipe():
    for recipe in (PLAIN, UPSAMPLER, STUDENT):
        check_no_unused_fields(replace(recipe, sample_every=0))


FILES = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_size_of_every_recipe_passes(file):
    named = re.search(r"^SIZES = (.*)$", file.read_text(), re.MULTILINE)
    sizes = re.findall(r'"([^"]+)"', named[1] if named else "")
    for size in (*sizes, "toy"):
        check_recipe(load_recipe(f"{file}:{size}"))


def test_a_field_of_a_recipe_that_an_option_makes_useless_is_left_out():
    words = ["--config", "emoji64", "--optimiser.lr-decay", "constant", "--model.variant", "base"]
    config, _ = parse_recipe(words, "")
    assert isinstance(config, TrainConfig)
    assert (config.optimiser.lr_decay_share, config.mask_all_share) == (0.4, 0.1)
    config, _ = parse_recipe(["--config", "emoji_clip64", "--data.crop", "centre"], "")
    assert isinstance(config, CLIPTrainConfig) and config.data.min_crop == 0.8
    mixed = ["--data.mixture", "a:1", "b:2", "--data.on-device", "yes"]
    config, _ = parse_recipe(["--config", "cfg64", *mixed], "")
    assert (config.data.source, config.data.workers) == ("", 0)
    with pytest.raises(UsageError, match="^optimiser.lr_decay_share is for optimiser.lr_decay wsd"):
        parse_recipe([*words, "--optimiser.lr-decay-share", "0.3"], "")


def test_the_command_line_refuses_them_with_one_line():
    result = run("train.py", "--config", RECIPE, "--snr-gamma", 3)
    assert one_line(result, 2) == (
        "error: snr_gamma is for weighting min-snr: choose that, or set it to 5.0"
    )
