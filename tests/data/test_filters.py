"""Filters: which records each rule leaves out, what is said, and the fingerprint."""

import csv
import io
import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from glide_jax.data import sources
from glide_jax.data.batches import make_batches
from glide_jax.data.data_config import DataConfig
from glide_jax.data.sources import open_source
from glide_jax.errors import UsageError
from glide_jax.models.tokenizers import GPT2Tokenizer
from tests.support.parquets import image_table, write_parquet
from tests.support.shards import write_tar

# Width and height of each image, and its score; the scores of e and f are absent or no number.
SIZES = {"a": (8, 8), "b": (16, 8), "c": (17, 8), "d": (7, 30), "e": (40, 40), "f": (40, 20)}
SCORES = {"a": 5.0, "b": 4.5, "c": 6, "d": 9.0, "e": None, "f": "high"}


def image(name):
    data = io.BytesIO()
    Image.new("RGB", SIZES[name]).save(data, "PNG")
    return data.getvalue()


def text_files(folder):
    for name in SIZES:
        (folder / f"{name}.png").write_bytes(image(name))
        (folder / f"{name}.txt").write_text(name)
        about = {} if SCORES[name] is None else {"aesthetic": {"score": SCORES[name]}}
        (folder / f"{name}.json").write_text(json.dumps(about))


def table(folder):
    text_files(folder)
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [
                ("file_name", "caption", "aesthetic/score"),
                *((f"{n}.png", n, SCORES[n]) for n in SIZES),
            ]
        )


def tar(folder):
    members = []
    for name in SIZES:
        about = {} if SCORES[name] is None else {"aesthetic": {"score": SCORES[name]}}
        members += [(f"{name}.png", image(name)), (f"{name}.txt", name.encode())]
        members.append((f"{name}.json", json.dumps(about).encode()))
    write_tar(folder / "0.tar", members)


def parquet(folder):
    scores = [None if n is None else str(n) for n in SCORES.values()]
    columns = {"text": list(SIZES), "aesthetic": pa.array([{"score": s} for s in scores])}
    write_parquet(folder / "train.parquet", image_table(map(image, SIZES), columns), rows=2)


@pytest.fixture(params=[text_files, table, tar, parquet])
def folder(request, tmp_path, monkeypatch):
    monkeypatch.setenv("GLIDE_JAX_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    request.param(data)
    return data


def captions(source):
    return "".join(source[i]["caption"] for i in range(len(source)))


@pytest.mark.parametrize(
    "options, left, reasons",
    [
        ({"min_side": 8}, "abcef", {"shortest side < 8": "d"}),
        ({"min_side": 9}, "ef", {"shortest side < 9": "abcd"}),
        ({"max_aspect": 2.0}, "abef", {"aspect > 2": "cd"}),
        ({"max_aspect": 1.0}, "ae", {"aspect > 1": "bcdf"}),
        ({"min_side": 8, "max_aspect": 2.0}, "abef", {"shortest side < 8": "d", "aspect > 2": "c"}),
        (
            {"min_score": 5.0},
            "acd",
            {
                "aesthetic/score < 5": "b",
                "no aesthetic/score": "e",
                "aesthetic/score is no number": "f",
            },
        ),
        (
            {"min_score": 5.0, "min_side": 8},
            "ac",
            {
                "aesthetic/score < 5": "b",
                "no aesthetic/score": "e",
                "aesthetic/score is no number": "f",
                "shortest side < 8": "d",
            },
        ),
    ],
)
def test_each_rule_leaves_out_its_records_and_they_are_counted(
    folder, options, left, reasons, capsys
):
    if "min_score" in options:
        options = options | {"score_field": "aesthetic/score"}
    source = open_source(DataConfig(source=str(folder), **options))
    assert captions(source) == left
    count = 6 - len(left)
    left_out = [f for f in source.faults.left_out if f.reason.startswith("filtered: ")]
    found = {why: sum(f.reason == f"filtered: {why}" for f in left_out) for why in reasons}
    assert found == {why: len(names) for why, names in reasons.items()} and len(left_out) == count
    lines = [line for line in capsys.readouterr().err.splitlines() if "filtered" in line]
    assert len(lines) == 1 and f"{folder}: left out {count} of 6: " in lines[0]
    whole = open_source(DataConfig(source=str(folder)))
    assert captions(whole) == "abcdef" and whole.fingerprint != source.fingerprint
    again = open_source(DataConfig(source=str(folder), **options))
    assert again.fingerprint == source.fingerprint


def test_the_line_names_records_by_reason(tmp_path, capsys):
    for name in SIZES:
        (tmp_path / f"{name}.png").write_bytes(image(name))
        (tmp_path / f"{name}.txt").write_text(name)
    open_source(DataConfig(source=str(tmp_path), min_side=9))
    line = "left out 4 of 6: a.png, b.png, c.png and 1 more (filtered: shortest side < 9: 4)\n"
    assert capsys.readouterr().err == f"{tmp_path}: {line}"


def test_filters_that_leave_nothing_out_change_nothing(folder, capsys):
    plain = open_source(DataConfig(source=str(folder)))
    said = capsys.readouterr().err
    source = open_source(DataConfig(source=str(folder), min_side=7, max_aspect=5))
    assert source.fingerprint == plain.fingerprint and capsys.readouterr().err == said


def test_filters_that_leave_nothing_are_an_error(folder):
    message = f"no image of {folder} is left: .*filtered: shortest side < 99: 6"
    with pytest.raises(UsageError, match=message):
        open_source(DataConfig(source=str(folder), min_side=99))


def test_a_column_of_scores_that_does_not_exist_is_named(tmp_path):
    parquet(tmp_path)
    config = DataConfig(source=str(tmp_path), min_score=1.0, score_field="aesthetic/scores")
    with pytest.raises(UsageError, match="no column 'aesthetic/scores', did you mean"):
        open_source(config)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"min_side": -1}, "min_side is a number of pixels"),
        ({"max_aspect": 0.5}, "max_aspect is at least 1"),
        ({"max_aspect": float("inf")}, "max_aspect must be finite"),
        ({"min_score": float("nan"), "score_field": "a"}, "min_score must be finite"),
        ({"min_score": 1.0}, "min_score and score_field belong together"),
        ({"score_field": "a"}, "min_score and score_field belong together"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        DataConfig(**options)


def test_broken_images_are_kept_for_the_loader_to_count(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(image(name) if name == "a" else b"no image")
        (tmp_path / f"{name}.txt").write_text(name)
    source = open_source(DataConfig(source=str(tmp_path), min_side=8))
    assert len(source) == 2 and [f.name for f in source.faults.broken] == ["b.png"]


def test_scenes_have_sizes_and_no_scores(monkeypatch):
    monkeypatch.setattr(sources, "SCENES_PER_PASS", 100)
    message = "no image of scenes64 is left"
    with pytest.raises(UsageError, match=message):
        open_source(DataConfig(source="scenes64", min_side=65, split="train"))
    with pytest.raises(UsageError, match="scenes have no scores"):
        open_source(DataConfig(source="scenes64", min_score=1.0, score_field="a"))


def test_batches_of_filtered_data_are_the_same_with_workers(tmp_path):
    parquet(tmp_path)
    source = open_source(DataConfig(source=str(tmp_path), max_aspect=2.0))

    def tokens(workers):
        made = make_batches(
            source,
            DataConfig(workers=workers),
            batch_size=4,
            tokenizer=GPT2Tokenizer(8),
            size=8,
            seed=0,
        )
        found = np.concatenate([next(made)["tokens"][:, 0] for _ in range(2)]).tolist()
        made.close()
        return found

    first = tokens(0)
    assert len(set(first[:4])) == 4 and sorted(first[:4]) == sorted(first[4:])
    assert tokens(1) == first
