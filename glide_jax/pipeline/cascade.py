"""The upsampler that a call of a pipeline uses."""

from collections.abc import Mapping
from typing import Literal, Protocol, TypeVar

from glide_jax.diffusion.sampling import NO_VARIANCE
from glide_jax.diffusion.solvers import traits_of
from glide_jax.errors import UsageError
from glide_jax.pipeline.settings import Settings, SettingsArguments
from glide_jax.weights.registry import NONE, Model


class _PipelineLike(Protocol):
    @property
    def settings(self) -> Settings: ...

    @property
    def model(self) -> Model: ...


P = TypeVar("P", bound=_PipelineLike)


def chosen_upsampler(
    upsampler: P | None, chosen: SettingsArguments | Literal["none"] | None
) -> P | None:
    """Return the upsampler that these settings are for, or None for a run without one.

    Args:
        upsampler: that of the pipeline, if it has one.
        chosen: settings of a call, "none", or None for the upsampler's own settings.

    Raises:
        UsageError: there is no upsampler for the settings, they are no settings, or its network
            does not suit their sampler.
    """
    if isinstance(chosen, str) and chosen == NONE:
        return None
    if chosen is not None and not isinstance(chosen, Mapping):
        raise UsageError(
            f'upsampler takes settings, such as {{"steps": 10}}, or "none", not {chosen!r}: '
            "glide_jax.load(upsampler=...) chooses its weights"
        )
    if upsampler is None:
        if chosen:
            raise UsageError("settings of an upsampler, but there is none: load one")
        return None
    # For their errors: the upsampler would raise them only after the base has sampled.
    settings = upsampler.settings.changed(**(chosen or {}))
    if traits_of(settings.sampler).learns_variance and upsampler.model.config.out_channels == 3:
        raise UsageError(f"the upsampler: {NO_VARIANCE}")
    return upsampler
