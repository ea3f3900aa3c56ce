"""The noise-prediction loss on splits, the scores of scenes, and reports with real networks."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from glide_jax.data.batches import make_batches
from glide_jax.data.decoding import from_uint8
from glide_jax.data.scenes import Scene, ScenesSource, render
from glide_jax.data.sources import open_source
from glide_jax.diffusion.losses import at_timesteps, make_tables, q_sample
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.errors import UsageError
from glide_jax.evaluation import experiment, ranking, scene_report
from glide_jax.evaluation.features import open_scorer
from glide_jax.evaluation.noise_loss import EpsNetwork, noise_loss, report
from glide_jax.evaluation.scene_score import look
from glide_jax.evaluation.sweep_options import tasks
from glide_jax.models.clip import NoisedCLIP
from glide_jax.models.clip import init_params as init_params_clip
from glide_jax.models.presets import CLIP_PRESETS
from glide_jax.models.unet import GLIDE, init_params
from glide_jax.pipeline.images import Images
from glide_jax.pipeline.loading import load
from glide_jax.training.objectives import (
    make_objective,
    make_tokenizer,
    sample_noise,
    to_batch,
)
from glide_jax.training.validation import Validation
from glide_jax.weights.clip_registry import CLIPModel, save_clip
from glide_jax.weights.registry import Model, load_model
from tests.support.commands import TINY, first_weights, make_weights
from tests.support.ranked import SIZE, make_npz, recipe

SMALL = replace(TINY, image_size=SIZE)
TABLES = make_tables(make_schedule("cosine", 1000))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return replace(recipe(make_npz(tmp_path_factory.mktemp("pairs"))), model=SMALL)


@pytest.mark.parametrize("prediction_type", ["eps", "v"])
def test_the_output_of_a_network_becomes_the_noise(prediction_type):
    rng = np.random.default_rng(0)
    x_0, eps, other = (jnp.float32(rng.normal(size=(5, 4, 4, 3))) for _ in range(3))
    t = jnp.array([0, 10, 500, 900, 999])
    x_t = q_sample(TABLES, x_0, t, eps)
    alpha, sigma = at_timesteps(TABLES.alpha, t), at_timesteps(TABLES.sigma, t)
    exact = eps if prediction_type == "eps" else alpha * eps - sigma * x_0

    def apply(variables, *inputs, method=None, **options):
        assert variables == {"params": "weights"}
        if method is not None:
            return inputs[1]
        assert inputs[2] == "text" and options == {"dropout_keys": None}
        return jnp.concatenate([exact, other], axis=-1)

    predictor = EpsNetwork(SimpleNamespace(apply=apply), TABLES, prediction_type)
    for captions in (True, False):
        variables = {"params": {"model": "weights", "captions": captions}}
        seen = predictor.apply(variables, 0, np.array([True, False]), method="encode_text")
        assert seen.tolist() == [captions, False]
    found = predictor.apply(variables, x_t, t, "text", dropout_keys=None)
    assert found.shape == eps.shape and np.abs(found - eps).max() < 1e-5


def test_a_network_whose_output_is_zero(config):
    """v = 0 means the noise `sigma x_t`: timesteps and noise alone determine the loss."""
    params = first_weights(init_params, GLIDE(SMALL))
    assert not params["unet"]["head"]["kernel"].any()
    model = Model("zero", SMALL, params, prediction_type="v")
    found = noise_loss(model, config, "test_style", images=24, batch_size=12)
    assert found["captions"] == found["no captions"]

    data = replace(config.data, split="test_style")
    batches = make_batches(
        open_source(data), data, batch_size=12, tokenizer=make_tokenizer(config), size=SIZE, seed=0
    )
    errors, quarters = [], []
    for i in range(2):
        batch = to_batch(next(batches))
        batch = batch._replace(row=batch.row + 12 * i)
        noise = sample_noise(jax.random.key(0), batch, 1000)
        x_t = q_sample(TABLES, from_uint8(batch.image), noise.t, noise.eps)
        error = (at_timesteps(TABLES.sigma, noise.t) * x_t - noise.eps) ** 2
        errors.append(np.asarray(error).mean(axis=(1, 2, 3)))
        quarters.append(np.asarray(noise.t) // 250)
    errors, quarters = np.concatenate(errors), np.concatenate(quarters)
    assert found["captions"]["loss"] == pytest.approx(errors.mean(), rel=1e-4)
    expected = [errors[quarters == q].mean() for q in range(4)]
    assert found["captions"]["quartiles"] == pytest.approx(expected, rel=1e-4)
    # At the end of the diffusion process x_t is nearly all noise.
    assert expected[0] > 10 * expected[3]


def test_the_loss_equals_the_validation_loss_of_training(config, tmp_path):
    model = load_model(make_weights(tmp_path / "weights", SMALL))
    found = report(model, config, ["test_style"], images=24, batch_size=12)["test_style"]
    assert found["captions"]["loss"] != found["no captions"]["loss"] and found["images"] == 24
    # The batch size changes nothing, except that only whole batches are measured.
    other = report(model, config, ["test_style"], images=20, batch_size=8)["test_style"]
    assert other["captions"]["loss"] == pytest.approx(found["captions"]["loss"], rel=1e-5)
    assert other["images"] == 24
    same = replace(config, batch_size=12, validation_split="test_style", validation_batches=2)
    trained_on = open_source(config.data)
    measured = Validation(same, make_objective(same), trained_on)(model.params)
    assert found["captions"]["loss"] == pytest.approx(measured["mse"], rel=1e-5)
    with pytest.raises(UsageError, match="no split 'nowhere'"):
        noise_loss(model, config, "nowhere")


# --- scenes


def scene_painter(change=lambda scene: scene):
    """Return a substitute for a pipeline: it renders each scene, changed."""
    by_caption = {}
    for split in ("train", "test"):
        source = ScenesSource(12, split=split)
        by_caption |= {source.scene(i).caption: source.scene(i) for i in range(12)}

    def pipe(prompts, *, seed, batch_size=None, **settings):
        images = np.stack([render(change(by_caption[prompt])) for prompt in prompts])
        indices = tuple(range(len(prompts)))
        return Images(images, tuple(prompts), seed, indices, "scenes", settings)

    pipe.model = SimpleNamespace(name="scenes", config=replace(TINY, image_size=64))
    return pipe


def test_scenes_rendered_correctly_are_right(tmp_path):
    found = scene_report.report(scene_painter(), tmp_path, images=12, settings={"steps": 5})
    assert set(found["right"].values()) == {1.0} == set(found["right_of_true_images"].values())
    kinds = found["right_by_kind"]
    assert sum(kind["of"] for kind in kinds.values()) == 12 and len(kinds) > 1
    assert json.loads((tmp_path / "scenes.json").read_text()) == found
    assert found["settings"] == {"steps": 5} and found["split"] == "test"
    assert Image.open(tmp_path / "scenes.png").width == 1400


def test_a_wrong_detail_lowers_its_own_rate_alone(tmp_path):
    def repaint(scene: Scene) -> Scene:
        objects = tuple(replace(one, colour="blue") for one in scene.objects)
        return replace(scene, background="white", objects=objects)

    source = ScenesSource(10, split="train")
    scenes = [source.scene(i) for i in range(10)]
    found = scene_report.report(scene_painter(repaint), tmp_path, split="train", images=10)
    right, blue = found["right"], {"blue"}
    assert right["background"] == np.mean([s.background == "white" for s in scenes])
    assert right["colours"] == np.mean([{one.colour for one in s.objects} == blue for s in scenes])
    assert right["count"] == right["shapes"] == right["sizes"] == 1 > right["all"]
    assert look(render(scenes[0])).background == scenes[0].background


def test_an_unknown_split_and_no_images_are_refused(tmp_path):
    for wrong, message in (({"split": "held out"}, "train and test"), ({"images": 0}, "at least")):
        with pytest.raises(UsageError, match=message):
            scene_report.report(scene_painter(), tmp_path, **wrong)


# --- real networks


def test_ranking_and_sweep_of_real_networks(config, tmp_path):
    """A tiny random model, guided by a tiny random CLIP and scored by another."""
    sizes = replace(
        CLIP_PRESETS["clip64"](), image_size=SIZE, patch_size=2, image_width=16, image_layers=1,
        text_width=16, text_layers=1, head_size=16, embed_width=8, n_vocab=49408,
    )  # fmt: skip
    for seed, name in enumerate(("guide", "scorer")):
        params = first_weights(init_params_clip, NoisedCLIP(sizes), seed)
        save_clip(CLIPModel(name, sizes, params), tmp_path / name)
    pipe = load(make_weights(tmp_path / "weights", SMALL), clip_model=tmp_path / "guide")
    scorer = open_scorer(tmp_path / "scorer", guide=pipe.clip)
    sizes = {"images": 4, "captions": 30}
    settings = {"steps": 2, "guidance_scale": 1.0}
    found = ranking.report(pipe, scorer, config, tmp_path / "out", settings=settings, **sizes)
    assert found["training_concepts"]["of"] == 4 and found["settings"]["steps"] == 2
    shared = experiment.Experiment(pipe, scorer, (scorer,), config, **sizes)
    todo = tasks(("clip-guidance-scale",), ("0", "50"), {"steps": 2})
    points = experiment.run(shared, todo, tmp_path / "out")["points"]
    assert [point["clip"] and point["clip"][0] for point in points] == [
        None, str(tmp_path / "guide"),
    ]  # fmt: skip
    assert points[0]["clip_score"] != points[1]["clip_score"]
    assert all(np.isfinite(list(p["distances"][scorer.name].values())).all() for p in points)
