"""Single steps and whole runs of the sampler against the original code."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glide_jax.diffusion.guidance import Network, clamp_x_0, classifier_free, guidance
from glide_jax.diffusion.losses import make_tables, q_sample
from glide_jax.diffusion.sampling import make_plan, run_plan, stream_plan
from glide_jax.diffusion.schedule import Schedule, make_schedule, posterior
from glide_jax.diffusion.solvers.first_order import ddim, ddpm
from glide_jax.diffusion.solvers.table import step_betas
from glide_jax.diffusion.spacings import respaced
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

# --- single steps with the network outputs of the reference

# A noise schedule and a respacing, as the keys of the reference have them.
PROCESSES = ["squaredcos_cap_v2|none", "linear|fast27", "squaredcos_cap_v2|10"]
each_process = pytest.mark.parametrize("process", PROCESSES)
# The original rounds alpha-bar to float32; at eta = 1 a difference of two of them loses digits.
ETAS = {0.0: 1e-5, 0.5: 1e-5, 1.0: 1e-3}


@guidance()
def pushed(predict, x, point, *, gradient):
    """Set a fixed guidance gradient."""
    return predict(x, point)._replace(guidance_gradient=gradient)


@guidance()
def seen(predict, x, point):
    """Return the network's output as x_0."""
    p = predict(x, point)
    return p._replace(x_0=p.branches["caption"])


def echo(params, x, t, cond):
    """A network that returns its conditioning."""
    return cond


def echo_t(params, x, t, cond):
    """A network that returns its timestep."""
    return jnp.broadcast_to(t[:, None, None, None], x.shape)


@cache
def timesteps_of(process: str) -> tuple[Schedule, np.ndarray]:
    name, spec = process.split("|")
    schedule = make_schedule(SCHEDULES[name])
    return schedule, respaced(schedule, "" if spec == "none" else spec)


def reference(process: str, name: str) -> np.ndarray:
    array = load("diffusion_steps")[f"{process}|{name}"]
    return nhwc(array) if array.ndim == 4 else array


def step_each(process, solver, guidances=(), *, fn=echo, noise=1.0, push=False):
    """Take one step of each image of the reference, each by its own row: `(x, x_0)`."""
    schedule, timesteps = timesteps_of(process)
    found = []
    for i, t in enumerate(reference(process, "t")):
        one = slice(i, i + 1)
        pushes = [pushed(gradient=reference(process, "grad")[one])] if push else []
        row = len(timesteps) - 1 - t
        part = rows(
            make_plan(schedule, timesteps, solver, [*guidances, *pushes]), slice(row, row + 1)
        )
        tape = noise * reference(process, "noise")[one][None]
        networks = {"main": Network(fn, None)}
        conds = {"caption": reference(process, "model_output")[one]}
        found.append(run_plan(networks, conds, part, reference(process, "x")[one], tape))
    return [np.concatenate(column) for column in zip(*((s.x, s.x_0) for s in found), strict=True)]


@each_process
def test_q_sample(process):
    schedule, timesteps = timesteps_of(process)
    tables = make_tables(Schedule(step_betas(schedule, timesteps)))
    t = reference(process, "t")
    x_0, noise = reference(process, "x0"), reference(process, "noise0")
    assert_close(q_sample(tables, x_0, t, noise), reference(process, "q_sample"), 1e-6)


@each_process
def test_posterior(process):
    q, t = posterior(step_betas(*timesteps_of(process))), reference(process, "t")
    x_0, x = reference(process, "x0"), reference(process, "x")
    weights = q.mean_weight_x_0, q.mean_weight_x_t
    weight_x_0, weight_x_t = (c[t][:, None, None, None] for c in weights)
    assert_close(weight_x_0 * x_0 + weight_x_t * x, reference(process, "post_mean"), 1e-5)
    assert_close(q.beta_tilde[t], reference(process, "post_var").ravel(), 1e-6)
    assert_close(q.log_beta_tilde[t], reference(process, "post_logvar").ravel(), 1e-5)


@pytest.mark.parametrize("kind", ["clip", "noclip"])
@each_process
def test_ancestral_step(process, kind):
    guidances = [clamp_x_0()] if kind == "clip" else []
    x, x_0 = step_each(process, ddpm, guidances)
    assert_relative(x_0, reference(process, f"pmv_{kind}_pred_xstart"), 2e-6, floor=1)
    assert_relative(x, reference(process, f"p_sample_{kind}"), 5e-6, floor=1)
    mean, _ = step_each(process, ddpm, guidances, noise=0.0)
    assert_relative(mean, reference(process, f"pmv_{kind}_mean"), 5e-6, floor=1)


@each_process
def test_learned_variance(process):
    """It is seen in the noise of a step; the variance output exceeds [-1, 1] and is not clipped."""
    without, _ = step_each(process, ddpm, [clamp_x_0()], noise=0.0)
    x, _ = step_each(process, ddpm, [clamp_x_0()])
    std = np.exp(0.5 * reference(process, "pmv_clip_log_variance"))
    noisy = reference(process, "t") > 0
    added = (x - without)[noisy]
    assert_close(added, (std * reference(process, "noise"))[noisy], 2e-6)
    assert not (x - without)[~noisy].any()


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("kind", ["clip", "noclip"])
@each_process
def test_ddim_step(process, kind, eta):
    guidances = [clamp_x_0()] if kind == "clip" else []
    x, _ = step_each(process, partial(ddim, eta=eta, float32_alpha_bar=True), guidances)
    assert_relative(x, reference(process, f"ddim_{kind}_eta{eta}"), ETAS[eta], floor=1)


@each_process
def test_a_score_moves_the_mean_of_ancestral_sampling(process):
    """It adds variance times the gradient after clipping, also in the last step."""
    x, x_0 = step_each(process, ddpm, [clamp_x_0()], push=True)
    assert_relative(x, reference(process, "p_sample_cond"), 5e-6, floor=1)
    assert_close(x_0, reference(process, "pmv_clip_pred_xstart"), 1e-5)


@each_process
def test_a_score_moves_the_prediction_of_ddim(process):
    """It adds sigma^2 / alpha times the gradient, beyond the range of images (4.7e4 at t = 999)."""
    x, _ = step_each(process, partial(ddim, float32_alpha_bar=True), [clamp_x_0()], push=True)
    assert_relative(x, reference(process, "ddim_cond"), 1e-5, floor=1)


@each_process
def test_the_network_sees_timesteps_of_the_training_process(process):
    _, t = step_each(process, ddim, [seen()], fn=echo_t)
    wanted = reference(process, "t_seen_by_model")
    np.testing.assert_array_equal(t, np.broadcast_to(wanted[:, None, None, None], t.shape))


# --- whole runs of tiny networks


def base_run(spec, solver, guidances):
    """Return the arguments of the drivers, for the reference's two captions."""
    loops, schedule = load("loops"), make_schedule("cosine")
    text = encode("base", loops["tokens"], loops["mask"])
    conds = {
        name: (jax.tree.map(lambda array: array[rows], text), {})  # noqa: B023
        for name, rows in (("caption", slice(0, 2)), ("null", slice(2, 4)))
    }
    run = make_plan(schedule, respaced(schedule, spec), solver, guidances)
    x, tape = nhwc(loops["base.x_T"][:2]), steps_nhwc(loops["base.noise"][: len(run), :2])
    return {"main": network("base")}, conds, run, x, tape


def test_ancestral_run_with_classifier_free_guidance():
    loops = load("loops")
    run = base_run("6", ddpm, [classifier_free(3.0), clamp_x_0()])
    states = [state for _, state in stream_plan(*run)]
    wanted = steps_nhwc(loops["base_p.steps"])
    assert_close(np.stack([state.x for state in states]), wanted, 1e-4)
    assert_close(states[-1].x_0, nhwc(loops["base_p.pred_xstart_last"]), 1e-4)
    assert_close(run_plan(*run).x, nhwc(loops["base_p.final"]), 1e-4)


@pytest.mark.parametrize(("eta", "tolerance"), [(0.0, 1e-4), (1.0, 2e-3)])
def test_ddim_run_with_classifier_free_guidance(eta, tolerance):
    solver = partial(ddim, eta=eta, float32_alpha_bar=True)
    run = base_run("4", solver, [classifier_free(4.0), clamp_x_0()])
    found = np.stack([state.x for _, state in stream_plan(*run)])
    assert_close(found, steps_nhwc(load("loops")[f"base_ddim_eta{eta}.steps"]), tolerance)


def test_ddim_run_without_clipping():
    run = base_run("4", partial(ddim, float32_alpha_bar=True), [classifier_free(1.5)])
    found = np.stack([state.x for _, state in stream_plan(*run)])
    assert_relative(found, steps_nhwc(load("loops")["base_ddim_noclip.steps"]), 5e-6)


def test_ddim_run_of_the_upsampler():
    loops, schedule = load("loops"), make_schedule("linear")
    text = encode("superres", loops["tokens"][:2], loops["mask"][:2])
    conds = {"caption": (text, {"low_res": nhwc(loops["up.low_res"])})}
    run = make_plan(
        schedule, respaced(schedule, "4"), partial(ddim, float32_alpha_bar=True), [clamp_x_0()]
    )
    x = nhwc(loops["up.x_T"])
    tape = np.zeros((len(run), *x.shape), np.float32)
    states = stream_plan({"main": network("superres")}, conds, run, x, tape)
    found = np.stack([state.x for _, state in states])
    assert_close(found, steps_nhwc(loops["up_ddim.steps"]), 5e-4)
