"""Sweeps: measures, resumption after an interruption, the command line, figures."""

import json
import re
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from glide_jax.commands.evaluate import Ranking, Sweep, read
from glide_jax.errors import GlideError, UsageError
from glide_jax.evaluation import figures
from glide_jax.evaluation.experiment import Experiment, run
from glide_jax.evaluation.figures import curves, matched, write_figures
from glide_jax.evaluation.metrics import inception_score
from glide_jax.evaluation.sweep_options import EVERYWHERE, SWEEPS, tasks
from glide_jax.pipeline.options import read_options
from tests.support.ranked import ColourScorer, Painted, make_npz, recipe

SCALES = ("1", "3", "8", "100")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return recipe(make_npz(tmp_path_factory.mktemp("pairs")))


def experiment(config, pipe=None, **changed):
    scorer = ColourScorer()
    options = {"images": 16, "captions": 60, "seed": 5, "spaces": (scorer,)} | changed
    return Experiment(pipe or Painted(), scorer, config=config, **options)


def values(found, name="guidance-scale"):
    return [point["value"] for point in found["points"] if point["sweep"] == name]


# --- measures


def test_less_noise_is_nearer_to_the_real_images_and_no_noise_is_exact(config, tmp_path):
    found = run(experiment(config), tasks(("guidance-scale",), SCALES), tmp_path)
    space = [point["distances"]["colours"] for point in found["points"]]
    assert values(found) == list(SCALES)
    frechet = [s["frechet_distance"] for s in space]
    assert frechet[0] > frechet[1] > frechet[2] > frechet[3] == pytest.approx(0, abs=1e-9)
    assert (space[3]["precision"], space[3]["recall"]) == (1, 1)
    last = found["points"][3]
    # Equal colours have cosine 1, which the scorer's scale multiplies.
    assert last["clip_score"] == pytest.approx(10) and last["r_precision"] == 1
    assert found["real"]["clip_score"] == pytest.approx(10) and found["real"]["r_precision"] == 1
    assert found["real"]["distances_of_others"]["colours"]["frechet_distance"] > 0
    assert last["settings"]["guidance_scale"] == 100 and last["evaluations"] == 25
    head = found["experiment"]
    assert head["features"] == ["colours"] and head["weights"][0] == "painted"
    assert (head["images"], head["real_images"], head["captions"]) == (16, 16, 60)
    sheets = sorted((tmp_path / "images").glob("*.png"))
    assert len(sheets) == 4 and Image.open(sheets[0]).size == (4 * 6 + 2, 4 * 6 + 2)


def test_every_point_uses_the_same_captions(config, tmp_path):
    first, again = experiment(config), experiment(config)
    assert first.choices == again.choices
    assert [r["index"] for r in first.records] == [r["index"] for r in again.records]
    for record, choices in zip(first.records, first.choices, strict=True):
        assert choices[0].endswith(record["style"]) and len(set(choices)) == 60
    other = experiment(config, seed=6)
    assert [r["index"] for r in first.records] != [r["index"] for r in other.records]
    # More images than pairs: no pair repeats before all have occurred.
    many = experiment(config, images=100)
    assert len({r["index"] for r in many.records[:90]}) == 90 == len(many.reference)
    assert many.real()["r_precision"] == 1 and "distances_of_others" not in many.real()


def test_precision_and_recall_use_the_k_that_is_set(config, tmp_path):
    """Fewer images lie among others at a smaller k."""
    shares = {}
    for k in (1, 3):
        todo = tasks(("guidance-scale",), ("0.1",))
        found = run(experiment(config, nearest_k=k), todo, tmp_path / str(k))
        space = found["points"][0]["distances"]["colours"]
        shares[k] = space["precision"] + space["recall"]
    assert shares[1] < shares[3]


def test_a_space_that_classifies_has_an_inception_score(config, tmp_path):
    class Classes(SimpleNamespace):
        def both(self, images):
            return ColourScorer()(images), np.eye(4)[np.arange(len(images)) % 4]

        def __call__(self, images):
            return self.both(images)[0]

    spaces = (ColourScorer(), Classes(name="classes", classes=4, checksum="2"))
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


# --- resumption


def test_an_interrupted_sweep_resumes_to_the_same_results(config, tmp_path):
    todo = tasks(("guidance-scale",), SCALES)
    whole = Painted()
    run(experiment(config, whole), todo, tmp_path / "whole")
    broken = Painted(fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        run(experiment(config, broken), todo, tmp_path / "broken")
    half = json.loads((tmp_path / "broken" / "sweep.json").read_text())
    assert values(half) == ["1", "3"] and len(broken.calls) == 2
    rest = Painted()
    run(experiment(config, rest), todo, tmp_path / "broken")
    assert broken.calls + rest.calls == whole.calls
    files = [(tmp_path / name / "sweep.json").read_text() for name in ("whole", "broken")]
    assert files[0] == files[1]
    names = [sorted(p.name for p in (tmp_path / n).rglob("*")) for n in ("whole", "broken")]
    assert names[0] == names[1]
    # Nothing is left to do.
    idle = Painted(fail_at=0)
    run(experiment(config, idle), todo, tmp_path / "broken")
    assert not idle.calls and (tmp_path / "broken" / "sweep.json").read_text() == files[0]


def test_sweeps_share_a_folder_and_the_points_that_they_have_in_common(config, tmp_path):
    run(experiment(config), tasks(("guidance-scale",), ("1", "3")), tmp_path)
    pipe = Painted()
    found = run(experiment(config, pipe), tasks(("steps",), ("10", "25")), tmp_path)
    # 25 steps at scale 3 are the defaults, and already measured.
    assert [call["steps"] for call in pipe.calls] == [10]
    assert values(found) == ["1", "3"] and values(found, "steps") == ["10", "25"]
    assert found["points"][3]["distances"] == found["points"][1]["distances"]
    # Another spelling of the same point.
    idle = Painted(fail_at=0)
    run(experiment(config, idle), tasks(("guidance-scale",), ("3.0",)), tmp_path)
    # With other settings it is another point.
    other = Painted()
    run(experiment(config, other), tasks(("guidance-scale",), ("3",), {"steps": 5}), tmp_path)
    assert len(other.calls) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 6}, "seed"),
        ({"images": 15}, "images"),
        ({"captions": 50}, "captions"),
        ({"nearest_k": 1}, "nearest k"),
        ({"spaces": (replace(ColourScorer(), checksum="1"),)}, "feature weights"),
    ],
)
def test_another_experiment_is_refused(config, tmp_path, changed, message):
    run(experiment(config), tasks(("guidance-scale",), ("100",)), tmp_path)
    before = (tmp_path / "sweep.json").read_text()
    with pytest.raises(UsageError, match=f"other {message}: choose another --out"):
        run(experiment(config, **changed), tasks(("guidance-scale",), ("1",)), tmp_path)
    assert (tmp_path / "sweep.json").read_text() == before


def test_a_broken_file_and_impossible_settings_fail_before_generation(config, tmp_path):
    idle = Painted(fail_at=0)
    for todo, message in (
        (tasks(("sampler",), ("ddim", "ddmp")), "unknown sampler 'ddmp'"),
        (tasks(("spacing",), ("logsnr", "evenly")), "evenly"),
        (tasks(("guidance-scale",), ("1", "2"), {"guidance_method": "cfg++"}), "from 0 to 1"),
        (tasks(("guidance-interval",), ("all", "5:0.3")), "interval"),
        (tasks(("clip-guidance-scale",), ("0", "2")), "needs a noised CLIP"),
    ):
        with pytest.raises(UsageError, match=message):
            run(experiment(config, idle), todo, tmp_path / "a")
    with pytest.raises(UsageError, match="nearest_k is 3: .* images of a point, 3"):
        run(experiment(config, images=3), tasks(("steps",)), tmp_path / "b")
    for text in ("{", "[]", '{"points": 3}'):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(GlideError, match=r"cannot read .*sweep\.json"):
            run(experiment(config, idle), tasks(("steps",)), tmp_path)


# --- the settings of a sweep


def test_the_settings_of_each_sweep():
    clip = tasks(("clip-guidance-scale",), ("2",))[0].settings
    assert clip == {"guidance_scale": 1.0, "sampler": "ddpm", "clip_guidance_scale": 2.0}
    other = tasks(("clip-guidance-scale",), ("2",), {"sampler": "ddim", "steps": None})[0].settings
    assert other["sampler"] == "ddim" and "steps" not in other
    alone = tasks(("guidance-scale",), ("2",))[0].settings
    assert alone == {"guidance_scale": 2.0, "clip_guidance_scale": 0.0}
    todo = tasks(("guidance-interval",), ("all", "0.3:5"))
    intervals = [task.settings["guidance_interval"] for task in todo]
    assert intervals == [EVERYWHERE, (0.3, 5.0)]
    steps = [task.settings["steps"] for task in tasks(("steps",), ("10", "fast27"))]
    assert steps == [10, "fast27"]
    both = tasks(("guidance-scale", "clip-guidance-scale"))
    assert len(both) == sum(
        len(SWEEPS[n].values) for n in ("guidance-scale", "clip-guidance-scale")
    )


@pytest.mark.parametrize(
    ("names", "chosen", "settings", "message"),
    [
        (("guidance_scale",), (), {}, "did you mean 'guidance-scale'"),
        ((), (), {}, "name what to sweep"),
        (("steps", "sampler"), ("5",), {}, "for one sweep"),
        (("guidance-scale",), ("high",), {}, "'high' is not a value"),
        (("guidance-interval",), ("3",), {}, "'3' is not a value"),
        (
            ("guidance-scale",),
            (),
            {"guidance_scale": 2.0},
            "--guidance-scale is swept and cannot also be set",
        ),
    ],
)
def test_impossible_sweeps_are_refused(names, chosen, settings, message):
    with pytest.raises(UsageError, match=message):
        tasks(names, chosen, settings)


def test_the_command_line():
    words = ("--weights", "mine", "--vary", "guidance-scale", "clip-guidance-scale", "--steps", "9")
    found = read(["sweep", *words])
    assert isinstance(found, Sweep) and found.vary == ("guidance-scale", "clip-guidance-scale")
    assert found.model.weights == "mine" and found.sampling.steps == 9
    assert read(["sweep", "--vary", "steps", "--values", "5", "fast27"]).values == ("5", "fast27")
    found = read(["ranking", "--data", "a.npz", "--guidance-scale", "2"])
    assert isinstance(found, Ranking) and found.dataset.data == "a.npz"
    for wrong in ([], ["rank"], ["--weights", "mine"], ["--vary", "steps"], ["sweep"]):
        with pytest.raises(SystemExit) as stopped:
            read(wrong)
        assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ranking", "--clip-model", "c"], "--clip-model .*: give --clip-guidance-scale"),
        (["sweep", "--vary", "steps", "--weak-model", "w"], "--weak-model .*: give --autoguidance"),
        # Its scale is swept: the next error is that of the recipe.
        (
            ["sweep", "--vary", "clip-guidance-scale", "--clip-model", "c", "--recipe", "no"],
            "recipe",
        ),
    ],
)
def test_a_model_that_guides_needs_a_scale(words, message, monkeypatch):
    monkeypatch.setattr(figures, "figure_class", lambda: None)
    with pytest.raises(UsageError, match=message):
        read(words).run()


@pytest.mark.parametrize(
    ("read_words", "default"),
    [
        (partial(read_options, ""), "the one that belongs"),
        (lambda w: read(["nearest", *w]), "none"),
    ],
)
def test_the_help_states_where_a_default_of_evaluate_differs(read_words, default, capsys):
    with pytest.raises(SystemExit):
        read_words(["--help"])
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    text = "Weights of the upsampler that enlarges each image, or none."
    assert f"--upsampler STR {text} (default: {default}" in shown


def test_the_help_lists_the_default_values_of_each_sweep():
    help_text = " ".join(str(Sweep.__doc__).split())
    for name, sweep in SWEEPS.items():
        if name not in ("sampler", "spacing"):
            assert f"{name} {' '.join(sweep.values)}" in help_text


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
    a_point("clip-guidance-scale", "16", 0.1, 9.0),
    a_point("clip-guidance-scale", "2", 0.6, 3.0),
    a_point("clip-guidance-scale", "4", 0.2, 5.0),
]


def test_both_guidances_are_compared_at_equal_recall():
    found = matched(POINTS, "colours")
    # No point of classifier-free guidance has a recall of 0.1.
    assert [(row["clip"]["scale"], row["recall"]) for row in found] == [(2, 0.6), (4, 0.2)]
    free, guided = found[0]["classifier-free"], found[0]["clip"]
    assert free["clip_score"] == pytest.approx(4) and guided["clip_score"] == 3
    assert free["precision"] == pytest.approx(0.4) == guided["precision"]
    assert free["frechet_distance"] == pytest.approx(1.2) and free["scale"] == pytest.approx(1.5)
    assert found[1]["classifier-free"]["clip_score"] == pytest.approx(8)
    # If recall has the same value at several scales, all of them are compared.
    twice = [*POINTS, a_point("guidance-scale", "4", 0.6, 4.0)]
    found = [row["classifier-free"] for row in matched(twice, "colours")]
    assert [free["scale"] for free in found] == pytest.approx([1.5, 4, 3])
    assert [free["clip_score"] for free in found] == pytest.approx([4, 4, 8])


def test_curves_are_in_order_and_separate_where_other_settings_differ():
    found = curves([*POINTS, a_point("guidance-scale", "2", 0.3, 5.0, steps=50)])
    assert [[p["value"] for p in curve] for curve in found.values()] == [
        ["1", "2", "3"], ["2", "4", "16"], ["2"],
    ]  # fmt: skip
    assert list(found) == [
        "classifier-free guidance, ddpm, 25 steps",
        "CLIP guidance, ddpm, 25 steps",
        "classifier-free guidance, ddpm, 50 steps",
    ]
    # Names contain another setting only if curves differ in it.
    points = [
        a_point("guidance-scale", "2", 0.3, 5.0, guidance_interval=interval)
        for interval in (None, [0.3, 5.0])
    ]
    assert list(curves(points)) == [
        f"classifier-free guidance, ddpm, 25 steps, guidance_interval {s}"
        for s in ("None", "[0.3, 5.0]")
    ]


def test_curves_of_different_clips_are_separate():
    """The point without guidance belongs to each."""
    points = [a_point("clip-guidance-scale", "0", 0.9, 1.0)]
    points += [
        a_point("clip-guidance-scale", scale, 0.5, 2.0, clip=[name, "1"])
        for name in ("guide", "other")
        for scale in ("4", "2")
    ]
    found = curves(points)
    assert list(found) == [
        f"CLIP guidance, ddpm, 25 steps, guided by {name} 1" for name in ("guide", "other")
    ]
    assert all([p["value"] for p in curve] == ["0", "2", "4"] for curve in found.values())


def test_the_figures_show_the_curves(config, tmp_path):
    pytest.importorskip("matplotlib")
    clip = SimpleNamespace(name="guide", params={})
    shared = experiment(config, replace(Painted(), clip=clip))
    for names, chosen in (
        (("guidance-scale",), ("1", "3")),
        (("clip-guidance-scale",), ("0", "2")),
        (("steps",), ("5", "10")),
        (("sampler",), ("ddim", "heun")),
    ):
        found = run(shared, tasks(names, chosen), tmp_path)
    guided = [point["clip"] for point in found["points"] if point["sweep"] == "clip-guidance-scale"]
    assert guided[0] is None and guided[1][0] == "guide"
    files = write_figures(found, tmp_path)
    names = ["guidance_scale.png", "clip_guidance_scale.png", "steps.png", "sampler.png"]
    assert [f.name for f in files] == ["trade_off.json", "trade_off.png", *names]
    table = json.loads(files[0].read_text())
    assert table == {"colours": matched(found["points"], "colours")}
    for file in files[1:]:
        image = np.asarray(Image.open(file).convert("RGB"))
        assert image.shape[0] > 300 and image.shape[1] > 900
        # Lines of the first curve's colour.
        assert (image == (31, 119, 180)).all(-1).sum() > 20


def test_figures_without_matplotlib_name_what_to_install(config, tmp_path, monkeypatch):
    found = run(experiment(config), tasks(("guidance-scale",), ("100",)), tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="need matplotlib"):
        write_figures(found, tmp_path)
