"""Sweeps: what is measured, going on after a break, the figures."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from glide_jax.errors import GlideError, UsageError
from glide_jax.commands.evaluate import Ranking, Sweeping
from glide_jax.evaluation.experiment import read
from glide_jax.evaluation.figures import curves, draw, matched
from glide_jax.evaluation.metrics import inception_score
from glide_jax.evaluation.experiment import Experiment, run
from glide_jax.evaluation.sweep_options import EVERYWHERE, SWEEPS, tasks
from tests.support.ranked import Judge, Painted, make_npz, recipe

SCALES = ("1", "3", "8", "100")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return recipe(make_npz(tmp_path_factory.mktemp("cells")))


def experiment(config, pipe=None, **changed):
    judge = Judge()
    given = {"pictures": 16, "captions": 60, "seed": 5, "spaces": (judge,)} | changed
    return Experiment(pipe or Painted(), judge, config=config, **given)


def values(found, name="guidance-scale"):
    return [point["value"] for point in found["points"] if point["sweep"] == name]


# --- what is measured


def test_less_noise_is_nearer_to_the_real_pictures_and_the_real_ones_are_exact(config, tmp_path):
    found = run(experiment(config), tasks(("guidance-scale",), SCALES), tmp_path)
    space = [point["distances"]["colours"] for point in found["points"]]
    assert values(found) == list(SCALES)
    frechet = [s["frechet_distance"] for s in space]
    assert frechet[0] > frechet[1] > frechet[2] > frechet[3] == pytest.approx(0, abs=1e-9)
    assert (space[3]["precision"], space[3]["recall"]) == (1, 1)
    last = found["points"][3]
    # Equal colours have cosine 1, which the judge's scale multiplies.
    assert last["clip_score"] == pytest.approx(10) and last["r_precision"] == 1
    assert found["real"]["clip_score"] == pytest.approx(10) and found["real"]["r_precision"] == 1
    assert found["real"]["distances_of_others"]["colours"]["frechet_distance"] > 0
    assert last["settings"]["guidance_scale"] == 100 and last["evaluations"] == 25
    head = found["experiment"]
    assert head["features"] == ["colours"] and head["weights"][0] == "painted"
    assert (head["pictures"], head["real_pictures"], head["captions"]) == (16, 16, 60)
    sheets = sorted((tmp_path / "pictures").glob("*.png"))
    assert len(sheets) == 4 and Image.open(sheets[0]).size == (4 * 6 + 2, 4 * 6 + 2)


def test_every_point_asks_for_the_same_captions(config, tmp_path):
    first, again = experiment(config), experiment(config)
    assert first.choices == again.choices
    assert [r["index"] for r in first.records] == [r["index"] for r in again.records]
    for record, choices in zip(first.records, first.choices, strict=True):
        assert choices[0].endswith(record["style"]) and len(set(choices)) == 60
    other = experiment(config, seed=6)
    assert [r["index"] for r in first.records] != [r["index"] for r in other.records]
    # More pictures than cells: each cell is asked for before any a second time.
    many = experiment(config, pictures=100)
    assert len({r["index"] for r in many.records[:90]}) == 90 == len(many.reference)
    assert many.real()["r_precision"] == 1 and "distances_of_others" not in many.real()


def test_the_neighbour_that_is_said_is_looked_at(config, tmp_path):
    """Images are among others at fewer neighbours less often."""
    shares = {}
    for k in (1, 3):
        todo = tasks(("guidance-scale",), ("0.1",))
        found = run(experiment(config, neighbour=k), todo, tmp_path / str(k))
        space = found["points"][0]["distances"]["colours"]
        shares[k] = space["precision"] + space["recall"]
    assert shares[1] < shares[3]


def test_a_space_that_classifies_has_an_inception_score(config, tmp_path):
    class Classes(SimpleNamespace):
        def both(self, images):
            return Judge()(images), np.eye(4)[np.arange(len(images)) % 4]

        def __call__(self, images):
            return self.both(images)[0]

    spaces = (Judge(), Classes(name="classes", classes=4, checksum="2"))
    found = run(experiment(config, spaces=spaces), tasks(("steps",), ("5", "10")), tmp_path)
    for point in found["points"]:
        assert point["distances"]["classes"]["inception_score"] == pytest.approx(4)
        assert "inception_score" not in point["distances"]["colours"]
        one, other = (dict(point["distances"][name]) for name in ("colours", "classes"))
        assert one == {k: v for k, v in other.items() if k != "inception_score"}


def test_inception_score_by_hand():
    assert inception_score(np.full((6, 5), 0.2)) == pytest.approx(1)
    p = np.array([[0.9, 0.1], [0.1, 0.9]])
    expected = np.exp(0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5))
    assert inception_score(p) == pytest.approx(expected)
    with pytest.raises(UsageError, match="sum to 1"):
        inception_score(np.ones((3, 2)))


# --- going on


def test_a_sweep_that_was_interrupted_goes_on_to_the_same_figures(config, tmp_path):
    todo = tasks(("guidance-scale",), SCALES)
    whole = Painted()
    run(experiment(config, whole), todo, tmp_path / "whole")
    broken = Painted(fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        run(experiment(config, broken), todo, tmp_path / "parts")
    half = json.loads((tmp_path / "parts" / "sweep.json").read_text())
    assert values(half) == ["1", "3"] and len(broken.calls) == 2
    rest = Painted()
    run(experiment(config, rest), todo, tmp_path / "parts")
    assert broken.calls + rest.calls == whole.calls
    files = [(tmp_path / name / "sweep.json").read_text() for name in ("whole", "parts")]
    assert files[0] == files[1]
    names = [sorted(p.name for p in (tmp_path / n).rglob("*")) for n in ("whole", "parts")]
    assert names[0] == names[1]
    # Nothing is left to do.
    idle = Painted(fail_at=0)
    run(experiment(config, idle), todo, tmp_path / "parts")
    assert not idle.calls and (tmp_path / "parts" / "sweep.json").read_text() == files[0]


def test_sweeps_share_a_folder_and_the_points_in_which_they_cross(config, tmp_path):
    run(experiment(config), tasks(("guidance-scale",), ("1", "3")), tmp_path)
    pipe = Painted()
    found = run(experiment(config, pipe), tasks(("steps",), ("10", "25")), tmp_path)
    # 25 steps at scale 3 are the defaults, and drawn already.
    assert [call["steps"] for call in pipe.calls] == [10]
    assert values(found) == ["1", "3"] and values(found, "steps") == ["10", "25"]
    assert found["points"][3]["distances"] == found["points"][1]["distances"]
    # Written otherwise, but the same point.
    idle = Painted(fail_at=0)
    run(experiment(config, idle), tasks(("guidance-scale",), ("3.0",)), tmp_path)
    # Under other settings it is another one.
    other = Painted()
    run(experiment(config, other), tasks(("guidance-scale",), ("3",), {"steps": 5}), tmp_path)
    assert len(other.calls) == 1


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seed": 6}, "seed"),
        ({"pictures": 15}, "pictures"),
        ({"captions": 50}, "captions"),
        ({"neighbour": 1}, "neighbour"),
        ({"spaces": (replace(Judge(), checksum="1"),)}, "feature weights"),
    ],
)
def test_another_experiment_is_not_mixed_in(config, tmp_path, changed, says):
    run(experiment(config), tasks(("guidance-scale",), ("100",)), tmp_path)
    before = (tmp_path / "sweep.json").read_text()
    with pytest.raises(UsageError, match=f"other {says}: choose another --out"):
        run(experiment(config, **changed), tasks(("guidance-scale",), ("1",)), tmp_path)
    assert (tmp_path / "sweep.json").read_text() == before


def test_a_broken_file_and_settings_that_cannot_be_are_said_before_anything_is_drawn(
    config, tmp_path
):
    idle = Painted(fail_at=0)
    for todo, says in (
        (tasks(("sampler",), ("ddim", "ddmp")), "unknown sampler 'ddmp'"),
        (tasks(("spacing",), ("logsnr", "evenly")), "evenly"),
        (tasks(("guidance-scale",), ("1", "2"), {"guidance_method": "cfg++"}), "from 0 to 1"),
        (tasks(("guidance-interval",), ("all", "5:0.3")), "span"),
        (tasks(("clip-scale",), ("0", "2")), "needs a noised CLIP"),
    ):
        with pytest.raises(UsageError, match=says):
            run(experiment(config, idle), todo, tmp_path / "a")
    with pytest.raises(UsageError, match="neighbour 3: .* not 3"):
        run(experiment(config, pictures=3), tasks(("steps",)), tmp_path / "b")
    for text in ("{", "[]", '{"points": 3}'):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(GlideError, match=r"cannot read .*sweep\.json"):
            run(experiment(config, idle), tasks(("steps",)), tmp_path)


# --- what is swept


def test_what_the_sweeps_set():
    clip = tasks(("clip-scale",), ("2",))[0].settings
    assert clip == {"guidance_scale": 1.0, "sampler": "ddpm", "clip_scale": 2.0}
    said = tasks(("clip-scale",), ("2",), {"sampler": "ddim", "steps": None})[0].settings
    assert said["sampler"] == "ddim" and "steps" not in said
    alone = tasks(("guidance-scale",), ("2",))[0].settings
    assert alone == {"guidance_scale": 2.0, "clip_scale": 0.0}
    spans = [task.settings["guidance_interval"] for task in tasks(("guidance-interval",), ("all", "0.3:5"))]
    assert spans == [EVERYWHERE, (0.3, 5.0)]
    steps = [task.settings["steps"] for task in tasks(("steps",), ("10", "fast27"))]
    assert steps == [10, "fast27"]
    both = tasks(("guidance-scale", "clip-scale"))
    assert len(both) == sum(len(SWEEPS[n].values) for n in ("guidance-scale", "clip-scale"))


@pytest.mark.parametrize(
    ("names", "given", "settings", "says"),
    [
        (("guidance_scale",), (), {}, "did you mean 'guidance-scale'"),
        ((), (), {}, "name what to sweep"),
        (("steps", "sampler"), ("5",), {}, "of one sweep"),
        (("guidance-scale",), ("high",), {}, "'high' is no value"),
        (("guidance-interval",), ("3",), {}, "'3' is no value"),
        (("guidance-scale",), (), {"guidance_scale": 2.0}, "--guidance-scale is what is swept"),
    ],
)
def test_sweeps_that_cannot_be(names, given, settings, says):
    with pytest.raises(UsageError, match=says):
        tasks(names, given, settings)


def test_the_command_line():
    found = read(["--weights", "mine", "--sweep", "guidance-scale", "clip-scale", "--steps", "10"])
    assert isinstance(found, Sweeping) and found.sweep == ("guidance-scale", "clip-scale")
    assert found.model.weights == "mine" and found.sampling.steps == 10
    assert read(["sweep", "--sweep", "steps", "--values", "5", "fast27"]).values == ("5", "fast27")
    found = read(["ranking", "--data", "a.npz", "--guidance-scale", "2"])
    assert isinstance(found, Ranking) and found.asked.data == "a.npz"
    for wrong in ([], ["rank"], ["--weights", "mine"], ["sweep"]):
        with pytest.raises(SystemExit) as stopped:
            read(wrong)
        assert stopped.value.code == 2


# --- figures


def a_point(sweep, value, recall, score, clip=None, **settings):
    distances = {
        "precision": 1 - recall, "recall": recall, "frechet_distance": 2 * recall,
        "kernel_distance": 0.0,
    }  # fmt: skip
    settings = {"sampler": "ddpm", "steps": 25, "guidance_scale": 1.0} | settings
    return {
        "sweep": sweep, "value": value, "settings": settings, "evaluations": 25, "clip": clip,
        "clip_score": score, "r_precision": score / 10, "distances": {"colours": distances},
    }  # fmt: skip


POINTS = [
    a_point("guidance-scale", "3", 0.2, 8.0),
    a_point("guidance-scale", "1", 0.8, 2.0),
    a_point("guidance-scale", "2", 0.4, 6.0),
    a_point("clip-scale", "16", 0.1, 9.0),
    a_point("clip-scale", "2", 0.6, 3.0),
    a_point("clip-scale", "4", 0.2, 5.0),
]


def test_both_guidances_are_compared_at_equal_recall():
    found = matched(POINTS, "colours")
    # At a recall of 0.1 there is no classifier-free guidance to compare with.
    assert [(row["clip"]["scale"], row["recall"]) for row in found] == [(2, 0.6), (4, 0.2)]
    free, guided = found[0]["classifier-free"], found[0]["clip"]
    assert free["clip_score"] == pytest.approx(4) and guided["clip_score"] == 3
    assert free["precision"] == pytest.approx(0.4) == guided["precision"]
    assert free["frechet_distance"] == pytest.approx(1.2) and free["scale"] == pytest.approx(1.5)
    assert found[1]["classifier-free"]["clip_score"] == pytest.approx(8)
    # Where recall comes back to the same, all scales that have it are compared with.
    twice = [*POINTS, a_point("guidance-scale", "4", 0.6, 4.0)]
    places = [row["classifier-free"] for row in matched(twice, "colours")]
    assert [place["scale"] for place in places] == pytest.approx([1.5, 4, 3])
    assert [place["clip_score"] for place in places] == pytest.approx([4, 4, 8])


def test_curves_are_in_order_and_apart_by_what_else_differs():
    found = curves([*POINTS, a_point("guidance-scale", "2", 0.3, 5.0, steps=50)])
    assert [[p["value"] for p in curve] for curve in found.values()] == [
        ["1", "2", "3"], ["2", "4", "16"], ["2"],
    ]  # fmt: skip
    assert list(found) == [
        "classifier-free guidance, ddpm, 25 steps",
        "CLIP guidance, ddpm, 25 steps",
        "classifier-free guidance, ddpm, 50 steps",
    ]
    # What else they differ in is said, and only then.
    spans = [a_point("guidance-scale", "2", 0.3, 5.0, guidance_interval=s) for s in (None, [0.3, 5.0])]
    assert list(curves(spans)) == [
        f"classifier-free guidance, ddpm, 25 steps, guidance_interval {s}"
        for s in ("None", "[0.3, 5.0]")
    ]


def test_curves_of_different_clips_are_apart():
    """And the point without guidance belongs to each."""
    points = [a_point("clip-scale", "0", 0.9, 1.0)]
    points += [
        a_point("clip-scale", scale, 0.5, 2.0, clip=[name, "1"])
        for name in ("guide", "other")
        for scale in ("4", "2")
    ]
    found = curves(points)
    assert list(found) == [
        f"CLIP guidance, ddpm, 25 steps, guided by {name} 1" for name in ("guide", "other")
    ]
    assert all([p["value"] for p in curve] == ["0", "2", "4"] for curve in found.values())


def test_the_figures_are_drawn(config, tmp_path):
    pytest.importorskip("matplotlib")
    clip = SimpleNamespace(name="guide", params={})
    mine = experiment(config, replace(Painted(), clip=clip))
    for names, given in (
        (("guidance-scale",), ("1", "3")),
        (("clip-scale",), ("0", "2")),
        (("steps",), ("5", "10")),
        (("sampler",), ("ddim", "heun")),
    ):
        found = run(mine, tasks(names, given), tmp_path)
    guided = [point["clip"] for point in found["points"] if point["sweep"] == "clip-scale"]
    assert guided[0] is None and guided[1][0] == "guide"
    files = draw(found, tmp_path)
    names = ["guidance_scale.png", "clip_scale.png", "steps.png", "sampler.png"]
    assert [f.name for f in files] == ["trade_off.json", "trade_off.png", *names]
    table = json.loads(files[0].read_text())
    assert table == {"colours": matched(found["points"], "colours")}
    for file in files[1:]:
        picture = np.asarray(Image.open(file).convert("RGB"))
        assert picture.shape[0] > 300 and picture.shape[1] > 900
        # Lines of the first curve's colour.
        assert (picture == (31, 119, 180)).all(-1).sum() > 20


def test_without_matplotlib_the_figures_say_what_is_missing(config, tmp_path, monkeypatch):
    found = run(experiment(config), tasks(("guidance-scale",), ("100",)), tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="need matplotlib"):
        draw(found, tmp_path)
