"""Checkpoints: restoring, keeping, and damaged files."""

import json
import os
import re
import resource
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glide_jax.errors import GlideError
from glide_jax.training.checkpoint import Checkpoints, newest, steps_in
from glide_jax.training.checksums import checksums, name_of
from glide_jax.training.config import OptimiserConfig
from glide_jax.training.optimiser import make_optimiser
from glide_jax.training.runs import is_average
from glide_jax.training.state import new_state

CONFIG = OptimiserConfig(first_moment_dtype="bfloat16", ema_widths=(0.1,))


def make_state(step: int, seed: int = 0, width: int = 300):
    """Return a small state of different arrays; the largest fills more than one page."""
    rng = np.random.default_rng((seed, step))
    params = {"a": {"kernel": np.zeros((7, width))}, "b": np.zeros(5)}
    params = jax.tree.map(lambda x: jnp.float32(rng.standard_normal(x.shape)), params)
    state = new_state(params, make_optimiser(CONFIG, 10), CONFIG)
    state = jax.tree.map(
        lambda x: (
            np.asarray(rng.standard_normal(x.shape), x.dtype)
            if jnp.issubdtype(x.dtype, jnp.floating)
            else np.full(x.shape, step, x.dtype)
        ),
        state,
    )
    return jax.device_get(state)


def zeros(state):
    return jax.tree.map(np.zeros_like, state)


def assert_same(a, b):
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y), path


def save(folder: Path, *steps: int, keep: int = 3, keep_every: int = 0, source: str = "data"):
    with Checkpoints(folder, keep, keep_every) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"position": 8 * step}, source)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of a run with checkpoints of steps 1 and 2; tests must not change it."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    save(folder, 1, 2)
    return folder


@pytest.fixture
def copied(two, tmp_path):
    """A copy of `two`."""
    return Path(shutil.copytree(two, tmp_path / "run" / "checkpoints"))


def restored(folder: Path, **like):
    """Return the checkpoint that a run would resume from."""
    with Checkpoints(folder, 3) as checkpoints:
        return checkpoints.restore(zeros(make_state(0, **like)), "data")


# --- checksums


def test_every_flipped_bit_changes_a_checksum():
    values = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    before = checksums(values)[""]
    bits = values.view(np.uint32)
    for index in np.ndindex(3, 5):
        for bit in range(32):
            bits[index] ^= np.uint32(1 << bit)
            assert checksums(values)[""] != before
            bits[index] ^= np.uint32(1 << bit)
    assert checksums(values)[""] == before


@pytest.mark.parametrize("dtype", [np.float32, np.int32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(4, 6, 5), (7,), (), (1, 3, 1), (2, 0, 3)])
def test_a_checksum_is_that_of_the_definition_on_host_and_device(shape, dtype):
    rng = np.random.default_rng(0)
    size = np.dtype(dtype).itemsize
    x = np.asarray(rng.integers(0, 256**size, shape, dtype=f"u{size}"))
    index = np.arange(x.size, dtype=object).reshape(x.shape)
    whole = int(np.sum(x.astype(object) * (2 * index + 1))) % 2**32
    values = x.view(dtype)
    assert checksums(values) == checksums(jnp.asarray(values)) == {"": whole}
    # A replicated state has one more axis on each device.
    assert checksums(jnp.asarray(values)[None]) == {"": whole}


def test_a_permutation_changes_the_checksum():
    a = np.arange(6, dtype=np.float32)
    assert checksums(a) != checksums(a[::-1].copy())
    assert checksums(a) == checksums(jnp.asarray(a))


# --- restoring and keeping


def test_a_state_is_restored_bit_for_bit_with_its_position_in_the_data(two):
    step, state, loop_state = restored(two)
    assert step == 2 and loop_state == {"position": 16}
    assert_same(state, make_state(2))


def test_the_newest_are_kept_and_those_at_multiples_of_keep_every(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=1, keep_every=2)
    assert steps_in(tmp_path) == [4, 2]


def test_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path, 3) as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(1, make_state(1), {}, "data")
        checkpoints.save(1, make_state(1, seed=1), {}, "data")
        assert checkpoints.latest == 1
    assert_same(restored(tmp_path).state, make_state(1))


def test_the_unfinished_checkpoint_of_a_killed_run_is_removed(copied):
    unfinished = copied / "3.orbax-checkpoint-tmp"
    shutil.copytree(copied / "2", unfinished)
    with Checkpoints(copied, 3) as checkpoints:
        # Before anything is saved, or a save of the same step could lose its folder.
        assert not unfinished.exists()
        assert checkpoints.latest == 2
    save(copied, 3)
    assert not unfinished.exists() and steps_in(copied) == [3, 2, 1]


def test_other_data_give_a_warning(two, capsys):
    with Checkpoints(two, 3) as checkpoints:
        checkpoints.restore(zeros(make_state(0)), "data")
        assert capsys.readouterr().err == ""
        checkpoints.restore(zeros(make_state(0)), "data, 3 images more")
    warning = "warning: the run resumes with other data: data, 3 images more; they were data\n"
    assert capsys.readouterr().err == warning


def read_bytes() -> int:
    """Return the bytes that this process has read from files so far."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes by Linux's /proc")
@pytest.mark.parametrize("extra", [None, "/nu/b"])
def test_the_average_is_read_without_the_rest(tmp_path, extra):
    big = make_state(1, width=50_000)
    with Checkpoints(tmp_path, 3) as checkpoints:
        checkpoints.save(1, big, {}, "data")
    before, like = read_bytes(), zeros(big)
    newest(tmp_path, like)
    whole, before = read_bytes() - before, read_bytes()

    def wanted(path: str) -> bool:
        return is_average(path) or (extra is not None and path.endswith(extra))

    state, _, broken = newest(tmp_path, like, wanted)
    part = read_bytes() - before
    assert not broken and int(state.step) == 1
    assert_same(state.ema, big.ema)
    # Five arrays of this size, of which one is wanted (the first moment has half the size).
    assert part < 0.4 * whole
    skipped = [leaf for leaf in jax.tree.leaves(state) if leaf is ...]
    expected = [p for p, _ in jax.tree.leaves_with_path(big) if not wanted(name_of(p))]
    assert len(skipped) == len(expected) > 5
    if extra:
        found, saved = (jax.tree.leaves_with_path(s.opt_state) for s in (state, big))
        ((moment, same),) = [
            (x, y)
            for (path, x), (_, y) in zip(found, saved, strict=True)
            if name_of(path).endswith(extra)
        ]
        np.testing.assert_array_equal(moment, same)


def test_an_average_that_was_altered_is_found_where_it_alone_is_read(copied, capfd):
    shutil.rmtree(copied / "2" / "state")
    shutil.copytree(copied / "1" / "state", copied / "2" / "state")
    state, _, broken = newest(copied, zeros(make_state(1)), is_average)
    assert broken == [2] and "(values of ema/a/kernel, ema/b, step differ" in capfd.readouterr().err
    assert_same(state.ema, make_state(1).ema)


# --- damage


def flipped(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def shortened(path: Path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flipped, shortened, Path.unlink])
def test_a_damaged_file_is_found_or_has_no_effect(two, tmp_path, damage, capfd):
    """For each file: the checkpoint before it is used, unless the restored state is unaltered."""
    names = [p.relative_to(two) for p in (two / "2").rglob("*") if p.is_file()]
    good, used_before = {1: make_state(1), 2: make_state(2)}, 0
    for i, name in enumerate(names):
        folder = Path(shutil.copytree(two, tmp_path / str(i)))
        damage(folder / name)
        state, _, broken = newest(folder, zeros(good[1]))
        printed = capfd.readouterr().err
        if broken:
            assert broken == [2]
            assert printed.startswith("warning: the checkpoint of step 2 is broken")
            assert len(printed.splitlines()) == 1
            used_before += 1
        else:
            assert printed == ""
        assert_same(state, good[1 if broken else 2])
    # At least the manifest, the list of arrays, the tree of the database and its leaves.
    assert used_before >= 4


def test_altered_values_in_whole_files_are_named(copied, capfd):
    """The files are those of another checkpoint."""
    shutil.rmtree(copied / "2" / "state")
    shutil.copytree(copied / "1" / "state", copied / "2" / "state")
    assert restored(copied).step == 1
    assert "(values of ema/a/kernel, ema/b, " in capfd.readouterr().err


def test_an_altered_position_in_the_data_is_found(copied, capfd):
    path = copied / "2" / "manifest" / "metadata"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"data": {"position": 0}}))
    assert restored(copied).loop_state == {"position": 8}
    assert "its manifest was altered" in capfd.readouterr().err


def test_broken_checkpoints_are_set_aside_and_their_steps_saved_again(copied, capfd):
    shortened(copied / "2" / "manifest" / "metadata")
    (copied / "5").mkdir()
    (copied / "notes.txt").write_text("not a checkpoint")
    with Checkpoints(copied, 3) as checkpoints:
        assert checkpoints.restore(zeros(make_state(0)), "data").step == 1
        assert checkpoints.latest == 1
        checkpoints.save(2, make_state(2), {"position": 16}, "data")
    printed = capfd.readouterr().err
    assert "step 5 is broken (its manifest: No such file or directory)" in printed
    assert "step 2 is broken" in printed and len(printed.splitlines()) == 2
    assert sorted(p.name for p in (copied.parent / "broken").iterdir()) == ["2-1", "5-0"]
    assert restored(copied).step == 2


def test_reading_sets_nothing_aside(copied, capfd):
    shortened(copied / "2" / "manifest" / "metadata")
    _, manifest, broken = newest(copied, zeros(make_state(0)))
    assert broken == [2] and manifest["data"] == {"position": 8}
    assert steps_in(copied) == [2, 1]


def test_without_a_whole_checkpoint_a_run_ends_and_nothing_is_moved(copied, capfd):
    for step in (1, 2):
        (copied / str(step) / "manifest" / "metadata").unlink()
    with pytest.raises(GlideError, match=r"no checkpoint in .* is whole \(step 2: .*; step 1: "):
        restored(copied)
    assert steps_in(copied) == [2, 1] and not (copied.parent / "broken").exists()


def test_a_checkpoint_of_another_recipe_does_not_count_as_broken(copied):
    with pytest.raises(GlideError, match=r"another recipe \(\d+ arrays differ: ema/a/kernel, "):
        restored(copied, width=301)
    assert steps_in(copied) == [2, 1] and not (copied.parent / "broken").exists()


# --- write errors


def test_a_folder_that_cannot_be_created_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GlideError, match="cannot write a checkpoint to .*file"):
        Checkpoints(tmp_path / "file" / "checkpoints", 3)


def test_a_save_that_fails_in_the_background_is_one_error_and_older_ones_are_kept(copied, capfd):
    """A limit of four kilobytes per file acts like a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(copied, 1) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with pytest.raises(GlideError, match="cannot write a checkpoint to .*are kept"):
                checkpoints.save(3, make_state(3), {}, "data")
                deadline = time.monotonic() + 60
                while checkpoints.latest and time.monotonic() < deadline:
                    time.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capfd.readouterr().err == ""
    assert steps_in(copied) == [2, 1] and restored(copied).step == 2
    save(copied, 3, keep=1)
    assert steps_in(copied) == [3]


def test_an_error_that_ends_a_run_is_not_hidden_by_one_of_saving(copied, capfd):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(GlideError, match="loss nan"), Checkpoints(copied, 3) as checkpoints:
            checkpoints.save(3, make_state(3), {}, "data")
            raise GlideError("loss nan")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capfd.readouterr().err.startswith("warning: cannot write a checkpoint")
