"""`glide-jax evaluate fid`: a small CLIP from a file stands in for the networks."""

import json
import os

import numpy as np
import pytest
from PIL import Image
from scipy import linalg

from glide_jax.commands.evaluate import read
from glide_jax.errors import GlideError
from glide_jax.evaluation.extractors import open_extractor
from glide_jax.evaluation.extractors.extractor import Extractor
from glide_jax.evaluation.metrics import kernel_distance, precision_recall
from glide_jax.evaluation.set_scores import label
from glide_jax.weights import write_torch_file
from tests.evaluation.test_extractors import tensors
from tests.support.commands import one_line, run
from tests.support.extractor_weights import random_images

REAL, GENERATED = random_images(80, 64, 64, seed=0), random_images(60, 64, 64, seed=1) // 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a network, real images, and generated ones as ADM writes them."""
    place = tmp_path_factory.mktemp("scores")
    write_torch_file(place / "clip.pth", tensors("clip"))
    write_torch_file(place / "dino.pth", tensors("dinov2"))
    (place / "real").mkdir()
    for i, image in enumerate(REAL):
        Image.fromarray(image).save(place / "real" / f"{i}.png")
    np.savez(place / "generated.npz", GENERATED)
    return place


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)


HEAD = ["features", "Frechet", "distance", "kernel", "distance", "precision", "recall"]


def score(*words):
    read(["fid", *map(str, words)]).run()


def report(path):
    return json.loads(path.read_text())


def refused(*words):
    with pytest.raises(GlideError) as error:
        score(*words)
    return str(error.value)


BOTH = ("--real", "real", "--generated", "generated.npz")


def by_the_formula(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    one, two = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(one @ two).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + two - 2 * root)


def test_the_scores_are_those_of_the_features(place, capsys, monkeypatch):
    extractor = open_extractor("clip.pth")
    real, generated = extractor(REAL), extractor(GENERATED)
    out = place / "first" / "report.json"
    score(*BOTH, "--features", "clip.pth", "--out", out)
    found = report(out)["scores"][0]
    assert found["frechet_distance"] == pytest.approx(by_the_formula(real, generated), rel=1e-4)
    assert found["kernel_distance"] == pytest.approx(kernel_distance(real, generated), rel=1e-4)
    assert (found["precision"], found["recall"]) == precision_recall(real, generated)
    assert found["images"] == {"real": 80, "generated": 60} and found["dimensions"] == 48
    assert found["sizes"] == {"real": [64, 64], "generated": [64, 64]}
    head, line, last = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "features",
        "Frechet",
        "distance",
        "kernel",
        "distance",
        "precision",
        "recall",
    ]
    assert line.startswith("CLIP ViT-128/16, 64 pixels")
    assert f"{found['frechet_distance']:.4f}" in line and last == str(out)

    def never(*_):
        raise AssertionError("the network must not run")

    # The second call computes nothing, and gives the same report.
    monkeypatch.setattr(Extractor, "__call__", never)
    score(*BOTH, "--features", "clip.pth", "--out", place / "first" / "again.json")
    assert report(place / "first" / "again.json") == report(out)


def test_saved_statistics_give_the_same_distance(place, capsys):
    score(*BOTH, "--features", "clip.pth", "--out", "a/whole.json")
    score("--real", "real", "--features", "clip.pth", "--save-statistics", "a/s.npz",
          "--out", "a/x.json")  # fmt: skip
    assert not (place / "a" / "x.json").exists()
    capsys.readouterr()
    generated = ("--generated", "generated.npz", "--features", "clip.pth")
    for option in ("--reference", "--real"):
        score(option, "a/s.npz", *generated, "--out", "a/part.json")
        whole, part = (report(place / "a" / f"{n}.json")["scores"][0] for n in ("whole", "part"))
        assert part["frechet_distance"] == pytest.approx(whole["frechet_distance"], rel=1e-9)
        assert part["kernel_distance"] is part["precision"] is part["recall"] is None
        assert part["sizes"] == whole["sizes"]
    output = capsys.readouterr()
    assert output.err == "" and output.out.splitlines()[1].split()[-3:] == ["-", "-", "-"]


def test_statistics_of_other_programs(place, capsys):
    features = open_extractor("clip.pth")(REAL).astype(np.float64)
    np.savez("adm.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    score("--reference", "adm.npz", "--generated", "generated.npz", "--features", "clip.pth",
          "--out", "adm.json")  # fmt: skip
    expected = by_the_formula(features, open_extractor("clip.pth")(GENERATED))
    found = report(place / "adm.json")["scores"][0]["frechet_distance"]
    assert found == pytest.approx(expected, rel=1e-4)
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("adm.npz does not say which network")


def test_several_networks_and_the_clip_score_in_one_call(place, capsys):
    (place / "captions.txt").write_text("a red apple\n" * 60)
    score(*BOTH, "--features", "scorer", "clip.pth", "--captions", "captions.txt", "--views", 1,
          "--allow-few-images", "--size", 64, "--out", "many/report.json")  # fmt: skip
    found = report(place / "many" / "report.json")
    names = [s["extractor"] for s in found["scores"]]
    assert names == ["emoji_scorer64 image embeddings, 1 view", "CLIP ViT-128/16, 64 pixels"]
    assert f"CLIP score: {found['clip_score']['clip_score']:.4f}" in capsys.readouterr().out
    # Without real images the CLIP score alone is measured.
    score("--generated", "generated.npz", "--captions", "captions.txt", "--views", 1,
          "--size", 64, "--out", "many/alone.json")  # fmt: skip
    assert report(place / "many" / "alone.json")["clip_score"] == found["clip_score"]


def test_images_of_two_sizes_get_a_note(place, capsys):
    np.savez("small.npz", GENERATED[:, ::2, ::2])
    small = ("--real", "real", "--generated", "small.npz", "--features", "clip.pth")
    score(*small, "--out", "sizes.json")
    assert capsys.readouterr().err == (
        "real and generated images have 64 x 64 and 32 x 32 pixels: --size makes them alike\n"
    )
    score(*small, "--size", 32, "--out", "sizes.json")
    assert capsys.readouterr().err == ""


def test_what_is_missing_is_said(place):
    features, out = ("--features", "clip.pth"), ("--out", "x.json")
    assert "pt_inception-2015-12-05-6726825d.pth for FID (releases of github.com" in refused(*BOTH)
    generated = BOTH[2:]
    assert refused(*generated, *features) == (
        "give the real images to --real, or their statistics to --reference"
    )
    assert refused(*BOTH, "--reference", "s.npz", *features) == (
        "give the real images to --real, or their statistics to --reference"
    )
    assert "give the images to score to --generated" in refused("--real", "real", *features)
    assert "absent.pth does not exist" in refused(*BOTH, "--features", "absent.pth", *out)
    assert "absent does not exist: give a folder of images" in refused(
        "--real", "absent", *generated, *features, *out
    )
    (place / "empty").mkdir(exist_ok=True)
    assert "empty has no images" in refused("--real", "empty", *generated, *features, *out)
    assert "--out is a .json file, not report" in refused(*BOTH, *features, "--out", "report")
    assert "--nearest-k must be at least 1, not 0" in refused(*BOTH, *features, "--nearest-k", 0)
    two = ("--features", "clip.pth", "dino.pth")
    assert "name one in --features" in refused(*BOTH, *two, "--save-statistics", "s.npz")
    assert "name one in --features" in refused("--reference", "s.npz", *generated, *two)
    assert "--save-statistics ends in .npz, not s" in refused(
        *BOTH, *features, "--save-statistics", "s"
    )
    assert "--captions needs generated images" in refused(
        "--real", "real", *features, "--save-statistics", "s.npz", "--captions", "beside"
    )


def test_too_few_images_are_refused_unless_allowed(place):
    np.savez("few.npz", GENERATED[:20])
    few = (
        "--real",
        "real",
        "--generated",
        "few.npz",
        "--features",
        "clip.pth",
        "--out",
        "few.json",
    )
    assert refused(*few) == (
        "few.npz has 20 images, and CLIP ViT-128/16, 64 pixels has 48 dimensions: give more than "
        "48 images, or --allow-few-images, which makes the Frechet distance too large"
    )
    score(*few, "--allow-few-images")
    assert report(place / "few.json")["scores"][0]["images"]["generated"] == 20
    np.savez("one.npz", GENERATED[:1])
    assert "one.npz has one image" in refused(*few[:3], "one.npz", *few[4:])


def test_statistics_of_another_network_are_refused():
    np.savez("other.npz", mu=np.zeros(5), sigma=np.eye(5))
    with_reference = ("--generated", "generated.npz", "--features", "clip.pth", "--out", "o.json")
    assert refused("--reference", "other.npz", *with_reference) == (
        "other.npz has statistics of 5 dimensions, CLIP ViT-128/16, 64 pixels has 48: give the "
        "network that made them to --features"
    )
    np.savez("named.npz", mu=np.zeros(48), sigma=np.eye(48), extractor="DINOv2", checksum="1")
    assert "named.npz was made with another network (extractor DINOv2, here CLIP" in refused(
        "--reference", "named.npz", *with_reference
    )


def test_the_names_of_papers():
    assert label("Inception v3 (FID)") == "FID: Inception v3"
    assert label("DINOv2 ViT-L/14") == "FD-DINOv2: DINOv2 ViT-L/14"
    assert label("CLIP ViT-B/32") == "CLIP ViT-B/32"


def test_as_a_command(place):
    result = run("-m", "glide_jax", "evaluate", "fid", *BOTH, "--out", "c.json", cwd=place)
    assert "releases of github.com/mseitzer/pytorch-fid" in one_line(result, 2)
    assert not os.path.exists("c.json")
