"""`glide-jax evaluate curve`: every figure is that of its images; interrupted and continued."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from glide_jax.commands import guidance_curve
from glide_jax.commands.evaluate import read
from glide_jax.errors import GlideError, UsageError
from glide_jax.evaluation.captioned_sets import clip_score
from glide_jax.evaluation.extractors.clean_clip import open_clean_clip
from glide_jax.evaluation.extractors.extractor import Extractor, Features, normalised
from glide_jax.evaluation.figures import figure_class
from glide_jax.evaluation.guidance_figure import write_curve_figure
from glide_jax.evaluation.image_sets import open_images
from glide_jax.evaluation.metrics import frechet_distance, inception_score, precision_recall
from glide_jax.pipeline.pipeline import Pipeline
from tests.evaluation.test_clean_clip import folder_of
from tests.support.commands import make_images, make_weights

CAPTIONS = [f"red {i}" for i in range(12)]


class Colours(nn.Module):
    """A network of 3 features and 5 classes in the place of Inception."""

    @nn.compact
    def __call__(self, images):
        pooled = normalised(images, (0.0,) * 3, (1.0,) * 3).mean((1, 2))
        return Features(pooled, nn.softmax(nn.Dense(5, use_bias=False, name="fc")(pooled)))


KERNEL = np.random.RandomState(0).standard_normal((3, 5)).astype(np.float32) * 9
TOY = Extractor("toy", 3, 5, Colours(), {"fc": {"kernel": KERNEL}}, lambda images: images)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("curve")
    make_weights(place / "w")
    make_images(place / "real", size=20)
    folder_of(place / "clip")
    (place / "captions.json").write_text(json.dumps(CAPTIONS))
    return place


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(guidance_curve, "open_extractor", lambda path: TOY)
    # The figure has a test of its own, where there is matplotlib.
    monkeypatch.setattr(guidance_curve, "figure_class", lambda: None)
    monkeypatch.setattr(guidance_curve, "write_curve_figure", lambda *_: None)


WORDS = ("--prompts-file", "captions.json", "--real", "real", "--inception", "i.pth",
         "--clip-score-model", "clip", "--weights", "w", "--num", "9", "--shard-size", "4",
         "--scales", "1", "3", "--steps", "2", "--seed", "1", "--out", "out")  # fmt: skip


def curve(*words):
    read(["curve", *WORDS, *words]).run()
    return json.loads(Path("out/curve.json").read_text())


def test_every_measure_is_that_of_the_images_of_its_scale(place, capsys, monkeypatch):
    found = curve()
    lines = capsys.readouterr().out.splitlines()
    assert [(p["kind"], p["scale"]) for p in found["points"]] == [
        ("guidance_scale", 1.0), ("guidance_scale", 3.0),
    ]  # fmt: skip
    prompts, clip = random.Random(1).sample(CAPTIONS, 9), open_clean_clip("clip")
    real = TOY(np.stack(list(open_images("real", 16).images())))
    for point in found["points"]:
        images = open_images(f"out/guidance_scale_{point['scale']:g}")
        pixels = np.stack(list(images.images()))
        features, probabilities = TOY.both(pixels)
        assert images.captions() == prompts and len(pixels) == 9
        assert point["frechet_distance"] == pytest.approx(
            frechet_distance(real, features), rel=1e-5
        )
        assert (point["precision"], point["recall"]) == precision_recall(real, features)
        assert point["inception_score"] == pytest.approx(inception_score(probabilities), rel=1e-5)
        expected = clip_score(clip, clip.image(pixels), prompts)
        assert point["clip_score"] == pytest.approx(expected["clip_score"], rel=1e-5)
        assert (
            f"guidance scale {point['scale']:g}: FID {point['frechet_distance']:.2f}, inception "
            f"score {point['inception_score']:.2f}, precision {point['precision']:.3f}, recall "
            f"{point['recall']:.3f}, CLIP score {point['clip_score']:.2f}"
        ) in lines
    assert found["points"][0]["clip_score"] != found["points"][1]["clip_score"]

    def never(*_, **__):
        raise AssertionError("no image is generated again")

    monkeypatch.setattr(Pipeline, "__call__", never)
    assert curve() == found


def test_processes_share_the_images_and_the_last_one_scores(place, capsys):
    for process in ("0", "1"):
        words = (
            "--out",
            "shared",
            "--scales",
            "3",
            "--num-processes",
            "2",
            "--process-id",
            process,
        )
        read(["curve", *WORDS, *words]).run()
        last = capsys.readouterr().out.splitlines()[-1]
        unfinished = "shared/guidance_scale_3 is unfinished: this command scores when all shards"
        assert last.startswith("curve.json and" if process == "1" else unfinished)
    alone = next(p for p in curve()["points"] if p["scale"] == 3)
    assert json.loads(Path("shared/curve.json").read_text())["points"] == [alone]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num", "13"), "captions.json has 12 captions: set --num to that or less, not 13"),
        (("--num", "0"), "--num must be at least 1"),
        (
            ("--clip-guidance-scales", "2"),
            "--clip-guidance-scales needs a noised CLIP that guides: give --clip-model",
        ),
        (("--seed", "2"), r"shards of another run \(seed 1, here 2; other prompts"),
    ],
)
def test_what_cannot_be_is_refused(place, words, message):
    curve()
    with pytest.raises(GlideError, match=message):
        curve(*words)


def test_the_figure_has_a_curve_for_each_kind_of_guidance(tmp_path):
    pytest.importorskip("matplotlib")
    measures = ("recall", "precision", "inception_score", "frechet_distance", "clip_score")
    points = [
        {"kind": kind, "scale": scale, **dict.fromkeys(measures, scale)}
        for kind in ("guidance_scale", "clip_guidance_scale")
        for scale in (3.0, 1.0)
    ]
    write_curve_figure(points, "a title", tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size == (1848, 462)


def test_a_missing_matplotlib_is_named_before_the_first_image(place, monkeypatch):
    monkeypatch.setattr(guidance_curve, "figure_class", figure_class)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="need matplotlib"):
        curve("--out", "none")
    assert not Path("none").exists()
