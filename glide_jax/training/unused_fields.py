"""Checks that refuse fields of a recipe that have no effect, given the other fields."""

import dataclasses
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

from glide_jax.errors import UsageError
from glide_jax.training.config import RunConfig, TrainConfig


class Rule(NamedTuple):
    """Fields that have an effect only in some recipes.

    Attributes:
        fields: names of the fields, with a dot for those of a section of the recipe.
        needed: what a recipe must have for the fields to act, as messages say it.
        applies: whether a recipe has it.
        off: a value of the fields that is always accepted, besides the default.
    """

    fields: tuple[str, ...]
    needed: str
    applies: Callable[[Any], bool]
    off: Any = None


# Rules for every recipe.
RUN_RULES = (
    Rule(("optimiser.muon_lr_ratio",), "optimiser.kind muon", lambda c: c.optimiser.kind == "muon"),
    Rule(
        ("optimiser.lr_decay_share",),
        "optimiser.lr_decay wsd",
        lambda c: c.optimiser.lr_decay == "wsd",
    ),
    Rule(
        ("optimiser.ema_snapshot_every",),
        "optimiser.ema_widths",
        lambda c: bool(c.optimiser.ema_widths),
    ),
    Rule(
        ("validation_split", "validation_batches"),
        "a validate_every above 0",
        lambda c: c.validate_every > 0,
    ),
    Rule(("data.source",), "data without a mixture", lambda c: not c.data.mixture),
    Rule(("data.min_crop",), "data.crop random", lambda c: c.data.crop == "random"),
    Rule(("data.workers",), "data.on_device auto or no", lambda c: c.data.on_device != "yes"),
    # A loader makes the batches of the held-out loss, in this process.
    Rule(
        ("data.threads", "data.prefetch"),
        "data.on_device auto or no, or a validate_every above 0",
        lambda c: c.data.on_device != "yes" or c.validate_every > 0,
    ),
)
# Rules for recipes of GLIDE models.
GLIDE_RULES = (
    Rule(("snr_gamma",), "weighting min-snr", lambda c: c.weighting == "min-snr"),
    Rule(
        ("half_log_snr_mean", "half_log_snr_std", "uniform_timestep_share"),
        "timestep_distribution log-normal",
        lambda c: c.timestep_distribution == "log-normal",
    ),
    Rule(("mask_all_share",), "inpainting models", lambda c: c.model.inpaints),
    Rule(("sample_strength",), "upsamplers", lambda c: c.model.upsamples),
    Rule(
        ("sample_every",),
        "models that generate from text, with sample_prompts",
        lambda c: bool(c.sample_prompts) and not c.model.upsamples,
        off=0,
    ),
    Rule(("lora.alpha", "lora.layers"), "a lora.rank above 0", lambda c: c.lora.rank > 0),
    Rule(
        ("distillation.unguided_share",),
        "distillation.guidance_scales that are a range",
        lambda c: c.distillation.guidance_scales[0] < c.distillation.guidance_scales[1],
    ),
    # A range of scales is an input of the student too, with or without a teacher.
    Rule(
        ("distillation.guidance_scales",),
        "a distillation.teacher",
        lambda c: (
            bool(c.distillation.teacher)
            or c.distillation.guidance_scales[0] < c.distillation.guidance_scales[1]
        ),
    ),
)


def check_no_unused_fields(config: RunConfig) -> None:
    """Check that the fields that have no effect in a recipe have their defaults.

    The check belongs where a training begins, not where a recipe is built: a run that was trained
    with such a field can still be read.

    Raises:
        UsageError: a field without effect is set.
    """
    for rule in rules_of(config):
        if rule.applies(config):
            continue
        for path in rule.fields:
            value, default = attrgetter(path)(config), default_of(config, path)
            if value != default and (rule.off is None or value != rule.off):
                raise UsageError(
                    f"{path} is for {rule.needed}: choose that, or set it to {default!r}"
                )


def without_leftovers(config: RunConfig, recipe: RunConfig) -> RunConfig:
    """Return a changed recipe, where fields that the change made useless have their defaults.

    So `--optimiser.lr-decay constant` is enough, whatever `lr_decay_share` the recipe had for
    "wsd".

    Args:
        config: the recipe with the options of the command line.
        recipe: the recipe itself.
    """
    for rule in rules_of(config):
        if rule.applies(config) or not rule.applies(recipe):
            continue
        for path in rule.fields:
            if attrgetter(path)(config) == attrgetter(path)(recipe):
                config = _changed(config, path, default_of(config, path))
    return config


def rules_of(config: RunConfig) -> tuple[Rule, ...]:
    """Return the rules for the fields of a recipe."""
    return RUN_RULES + GLIDE_RULES if isinstance(config, TrainConfig) else RUN_RULES


def default_of(config: RunConfig, path: str) -> Any:
    """Return the default of a field of a recipe, or of a section of it."""
    section, _, name = path.rpartition(".")
    fields = dataclasses.fields(attrgetter(section)(config) if section else config)
    return next(f.default for f in fields if f.name == name)


def _changed(config: RunConfig, path: str, value: Any) -> RunConfig:
    section, _, name = path.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{name: value})
    changed: Any = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: changed})
