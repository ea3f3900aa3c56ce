"""The noise levels that a sampler visits, from `--steps` and `--spacing`."""

from collections.abc import Callable

import numpy as np

from glide_jax.diffusion.optimised_timesteps import load_optimised_timesteps
from glide_jax.diffusion.schedule import Schedule
from glide_jax.diffusion.solvers.table import Solver
from glide_jax.diffusion.spacings import (
    karras,
    log_snr_uniform,
    respaced,
    trailing,
    trailing_capped,
    uniform,
)
from glide_jax.errors import UsageError, did_you_mean

OPTIMISED = "optimised"
SPACINGS: dict[str, Callable[[Schedule, int], np.ndarray]] = {
    "logsnr": log_snr_uniform,
    "uniform": uniform,
    "karras": karras,
    "trailing": trailing,
    "trailing-capped": trailing_capped,
}
"""Spacings by name, `(schedule, steps) -> timesteps`; "optimised" depends on the solver too."""


def make_timesteps(
    schedule: Schedule, steps: int | str, spacing: str = "logsnr", *, solver: Solver | None = None
) -> np.ndarray:
    """Return the `(N,)` timesteps that a sampler visits, noisiest first.

    Args:
        steps: a number of noise levels, or a respacing string of OpenAI's code: "ddim50", "fast27",
            "10,10,3,2,2". A string that holds one number is that number of levels.
        spacing: spacing of the levels: "logsnr" (even in log(alpha / sigma)), "uniform" (even in
            time, as in OpenAI's code), "karras" (EDM), "trailing" (even in time, the last step as
            long as the others), "trailing-capped" (as trailing, without the noisiest timesteps: for
            few steps), or "optimised" (for the solver). A respacing string ignores it.
        solver: the solver to optimise for; None: dpm++2m.

    Raises:
        UsageError: no steps, an unknown spacing, or more steps than the process has timesteps.
    """
    names = (*SPACINGS, OPTIMISED)
    if spacing not in names:
        raise UsageError(
            f"unknown spacing {spacing!r}{did_you_mean(spacing, names)}: "
            f"choose one of {', '.join(names)}"
        )
    if isinstance(steps, str):
        steps = steps.strip()
        if not steps:
            raise UsageError("steps is empty: give a number (25), 10,10,3,2,2, ddim50 or fast27")
        try:
            steps = int(steps)
        except ValueError:
            return respaced(schedule, str(steps))
    if not float(steps).is_integer():
        raise UsageError(f"steps is a whole number, not {steps}")
    steps = int(steps)
    if steps < 1:
        raise UsageError(f"sampling needs at least one step, not {steps}")
    if steps > len(schedule):
        length = len(schedule)
        raise UsageError(f"cannot take {steps} steps: the process has {length} timesteps")
    if spacing == OPTIMISED:
        return load_optimised_timesteps(schedule, steps, solver)
    return SPACINGS[spacing](schedule, steps)
