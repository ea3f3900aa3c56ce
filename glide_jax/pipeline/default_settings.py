"""The sampling settings that a recipe stores with its weights, checked before they are trained."""

from collections.abc import Sequence

from glide_jax.diffusion.guidance import Guidance
from glide_jax.diffusion.sampling import NO_VARIANCE
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.errors import UsageError
from glide_jax.pipeline.prompts import read_prompt
from glide_jax.pipeline.settings import Settings
from glide_jax.weights.registry import Model


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
    """Check that settings make a plan, and one that the network of a model suits.

    Raises:
        UsageError: they do not.
    """
    plan = settings.plan(make_schedule(model.schedule, model.diffusion_steps), guidances)
    if plan.needs_learned_variance and model.config.out_channels == 3:
        raise UsageError(NO_VARIANCE)
