"""Damage at random places of checkpoints and weights: `tests.tools.corrupt_checkpoints`, short."""

import random

import jax
import pytest

from glide_jax.training.checkpoint import Checkpoints, newest
from tests.support.damage import Tally, damaged
from tests.tools.corrupt_checkpoints import corrupt, corrupt_all, reads, same, sentence
from tests.training.test_checkpoint import make_state, save, zeros


def test_damage_is_undone_and_each_kind_occurs(tmp_path):
    files, rng, seen = [tmp_path / "a", tmp_path / "b"], random.Random(0), set()
    for path in files:
        path.write_bytes(b"0123456789")
    for _ in range(200):
        with damaged(files, rng) as what:
            seen.add(what.split(": ")[1].split(" ")[0])
            assert [p.read_bytes() if p.exists() else b"" for p in files] != [b"0123456789"] * 2
        assert [path.read_bytes() for path in files] == [b"0123456789"] * 2
    assert {"deleted", "cut", "byte"} <= seen


def test_the_tally_tells_bad_outcomes(tmp_path):
    tally = Tally()

    def fails():
        raise KeyError("x")

    assert tally.add("a", lambda: "accepted") == "accepted"
    assert tally.add("b", fails) == "traceback"
    assert tally.add("c", lambda: "unchanged") == "unchanged"
    assert tally.bad == ["accepted: a: ", "traceback: b: KeyError: 'x'"]
    assert "3 damages" in sentence({"npz": tally})
    assert "1 accepted with other values, 1 tracebacks" in sentence({"npz": tally})


def test_a_damaged_checkpoint_is_never_taken_for_whole(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    save(folder, 1, 2)
    files = sorted(p for p in (folder / "2").rglob("*") if p.is_file())
    like, truth = zeros(make_state(0)), {1: make_state(1), 2: make_state(2)}

    def read() -> str:
        state, _, broken = newest(folder, like)
        step = int(state.step)
        if not same(jax.tree.leaves(state), jax.tree.leaves(truth[step])):
            return "accepted"
        return "unchanged" if step == 2 else "earlier" if broken == [2] else "accepted"

    tally = corrupt(files, read, places=60, seed=0)
    assert not tally.bad and tally.counts["earlier"] > 20
    with Checkpoints(folder, 3) as checkpoints:
        assert checkpoints.latest == 2


@pytest.mark.parametrize(
    "kind", ["embedded weights", "weights folder", "safetensors", "PyTorch file", "npz"]
)
def test_damaged_weights_are_refused_or_unchanged(tmp_path, kind):
    files, read = reads(tmp_path)[kind]
    tally = corrupt(files, read, places=100, seed=1)
    assert not tally.bad and tally.counts["refused"] > 80


@pytest.mark.slow
def test_a_run_and_all_weights_with_damage(tmp_path):
    found = corrupt_all(tmp_path, places=150, weight_places=1000, seed=2)
    assert not [case for tally in found.values() for case in tally.bad]
