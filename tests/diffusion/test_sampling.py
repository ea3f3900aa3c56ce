"""Single steps and whole runs of the sampler against the original's, and its two drivers."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glide_jax.diffusion.spacings import respaced
from glide_jax.diffusion.guidance import Network, guidance
from glide_jax.diffusion.guidance.linear import classifier_free, clip
from glide_jax.diffusion.losses import make_tables, q_sample
from glide_jax.diffusion.sampling import plan, sample, stream
from glide_jax.diffusion.schedule import Schedule, make_schedule, posterior
from glide_jax.diffusion.solvers.ancestral import ddim, ddpm
from glide_jax.diffusion.solvers.table import step_betas
from tests.support.golden import (
    SCHEDULES,
    assert_close,
    assert_relative,
    encode,
    load,
    network,
    nhwc,
    rows,
    steps_nhwc,
)

# --- single steps, the network's output given

CHAINS = ["squaredcos_cap_v2|none", "linear|fast27", "squaredcos_cap_v2|10"]
each_chain = pytest.mark.parametrize("chain", CHAINS)
# The original rounds alpha-bar to float32, and at eta = 1 little is left of a difference of two.
ETAS = {0.0: 1e-5, 0.5: 1e-5, 1.0: 1e-3}


@guidance()
def pushed(predict, x, point, *, score):
    """What gradient guidance does, with a given gradient."""
    return predict(x, point)._replace(score=score)


@guidance()
def seen(predict, x, point):
    """Hands out the network's output in the place of x_0."""
    p = predict(x, point)
    return p._replace(x_0=p.branches["cond"])


def echo(params, x, t, cond):
    """A network that answers with its conditioning."""
    return cond


def tell_t(params, x, t, cond):
    """A network that answers with its timestep."""
    return jnp.broadcast_to(t[:, None, None, None], x.shape)


@cache
def grid_of(chain: str) -> tuple[Schedule, np.ndarray]:
    name, spec = chain.split("|")
    schedule = make_schedule(SCHEDULES[name])
    return schedule, respaced(schedule, "" if spec == "none" else spec)


def reference(chain: str, name: str) -> np.ndarray:
    array = load("diffusion_steps")[f"{chain}|{name}"]
    return nhwc(array) if array.ndim == 4 else array


def step_each(chain, solver, guidances=(), *, fn=echo, noise=1.0, push=False):
    """One step of each picture of the reference, each from its own row of the plan: `(x, x_0)`."""
    schedule, grid = grid_of(chain)
    found = []
    for i, t in enumerate(reference(chain, "t")):
        one = slice(i, i + 1)
        scores = [pushed(score=reference(chain, "grad")[one])] if push else []
        row = len(grid) - 1 - t
        part = rows(plan(schedule, grid, solver, [*guidances, *scores]), slice(row, row + 1))
        tape = noise * reference(chain, "noise")[one][None]
        networks = {"main": Network(fn, None)}
        conds = {"cond": reference(chain, "model_output")[one]}
        found.append(sample(networks, conds, part, reference(chain, "x")[one], tape))
    return [np.concatenate(column) for column in zip(*((s.x, s.x_0) for s in found), strict=True)]


@each_chain
def test_q_sample(chain):
    schedule, grid = grid_of(chain)
    tables = make_tables(Schedule(step_betas(schedule, grid)))
    t = reference(chain, "t")
    x_0, noise = reference(chain, "x0"), reference(chain, "noise0")
    assert_close(q_sample(tables, x_0, t, noise), reference(chain, "q_sample"), 1e-6)


@each_chain
def test_posterior(chain):
    q, t = posterior(step_betas(*grid_of(chain))), reference(chain, "t")
    x_0, x = reference(chain, "x0"), reference(chain, "x")
    mean_x_0, mean_x_t = (c[t][:, None, None, None] for c in (q.mean_x_0, q.mean_x_t))
    assert_close(mean_x_0 * x_0 + mean_x_t * x, reference(chain, "post_mean"), 1e-5)
    assert_close(q.beta_tilde[t], reference(chain, "post_var").ravel(), 1e-6)
    assert_close(q.log_beta_tilde[t], reference(chain, "post_logvar").ravel(), 1e-5)


@pytest.mark.parametrize("kind", ["clip", "noclip"])
@each_chain
def test_ancestral_step(chain, kind):
    guidances = [clip()] if kind == "clip" else []
    x, x_0 = step_each(chain, ddpm, guidances)
    assert_relative(x_0, reference(chain, f"pmv_{kind}_pred_xstart"), 2e-6, floor=1)
    assert_relative(x, reference(chain, f"p_sample_{kind}"), 5e-6, floor=1)
    mean, _ = step_each(chain, ddpm, guidances, noise=0.0)
    assert_relative(mean, reference(chain, f"pmv_{kind}_mean"), 5e-6, floor=1)


@each_chain
def test_learned_variance(chain):
    """From the noise that a step adds; v leaves [-1, 1] here, and is not clipped."""
    without, _ = step_each(chain, ddpm, [clip()], noise=0.0)
    x, _ = step_each(chain, ddpm, [clip()])
    std = np.exp(0.5 * reference(chain, "pmv_clip_log_variance"))
    noisy = reference(chain, "t") > 0
    added = (x - without)[noisy]
    assert_close(added, (std * reference(chain, "noise"))[noisy], 2e-6)
    assert not (x - without)[~noisy].any()


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("kind", ["clip", "noclip"])
@each_chain
def test_ddim_step(chain, kind, eta):
    guidances = [clip()] if kind == "clip" else []
    x, _ = step_each(chain, partial(ddim, eta=eta, released=True), guidances)
    assert_relative(x, reference(chain, f"ddim_{kind}_eta{eta}"), ETAS[eta], floor=1)


@each_chain
def test_a_score_moves_the_mean_of_ancestral_sampling(chain):
    """By variance times score, after clipping; at the last step too."""
    x, x_0 = step_each(chain, ddpm, [clip()], push=True)
    assert_relative(x, reference(chain, "p_sample_cond"), 5e-6, floor=1)
    assert_close(x_0, reference(chain, "pmv_clip_pred_xstart"), 1e-5)


@each_chain
def test_a_score_moves_the_prediction_of_ddim(chain):
    """By sigma^2 / alpha times score, beyond the range of pictures (4.7e4 at t = 999)."""
    x, _ = step_each(chain, partial(ddim, released=True), [clip()], push=True)
    assert_relative(x, reference(chain, "ddim_cond"), 1e-5, floor=1)


@each_chain
def test_the_network_sees_timesteps_of_the_original_chain(chain):
    _, t = step_each(chain, ddpm, [seen()], fn=tell_t)
    wanted = reference(chain, "t_seen_by_model")
    np.testing.assert_array_equal(t, np.broadcast_to(wanted[:, None, None, None], t.shape))


# --- whole runs of tiny networks


def base_run(spec, solver, guidances):
    """The reference's two captions, with classifier-free guidance: arguments of the drivers."""
    loops, schedule = load("loops"), make_schedule("cosine")
    text = encode("base", loops["tokens"], loops["mask"])
    conds = {
        name: (jax.tree.map(lambda array: array[rows], text), {})  # noqa: B023
        for name, rows in (("cond", slice(0, 2)), ("null", slice(2, 4)))
    }
    run = plan(schedule, respaced(schedule, spec), solver, guidances)
    x, tape = nhwc(loops["base.x_T"][:2]), steps_nhwc(loops["base.noise"][: len(run), :2])
    return {"main": network("base")}, conds, run, x, tape


def test_ancestral_run_with_classifier_free_guidance():
    loops = load("loops")
    run = base_run("6", ddpm, [classifier_free(scale=3.0), clip()])
    states = [state for _, state in stream(*run)]
    wanted = steps_nhwc(loops["base_p.steps"])
    assert_close(np.stack([state.x for state in states]), wanted, 1e-4)
    assert_close(states[-1].x_0, nhwc(loops["base_p.pred_xstart_last"]), 1e-4)
    assert_close(sample(*run).x, nhwc(loops["base_p.final"]), 1e-4)


@pytest.mark.parametrize(("eta", "tolerance"), [(0.0, 1e-4), (1.0, 2e-3)])
def test_ddim_run_with_classifier_free_guidance(eta, tolerance):
    solver = partial(ddim, eta=eta, released=True)
    run = base_run("4", solver, [classifier_free(scale=4.0), clip()])
    found = np.stack([state.x for _, state in stream(*run)])
    assert_close(found, steps_nhwc(load("loops")[f"base_ddim_eta{eta}.steps"]), tolerance)


def test_ddim_run_without_clipping():
    run = base_run("4", partial(ddim, released=True), [classifier_free(scale=1.5)])
    found = np.stack([state.x for _, state in stream(*run)])
    assert_relative(found, steps_nhwc(load("loops")["base_ddim_noclip.steps"]), 5e-6)


def test_ddim_run_of_the_upsampler():
    loops, schedule = load("loops"), make_schedule("linear")
    text = encode("superres", loops["tokens"][:2], loops["mask"][:2])
    conds = {"cond": (text, {"low_res": nhwc(loops["up.low_res"])})}
    run = plan(schedule, respaced(schedule, "4"), partial(ddim, released=True), [clip()])
    x = nhwc(loops["up.x_T"])
    tape = np.zeros((len(run), *x.shape), np.float32)
    states = stream({"main": network("superres")}, conds, run, x, tape)
    found = np.stack([state.x for _, state in states])
    assert_close(found, steps_nhwc(loops["up_ddim.steps"]), 5e-4)
