"""Samplers by name: `SOLVERS` maps a sampler's name to its solver.

A solver is a function `(schedule, grid, breaks) -> Table` that writes a sampler's coefficients in
float64 on the host, one row per network evaluation; `glide_jax.diffusion.solvers.table` has the
recursion that runs them. One file per family: `ancestral`, `multistep`, `runge_kutta`; `jumps`
wraps any of them; `optimised` finds grids for them.
"""

from functools import partial

from glide_jax.diffusion.solvers.ancestral import consistency, ddim, ddim_reverse, ddpm
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

__all__ = ["SOLVERS", "Solver", "Table", "ddim_reverse", "repaint", "restart"]
