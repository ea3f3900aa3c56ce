"""Grids optimised for a solver and a number of steps, on exact statistics of images.

Of Gaussian images the best denoiser is known, and every solver is linear in it, one spatial
frequency at a time: what it ends with can be computed, and its error be made least. The images here
have the power spectrum of natural ones, 1/f^2: a measure of discretisation alone.

    python -m glide_jax.diffusion.solvers.optimised            # makes glide_jax/assets/grids.json again
"""

import json
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glide_jax.diffusion.schedule import Schedule, make_schedule
from glide_jax.diffusion.solvers.multistep import dpm_solver_2m
from glide_jax.diffusion.solvers.table import HISTORY, Solver, Table
from glide_jax.diffusion.spacings import end_levels
from glide_jax.errors import UsageError

# Beyond it an optimisation takes minutes, and even steps in log-SNR leave nothing to gain.
MOST_STEPS = 50
SHIPPED = Path(__file__).parents[2] / "assets" / "grids.json"
SHIPPED_STEPS = (5, 6, 8, 10, 12, 15, 20, 25)


class Spectrum(NamedTuple):
    """Gaussian images by their distinct spatial frequencies, each `(K,)` float64.

    Attributes:
        variance: of a frequency's coefficient, scaled so that a pixel's is the mean of all.
        share: of all coefficients, those that have it.
    """

    variance: np.ndarray
    share: np.ndarray


@cache
def natural_images(size: int = 64, known: int = 0) -> Spectrum:
    """Images `size` pixels wide of power 1/f^2 and standard deviation 0.5 a pixel.

    Args:
        known: frequencies below it are known (those of the picture that an upsampler is given), and
            left out.
    """
    k = np.fft.fftfreq(size, 1 / size)
    squares, counts = np.unique(k[:, None] ** 2 + k**2, return_counts=True)
    variance = 1 / np.maximum(squares, 1)
    variance *= 0.25 / np.average(variance, weights=counts)
    drawn = squares >= known**2
    return Spectrum(variance[drawn], counts[drawn] / counts[drawn].sum())


def drawn_with(schedule: Schedule) -> Spectrum:
    """What is drawn on a schedule: on the linear one what an upsampler adds, else whole images."""
    linear = np.array_equal(schedule.betas, make_schedule("linear", len(schedule)).betas)
    return natural_images(256, known=32) if linear else natural_images(64)


def standard_deviations(table: Table, spectrum: Spectrum) -> np.ndarray:
    """`(K,)`: of what a table ends with from standard normal noise, given the best denoiser.

    The recursion is linear: x is carried as its weights on the noise it begins with, and on that
    of each row. Where the variance is learned, it is the best that is the same for every pixel.
    """
    noisy = np.flatnonzero((table.s > 0) | (table.s_learned > 0))
    x = np.zeros((1 + len(noisy), len(spectrum.variance)))
    x[0] = 1.0
    y, history = np.zeros_like(x), np.zeros((HISTORY, *x.shape))
    for i in range(len(table.t)):
        row = table.rows(i)
        total = row.alpha**2 * spectrum.variance + row.sigma**2
        x_0 = row.alpha * spectrum.variance / total * x
        entry = row.u * x + row.v * x_0
        history = np.tensordot(row.S, np.concatenate([entry[None], history]), axes=1)
        y = row.Py * y + row.Px * x + np.tensordot(row.B, history, axes=1)
        x = row.Qy * y + row.Qx * x + np.tensordot(row.E, history, axes=1)
        if i in noisy:
            uncertain = spectrum.share @ (spectrum.variance * row.sigma**2 / total)
            x[1 + np.searchsorted(noisy, i)] += row.s + row.s_learned * _learned(row, uncertain)
    return np.sqrt((x**2).sum(axis=0))


def _learned(row: Table, uncertain: float) -> float:
    """Standard deviation of a row, where the network knows `beta_tilde + c^2 Var[x_0 | x_t]`."""
    beta = 1 - (row.alpha / row.next_alpha) ** 2
    beta_tilde = beta * (row.next_sigma / row.sigma) ** 2
    best = beta_tilde + (beta * row.next_alpha / row.sigma**2) ** 2 * uncertain
    frac = np.log(best / beta_tilde) / np.log(beta / beta_tilde)
    return np.exp((frac * row.log_beta + (1 - frac) * row.log_beta_tilde) / 2)


def image_error(
    schedule: Schedule, grid: np.ndarray, solver: Solver, spectrum: Spectrum | None = None
) -> float:
    """Distance of what a solver draws from what it should: 2-Wasserstein, root mean square a pixel.

    Args:
        spectrum: of the images; None: `drawn_with(schedule)`.
    """
    spectrum = drawn_with(schedule) if spectrum is None else spectrum
    table = solver(schedule, grid, np.zeros(len(grid), bool))
    error = standard_deviations(table, spectrum) - np.sqrt(spectrum.variance)
    return float(np.sqrt(spectrum.share @ error**2))


# Weights of the unevenness of steps against errors in 1/1000. The first leads past poor minima; the
# second decides where the error does not, which from 15 steps on is nearly everywhere.
SMOOTHNESS = (0.3, 0.03)


def optimise_grid(schedule: Schedule, steps: int, solver: Solver = dpm_solver_2m) -> np.ndarray:
    """The grid of least `image_error`, `(steps,)`; it begins where the log-SNR spacing does.

    Raises:
        UsageError: fewer than one step, or more than 50.
    """
    if not 1 <= steps <= min(MOST_STEPS, len(schedule)):
        most = min(MOST_STEPS, len(schedule))
        raise UsageError(
            f"a grid is optimised for 1 to {most} steps, not {steps}: take spacing logsnr"
        )
    return schedule.at_log_snr(_optimised(schedule.betas.tobytes(), steps, *_parts(solver)))


def _parts(solver: Solver) -> tuple[Solver, tuple]:
    """A solver and its options, equal for equal ones: two `partial` of the same are not."""
    bare = partial(solver)  # Of a partial it takes the parts.
    return bare.func, tuple(sorted(bare.keywords.items()))


@lru_cache(maxsize=256)
def _optimised(betas: bytes, steps: int, solver: Solver, options: tuple) -> np.ndarray:
    # Not at the top: it takes a while, and most runs do not need it.
    from scipy.optimize import least_squares

    schedule, solver = Schedule(np.frombuffer(betas)), partial(solver, **dict(options))
    spectrum, (low, high) = drawn_with(schedule), end_levels(schedule)
    if steps == 1:
        return np.array([low])

    def levels_of(logits):
        parts = np.exp(logits - logits.max())
        return low + (high - low) * np.append(0.0, np.cumsum(parts[:-1]) / parts.sum())

    def residuals(logits, smoothness):
        grid = schedule.at_log_snr(levels_of(logits))
        table = solver(schedule, grid, np.zeros(steps, bool))
        error = standard_deviations(table, spectrum) - np.sqrt(spectrum.variance)
        uneven = smoothness * np.diff(logits[:-1], 2)
        return np.append(1000 * np.sqrt(spectrum.share) * error, uneven)

    # From even steps, the cleanest level a third of one before the end.
    logits = np.append(np.zeros(steps - 1), np.log(1 / 3))
    for smoothness in SMOOTHNESS:
        logits = least_squares(residuals, logits, max_nfev=100, args=(smoothness,)).x
    return levels_of(logits)


@cache
def _shipped() -> dict[str, dict[str, list[float]]]:
    return json.loads(SHIPPED.read_text(encoding="utf-8"))


def optimised_grid(schedule: Schedule, steps: int, solver: Solver | None = None) -> np.ndarray:
    """`optimise_grid` for a solver, None being dpm++2m, of which some are shipped.

    Raises:
        UsageError: see `optimise_grid`.
    """
    solver = dpm_solver_2m if solver is None else solver
    if _parts(solver) == (dpm_solver_2m, ()) and steps in SHIPPED_STEPS:
        for name, grids in _shipped().items():
            if np.array_equal(schedule.betas, make_schedule(name).betas):
                return schedule.at_log_snr(grids[str(steps)])
    return optimise_grid(schedule, steps, solver)


def main() -> None:
    """Makes the shipped grids again: log-SNR of their levels."""
    found = {}
    for name in ("cosine", "linear"):
        schedule = make_schedule(name)
        grids = {n: schedule.log_snr(optimise_grid(schedule, n)) for n in SHIPPED_STEPS}
        found[name] = {str(n): [round(level, 4) for level in grid] for n, grid in grids.items()}
    SHIPPED.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
