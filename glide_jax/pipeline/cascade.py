"""The upsampler that a call of a pipeline uses."""

from collections.abc import Mapping
from typing import Literal, Protocol, TypeVar

from glide_jax.errors import UsageError
from glide_jax.pipeline.default_settings import check_plan
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
        UsageError: there are settings but no upsampler; `chosen` is no mapping; its settings cannot
            be used; or the upsampler's network does not suit the sampler.
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
    try:
        check_plan(upsampler.model, upsampler.settings.changed(**(chosen or {})))
    except UsageError as error:
        raise UsageError(f"the upsampler: {error}") from None
    return upsampler
