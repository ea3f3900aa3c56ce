"""Timesteps with the least discretisation error for a solver and a number of steps.

The error is measured on Gaussian images with the power spectrum of natural images, 1/f^2. Their
best denoiser is known and linear, one spatial frequency at a time. A run of any solver is then a
linear map of its noise, and the distribution of its results is computed exactly, without sampling.

This command rewrites the shipped timesteps, `glide_jax/assets/optimised_timesteps.json`:

    python -m glide_jax.diffusion.optimised_timesteps
"""

import json
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glide_jax.diffusion.schedule import Schedule, make_schedule
from glide_jax.diffusion.solvers.multistep import dpm_solver_2m
from glide_jax.diffusion.solvers.table import HISTORY, Solver, Table
from glide_jax.diffusion.spacings import end_half_log_snrs
from glide_jax.errors import UsageError

# With more steps an optimisation takes minutes, and gains nothing over the spacing logsnr.
MAX_STEPS = 50
SHIPPED = Path(__file__).parents[1] / "assets" / "optimised_timesteps.json"
SHIPPED_STEPS = (5, 6, 8, 10, 12, 15, 20, 25)


class Spectrum(NamedTuple):
    """Variances of the Fourier coefficients of Gaussian images: K distinct ones, `(K,)` float64.

    Attributes:
        variance: variance of a coefficient, scaled so that the mean over all coefficients is the
            variance of a pixel.
        share: fraction of all coefficients that have this variance.
    """

    variance: np.ndarray
    share: np.ndarray


@cache
def natural_spectrum(size: int = 64, known: int = 0) -> Spectrum:
    """Return the spectrum of images of power 1/f^2 and standard deviation 0.5 per pixel.

    Args:
        size: width and height in pixels.
        known: frequencies below it are left out: an upsampler knows them from its small image.
    """
    k = np.fft.fftfreq(size, 1 / size)
    squares, counts = np.unique(k[:, None] ** 2 + k**2, return_counts=True)
    variance = 1 / np.maximum(squares, 1)
    variance *= 0.25 / np.average(variance, weights=counts)
    unknown = squares >= known**2
    return Spectrum(variance[unknown], counts[unknown] / counts[unknown].sum())


def default_spectrum(schedule: Schedule) -> Spectrum:
    """Return the spectrum of what a schedule's models generate.

    OpenAI's upsamplers use the linear schedule and add the high frequencies; other models generate
    whole images.
    """
    linear = np.array_equal(schedule.betas, make_schedule("linear", len(schedule)).betas)
    return natural_spectrum(256, known=32) if linear else natural_spectrum(64)


def standard_deviations(table: Table, spectrum: Spectrum) -> np.ndarray:
    """Return the standard deviations `(K,)` that a sampler generates with the best denoiser.

    The recursion is linear, so x is kept as its weights on the initial noise and on the noise of
    each row. A learned variance is the best one that is the same for every pixel.
    """
    noisy = np.flatnonzero((table.s > 0) | (table.s_learned > 0))
    x = np.zeros((1 + len(noisy), len(spectrum.variance)))
    x[0] = 1.0
    y, history = np.zeros_like(x), np.zeros((HISTORY, *x.shape))
    for i in range(len(table.t)):
        row = table.rows(i)
        x_variance = row.alpha**2 * spectrum.variance + row.sigma**2
        x_0 = row.alpha * spectrum.variance / x_variance * x
        entry = row.u * x + row.v * x_0
        history = np.tensordot(row.S, np.concatenate([entry[None], history]), axes=1)
        y = row.Py * y + row.Px * x + np.tensordot(row.B, history, axes=1)
        x = row.Qy * y + row.Qx * x + np.tensordot(row.E, history, axes=1)
        if i in noisy:
            x_0_variance = float(spectrum.share @ (spectrum.variance * row.sigma**2 / x_variance))
            x[1 + np.searchsorted(noisy, i)] += row.s + row.s_learned * _learned_std(
                row, x_0_variance
            )
    return np.sqrt((x**2).sum(axis=0))


def _learned_std(row: Table, x_0_variance: float) -> float:
    """Return the learned standard deviation of a row: `sqrt(beta_tilde + c^2 Var[x_0 | x_t])`."""
    beta = 1 - (row.alpha / row.next_alpha) ** 2
    beta_tilde = beta * (row.next_sigma / row.sigma) ** 2
    best = beta_tilde + (beta * row.next_alpha / row.sigma**2) ** 2 * x_0_variance
    fraction = np.log(best / beta_tilde) / np.log(beta / beta_tilde)
    return float(np.exp((fraction * row.log_beta + (1 - fraction) * row.log_beta_tilde) / 2))


def image_error(
    schedule: Schedule, timesteps: np.ndarray, solver: Solver, spectrum: Spectrum | None = None
) -> float:
    """Return the 2-Wasserstein distance between generated and true images, per pixel (RMS).

    Args:
        spectrum: spectrum of the true images; None: `default_spectrum(schedule)`.
    """
    spectrum = default_spectrum(schedule) if spectrum is None else spectrum
    table = solver(schedule, timesteps, np.zeros(len(timesteps), bool))
    error = standard_deviations(table, spectrum) - np.sqrt(spectrum.variance)
    return float(np.sqrt(spectrum.share @ error**2))


# Weights of the penalty on uneven steps; errors are multiplied by 1000. The timesteps are optimised
# with the first weight, then from there with the second. The first avoids poor local minima. The
# second chooses among timesteps of nearly the same error: with 15 steps or more, most timesteps
# are.
SMOOTHNESS = (0.3, 0.03)


def optimise_timesteps(
    schedule: Schedule, steps: int, solver: Solver = dpm_solver_2m
) -> np.ndarray:
    """Return the timesteps `(steps,)` of least `image_error`; it starts where spacing logsnr does.

    Raises:
        UsageError: there is no step, or there are more than 50 or than the schedule's timesteps.
    """
    if not 1 <= steps <= min(MAX_STEPS, len(schedule)):
        most = min(MAX_STEPS, len(schedule))
        raise UsageError(
            f"spacing optimised takes 1 to {most} steps, not {steps}: choose spacing logsnr"
        )
    return schedule.t_at_half_log_snr(_optimised(schedule.betas.tobytes(), steps, *_key(solver)))


def _key(solver: Solver) -> tuple[Solver, tuple]:
    """Split a solver into its function and its options: two equal `partial`s compare unequal."""
    flat = partial(solver)  # A partial of a partial is flattened.
    return flat.func, tuple(sorted(flat.keywords.items()))


@lru_cache(maxsize=256)
def _optimised(betas: bytes, steps: int, solver: Solver, options: tuple) -> np.ndarray:
    # Not at the top of the file: the import is slow, and most runs do not need it.
    from scipy.optimize import least_squares

    schedule, full_solver = Schedule(np.frombuffer(betas)), partial(solver, **dict(options))
    spectrum, (low, high) = default_spectrum(schedule), end_half_log_snrs(schedule)
    if steps == 1:
        return np.array([low])

    def half_log_snrs_of(logits: np.ndarray) -> np.ndarray:
        widths = np.exp(logits - logits.max())
        return low + (high - low) * np.append(0.0, np.cumsum(widths[:-1]) / widths.sum())

    def residuals(logits: np.ndarray, smoothness: float) -> np.ndarray:
        timesteps = schedule.t_at_half_log_snr(half_log_snrs_of(logits))
        table = full_solver(schedule, timesteps, np.zeros(steps, bool))
        error = standard_deviations(table, spectrum) - np.sqrt(spectrum.variance)
        uneven = smoothness * np.diff(logits[:-1], 2)
        return np.append(1000 * np.sqrt(spectrum.share) * error, uneven)

    # Start with even steps, with the cleanest level a third of a step before the end.
    logits = np.append(np.zeros(steps - 1), np.log(1 / 3))
    for smoothness in SMOOTHNESS:
        logits = least_squares(residuals, logits, max_nfev=100, args=(smoothness,)).x
    return half_log_snrs_of(logits)


@cache
def _shipped() -> dict[str, dict[str, list[float]]]:
    return json.loads(SHIPPED.read_text(encoding="utf-8"))


def load_optimised_timesteps(
    schedule: Schedule, steps: int, solver: Solver | None = None
) -> np.ndarray:
    """Return `optimise_timesteps` for a solver, from the shipped timesteps where they have it.

    Args:
        solver: None: dpm++2m, which the shipped timesteps are for.

    Raises:
        UsageError: see `optimise_timesteps`.
    """
    solver = dpm_solver_2m if solver is None else solver
    if _key(solver) == (dpm_solver_2m, ()) and steps in SHIPPED_STEPS:
        for name, timesteps in _shipped().items():
            if np.array_equal(schedule.betas, make_schedule(name).betas):
                return schedule.t_at_half_log_snr(timesteps[str(steps)])
    return optimise_timesteps(schedule, steps, solver)


def main() -> None:
    """Write the shipped timesteps: log(alpha/sigma) of their levels."""
    shipped: dict[str, dict[str, list[float]]] = {}
    for name in ("cosine", "linear"):
        schedule = make_schedule(name)
        shipped[name] = {}
        for n in SHIPPED_STEPS:
            half_log_snrs = schedule.half_log_snr(optimise_timesteps(schedule, n))
            shipped[name][str(n)] = [round(value, 4) for value in half_log_snrs]
    SHIPPED.write_text(json.dumps(shipped) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
