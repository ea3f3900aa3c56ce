"""The fields of a recipe that belong to one objective."""

import dataclasses
from typing import Any

from glide_jax.errors import UsageError

OBJECTIVES = ("denoising", "consistency")
# Fields of the loss of "denoising". "consistency" has those of `distillation`.
DENOISING = (
    "weighting",
    "snr_gamma",
    "huber_width",
    "timestep_distribution",
    "half_log_snr_mean",
    "half_log_snr_std",
    "uniform_timestep_share",
)


def check_objective(recipe: Any) -> None:
    """Check the fields of a `TrainConfig` against its objective.

    Raises:
        UsageError: a field that the objective ignores is set, or two fields contradict each other.
    """
    if recipe.objective == "denoising":
        names = [f.name for f in dataclasses.fields(recipe.distillation)]
        _check_unset(recipe.distillation, names, "distillation.", "consistency")
        return
    _check_unset(recipe, DENOISING, "", "denoising")
    low, high = recipe.distillation.guidance_scales
    if low < high and not recipe.model.guidance_scale_input:
        raise UsageError("distillation.guidance_scales is a range: set model.guidance_scale_input")
    if recipe.validate_every:
        raise UsageError("objective consistency has no held-out loss: set validate_every to 0")


def _check_unset(config: Any, names: list[str] | tuple[str, ...], prefix: str, owner: str) -> None:
    """Check that the fields have their defaults; `owner` is the objective that uses them."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for name in names:
        if getattr(config, name) != defaults[name]:
            raise UsageError(
                f"{prefix}{name} is for objective {owner}: choose that, or set it to "
                f"{defaults[name]!r}"
            )
