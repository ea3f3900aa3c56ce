"""Checks of sampling settings before training, and of an upsampler's before the base samples."""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeVar

from glide_jax.diffusion.guidance import Guidance
from glide_jax.diffusion.sampling import NO_VARIANCE
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.errors import UsageError
from glide_jax.pipeline.clip_guide import CLIP, clip_guidance
from glide_jax.pipeline.prompts import read_prompt
from glide_jax.pipeline.settings import Settings, SettingsArguments
from glide_jax.weights.registry import NONE, Model


class _PipelineLike(Protocol):
    @property
    def settings(self) -> Settings: ...

    @property
    def model(self) -> Model: ...

    @property
    def clip(self) -> CLIP | None: ...


P = TypeVar("P", bound=_PipelineLike)


def check_defaults(model: Model) -> None:
    """Check that a model can be sampled with its default settings and its prompts.

    The plan of such a run is built, without the weights and without CLIP guidance.

    Raises:
        UsageError: it cannot; the message names the fields of the recipe, `sample_...`.
    """
    if isinstance(model.prompts, str):
        raise UsageError(f"sample_prompts takes a list of prompts, not {model.prompts!r:.60}")
    try:
        prompts = [read_prompt(prompt) for prompt in model.prompts or ("",)]
    except UsageError as error:
        raise UsageError(f"sample_prompts: {error}") from None
    if model.config.upsamples:
        prompts = [prompt.joined() for prompt in prompts]
    count = max(len(prompt.parts) for prompt in prompts)
    try:
        settings = Settings().changed(**model.defaults)
        guidances = settings.guidances([prompt.padded(count) for prompt in prompts])
        check_plan(model, settings, guidances)
    except UsageError as error:
        raise UsageError(f"the sample_ fields of the recipe: {error}") from None


def check_plan(model: Model, settings: Settings, guidances: Sequence[Guidance] = ()) -> None:
    """Check that settings make a plan, and that the network of the model suits it.

    Raises:
        UsageError: they do not.
    """
    plan = settings.plan(make_schedule(model.noise_schedule, model.diffusion_steps), guidances)
    if plan.needs_learned_variance and model.config.out_channels == 3:
        raise UsageError(NO_VARIANCE)


def chosen_upsampler(
    upsampler: P | None, given: SettingsArguments | Literal["none"] | None
) -> P | None:
    """Return the upsampler that these settings are for, or None for a run without one.

    Args:
        upsampler: that of the pipeline, if it has one.
        given: settings of a call, "none", or None for the upsampler's own settings.

    Raises:
        UsageError: there are settings but no upsampler; `given` is no mapping; its settings
            cannot be used; or the upsampler's network does not suit the sampler.
    """
    if isinstance(given, str) and given == NONE:
        return None
    if given is not None and not isinstance(given, Mapping):
        raise UsageError(
            f'upsampler takes settings, such as {{"steps": 10}}, or "none", not {given!r}: '
            "glide_jax.load(upsampler=...) chooses its weights"
        )
    if upsampler is None:
        if given:
            raise UsageError("settings of an upsampler, but there is none: load one")
        return None
    # For their errors: the upsampler would raise them only after the base has sampled.
    try:
        settings = upsampler.settings.changed(**(given or {}))
        prompts = [read_prompt("")]
        clip = clip_guidance(upsampler.clip, upsampler.model, prompts, settings)
        check_plan(upsampler.model, settings, (*settings.guidances(prompts), *clip))
    except UsageError as error:
        raise UsageError(f"the upsampler: {error}") from None
    return upsampler
