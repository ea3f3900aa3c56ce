"""A toy network with each guidance, at one noise level or over a short run."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.diffusion.grids import make_grid
from glide_jax.diffusion.guidance import Network, Point, compose, dynamic_threshold, gradient, image_loss, rescale
from glide_jax.diffusion.guidance.linear import all_of, apg, autoguidance, cfg_plus_plus, classifier_free, clip, negative
from glide_jax.diffusion.guidance import apply, branches_of
from glide_jax.diffusion.guidance.predictor import noise_predictor
from glide_jax.diffusion.sampling import plan
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.diffusion.solvers.ancestral import ddim

SCHEDULE = make_schedule("cosine")
SHAPE = (3, 4, 4, 1)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal(SHAPE), jnp.float32)
NAMES = ("cond", "null", "negative", "guide", "prompt 0", "prompt 1")
CONDS = {name: np.float32(RNG.standard_normal(3)) for name in NAMES}
ALPHA, SIGMA = 0.6, 0.8
SPAN = (0.3, 5.0)
MEMORY = {"apg": jnp.asarray(RNG.standard_normal(SHAPE), jnp.float32), "other": X}


def toy(params, x, t, cond):
    """Noise, and a variance; neither linear nor the same for any two pixels."""
    cond, t = (column[:, None, None, None] for column in (cond, t))
    eps = jnp.tanh(params * x + cond * jnp.flip(x, 1) + cond + t / 1000)
    return jnp.concatenate([eps, jnp.cos(x)], axis=-1)


def bowl(params, x, t, cond):
    """`-|x - cond|^2 / 2` of each picture."""
    return -jnp.sum((x - cond[:, None, None, None]) ** 2, axis=(1, 2, 3)) / 2


NETWORKS = {"main": Network(toy, np.float32(0.9)), "guide": Network(toy, np.float32(0.5))}
BOWL, GOAL = Network(bowl, None), CONDS["prompt 0"]
# Each guidance with its numbers, so made that each number can be one for each image.
EACH = {
    "classifier_free": (classifier_free, {"scale": 3.0}),
    "negative": (partial(negative, prompt="ugly"), {"scale": 3.0}),
    "all_of": (
        lambda **w: all_of(prompts=[None, "a", "b"], weights=[w["own"], w["a"], w["b"]]),
        {"own": 2.0, "a": 1.5, "b": -0.5},
    ),
    "cfg_plus_plus": (cfg_plus_plus, {"scale": 0.6}),
    "autoguidance": (autoguidance, {"scale": 2.0}),
    "apg": (apg, {"scale": 4.0, "eta": 0.3, "momentum": -0.5, "radius": 0.7}),
    "rescale": (lambda **a: compose(classifier_free(scale=5.0), rescale(**a)), {"amount": 0.7}),
    "dynamic_threshold": (dynamic_threshold, {"quantile": 0.6}),
    "clip": (clip, {"low": -0.3, "high": 0.4}),
    "gradient": (partial(gradient, log_prob=BOWL, cond=GOAL), {"scale": 0.3}),
    "image_loss": (partial(image_loss, loss=BOWL, cond=GOAL), {"scale": -0.3}),
    "image_loss beside": (
        partial(image_loss, loss=BOWL, cond=GOAL, through=False),
        {"scale": -0.3},
    ),
}


def made(name, **changed):
    construct, numbers = EACH[name]
    return construct(**numbers | changed)


def keys(seed=0):
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(np.arange(3))


def run_of(guidances=(), solver=ddim, steps=6, spacing="logsnr"):
    return plan(SCHEDULE, make_grid(SCHEDULE, steps, spacing), solver, guidances)


def predicted(*guidances, networks=NETWORKS, conds=CONDS, some=slice(None), memory=MEMORY):
    """The prediction at one noise level, of some pictures."""
    conds = {name: cond[some] for name, cond in conds.items()}
    memory = {name: image[some] for name, image in memory.items()}
    at = Point(jnp.float32(500), ALPHA, SIGMA, 0.8, 0.6, memory)
    return apply(noise_predictor(networks, conds, branches_of(guidances)), guidances)(X[some], at)


def eps_of(name):
    return toy(0.5 if name == "guide" else 0.9, X, jnp.full(3, 500.0), CONDS[name])[..., :1]


def x_0_of(eps):
    return (X - SIGMA * eps) / ALPHA
