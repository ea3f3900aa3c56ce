"""Batches: a position of the order gives the same arrays everywhere, and iteration resumes."""

import itertools
import json
from dataclasses import replace

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from glide_jax.data.batches import make_batches
from glide_jax.data.data_config import DataConfig
from glide_jax.data.decoding import Encoded
from glide_jax.data.order import groups_of, shuffled, shuffled_groups
from glide_jax.data.records import Source
from glide_jax.data.sources import open_source
from glide_jax.errors import GlideError, UsageError
from glide_jax.models.tokenizers import CLIPTokenizer, GPT2Tokenizer
from glide_jax.training.objectives import to_batch
from tests.support.commands import ROOT, run
from tests.support.shards import encode

MINI = str(ROOT / "tests" / "fixtures" / "emoji_mini.npz")


def batches(config, source=None, **kwargs):
    arguments = {"batch_size": 4, "tokenizer": GPT2Tokenizer(16), "size": 64, "seed": 0} | kwargs
    return make_batches(source or open_source(config), config, **arguments)


def first(iterator, count):
    return list(itertools.islice(iterator, count))


def same(a, b):
    return all(np.array_equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


def captions(arrays):
    tokenizer = GPT2Tokenizer(16)
    rows = zip(arrays["tokens"], arrays["caption_mask"], strict=True)
    return [tokenizer.decode(ids[mask]) for ids, mask in rows]


def partly_broken(count=40, *, broken=(), captions=None):
    """Return a source of plain images; those in `broken` are truncated."""
    data = encode(np.full((8, 8, 3), 99, np.uint8), "PNG")
    return Source(
        [
            {
                "image": Encoded(data[:30] if i in broken else data, f"{i}.png"),
                "caption": captions or f"{i}",
            }
            for i in range(count)
        ]
    )


# -- order ----------------------------------------------------------------------------------------


def test_every_pass_has_every_record_once_in_another_order():
    config = DataConfig(source=MINI, styles=("Google Noto style",))
    n = len(open_source(config))
    arrays = batches(config, batch_size=n)
    one, two = next(arrays)["image"], next(arrays)["image"]
    assert not np.array_equal(one, two)
    assert np.array_equal(np.sort(one.sum((1, 2, 3))), np.sort(two.sum((1, 2, 3))))


@pytest.mark.parametrize("count", [7, 1 << 15])
def test_a_pass_is_a_permutation_of_few_and_of_many_records(count):
    one = [shuffled(i, count, 5) for i in range(count)]
    assert sorted(one) == list(range(count)) != one
    few = range(min(count, 99))
    assert [shuffled(count + i, count, 5) for i in few] != one[: len(few)]
    assert [shuffled(i, count, 6) for i in few] != one[: len(few)]


def test_groups_stay_together_and_every_pass_has_another_order():
    names = ["cat", "dog", "cat", "owl", "dog", "cat", "hen"]
    source = Source([{"image": np.zeros((8, 8, 3), np.uint8), "caption": n} for n in names])
    groups = groups_of(source, "caption")
    passes = [[shuffled_groups(7 * p + i, groups, 5) for i in range(7)] for p in range(20)]
    for order in passes:
        assert sorted(order) == list(range(7))
        runs = [name for name, _ in itertools.groupby(order, key=names.__getitem__)]
        assert sorted(runs) == ["cat", "dog", "hen", "owl"]
    # The order of the groups differs, and the order of the records in a group.
    assert len({tuple(names[i] for i in order) for order in passes}) > 5
    assert len({tuple(i for i in order if names[i] == "cat") for order in passes}) > 3
    assert passes[0] != [shuffled_groups(i, groups, 6) for i in range(7)]


def test_batches_with_groups_resume():
    config = DataConfig(source=MINI, caption_templates=("{concept}",), group_by="concept")
    one, two = batches(config, batch_size=12), batches(config, batch_size=12)
    made = first(one, 3)
    found = [caption for arrays in made for caption in captions(arrays)]
    runs = [name for name, _ in itertools.groupby(found)]
    assert len(runs) == len(set(found)) < len(found) / 2
    two.set_state({"position": 12})
    assert same(made[1:], first(two, 2))


def test_a_missing_field_to_group_by_is_named():
    with pytest.raises(UsageError, match="record 0 of .* has no text field 'colour'"):
        batches(DataConfig(source=MINI, group_by="colour"))


def test_another_seed_gives_another_order_and_may_be_negative():
    config = DataConfig(source=MINI)
    one, two = (first(batches(config, seed=seed), 2) for seed in (0, -1))
    assert not same(one, two)
    assert same(one, first(batches(config, seed=0), 2))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_make_the_batch_of_one_process(count):
    config = DataConfig(
        source=MINI, caption_templates=("{caption}", "{a_caption}"), crop="random", flip=True
    )
    whole = first(batches(config), 3)
    shares = [first(batches(config, process=(i, count)), 3) for i in range(count)]
    for step, expected in enumerate(whole):
        for key in ("image", "tokens", "caption_mask", "row"):
            got = np.concatenate([share[step][key] for share in shares])
            assert np.array_equal(got, expected[key]), key
    assert whole[0]["row"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("process", [(0, 3), (2, 2), (-1, 2)])
def test_a_batch_without_an_even_share_is_refused(process):
    with pytest.raises(UsageError, match="a batch of 4 has no even share"):
        batches(DataConfig(source=MINI), process=process)


def test_threads_change_nothing():
    config = DataConfig(source=MINI, crop="random")
    assert same(first(batches(config), 5), first(batches(replace(config, threads=3)), 5))


# -- resuming -------------------------------------------------------------------------------------


def test_iteration_resumes_where_it_was_saved():
    config = DataConfig(source=MINI, caption_templates=("{caption}", "{a_caption}", "{style}"))
    one, two = batches(config), batches(config)
    first(one, 3)
    state = json.loads(json.dumps(one.get_state()))
    ahead = first(one, 3)
    next(two)  # resuming must also work when batches are already being made
    two.set_state(state)
    assert same(ahead, first(two, 3))


def test_the_position_is_saved_in_a_checkpoint(tmp_path):
    one, two = (batches(DataConfig(source=MINI)) for _ in range(2))
    first(one, 3)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(one)))
        manager.wait_until_finished()
        restored = grain.checkpoint.CheckpointRestore(two)
        manager.restore(3, args=ocp.args.Composite(data=restored))
    assert same(first(one, 2), first(two, 2))


def test_iteration_resumes_past_broken_records():
    source = partly_broken(broken=range(0, 40, 3))
    one, two = batches(DataConfig(), source, size=8), batches(DataConfig(), source, size=8)
    first(one, 2)
    two.set_state(one.get_state())
    assert same(first(one, 5), first(two, 5))


def test_the_state_fits_other_processes_and_another_batch_size():
    config = DataConfig(source=MINI)
    one = batches(config)
    rest = first(one, 4)[2:]
    again = batches(config, batch_size=2, process=(1, 2))
    half = batches(config, process=(0, 2))
    first(half, 2)
    again.set_state(half.get_state())
    got = np.stack([arrays["image"][0] for arrays in first(again, 4)])
    assert np.array_equal(got, np.concatenate([arrays["image"] for arrays in rest])[1::2])


def test_worker_processes_change_nothing_and_can_be_resumed(tmp_path):
    for i in range(6):
        encoded = encode(np.full((24, 32, 3), 40 * i, np.uint8))
        (tmp_path / f"{i}.jpg").write_bytes(encoded[: None if i % 3 else 50])
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    config = DataConfig(source=str(tmp_path), crop="random")
    expected = first(batches(config, size=8), 9)
    iterator = batches(replace(config, workers=2), size=8)
    iterator.set_state({"position": 3 * 4})
    try:
        assert same(first(iterator, 6), expected[3:])
    finally:
        iterator.close()
    assert iterator.get_state()["position"] == 9 * 4
    assert iterator.skipped == sum(arrays["skipped"] for arrays in expected[3:]) > 0


def test_a_closed_iterator_raises():
    iterator = batches(DataConfig(source=MINI))
    next(iterator)
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


# -- broken records -------------------------------------------------------------------------------


def test_broken_records_are_replaced_counted_and_named(capsys):
    broken = (3, 11, 12)
    iterator = batches(DataConfig(), partly_broken(broken=broken), size=8, batch_size=40)
    arrays = next(iterator)
    assert arrays["skipped"] == iterator.skipped >= 3
    assert not {"3", "11", "12"} & set(captions(arrays))
    assert len(captions(arrays)) == 40
    error = capsys.readouterr().err
    assert all(f"cannot read the image {i}.png" in error for i in broken)
    assert error.count("skipped a record") == 3  # each is named once, even if it is met twice


def test_all_processes_replace_broken_records_by_the_same_ones():
    source = partly_broken(broken=range(20))
    config = DataConfig(crop="random")
    whole = first(batches(config, source, size=8, batch_size=8), 5)
    shares = [
        first(batches(config, source, size=8, batch_size=8, process=(i, 2)), 5) for i in (0, 1)
    ]
    for expected, one, two in zip(whole, *shares, strict=True):
        assert captions(expected) == captions(one) + captions(two)
        assert expected["skipped"] == one["skipped"] + two["skipped"]
    assert sum(arrays["skipped"] for arrays in whole) > 10


def test_only_the_first_few_broken_records_are_named(capsys):
    iterator = batches(DataConfig(), partly_broken(broken=range(20)), size=8, batch_size=40)
    first(iterator, 2)
    error = capsys.readouterr().err
    assert error.count("skipped a record") == 5 and "further ones are only counted" in error


def test_a_source_with_only_broken_records_stops_with_examples():
    iterator = batches(DataConfig(), partly_broken(broken=range(40)), size=8)
    with pytest.raises(GlideError, match=r"32 records in a row are broken.*\d\.png"):
        next(iterator)


def test_a_caption_that_is_not_text_counts_as_broken():
    source = partly_broken(20, captions="\ud800")
    good = partly_broken(20)
    mixed = Source([*source.records, *good.records])
    iterator = batches(DataConfig(), mixed, size=8, batch_size=20)
    assert set(captions(next(iterator))) <= {str(i) for i in range(20)}
    assert iterator.skipped > 0


# -- captions -------------------------------------------------------------------------------------


def test_captions_are_sampled_from_the_templates():
    config = DataConfig(
        source=MINI,
        concepts=("octopus",),
        styles=("Google Noto style",),
        caption_templates=("{caption}", "{a_caption}, {style}"),
    )
    seen = set()
    for arrays in first(batches(config), 8):
        seen.update(captions(arrays))
    assert seen == {"octopus", "an octopus, google noto style"}


@pytest.mark.parametrize(
    "template, message",
    [("{colour}", "colour"), ("{", "cannot be filled"), ("{}", "cannot be filled")],
)
def test_a_template_that_cannot_be_filled_is_refused_before_training(template, message):
    with pytest.raises(UsageError, match=message):
        batches(DataConfig(source=MINI, caption_templates=("{caption}", template)))


def test_records_that_cannot_fill_a_template_are_skipped():
    plain = partly_broken(10)
    styled = Source([*plain.records, *({**r, "style": "flat"} for r in plain.records)])
    iterator = batches(DataConfig(caption_templates=("{style}",)), styled, size=8, batch_size=20)
    assert captions(next(iterator)) == ["flat"] * 20 and iterator.skipped > 0


def test_one_of_several_captions_is_sampled_each_time():
    source = partly_broken(1, captions=("one", "two", "three", ""))
    arrays = next(batches(DataConfig(), source, size=8, batch_size=400))
    counts = [captions(arrays).count(c) for c in ("one", "two", "three", "")]
    assert sum(counts) == 400
    assert all(abs(count - 100) < 45 for count in counts)  # 5 standard deviations


def test_clip_tokens_come_with_a_mask():
    arrays = next(batches(DataConfig(), partly_broken(), size=8, tokenizer=CLIPTokenizer(12)))
    tokens = CLIPTokenizer(12)(["7"])
    assert arrays["tokens"].shape == arrays["caption_mask"].shape == (4, 12)
    assert arrays["tokens"].dtype == np.int32 and arrays["caption_mask"].dtype == bool
    assert (arrays["caption_mask"].sum(1) >= tokens.lengths[0]).all()
    assert np.array_equal(arrays["tokens"] > 0, arrays["caption_mask"])


def test_data_workers_do_not_use_the_accelerator():
    code = "import glide_jax.data.batches; from jax._src import xla_bridge as b; print(b._backends)"
    assert run("-c", code).stdout.strip() == "{}"


# -- images ---------------------------------------------------------------------------------------


def test_a_batch_has_the_row_of_each_record():
    batch = to_batch(next(batches(DataConfig(source=MINI))))
    assert batch.image.shape == (4, 64, 64, 3) and batch.image.dtype == np.uint8
    assert batch.row.tolist() == [0, 1, 2, 3]


def test_batches_have_the_size_of_the_model():
    assert next(batches(DataConfig(source=MINI), size=32))["image"].shape == (4, 32, 32, 3)


def test_flip_mirrors_half_of_the_images():
    left_white = np.zeros((8, 8, 3), np.uint8)
    left_white[:, :4] = 255
    source = Source([{"image": left_white, "caption": ""}])
    images = next(batches(DataConfig(flip=True), source, size=8, batch_size=400))["image"]
    assert abs((images[:, 0, 0, 0] == 255).mean() - 0.5) < 0.125  # 5 standard deviations
    images = next(batches(DataConfig(), source, size=8))["image"]
    assert (images == left_white).all()


@pytest.mark.parametrize("caption", ["an arrow to the Left", "right-facing", "counterclockwise"])
def test_an_image_whose_caption_names_a_side_is_not_mirrored(caption):
    left_white = np.zeros((8, 8, 3), np.uint8)
    left_white[:, :4] = 255
    source = Source([{"image": left_white, "caption": caption}])
    images = next(batches(DataConfig(flip=True), source, size=8, batch_size=40))["image"]
    assert (images == left_white).all()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"crop": "center"}, "did you mean 'centre'"),
        ({"min_crop": 0.0}, "min_crop"),
        ({"caption_templates": ()}, "caption_templates needs a template"),
        ({"workers": -1}, "workers"),
        ({"prefetch": 0}, "prefetch"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        DataConfig(**fields)
