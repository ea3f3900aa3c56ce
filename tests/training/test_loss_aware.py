"""Loss-aware timesteps against numpy: probabilities, weights, history, devices, resuming."""

import json
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glide_jax.devices.parallel import make_parallel
from glide_jax.diffusion.losses import make_tables
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.errors import GlideError
from glide_jax.training import loss_aware
from glide_jax.training.checkpoint import Checkpoints
from glide_jax.training.checksums import name_of
from glide_jax.training.config import OptimiserConfig, TrainConfig
from glide_jax.training.loss_aware import (
    LossHistory,
    TimestepLosses,
    add_losses,
    empty_history,
    importance,
    probabilities,
    sample_timestep,
)
from glide_jax.training.objectives import Batch, denoising_loss, make_objective, sample_noise
from glide_jax.training.optimiser import make_optimiser
from glide_jax.training.state import new_state, recipe_state
from glide_jax.training.step import Control, scan_steps, train_step
from glide_jax.training.timestep_distribution import TimestepDistribution
from tests.support.commands import TINY, run

KEY = jax.random.key(5)
STEPS, ROWS = 12, 32
OPTIMISER = OptimiserConfig(learning_rate=0.01)


class Reference:
    """The sampler of Improved DDPM, one loss after the other."""

    def __init__(self, steps):
        self.losses = [[] for _ in range(steps)]

    def add(self, t, loss):
        for one, value in zip(t, loss, strict=True):
            self.losses[one] = [*self.losses[one], value][-10:]

    def probabilities(self):
        steps = len(self.losses)
        if any(len(losses) < 10 for losses in self.losses):
            return np.full(steps, 1 / steps)
        size = np.sqrt((np.array(self.losses, np.float64) ** 2).mean(axis=1))
        return size / size.sum() * 0.999 + 0.001 / steps


def kept(history):
    """Return the losses of each timestep, sorted: the history is a ring."""
    rows = zip(np.asarray(history.losses), np.asarray(history.count), strict=True)
    return [sorted(losses[: min(count, 10)].tolist()) for losses, count in rows]


def assert_agrees(history, reference):
    for found, losses in zip(kept(history), reference.losses, strict=True):
        np.testing.assert_array_equal(found, np.sort(np.float32(losses)))
    np.testing.assert_allclose(probabilities(history), reference.probabilities(), rtol=2e-6)


@pytest.fixture(scope="module")
def spread():
    """A history whose probabilities span four orders of magnitude."""
    size = np.logspace(-4, 0, 200, dtype=np.float32)
    return LossHistory(jnp.tile(size[:, None], (1, 10)), jnp.full(200, 10))


def test_history_and_probabilities_are_those_of_the_reference():
    rng, reference, history = np.random.default_rng(0), Reference(6), empty_history(6)
    add, uniform = jax.jit(add_losses), 0
    for _ in range(12):
        # Few timesteps and many records: most timesteps come several times, some more than ten.
        t = rng.choice(6, 24, p=(0.5, 0.2, 0.1, 0.1, 0.05, 0.05)).astype(np.int32)
        loss = rng.exponential(1 + t).astype(np.float32)
        mixed = rng.permutation(24).astype(np.int32)
        history = add(history, TimestepLosses(mixed, t[mixed], loss[mixed]))
        reference.add(t, loss)
        assert_agrees(history, reference)
        uniform += np.allclose(probabilities(history), 1 / 6, rtol=1e-6)
    assert 2 < uniform < 12
    assert int(history.count.sum()) == 12 * 24


def test_timesteps_follow_their_probabilities(spread):
    p = np.asarray(probabilities(spread))
    assert p.sum() == pytest.approx(1, abs=1e-6)
    keys = jax.random.split(KEY, 100_000)
    t = np.asarray(jax.vmap(partial(sample_timestep, probability=jnp.asarray(p)))(keys))
    ends = np.cumsum((p * np.float32(2**31)).astype(np.uint64))
    bits = np.asarray(jax.vmap(partial(jax.random.bits, dtype=np.uint32))(keys)) // 2
    np.testing.assert_array_equal(t, np.searchsorted(ends[:-1], bits, side="right"))
    counts = np.bincount(t, minlength=200)
    assert (((counts - 1e5 * p) ** 2) / (1e5 * p)).sum() < 199 + 4 * np.sqrt(2 * 199)


def test_weighted_means_are_those_of_uniform_timesteps(spread):
    p = probabilities(spread)
    t = jax.vmap(partial(sample_timestep, probability=p))(jax.random.split(KEY, 100_000))
    values = np.sqrt(np.arange(200.0)) + 1
    found = np.asarray(importance(p, t)) * values[np.asarray(t)]
    # The exact expectation; and that of the samples, to four standard errors.
    assert (np.asarray(p) * np.asarray(importance(p, jnp.arange(200))) * values).sum() == (
        pytest.approx(values.mean(), rel=1e-6)
    )
    assert found.mean() == pytest.approx(values.mean(), abs=4 * found.std() / np.sqrt(1e5))


def test_losses_of_zero_leave_the_timesteps_uniform():
    history = LossHistory(jnp.zeros((5, 10)), jnp.full(5, 12))
    np.testing.assert_allclose(probabilities(history), 0.2, rtol=1e-6)


def test_the_timestep_of_a_record_depends_on_its_row_alone(spread):
    timesteps = TimestepDistribution(200, probability=probabilities(spread))
    batch = make_batch()
    whole, half = (
        sample_noise(KEY, rows, timesteps).t
        for rows in (batch, jax.tree.map(lambda x: x[16:], batch))
    )
    np.testing.assert_array_equal(whole[16:], half)


# --- in the training step


class Scaled:
    """A network that predicts `w x_t`, without a variance."""

    def apply(self, variables, *inputs, method=None, **conditioning):
        return None if method is not None else variables["params"]["w"] * inputs[0]


CONFIG = TrainConfig(
    name="x",
    model=TINY,
    timestep_distribution="loss-aware",
    diffusion_steps=STEPS,
    optimiser=OPTIMISER,
)
LOSS = partial(
    denoising_loss,
    model=Scaled(),
    tables=make_tables(make_schedule("cosine", STEPS)),
    config=CONFIG,
)


def make_batch(seed=0):
    image = np.random.default_rng(seed).integers(0, 256, (ROWS, 4, 4, 3), dtype=np.uint8)
    text = np.zeros((ROWS, 2), np.int32)
    return Batch(image, text, text == 0, np.arange(ROWS, dtype=np.int32))


def initial_state():
    optimiser = make_optimiser(OPTIMISER, 100)
    history = empty_history(STEPS)
    return new_state({"w": jnp.ones(3)}, optimiser, OPTIMISER, loss_history=history)


def step_of(**options):
    optimiser = make_optimiser(OPTIMISER, 100)
    return partial(train_step, loss=LOSS, optimiser=optimiser, config=OPTIMISER, **options)


def trained(number, state=None, first=0, **options):
    """Return the state after some steps, and the loss of each."""
    step, found = jax.jit(step_of(**options)), []
    state = state or initial_state()
    for seed in range(first, first + number):
        state, metrics = step(state, make_batch(seed), KEY)
        found.append(float(metrics["loss"]))
    return state, found


@cache
def over_devices(kind: str) -> list:
    """Return the losses, counts and history of two calls of five steps over all devices."""
    parallel = make_parallel(kind, ROWS)
    steps = partial(scan_steps, step=step_of(), read=lambda data, batch: batch)
    program = parallel.compile_steps(steps, np.zeros(1))
    state, found = parallel.put_state(jax.device_get(initial_state())), []
    for call in range(2):
        batches = [make_batch(5 * call + i) for i in range(5)]
        items = parallel.put_items(jax.tree.map(lambda *x: np.stack(x), *batches))
        state, metrics = program(state, items, Control(KEY))
        found += np.asarray(parallel.gather(metrics)["loss"]).tolist()
    copies = [np.asarray(x.data).tolist() for x in state.loss_history.count.addressable_shards]
    history = jax.device_get(parallel.gather(state.loss_history))
    return [found, history.losses.tolist(), history.count.tolist(), copies]


def test_the_step_records_unweighted_losses_and_weights_their_mean():
    reference, state = Reference(STEPS), initial_state()
    step, aware = jax.jit(step_of()), 0
    for seed in range(10):
        batch, p = make_batch(seed), reference.probabilities()
        record_key, _ = jax.random.split(jax.random.fold_in(KEY, state.step))
        timesteps = TimestepDistribution(STEPS, probability=probabilities(state.loss_history))
        noise = sample_noise(record_key, batch, timesteps)
        tables = LOSS.keywords["tables"]
        alpha, sigma = (
            np.asarray(x)[noise.t][:, None, None, None] for x in (tables.alpha, tables.sigma)
        )
        x_t = alpha * (batch.image / 127.5 - 1) + sigma * noise.eps
        each = np.asarray(((state.params["w"] * x_t - noise.eps) ** 2).mean(axis=(1, 2, 3)))
        state, metrics = step(state, batch, KEY)
        weight = 1 / (STEPS * p[np.asarray(noise.t)])
        assert float(metrics["loss"]) == pytest.approx((weight * each).mean(), rel=1e-4)
        quarter = np.asarray(noise.t) * 4 // STEPS
        sums = [(weight * each)[quarter == i].sum() / ROWS for i in range(4)]
        shares = [weight[quarter == i].sum() / ROWS for i in range(4)]
        np.testing.assert_allclose(metrics["quartile_sum"], sums, rtol=1e-4)
        np.testing.assert_allclose(metrics["quartile_share"], shares, rtol=1e-4)
        reference.add(np.asarray(noise.t), each)
        np.testing.assert_allclose(
            probabilities(state.loss_history), reference.probabilities(), rtol=1e-4
        )
        aware += np.ptp(p) > 0
    assert aware >= 3


def test_microbatches_and_several_steps_a_call_record_the_same():
    alone, losses = trained(10)
    split, split_losses = trained(10, accumulate=4)
    np.testing.assert_allclose(split_losses, losses, rtol=1e-5)
    np.testing.assert_array_equal(split.loss_history.count, alone.loss_history.count)
    np.testing.assert_allclose(split.loss_history.losses, alone.loss_history.losses, rtol=1e-4)
    together, history, count, _ = over_devices("pmap")
    np.testing.assert_allclose(together, losses, rtol=1e-5)
    np.testing.assert_allclose(history, alone.loss_history.losses, rtol=1e-4)
    np.testing.assert_array_equal(count, alone.loss_history.count)


def test_eight_devices_have_the_history_of_one():
    code = (
        "import json; from tests.training.test_loss_aware import over_devices; "
        "print(json.dumps([over_devices('pmap'), over_devices('fsdp')]))"
    )
    result = run("-c", code, devices=8)
    assert result.returncode == 0, result.stderr
    losses, history, count, _ = over_devices("pmap")
    assert min(count) >= 10
    for eight in json.loads(result.stdout.splitlines()[-1]):
        np.testing.assert_allclose(eight[0], losses, rtol=1e-5)
        np.testing.assert_allclose(eight[1], history, rtol=1e-4)
        assert eight[2] == count
        assert len(eight[3]) == 8 and all(np.ravel(copy).tolist() == count for copy in eight[3])


def test_a_bad_step_leaves_the_history():
    state, _ = trained(2)
    broken = make_batch(2)
    key = jax.random.key(1)
    bad = jax.tree.map(lambda x: x * np.nan, state.params)
    after, metrics = jax.jit(step_of())(replace(state, params=bad), broken, key)
    assert metrics["bad"] == 1
    jax.tree.map(np.testing.assert_array_equal, after.loss_history, state.loss_history)


def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path):
    whole, losses = trained(10)
    half, before = trained(6)
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(6, jax.device_get(half), {}, "data")
    with Checkpoints(tmp_path, 1) as checkpoints:
        zeros = jax.tree.map(np.zeros_like, jax.device_get(half))
        saved = checkpoints.restore(zeros, "data")
    resumed, after = trained(4, saved.state, first=6)
    assert before + after == losses
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_other_levels_have_no_history_and_the_checkpoints_of_before(tmp_path):
    """Checkpoints without a history have the arrays of those from before there was one."""
    optimiser = make_optimiser(OPTIMISER, 100)
    state = jax.device_get(new_state({"w": jnp.ones(3)}, optimiser, OPTIMISER))
    assert state.loss_history is None
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, state, {}, "data")
    tree = json.loads((tmp_path / "1" / "state" / "_METADATA").read_text())["tree_metadata"]
    fields = {entry["key_metadata"][0]["key"] for entry in tree.values()}
    assert fields == {
        "step", "params", "ema", "power_emas", "opt_state", "loss_mean", "log2_loss_scale",
        "reference_params",
    }  # fmt: skip
    with Checkpoints(tmp_path, 1) as checkpoints:
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(state, "data").state, state)
        with pytest.raises(GlideError, match=r"another recipe \(2 arrays differ: .*loss_history"):
            checkpoints.restore(jax.device_get(initial_state()), "data")


def test_a_recipe_chooses_them():
    abstract = jax.eval_shape(
        lambda: recipe_state(CONFIG, make_objective(CONFIG), {"w": jnp.ones(3)})
    )
    assert abstract.loss_history.losses.shape == (STEPS, 10)
    names = [name_of(path) for path, _ in jax.tree.leaves_with_path(abstract)]
    assert sum("loss_history" in name for name in names) == 2
    # Held-out losses have no history: every timestep alike, and no weights.
    batch = make_batch()
    plain, _ = LOSS({"w": jnp.ones(3)}, batch, KEY)
    uniform, metrics = LOSS({"w": jnp.ones(3)}, batch, KEY, loss_history=empty_history(STEPS))
    assert (
        "timestep_losses" in metrics
        and "timestep_losses" not in LOSS({"w": jnp.ones(3)}, batch, KEY)[1]
    )
    assert plain != uniform  # other random bits
    assert loss_aware.MEMORY == 10
