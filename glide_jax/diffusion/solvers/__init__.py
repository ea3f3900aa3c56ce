"""Samplers by name: `SOLVERS` maps a sampler's name to its solver.

A solver is a function `(schedule, timesteps, breaks) -> Table` that writes a sampler's coefficients
in float64 on the host, one row per network evaluation; `glide_jax.diffusion.solvers.table` has the
recursion that runs them. One file per family: `first_order`, `multistep`, `runge_kutta`; `jumps`
wraps any of them. `traits_of` says what is known of a sampler.
"""

import inspect
from functools import cache, partial
from typing import NamedTuple

import numpy as np

from glide_jax.diffusion.schedule import make_schedule
from glide_jax.diffusion.solvers.first_order import consistency, ddim, ddim_reverse, ddpm
from glide_jax.diffusion.solvers.jumps import repaint, restart
from glide_jax.diffusion.solvers.multistep import (
    dpm_solver_2m,
    dpm_solver_3m,
    noise_multistep,
    sa_solver,
    sde_dpm_solver_2m,
    unipc,
)
from glide_jax.diffusion.solvers.runge_kutta import dpm_solver_2s, heun, plms
from glide_jax.diffusion.solvers.table import Solver, Table
from glide_jax.errors import UsageError, did_you_mean

SOLVERS: dict[str, Solver] = {
    "dpm++2m": dpm_solver_2m,
    "dpm++3m": dpm_solver_3m,
    "dpm++2s": dpm_solver_2s,
    "dpm++2m-sde": sde_dpm_solver_2m,
    "unipc2": unipc,
    "unipc3": partial(unipc, order=3),
    "sa": sa_solver,
    "heun": heun,
    "ddim": ddim,
    "deis": partial(noise_multistep, order=3, variable="t"),
    "lms": partial(noise_multistep, order=4, variable="rho"),
    "ipndm": partial(noise_multistep, order=4, variable="step"),
    "plms": plms,
    "prk": partial(plms, runge_kutta=True),
    "ddpm": ddpm,
    "ddpm-small": partial(ddpm, variance="small"),
    "ddpm-large": partial(ddpm, variance="large"),
    "consistency": consistency,
}
"""The samplers by name, as `--sampler` takes them: each is a `Solver`."""


class Traits(NamedTuple):
    """What a sampler does and needs.

    Attributes:
        guides_mean: a guidance gradient moves the mean of a step, as in ancestral sampling, and not
            x_0.
        takes_eta: it has the parameter `eta`.
        is_noisy: its steps add noise.
    """

    guides_mean: bool
    takes_eta: bool
    is_noisy: bool


def solver_of(sampler: str) -> Solver:
    """Return the solver of a sampler.

    Raises:
        UsageError: there is no such sampler.
    """
    if sampler not in SOLVERS:
        raise UsageError(
            f"unknown sampler {sampler!r}{did_you_mean(sampler, SOLVERS)}: "
            f"choose one of {', '.join(SOLVERS)}"
        )
    return SOLVERS[sampler]


def traits_of(sampler: str) -> Traits:
    """Return what is known of a sampler, from its solver and the table of a short run.

    Raises:
        UsageError: there is no such sampler.
    """
    return _traits(solver_of(sampler))


@cache
def _traits(solver: Solver) -> Traits:
    steps = 8
    table = solver(make_schedule("cosine", steps), np.arange(steps)[::-1], np.zeros(steps, bool))
    return Traits(
        guides_mean=bool(table.mean_per_gradient.any()),
        takes_eta="eta" in inspect.signature(solver).parameters,
        is_noisy=bool(table.s.any() or table.s_learned.any()),
    )


__all__ = [
    "SOLVERS",
    "Solver",
    "Table",
    "Traits",
    "ddim_reverse",
    "repaint",
    "restart",
    "solver_of",
    "traits_of",
]
