"""Guidance where the guided distribution is known exactly: no trained network, float64.

The images have one pixel, whose distribution is a mixture of Gaussians. The denoiser, the
probability of a class and the posterior of an observation are then known at every noise level.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtri

from glide_jax.diffusion import sampling
from glide_jax.diffusion.guidance import (
    Network,
    autoguidance,
    classifier_free,
    classifier_guidance,
    combine_prompts,
    image_loss,
)
from glide_jax.diffusion.sampling import make_plan, run_plan
from glide_jax.diffusion.solvers.first_order import ddpm
from glide_jax.diffusion.solvers.multistep import dpm_solver_2m
from tests.support.golden import assert_close, rows
from tests.support.oracles import MEANS, SCHEDULE, STDS, WEIGHTS, gaussian_flow, log_snr_timesteps

HALF_LOG_SNR = SCHEDULE.half_log_snr(np.arange(len(SCHEDULE)))
# Even quantiles of the standard normal distribution; their mean is zero.
QUANTILES = ndtri((np.arange(40) + 0.5) / 40)


@pytest.fixture(autouse=True)
def double(monkeypatch):
    """Run the sampler in float64: tables are not rounded on their way to the device."""
    monkeypatch.setattr(sampling, "_to_device_dtype", lambda column: column)
    with jax.enable_x64(True):
        yield


def alpha_sigma(half_log_snr):
    return (1 + jnp.exp(-2 * half_log_snr)) ** -0.5, (1 + jnp.exp(2 * half_log_snr)) ** -0.5


def levels_of(half_log_snr, t):
    """`alpha, sigma` of each image, `(B, 1, 1, 1)`."""
    return alpha_sigma(
        jnp.interp(t, jnp.arange(len(half_log_snr)), half_log_snr)[:, None, None, None]
    )


def log_densities(x, alpha, sigma):
    """Log-density of each component times its weight, at a noise level: `(B, 1, 1, 3)`."""
    variance = alpha**2 * STDS**2 + sigma**2
    return jnp.log(WEIGHTS) - jnp.log(variance) / 2 - (x - alpha * MEANS) ** 2 / variance / 2


def noise_of_mixture(half_log_snr, x, t, cond):
    """`-sigma grad log p(x_t)`: of the mixture (cond 0), or of component 1, 2 or 3."""
    alpha, sigma = levels_of(half_log_snr, t)
    logs = log_densities(x, alpha, sigma)
    chosen = cond[:, None, None, None] == jnp.arange(1, 4)
    logs = jnp.where((cond == 0)[:, None, None, None] | chosen, logs, -jnp.inf)
    shares = jax.nn.softmax(logs, axis=-1)
    variance = alpha**2 * STDS**2 + sigma**2
    return sigma * jnp.sum(shares * (x - alpha * MEANS) / variance, axis=-1, keepdims=True)


def log_class(half_log_snr, x, t, cond):
    """`log p(y | x_t)`, exact."""
    logs = jax.nn.log_softmax(log_densities(x, *levels_of(half_log_snr, t)), axis=-1)
    return jnp.take_along_axis(logs[:, 0, 0], cond[:, None] - 1, axis=1)[:, 0]


MIXTURE = {"main": Network(noise_of_mixture, HALF_LOG_SNR)}
CLASSIFIER = Network(log_class, HALF_LOG_SNR)


def solve(networks, x, guidances, conds, low=-4.0, high=5.0, steps=200, solver=dpm_solver_2m):
    """Take `x (B,)` from one half log-SNR to another, along the flow of the guided prediction."""
    timesteps = log_snr_timesteps(low, high, steps)
    run = rows(make_plan(SCHEDULE, timesteps, solver, guidances), slice(0, -1))
    x = jnp.asarray(x)[:, None, None, None]
    tape = jnp.zeros((len(run), *x.shape))
    return np.asarray(run_plan(networks, conds, run, x, tape).x).ravel()


def gaussian(half_log_snr, mean, std):
    """Return the quantiles of a Gaussian noised to a level."""
    alpha, sigma = map(float, alpha_sigma(half_log_snr))
    return alpha * mean + np.sqrt(alpha**2 * std**2 + sigma**2) * QUANTILES


def everywhere(value, dtype=int):
    return np.full(len(QUANTILES), value, dtype)


@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_classifier_guidance_samples_from_the_posterior(chosen):
    """The unconditional flow, guided, gives the mean and each quantile of the class."""
    mean, std = MEANS[chosen - 1], STDS[chosen - 1]
    x = gaussian(-4.0, mean, std)
    guided = classifier_guidance(CLASSIFIER, everywhere(chosen), 1.0)
    found = solve(MIXTURE, x, [guided], {"caption": everywhere(0)})
    assert_close(found.mean(), gaussian(5.0, mean, std).mean(), 2e-4)
    assert_close(found, gaussian_flow(x, mean, std, -4.0, 5.0), 2e-3)


def test_classifier_guidance_is_the_conditional_network():
    """At any scale it equals classifier-free guidance with exact networks, by Bayes' rule."""
    chosen = everywhere(2)
    x = gaussian(-4.0, 0.0, 0.7)
    guided = classifier_guidance(CLASSIFIER, chosen, 2.5)
    found = solve(MIXTURE, x, [guided], {"caption": everywhere(0)}, steps=20)
    free = classifier_free(2.5)
    wanted = solve(MIXTURE, x, [free], {"caption": chosen, "null": everywhere(0)}, steps=20)
    assert_close(found, wanted, 1e-9)


def test_classifier_guidance_of_ancestral_sampling():
    """The mean converges to the posterior mean of an observation `y = x_0 + n`, in first order."""
    mean, std, blur, y = 0.3, 0.5, 0.4, 1.1
    gain = std**2 / (std**2 + blur**2)
    posterior = mean + gain * (y - mean)

    def noise(half_log_snr, x, t, cond):
        alpha, sigma = levels_of(half_log_snr, t)
        return sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    def log_likelihood(half_log_snr, x, t, cond):
        alpha, sigma = levels_of(half_log_snr, t)
        variance = alpha**2 * std**2 + sigma**2
        clean = mean + alpha * std**2 / variance * (x - alpha * mean)
        width = blur**2 + std**2 * sigma**2 / variance
        return -(((cond[:, None, None, None] - clean) ** 2) / width / 2)[:, 0, 0, 0]

    networks = {"main": Network(noise, HALF_LOG_SNR)}
    observed = classifier_guidance(Network(log_likelihood, HALF_LOG_SNR), np.array([y]), 1.0)

    small = partial(ddpm, variance="small")

    def error(steps):
        # Without noise the linear recursion maps the mean.
        start, end = (float(alpha_sigma(level)[0]) * posterior for level in (-4.0, 5.0))
        conds = {"caption": np.zeros(1)}
        found = solve(networks, [start], [observed], conds, steps=steps, solver=small)
        return found[0] - end

    coarse, fine = error(100), error(200)
    assert abs(fine) < 0.03 and abs(2 * fine - coarse) < 1e-4
    unguided = solve(networks, [0.0], [], {"caption": np.zeros(1)}, steps=200, solver=small)
    assert abs(unguided[0] - posterior) > 0.3


def shifted(params, x, t, cond):
    """The exact noise of a Gaussian whose mean is the condition."""
    half_log_snr, std = params
    alpha, sigma = levels_of(half_log_snr, t)
    mean = cond[:, None, None, None]
    return sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)


@pytest.mark.parametrize(
    ("guidances", "mean"),
    [
        ([classifier_free(3.0)], 0.2 + 3 * 0.5),
        ([combine_prompts([None, "a"], [2.0, -1.0])], 0.2 + 2 * 0.5 - 1 * 0.9),
        ([classifier_free(3.0), autoguidance(1.5)], 0.2 + 3 * 0.5 + 0.5 * 0.8),
    ],
    ids=["classifier-free", "and not", "with a weak model"],
)
def test_linear_guidance_of_gaussians(guidances, mean):
    """For Gaussians of one width, the result is a Gaussian with the weighted mean."""
    std = 0.4
    networks = {name: Network(shifted, (HALF_LOG_SNR, std)) for name in ("main", "weak")}
    means = {"caption": 0.7, "null": 0.2, "prompt 0": 1.1, "weak": -0.1}
    conds = {name: everywhere(value, float) for name, value in means.items()}
    x = gaussian(-4.0, mean, std)
    found = solve(networks, x, guidances, conds)
    assert_close(found, gaussian_flow(x, mean, std, -4.0, 5.0), 3e-4)


@pytest.mark.parametrize("through", [True, False])
def test_a_loss_on_the_clean_image_of_gaussians(through):
    """`x_0` is linear in `x_t` with a known slope; without the network's, `1 / alpha` is used."""
    mean, std, y, scale = 0.25, 0.5, 1.125, 0.75

    def half_square(params, x_0, t, cond):
        return ((x_0[:, 0, 0, 0] - cond) ** 2) / 2

    loss = image_loss(
        loss=Network(half_square, None),
        cond=everywhere(y, float),
        scale=scale,
        through_network=through,
    )
    networks = {"main": Network(shifted, (HALF_LOG_SNR, std))}
    x = QUANTILES + 0.2
    found = solve(
        networks, x, [loss], {"caption": everywhere(mean, float)}, low=-1.0, high=1.0, steps=1
    )
    (a, s), (next_a, next_s) = (map(float, alpha_sigma(level)) for level in (-1.0, 1.0))
    slope = a * std**2 / (a**2 * std**2 + s**2)
    clean = mean + slope * (x - a * mean)
    gradient = -scale * (clean - y) * (slope if through else 1 / a)
    moved = clean + s**2 / a * gradient
    assert_close(found, next_s / s * x + (next_a - next_s / s * a) * moved, 1e-9)
