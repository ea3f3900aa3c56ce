"""A toy network with each guidance, at one noise level or over a short run."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.diffusion.guidance import (
    Guidance,
    Network,
    Point,
    Prediction,
    apg,
    apply_guidances,
    autoguidance,
    branches_of,
    cfg_plus_plus,
    clamp_x_0,
    classifier_free,
    classifier_guidance,
    combine_prompts,
    compose,
    dynamic_threshold,
    guidance_rescale,
    image_loss,
    noise_predictor,
)
from glide_jax.diffusion.sampling import Plan, make_plan
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.diffusion.solvers.first_order import ddim
from glide_jax.diffusion.timesteps import make_timesteps

SCHEDULE = make_schedule("cosine")
SHAPE = (3, 4, 4, 1)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal(SHAPE), jnp.float32)
NAMES = ("caption", "null", "negative", "weak", "prompt 0", "prompt 1")
CONDS = {name: np.float32(RNG.standard_normal(3)) for name in NAMES}
# Conditioning of a run against the negative prompt: branch "null" gets its caption.
AGAINST = CONDS | {"null": CONDS["negative"]}
ALPHA, SIGMA = 0.6, 0.8
INTERVAL = (0.3, 5.0)
MEMORY = {"apg": jnp.asarray(RNG.standard_normal(SHAPE), jnp.float32), "other": X}


def toy(params, x, t, cond):
    """Predict noise and variance; neither is linear, nor the same function for two pixels."""
    cond, t = (column[:, None, None, None] for column in (cond, t))
    eps = jnp.tanh(params * x + cond * jnp.flip(x, 1) + cond + t / 1000)
    return jnp.concatenate([eps, jnp.cos(x)], axis=-1)


def bowl(params, x, t, cond):
    """`-|x - cond|^2 / 2` for each image."""
    return -jnp.sum((x - cond[:, None, None, None]) ** 2, axis=(1, 2, 3)) / 2


NETWORKS = {"main": Network(toy, np.float32(0.9)), "weak": Network(toy, np.float32(0.5))}
BOWL, GOAL = Network(bowl, None), CONDS["prompt 0"]
# Each guidance with its numbers; every number may have one value per image.
EACH: dict[str, tuple[Any, dict[str, float]]] = {
    "classifier_free": (classifier_free, {"scale": 3.0}),
    "negative": (lambda scale: classifier_free(scale).with_negative_prompt("ugly"), {"scale": 3.0}),
    "combine_prompts": (
        lambda **w: combine_prompts([None, "a", "b"], [w["own"], w["a"], w["b"]]),
        {"own": 2.0, "a": 1.5, "b": -0.5},
    ),
    "cfg_plus_plus": (cfg_plus_plus, {"scale": 0.6}),
    "autoguidance": (autoguidance, {"scale": 2.0}),
    "apg": (apg, {"scale": 4.0, "eta": 0.3, "momentum": -0.5, "radius": 0.7}),
    "guidance_rescale": (
        lambda **a: compose(classifier_free(5.0), guidance_rescale(**a)),
        {"amount": 0.7},
    ),
    "dynamic_threshold": (dynamic_threshold, {"quantile": 0.6}),
    "clamp_x_0": (clamp_x_0, {"low": -0.3, "high": 0.4}),
    "classifier_guidance": (partial(classifier_guidance, log_prob=BOWL, cond=GOAL), {"scale": 0.3}),
    "image_loss": (partial(image_loss, loss=BOWL, cond=GOAL), {"scale": -0.3}),
    "image_loss beside": (
        partial(image_loss, loss=BOWL, cond=GOAL, through_network=False),
        {"scale": -0.3},
    ),
}


def made(name: str, **changed: Any) -> Guidance:
    """Return the guidance of that name, some of its numbers or its conditioning changed."""
    construct, numbers = EACH[name]
    return construct(**numbers | changed)


def keys(seed: int = 0) -> jax.Array:
    """Return one key per image."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(np.arange(3))


def run_of(guidances=(), solver=ddim, steps=6, spacing="logsnr") -> Plan:
    """Return the plan of a short run."""
    return make_plan(SCHEDULE, make_timesteps(SCHEDULE, steps, spacing), solver, guidances)


def predicted(
    *guidances: Guidance, networks=NETWORKS, conds=CONDS, some=slice(None), memory=MEMORY
) -> Prediction:
    """Return the guided prediction for some images, at one noise level."""
    conds = {name: cond[some] for name, cond in conds.items()}
    memory = {name: image[some] for name, image in memory.items()}
    t, alpha, sigma, next_alpha, next_sigma = map(jnp.float32, (500, ALPHA, SIGMA, 0.8, 0.6))
    point = Point(t, alpha, sigma, next_alpha, next_sigma, memory)
    predict = apply_guidances(noise_predictor(networks, conds, branches_of(guidances)), guidances)
    return predict(X[some], point)


def eps_of(name: str) -> jax.Array:
    """Return the noise that a branch predicts at that noise level."""
    return toy(0.5 if name == "weak" else 0.9, X, jnp.full(3, 500.0), CONDS[name])[..., :1]


def x_0_of(eps: jax.Array) -> jax.Array:
    """Return the clean image of a predicted noise, at that noise level."""
    return (X - SIGMA * eps) / ALPHA
