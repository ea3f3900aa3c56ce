"""Mixtures: exact shares, the order of each source, resuming, and what is refused."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from glide_jax.data.batches import make_batches, make_prepare
from glide_jax.data.data_config import DataConfig
from glide_jax.data.mixture import parse_mixture
from glide_jax.data.order import mixed
from glide_jax.data.records import Part
from glide_jax.data.resident import make_resident
from glide_jax.data.sources import open_source
from glide_jax.errors import UsageError
from glide_jax.models.tokenizers import GPT2Tokenizer
from tests.support.commands import ROOT
from tests.support.shards import png

MINI = str(ROOT / "tests" / "fixtures" / "emoji_mini.npz")
TOKENIZER = GPT2Tokenizer(16)


def folder(path, values, broken=()):
    path.mkdir()
    for value in values:
        (path / f"{value:03}.png").write_bytes(b"no image" if value in broken else png(value))
        (path / f"{value:03}.txt").write_text(f"number {value}")
    return path


@pytest.fixture
def config(tmp_path):
    """Three images of 1 to 7, then one of 101 to 103."""
    folder(tmp_path / "a", range(1, 8))
    folder(tmp_path / "b", range(101, 104))
    return DataConfig(mixture=(f"{tmp_path}/a:3", f"{tmp_path}/b:1"))


def values(source, config, count, position=0, batch=4, process=(0, 1), seed=5):
    """Return the grey values of some batches."""
    made = make_batches(
        source, config, batch_size=batch, tokenizer=TOKENIZER, size=8, seed=seed, process=process
    )
    made.set_state({"position": position, "rounds": 16})
    found = [next(made)["image"][:, 0, 0, 0] for _ in range(count)]
    made.close()
    return np.concatenate(found).tolist()


# -- order ----------------------------------------------------------------------------------------


def test_shares_are_exact_in_every_block_and_sources_do_not_repeat_within_a_pass(config):
    source = open_source(config)
    assert len(source) == 10 and source.parts == (Part(7, 3), Part(3, 1))
    found = values(source, config, 84)
    assert all(sum(v > 100 for v in found[i : i + 4]) == 1 for i in range(0, 336, 4))
    first, second = [v for v in found if v < 100], [v for v in found if v > 100]
    for own, every in ((first, range(1, 8)), (second, range(101, 104))):
        passes = [own[i : i + len(every)] for i in range(0, len(own), len(every))]
        assert all(sorted(one) == list(every) for one in passes)
        assert len({tuple(one) for one in passes}) >= 6
    assert len({tuple(v > 100 for v in found[i : i + 4]) for i in range(0, 336, 4)}) == 4


def test_a_long_stream_of_uneven_weights_has_exact_counts():
    parts = (Part(40_000, 7), Part(50, 2), Part(9, 4))
    order = [mixed(position, parts, 1) for position in range(13 * 1000)]
    owners = Counter((number >= 40_000) + (number >= 40_050) for number in order)
    assert owners == {0: 7000, 1: 2000, 2: 4000}
    seen = Counter(order)
    assert {seen[n] for n in range(40_000)} == {0, 1}
    assert {seen[n] for n in range(40_000, 40_050)} == {40}
    assert {seen[n] for n in range(40_050, 40_059)} == {444, 445}


def test_the_stream_does_not_depend_on_workers_processes_batches_or_resuming(config):
    source = open_source(config)
    found = values(source, config, 12)
    assert values(source, replace(config, workers=2), 12) == found
    assert values(source, replace(config, threads=3), 12) == found
    assert values(source, config, 8, batch=6) == found
    assert values(source, config, 5, position=28) == found[28:]
    halves = [values(source, config, 12, process=(i, 2)) for i in range(2)]
    assert [halves[k // 2 % 2][k // 4 * 2 + k % 2] for k in range(48)] == found
    assert values(source, config, 12, seed=6) != found


def test_a_broken_record_is_replaced_by_one_of_the_same_source(tmp_path):
    folder(tmp_path / "a", range(1, 8))
    folder(tmp_path / "b", range(101, 105), broken=(102, 103))
    config = DataConfig(mixture=(f"{tmp_path}/a:1", f"{tmp_path}/b:1"))
    found = values(open_source(config), config, 20)
    assert Counter(v > 100 for v in found) == {False: 40, True: 40}
    assert {v for v in found if v > 100} == {101, 104}


def test_data_on_the_device_have_the_same_order(config):
    source = open_source(config)
    config = replace(config, on_device="yes")
    made = make_resident(
        source, config, batch_size=4, tokenizer=TOKENIZER, size=8, seed=5, steps_per_item=6
    )
    assert made is not None
    picks = next(made)
    found = made.data.image[np.asarray(picks.image).ravel(), 0, 0, 0].tolist()
    assert found == values(source, replace(config, on_device="no"), 6)


# -- sources --------------------------------------------------------------------------------------


def test_sources_of_different_kinds_and_their_templates(tmp_path, config):
    mixture = (*config.mixture, f"{MINI}:0.5")
    source = open_source(replace(config, mixture=mixture))
    assert [part.weight for part in source.parts] == [6, 2, 1]
    options = replace(config, mixture=mixture, caption_templates=("{caption}, {style}",))
    with pytest.raises(UsageError, match="asks for 'style'"):
        make_prepare(source, options, 4, TOKENIZER, 8, 0, (0, 1))


def test_the_fingerprint_has_the_sources_and_their_proportions(tmp_path, config):
    first, second = config.mixture
    base = open_source(config)
    assert base.fingerprint.startswith("a mixture of 3 x a folder, 1 x a folder, 10 images, ")
    same = replace(config, mixture=(f"{tmp_path}/a:1.5,{tmp_path}/b:0.5",))
    assert open_source(same).fingerprint == base.fingerprint
    others = [(second, first), (f"{tmp_path}/a:2", second), (first,)]
    (tmp_path / "b" / "103.txt").unlink()
    prints = {
        open_source(replace(config, mixture=m)).fingerprint for m in [(first, second), *others]
    }
    assert len(prints | {base.fingerprint}) == 5


def test_faults_and_filters_are_those_of_each_source(tmp_path, config, capsys):
    (tmp_path / "b" / "103.txt").unlink()
    (tmp_path / "a" / "001.png").write_bytes(png(1, 5))
    source = open_source(replace(config, min_side=6))
    assert [fault.name for fault in source.faults.left_out] == [
        f"{tmp_path}/a: 001.png",
        f"{tmp_path}/b: 103.png",
    ]
    assert source.left_out == 2 and source.parts == (Part(6, 3), Part(2, 1))
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_mixture_is_not_grouped(config):
    grouped = replace(config, group_by="caption")
    with pytest.raises(UsageError, match="a mixture is not grouped"):
        make_prepare(open_source(config), grouped, 4, TOKENIZER, 8, 0, (0, 1))


# -- names and weights ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts, expected",
    [
        (["a:3", "b:1"], {"a": 3, "b": 1}),
        (["emoji64.npz:3,images:1"], {"emoji64.npz": 3, "images": 1}),
        (["gs://bucket/a:2", "C:\\data:0.5"], {"gs://bucket/a": 2, "C:\\data": Fraction(1, 2)}),
        (["coco:1.1.0:1, b/{0,1}.tar:1e1"], {"coco:1.1.0": 1, "b/{0,1}.tar": 10}),
        (["hf://datasets/u/n@v1:0.1", "y=2020:0.2"],
         {"hf://datasets/u/n@v1": Fraction(1, 10), "y=2020": Fraction(1, 5)}),
    ],
)  # fmt: skip
def test_names_and_weights(texts, expected):
    assert parse_mixture(texts) == expected


@pytest.mark.parametrize(
    "texts, message",
    [
        (("images",), "'images' has no weight: write SOURCE:WEIGHT, such as images:1"),
        (("gs://bucket/a",), "'gs://bucket/a' has no weight"),
        (("C:\\data",), "has no weight"),
        (("a:1,b",), "'b' has no weight"),
        (("a:x",), "'a:x' has no weight"),
        (("a:1", "b:0"), "weight of b must be positive and finite, not 0"),
        (("a:-1",), "weight of a must be positive and finite, not -1"),
        (("a:nan",), "weight of a must be positive and finite, not nan"),
        (("a:1e999",), "weight of a must be positive and finite, not 1e999"),
        (("a:1", "a:2"), "names a twice: add its weights"),
        ((":1",), "names no source"),
        (("",), "names an empty source"),
        (("a:1", "b:0.0000001"), "round them, so that these numbers have a sum of at most 1,048,5"),
    ],
)
def test_nonsense_is_refused(texts, message):
    with pytest.raises(UsageError, match=message) as error:
        DataConfig(mixture=texts)
    assert "\n" not in str(error.value)


def test_a_source_that_does_not_exist_or_has_nothing_is_named(tmp_path, config):
    with pytest.raises(UsageError, match="there is no data set nowhere"):
        open_source(replace(config, mixture=(*config.mixture, "nowhere:1")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=f"{tmp_path}/empty has 0 images"):
        open_source(replace(config, mixture=(*config.mixture, f"{tmp_path}/empty:1")))
