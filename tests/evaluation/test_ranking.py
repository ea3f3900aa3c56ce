"""Captions to choose from, ranking by a scorer that reads colours, sheets, the real scorer."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import glide_jax as glide
from glide_jax.errors import UsageError
from glide_jax.evaluation.captions import (
    Vocabulary,
    held_out_pairs,
    one_of_each_concept,
    sample_in_passes,
    training_pairs,
    vocabulary,
)
from glide_jax.evaluation.features import Scorer, fit, open_scorer, open_space, ten_views
from glide_jax.evaluation.ranking import choose_pairs, rank, report
from glide_jax.evaluation.sheets import RIGHT, WRONG, Tile, contact_sheet
from glide_jax.models.clip import NoisedCLIP, init_params
from glide_jax.weights.clip_registry import save_clip
from tests.support.commands import first_weights, one_line, run
from tests.support.ranked import CONCEPTS, STYLES, ColourScorer, Painted, make_npz, recipe

# As many concepts as the embedded recipe has.
WORDS = Vocabulary({f"concept {i}": f"concept {i}" for i in range(100)}, STYLES)
OWN = {"concept": "concept 7", "caption": "concept 7", "style": "old style"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return recipe(make_npz(tmp_path_factory.mktemp("pairs")))


def generator():
    return np.random.default_rng(0)


# --- captions


def test_captions_that_test_the_concept_have_one_style():
    found = WORDS.concept_choices(OWN, 100, generator())
    assert found[0] == "concept 7, old style"
    assert set(found) == {f"concept {i}, old style" for i in range(100)} and len(found) == 100


def test_other_styles_fill_up_too_few_concepts_but_never_of_the_own_concept():
    words = Vocabulary({f"concept {i}": f"concept {i}" for i in range(10)}, STYLES)
    found = words.concept_choices(OWN, 30, generator())
    assert len(set(found)) == 30
    assert {f"concept {i}, old style" for i in range(10)} <= set(found)
    assert [c for c in found if c.startswith("concept 7,")] == ["concept 7, old style"]
    with pytest.raises(UsageError, match="make 37 captions to choose from, not 38"):
        words.concept_choices(OWN, 38, generator())


def test_a_held_out_pair_has_every_style_of_its_concept_and_twenty_concepts_in_its_style():
    found = WORDS.pair_choices(OWN, 100, generator())
    assert found[0] == "concept 7, old style" and len(set(found)) == 100
    pairs = [tuple(caption.split(", ")) for caption in found]
    assert {style for concept, style in pairs if concept == "concept 7"} == set(STYLES)
    assert len({c for c, style in pairs if style == "old style" and c != "concept 7"}) >= 20
    # With four styles: 25 concepts, each in all of them.
    concepts = {concept for concept, _ in pairs}
    assert len(concepts) == 25 and set(pairs) == {(c, s) for c in concepts for s in STYLES}
    assert WORDS.pair_choices(OWN, 100, np.random.default_rng(1)) != found
    assert WORDS.pair_choices(OWN, 100, generator()) == found


def test_too_few_captions_are_refused():
    few = Vocabulary(dict(list(WORDS.captions.items())[:20]), STYLES)
    for words, count in ((WORDS, 23), (few, 40)):
        with pytest.raises(UsageError, match="cannot hold every style"):
            words.pair_choices(OWN, count, generator())
    with pytest.raises(UsageError, match="nothing to choose"):
        WORDS.concept_choices(OWN, 1, generator())


def test_the_right_caption_is_the_records_own_if_its_concept_has_several():
    record = OWN | {"caption": "concept 7 icon"}
    for choose in (WORDS.concept_choices, WORDS.pair_choices):
        found = choose(record, 60, generator())
        assert found[0] == "concept 7 icon, old style" and "concept 7, old style" not in found


def test_the_pairs_of_each_kind_are_trained_on_or_held_out_pairs(config):
    words = vocabulary(config)
    assert tuple(words.captions) == CONCEPTS and set(words.styles) == set(STYLES)
    found = choose_pairs(config, words, seed=3, images=20, captions=60)
    trained = {r["index"] for r in training_pairs(config)}
    hidden = {r["index"] for r in held_out_pairs(config)}
    assert len(trained) == 90 and len(hidden) == 30 and not trained & hidden
    for kind, among in (("training_concepts", trained), ("held_out_pairs", hidden)):
        records, choices = found[kind]
        assert {r["index"] for r in records} <= among
        assert len({r["concept"] for r in records}) == 20
        assert all(
            c[0] == f"{r['caption']}, {r['style']}" for r, c in zip(records, choices, strict=True)
        )
        assert {len(set(c)) for c in choices} == {60}
    again = choose_pairs(config, words, seed=3, images=20, captions=60)
    other = choose_pairs(config, words, seed=4, images=20, captions=60)
    for kind in found:
        assert found[kind][1] == again[kind][1] != other[kind][1]


def test_the_recipe_limits_concepts_and_styles(config):
    some = replace(config, data=replace(config.data, concepts=CONCEPTS[:5], styles=STYLES[:2]))
    words = vocabulary(some)
    assert tuple(words.captions) == CONCEPTS[:5] and words.styles == STYLES[:2]
    assert {r["concept"] for r in training_pairs(some)} <= set(CONCEPTS[:5])


def test_no_pair_repeats_before_all_have_occurred(config):
    records = training_pairs(config)
    found = [r["index"] for r in sample_in_passes(records, 2 * len(records) + 5, generator())]
    assert len(set(found[:90])) == len(set(found[90:180])) == 90 and found[:90] != found[90:180]
    with pytest.raises(UsageError, match="there are 30 concepts to choose from: cannot take 31"):
        one_of_each_concept(records, 31, generator())


# --- ranks


def test_ranks_by_hand():
    captions = [f"{c}, {STYLES[0]}" for c in CONCEPTS[:4]]
    choices = [captions, captions[1:] + captions[:1]]
    images = Painted()(captions[:1] + captions[:1], seed=0, guidance_scale=100).images
    found = rank(ColourScorer(), images, choices)
    # The second image shows the last of its captions.
    assert found.rank.tolist() == [1, 2] and found.right.tolist() == [True, False]
    assert found.best == (captions[0], captions[0]) and found.rate == 0.5


def test_the_results_and_the_sheets(config, tmp_path):
    chosen = choose_pairs(config, vocabulary(config), seed=0, images=20, captions=60)
    prompts = {kind: [c[0] for c in choices] for kind, (_, choices) in chosen.items()}
    mistakes = {p: "concept 29, flat style" for p in prompts["training_concepts"][:3]}
    wrong = next(p for p in prompts["held_out_pairs"] if p not in prompts["training_concepts"])
    mistakes |= dict.fromkeys([wrong], f"{wrong.split(', ')[0]}, new style")
    mistakes = {k: v for k, v in mistakes.items() if k != v}
    # The scorer mistakes four real images, and images like them, for something else.
    scorer = ColourScorer(blind=tuple(prompts["held_out_pairs"][-4:]))
    out = tmp_path / "found"
    options = {"images": 20, "captions": 60, "settings": {"guidance_scale": 100.0, "steps": 5}}
    pipe = Painted(mistakes)
    found = report(pipe, scorer, config, out, **options)
    assert pipe.calls == [options["settings"]] * 2

    for kind in prompts:
        hits = [p not in mistakes and p not in scorer.blind for p in prompts[kind]]
        real = [p not in scorer.blind for p in prompts[kind]]
        result = found[kind]
        assert (result["right"], result["right_of_real"]) == (sum(hits), sum(real))
        assert result["ratio"] == pytest.approx(sum(hits) / sum(real)) and result["of"] == 20
        assert [i["rank"] == 1 for i in result["images"]] == hits
        assert [i["real_rank"] == 1 for i in result["images"]] == real
        assert all((i["first"] == i["prompt"]) == (i["rank"] == 1) for i in result["images"])
        sheet = np.asarray(Image.open(out / f"{kind}.png"))
        assert (sheet == WRONG).all(-1).any() and (sheet == RIGHT).all(-1).any()
    assert json.loads((out / "ranking.json").read_text()) == json.loads(json.dumps(found))
    assert found["weights"] == "painted" and found["scorer"] == "independent"
    assert found["settings"]["steps"] == 5 and found["captions"] == 60


def test_a_scorer_that_recognises_no_real_image_gives_no_ratio(config, tmp_path):
    blind = tuple(f"{c}, {s}" for c in CONCEPTS for s in STYLES)
    found = report(
        Painted(), ColourScorer(blind=blind), config, tmp_path, images=5, captions=60,
    )  # fmt: skip
    assert found["training_concepts"]["right_of_real"] == 0
    assert found["training_concepts"]["ratio"] is None


def test_a_sheet_shows_the_exact_pixels():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    tiles = [Tile(image, ("a", "b"), right=True), Tile(255 - image, ("c",), small=image)]
    sheet = np.asarray(contact_sheet(tiles))
    assert np.array_equal(sheet[4:132, 6:134][1::2, ::2], image)
    assert (sheet[132:] == RIGHT).all(-1).any() and not (sheet == WRONG).all(-1).any()
    assert np.array_equal(sheet[4:132, 146:274][::2, ::2], 255 - image)
    large = contact_sheet([Tile(np.zeros((256, 256, 3), np.uint8), ("a",))])
    assert large.width == 268


# --- the scorer with networks


@pytest.fixture(scope="module", params=[0, 10])
def clip(request):
    """A tiny random CLIP, without and with noise levels."""
    config = replace(
        glide.CLIP_PRESETS["clip64"](), image_size=16, image_width=32, image_layers=1,
        text_width=32, text_layers=1, head_size=16, embed_width=16, n_vocab=49408,
        n_timestep=request.param, logit_scale=20.0,
    )  # fmt: skip
    return glide.CLIP("tiny", config, first_weights(init_params, NoisedCLIP(config), 1))


def test_ten_views():
    image = np.arange(16 * 16, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    views = list(ten_views(image))
    assert len(views) == 10 and {view.shape for view in views} == {(1, 14, 14, 3)}
    # The first pixel of each corner and of the centre, in rows of 16.
    assert [int(view[0, 0, 0, 0]) for view in views[::2]] == [0, 2, 32, 34, 17]
    assert all(
        np.array_equal(a[:, :, ::-1], b) for a, b in zip(views[::2], views[1::2], strict=True)
    )


def test_the_scorer_averages_over_views(clip):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    one, ten = Scorer(clip, views=1), Scorer(clip)
    mean = np.mean([one(fit(view, 16)) for view in ten_views(images)], axis=0)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    assert ten.views == 10 and np.allclose(ten(images), mean, atol=1e-5)


def test_the_scorer_encodes_clean_images(clip):
    scorer = Scorer(clip, views=1)
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    features, texts = scorer(images), scorer.texts(["a cat", "a dog"])
    assert features.shape == (5, 16) and texts.shape == (2, 16) and features.dtype == np.float32
    for rows in (features, texts):
        assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    t = np.zeros(1) if clip.config.n_timestep else None
    alone = clip.network.fn(clip.network.params, images[3:4] / np.float32(127.5) - 1, t, texts[1:])
    assert scorer.scale == pytest.approx(20)
    assert float(alone[0]) == pytest.approx(20 * float(features[3] @ texts[1]), abs=1e-3)
    larger = images.repeat(4, axis=1).repeat(4, axis=2)
    assert np.array_equal(fit(larger, 16), images)
    assert np.allclose(scorer(larger), features, atol=1e-5)


def test_the_clip_that_guides_cannot_score(clip, tmp_path):
    save_clip(clip, tmp_path / "clip")
    scorer = open_scorer(tmp_path / "clip")
    assert open_space("scorer", scorer) is scorer and scorer.checksum == Scorer(clip).checksum
    with pytest.raises(UsageError, match="cannot score: it is the CLIP that guides"):
        open_scorer(tmp_path / "clip", guide=clip)


def test_data_without_concepts_and_styles_is_refused(config, tmp_path):
    for source, message in (("folder", "as an .npz file"), (tmp_path / "no.npz", "no such file")):
        other = replace(config, data=replace(config.data, source=str(source)))
        with pytest.raises(glide.GlideError, match=message):
            report(Painted(fail_at=0), ColourScorer(), other, tmp_path)


def test_an_error_of_the_command_is_one_line():
    error = one_line(run("-m", "glide_jax", "evaluate", "sweep", "--vary", "guidance"), 2)
    assert "there is no sweep 'guidance'" in error and "guidance-scale" in error
    error = one_line(run("-m", "glide_jax", "evaluate", "ranking", "--seed", "-1"), 2)
    assert "seed must be between 0 and 2^32 - 1, not -1" in error
