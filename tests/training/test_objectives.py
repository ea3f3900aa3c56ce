"""Training objectives: inputs of each kind of model, weighting, the loss over devices."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glide_jax.data.decoding import from_uint8
from glide_jax.diffusion.losses import (
    at_timesteps,
    hybrid_loss,
    loss_weight,
    make_tables,
    pseudo_huber,
    q_sample,
)
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.errors import UsageError
from glide_jax.models.presets import CLIPConfig
from glide_jax.training import objectives
from glide_jax.training.config import CLIPTrainConfig, OptimiserConfig, TrainConfig
from glide_jax.training.objectives import (
    Batch,
    denoising_loss,
    make_objective,
    noise_low_res,
    sample_noise,
    shrink,
)
from glide_jax.training.optimiser import make_optimiser
from glide_jax.training.quartiles import named_metrics
from glide_jax.training.state import new_state
from glide_jax.training.step import train_step
from glide_jax.training.timestep_distribution import make_timestep_distribution
from tests.support.commands import TINY

TABLES = make_tables(make_schedule("cosine"))
KEY = jax.random.key(3)


def make_batch(count=8, size=16, length=8, seed=0):
    rng = np.random.default_rng(seed)
    return Batch(
        rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8),
        rng.integers(0, 100, (count, length), dtype=np.int32),
        np.arange(length) < rng.integers(1, length + 1, (count, 1)),
        np.arange(count, dtype=np.int32),
    )


# --- weighting of noise levels


@pytest.mark.parametrize(
    ("snr", "eps", "v"), [(0.25, 1, 0.2), (1, 1, 0.5), (5, 1, 5 / 6), (20, 0.25, 5 / 21)]
)
def test_min_snr_weighs_as_the_paper_says(snr, eps, v):
    """The weight is min(SNR, 5) / SNR for eps, min(SNR, 5) / (SNR + 1) for v."""
    alpha, sigma = np.sqrt(snr / (1 + snr)), np.sqrt(1 / (1 + snr))
    assert float(loss_weight("min-snr", "eps", alpha, sigma, 5.0)) == pytest.approx(eps)
    assert float(loss_weight("min-snr", "v", alpha, sigma, 5.0)) == pytest.approx(v)


def test_min_snr_weighs_the_error_and_not_the_bound():
    x_0, eps, t = jnp.zeros((4, 2, 2, 3)), jnp.ones((4, 2, 2, 3)), jnp.array([0, 300, 600, 999])
    output = jnp.full((4, 2, 2, 6), 0.5)
    plain, weighted = (
        hybrid_loss(
            TABLES, x_0, at_timesteps(TABLES.sigma, t) * eps, t, eps, output, weighting=weighting
        )
        for weighting in ("none", "min-snr")
    )
    snr = (TABLES.alpha[t] / TABLES.sigma[t]) ** 2
    np.testing.assert_array_equal(weighted.vlb, plain.vlb)
    np.testing.assert_allclose(weighted.mse, 0.25)
    np.testing.assert_allclose(
        weighted.loss - weighted.vlb, 0.25 * np.minimum(snr, 5) / snr, rtol=1e-4, atol=1e-6
    )


def test_the_same_error_of_x_0_weighs_the_same_for_eps_and_v():
    """An error d of x_0 is alpha / sigma d in eps, and d / sigma in v."""
    for t in (100, 500, 900):
        alpha, sigma = TABLES.alpha[t], TABLES.sigma[t]
        of_eps = loss_weight("min-snr", "eps", alpha, sigma, 5.0) * (alpha / sigma) ** 2
        of_v = loss_weight("min-snr", "v", alpha, sigma, 5.0) / sigma**2
        assert float(of_v) == pytest.approx(float(of_eps), rel=1e-4)
        of_x = loss_weight("min-snr", "x_0", alpha, sigma, 5.0)
        assert float(of_x) == pytest.approx(float(of_eps), rel=1e-4)


def test_weighting_v_gives_the_squared_error_of_v_whatever_is_predicted():
    rng = np.random.default_rng(0)
    x_0, eps, guess = (jnp.asarray(rng.normal(size=(4, 2, 2, 3)), jnp.float32) for _ in range(3))
    t = jnp.array([20, 300, 600, 990])
    alpha, sigma = at_timesteps(TABLES.alpha, t), at_timesteps(TABLES.sigma, t)
    x_t = alpha * x_0 + sigma * eps
    # The same guess of x_0 as each kind of prediction.
    guessed_eps = (x_t - alpha * guess) / sigma
    outputs = {"x_0": guess, "eps": guessed_eps, "v": alpha * guessed_eps - sigma * guess}
    losses = [
        hybrid_loss(TABLES, x_0, x_t, t, eps, output, prediction_type=kind, weighting="v").loss
        for kind, output in outputs.items()
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)
    np.testing.assert_allclose(losses[2], losses[0], rtol=2e-3)


def test_pseudo_huber_is_squared_near_zero_and_absolute_far_away():
    np.testing.assert_allclose(pseudo_huber(jnp.float32(0.01), 1.0), 1e-4, rtol=1e-2)
    np.testing.assert_allclose(pseudo_huber(jnp.float32(100.0), 0.1), 2 * 0.1 * 100, rtol=1e-2)


def test_log_normal_levels_have_their_mean_and_spread():
    half_log_snr = make_schedule("cosine").half_log_snr(np.arange(1000))
    config = TrainConfig(
        name="x",
        model=TINY,
        timestep_distribution="log-normal",
        half_log_snr_mean=0.5,
        half_log_snr_std=0.8,
        uniform_timestep_share=0.0,
    )
    timesteps = make_timestep_distribution(config)
    t = np.asarray(jax.vmap(timesteps.sample)(jax.random.split(KEY, 20_000)))
    assert half_log_snr[t].mean() == pytest.approx(0.5, abs=0.02)
    assert half_log_snr[t].std() == pytest.approx(0.8, abs=0.02)
    everywhere = make_timestep_distribution(replace(config, uniform_timestep_share=1.0))
    t = np.asarray(jax.vmap(everywhere.sample)(jax.random.split(KEY, 20_000)))
    assert t.mean() == pytest.approx(499.5, abs=8) and t.std() == pytest.approx(288.7, abs=5)


# --- inputs of a model


class Recorder:
    """A network that predicts zero and records its inputs."""

    def apply(self, variables, *inputs, method=None, **conditioning):
        if method is not None:
            self.seen = {"mask": inputs[1]}
            return None
        x_t, t, _ = inputs
        self.seen |= {"x_t": x_t, "t": t} | conditioning
        return jnp.zeros((*x_t.shape[:3], 6))


def recorded(batch, variant="base", low_res_timestep=False, **options):
    """Return the inputs of the network for a batch, and the metrics."""
    model = replace(TINY, variant=variant, low_res_timestep=low_res_timestep)
    config = TrainConfig(name="x", model=model, **options)

    @jax.jit
    def run(batch):
        recorder = Recorder()
        _, metrics = denoising_loss({}, batch, KEY, model=recorder, tables=TABLES, config=config)
        return recorder.seen, metrics

    return jax.device_get(run(batch))


def test_images_are_noised_with_the_sampled_noise():
    batch = make_batch()
    noise, (found, _) = jax.jit(sample_noise, static_argnums=2)(KEY, batch, 1000), recorded(batch)
    alpha, sigma = (x[noise.t][:, None, None, None] for x in (TABLES.alpha, TABLES.sigma))
    np.testing.assert_array_equal(found["t"], noise.t)
    x_t = alpha * from_uint8(batch.image) + sigma * noise.eps
    np.testing.assert_allclose(found["x_t"], x_t, atol=1e-5)
    assert set(found) == {"x_t", "t", "mask"}


def test_the_noise_of_a_record_depends_on_its_row_alone():
    batch = make_batch()
    half = jax.tree.map(lambda x: x[4:], batch)
    sample = jax.jit(sample_noise, static_argnums=2)
    whole, part = (sample(KEY, rows, 1000) for rows in (batch, half))
    np.testing.assert_array_equal(whole.t[4:], part.t)
    np.testing.assert_array_equal(whole.eps[4:], part.eps)


def test_timesteps_are_uniform():
    batch = make_batch(1)._replace(row=np.arange(20_000, dtype=np.int32))
    t = np.asarray(sample_noise(KEY, batch._replace(image=np.zeros((1, 1, 1, 1))), 1000).t)
    assert t.min() == 0 and t.max() == 999
    assert np.bincount(t // 100, minlength=10) / 2000 == pytest.approx(1, abs=0.1)


def test_captions_are_emptied_at_the_rate_of_caption_dropout():
    batch = make_batch(count=2000, size=2)
    np.testing.assert_array_equal(recorded(batch)[0]["mask"], batch.caption_mask)
    mask = recorded(batch, caption_dropout=0.2)[0]["mask"]
    empty = ~mask.any(axis=1)
    assert empty.mean() == pytest.approx(0.2, abs=0.03)
    np.testing.assert_array_equal(mask[~empty], batch.caption_mask[~empty])
    assert not recorded(batch, caption_dropout=1.0)[0]["mask"].any()


def test_the_small_image_of_an_upsampler_is_means_of_four_by_four_pixels():
    batch = make_batch()
    low = np.asarray(shrink(jnp.asarray(batch.image)))
    assert low.shape == (8, 4, 4, 3) and (low == np.round(low)).all()
    np.testing.assert_array_equal(low[2, 1, 3], np.round(batch.image[2, 4:8, 12:].mean((0, 1))))
    found, _ = recorded(batch, "superres")
    assert set(found) == {"x_t", "t", "mask", "low_res"}
    np.testing.assert_allclose(found["low_res"], low / 127.5 - 1, atol=1e-6)


def test_a_noised_small_image_comes_with_its_timestep():
    batch = make_batch(count=500, size=4)
    found = recorded(batch, "superres", low_res_timestep=True, low_res_timestep_share=0.3)[0]
    t = found["low_res_timestep"]
    assert t.min() < 15 and 285 < t.max() < 300
    noise = found["low_res"] - at_timesteps(TABLES.alpha, t) * from_uint8(
        shrink(jnp.asarray(batch.image))
    )
    noise = np.asarray(noise / at_timesteps(TABLES.sigma, t))
    assert noise.mean() == pytest.approx(0, abs=0.1)
    assert noise.std() == pytest.approx(1, abs=0.1)
    # The noise of the large image is independent of it.
    own = np.asarray(sample_noise(KEY, batch, 1000).eps).reshape(500, -1)[:, :3]
    assert abs(np.corrcoef(own.ravel(), noise.ravel())[0, 1]) < 0.1


def test_the_least_timestep_share_of_low_res_noising_is_one_level():
    _, t = noise_low_res(TABLES, jnp.zeros((50, 1, 1, 3)), jax.random.split(KEY, 50), 1e-6)
    assert (np.asarray(t) == 0).all()


@pytest.mark.parametrize("variant", ["inpaint", "superres_inpaint"])
def test_the_conditioning_of_an_inpainting_model_is_the_known_pixels(variant):
    batch = make_batch(count=64)
    found = recorded(batch, variant, mask_all_share=0.25)[0]
    mask = found["inpaint_known"]
    assert mask.shape == (64, 16, 16, 1) and ((mask == 0) | (mask == 1)).all()
    known = from_uint8(batch.image) * mask
    np.testing.assert_allclose(found["inpaint_image"], known, atol=1e-6)
    nothing = (mask == 0).all(axis=(1, 2, 3)).mean()
    assert nothing == pytest.approx(0.25, abs=0.15)
    assert len(np.unique(mask, axis=0)) > 40
    # The small image is whole (GLIDE, sec. 4.3).
    if variant == "superres_inpaint":
        low = from_uint8(shrink(jnp.asarray(batch.image)))
        np.testing.assert_allclose(found["low_res"], low, atol=1e-6)


def test_low_res_noising_and_the_layers_of_its_level_go_together():
    model = replace(TINY, variant="superres")
    with pytest.raises(UsageError, match="go together"):
        TrainConfig(name="x", model=model, low_res_timestep_share=0.5)
    with pytest.raises(UsageError, match="go together"):
        TrainConfig(name="x", model=replace(model, low_res_timestep=True))


def test_the_loss_is_split_into_quarters_of_the_timesteps():
    batch = make_batch(count=64, size=4)
    values = named_metrics(recorded(batch)[1])
    quarter = np.asarray(sample_noise(KEY, batch, 1000).t) // 250
    shares = [(quarter == i).mean() for i in range(4)]
    total = sum(share * values[f"loss_quartile_{i}"] for i, share in enumerate(shares))
    assert total == pytest.approx(values["loss"], rel=1e-5)
    empty = {"loss": np.float32(1), "quartile_sum": np.zeros(4), "quartile_share": np.eye(4)[1]}
    assert set(named_metrics(empty)) == {"loss", "loss_quartile_1"}


# --- frozen parts


class Sum:
    """A network of two numbers, which predicts the sum of these and the image."""

    encode_text = "encode_text"

    def __init__(self, *_):
        self.dtype = jnp.float32

    def apply(self, variables, *inputs, method=None, **_):
        params = variables["params"]
        if method is not None:
            return params["text"]["w"]
        x_t, _, text = inputs
        return x_t + params["unet"]["w"] + text


def test_frozen_parameters_have_no_gradient_and_do_not_change(monkeypatch):
    monkeypatch.setattr(objectives, "GLIDE", Sum)
    params = {"text": {"w": jnp.float32(1)}, "unet": {"w": jnp.float32(2)}}
    results = []
    for freeze in ((), ("text",)):
        optimiser = OptimiserConfig(freeze=freeze)
        objective = make_objective(TrainConfig(name="x", model=TINY, optimiser=optimiser))
        adamw = make_optimiser(optimiser, 10)
        step = partial(train_step, loss=objective.loss, optimiser=adamw, config=optimiser)
        first = new_state(params, adamw, optimiser)
        results.append(jax.jit(step)(first, make_batch(), KEY))
    (free, free_metrics), (held, held_metrics) = results
    assert free.params["text"]["w"] != 1
    assert held.params["text"]["w"] == 1 and held.params["unet"]["w"] != 2
    # Both parameters have the same gradient; freezing removes one of them.
    ratio = float(free_metrics["grad_norm"] / held_metrics["grad_norm"])
    assert ratio == pytest.approx(np.sqrt(2), rel=1e-5)


# --- noised CLIP

CLIP = CLIPConfig(
    image_size=8, image_width=32, image_layers=1, text_width=32, text_layers=1, head_size=32,
    n_vocab=100, max_text_len=8, embed_width=16, learn_logit_scale=True, logit_scale=5.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def clip():
    objective = make_objective(CLIPTrainConfig(name="x", model=CLIP))
    return objective, jax.jit(objective.init)(jax.random.key(0))


def test_the_contrastive_loss_is_the_cross_entropy_both_ways(clip):
    objective, params = clip
    batch = make_batch(size=8)

    @jax.jit
    def both(params):
        noise = sample_noise(KEY, batch, 1000)
        x_t = q_sample(TABLES, from_uint8(batch.image), noise.t, noise.eps)
        lengths = batch.caption_mask.sum(axis=1)
        logits = objective.model.apply({"params": params}, x_t, noise.t, batch.tokens, lengths)
        return objective.loss(params, batch, KEY), logits

    (loss, metrics), logits = both(params)
    own = [-np.diag(jax.nn.log_softmax(logits, axis=axis)).mean() for axis in (0, 1)]
    assert float(loss) == pytest.approx(np.mean(own), rel=1e-5)
    right = np.asarray(logits).argmax(axis=1) == np.arange(8)
    assert float(metrics["accuracy"]) == pytest.approx(right.mean())
    assert float(metrics["scale"]) == pytest.approx(5)


def test_equal_captions_are_all_right(clip):
    objective, params = clip
    batch = make_batch(size=8)
    batch = batch._replace(
        tokens=np.repeat(batch.tokens[:1], 8, 0),
        caption_mask=np.repeat(batch.caption_mask[:1], 8, 0),
    )
    _, metrics = objective.loss(params, batch, KEY)
    assert float(metrics["accuracy"]) == 1


def test_captions_of_all_devices_are_compared(clip):
    """Four devices with two pairs each give the loss and gradient of the whole batch of eight."""
    objective, params = clip
    batch = make_batch(size=8)
    split = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), batch)
    gradient = jax.grad(objective.loss, has_aux=True)
    alone, metrics = jax.jit(gradient)(params, batch, KEY)
    each, each_metrics = jax.jit(
        jax.vmap(partial(gradient, axis="batch"), (None, 0, None), axis_name="batch")
    )(params, split, KEY)
    for name in ("loss", "accuracy"):
        assert float(each_metrics[name].mean()) == pytest.approx(float(metrics[name]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(each), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a.mean(axis=0), b, rtol=1e-3, atol=1e-6)


def test_a_clip_refuses_gradient_accumulation():
    with pytest.raises(UsageError, match="compares the whole batch"):
        CLIPTrainConfig(name="x", model=CLIP, accumulate=2)


def test_a_clip_refuses_grids_of_samples():
    with pytest.raises(UsageError, match="no grids of samples: sample_every must be 0"):
        CLIPTrainConfig(name="x", model=CLIP, sample_every=100)


def test_a_clip_can_be_trained_at_low_noise_alone(clip):
    """With a single noise level the images are nearly clean."""
    _, params = clip
    objective = make_objective(CLIPTrainConfig(name="x", model=CLIP, timestep_share=1e-3))
    batch = make_batch(size=8)

    @jax.jit
    def both(params):
        t, eps = jnp.zeros(8, int), sample_noise(KEY, batch, 1).eps
        x_t = q_sample(TABLES, from_uint8(batch.image), t, eps)
        lengths = batch.caption_mask.sum(axis=1)
        logits = objective.model.apply({"params": params}, x_t, t, batch.tokens, lengths)
        return objective.loss(params, batch, KEY)[0], logits

    loss, logits = both(params)
    own = [-np.diag(jax.nn.log_softmax(logits, axis=axis)).mean() for axis in (0, 1)]
    assert float(loss) == pytest.approx(np.mean(own), rel=1e-5)


@pytest.mark.parametrize("share", [0, 1.5])
def test_the_timestep_share_of_a_clip_is_a_share(share):
    with pytest.raises(UsageError, match="timestep_share is above 0 and up to 1"):
        CLIPTrainConfig(name="x", model=CLIP, timestep_share=share)
