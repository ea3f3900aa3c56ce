"""Malformed data: `tests.tools.fuzz_data`, shortened, and the kinds of faults that it found."""

import numpy as np
import pytest

from glide_jax.data.emoji.npz import load_npz
from glide_jax.data.storage import BrokenRecord
from glide_jax.errors import GlideError
from tests.support.mutations import base_items
from tests.tools.corrupt_checkpoints import make_npz
from tests.tools.fuzz_data import fuzz, matches, sentence


def test_malformed_data_are_records_or_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("GLIDE_JAX_CACHE", str(tmp_path))  # it is restored at the end
    found = fuzz(tmp_path, 400, seed=1)
    assert not [case for tally in found.values() for case in tally.bad]
    assert sum(tally.counts.total() for tally in found.values()) == 400
    assert all(tally.counts["refused"] for tally in found.values())
    assert "0 tracebacks, 0 hangs" in sentence(found)


@pytest.mark.slow
def test_many_malformed_data_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("GLIDE_JAX_CACHE", str(tmp_path))
    found = fuzz(tmp_path, 10_000, seed=2)
    assert not [case for tally in found.values() for case in tally.bad]


def test_an_altered_record_is_noticed():
    truth = {item.caption: np.zeros((2, 2, 3), np.uint8) for item in base_items()}
    assert matches({"caption": "a red apple", "image": np.zeros((2, 2, 3), np.uint8)}, truth)
    assert not matches({"caption": "a red apple", "image": np.ones((2, 2, 3), np.uint8)}, truth)


def test_the_message_of_a_broken_record_is_one_line():
    assert str(BrokenRecord("a\n.png has no\r\nimage")) == "a .png has no image"


@pytest.mark.parametrize(
    ("place", "value"),
    [(112, 29), (10045, 72), (None, None)],
    ids=["header of an array", "method of compression", "every byte of a header"],
)
def test_damaged_bytes_of_an_npz_file_are_one_line(tmp_path, place, value):
    path = make_npz(tmp_path / "a.npz")
    whole = path.read_bytes()
    places = range(len(whole) - 600, len(whole)) if place is None else [place]
    for at in places:
        changed = value if value is not None else whole[at] ^ 64
        path.write_bytes(whole[:at] + bytes([changed]) + whole[at + 1 :])
        try:
            load_npz(path)
        except GlideError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("style", np.array("Plain"), r"style has shape \(\), not \(N,\)"),
        ("image", np.zeros((12, 0, 0, 3), np.uint8), r"image is uint8 \(12, 0, 0, 3\), not uint8"),
    ],
)
def test_arrays_of_wrong_shapes_are_named(tmp_path, name, array, reason):
    path = make_npz(tmp_path / "a.npz")
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {name: array})
    with pytest.raises(GlideError, match=reason):
        load_npz(path)
