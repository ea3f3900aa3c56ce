"""Folders of weights: equal after a round trip, and unchanged by any failure."""

import json
import os
import stat
import struct
from collections import UserDict
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from glide_jax.errors import GlideError, UsageError
from glide_jax.weights import store
from glide_jax.weights.store import flatten, load_weights, save_weights, unflatten

CONFIG = {
    "name": "emoji64",
    "channels": [64, 128],
    "dropout": 0.1,
    "note": 'ä\n"',
    "deep": {"a": None},
}
METADATA = {"source": "base.pt", "über": "x\ny"}
RNG = np.random.default_rng(2112)
PARAMS = {
    "a/b/kernel": RNG.standard_normal((3, 3, 2, 4)).astype(np.float32),
    "a/b/bias": RNG.standard_normal(5).astype(ml_dtypes.bfloat16),
    "a/c": np.array(2.5, np.float64),
    "half": np.array([1.5, -0.0, np.inf, np.nan], np.float16),
    "eight": np.array([1.0, -448.0], ml_dtypes.float8_e4m3fn),
    "flags": np.array([[True, False]]),
    "empty": np.zeros((0, 3), np.float32),
    **{
        f"int/{kind}": np.array([np.iinfo(kind).min, np.iinfo(kind).max], kind)
        for kind in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    },
}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in found.items():
        wanted = np.asarray(expected[name])
        assert array.dtype == wanted.dtype, name
        assert array.shape == wanted.shape, name
        assert array.tobytes() == wanted.tobytes(), name


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def saved(tmp_path):
    save_weights(tmp_path / "model", CONFIG, PARAMS, METADATA)
    return tmp_path / "model"


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert message.isprintable() and len(message) < 600
    return message


# ---------------------------------------------------------------- round trip


def test_round_trip(saved):
    config, params, metadata = load_weights(saved)
    assert config == CONFIG and metadata == METADATA
    assert_same(params, PARAMS)
    assert sorted(contents(saved)) == ["config.json", "model.safetensors"]


def test_metadata_may_be_absent(tmp_path):
    save_weights(tmp_path / "new" / "folder", {}, {"w": np.ones(2)})
    assert load_weights(str(tmp_path / "new" / "folder"))[2] == {}
    save_weights(tmp_path, {}, {})
    assert load_weights(tmp_path) == ({}, {}, {})


def test_the_safetensors_package_reads_and_writes_the_same(saved, tmp_path):
    plain = {name: array for name, array in PARAMS.items() if name != "eight"}  # It cannot read it.
    save_weights(tmp_path / "plain", {}, plain)
    assert_same(load_file(tmp_path / "plain" / "model.safetensors"), plain)
    save_file(PARAMS, saved / "model.safetensors", {"format": "np"})
    _, params, metadata = load_weights(saved)
    assert_same(params, PARAMS)
    assert metadata == {"format": "np"}


def test_arrays_in_any_layout(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    params = {
        "transposed": base.T,
        "strided": base[1::2, ::3],
        "fortran": np.asfortranarray(base),
        "reversed": base[::-1],
        "broadcast": np.broadcast_to(base[0], (3, 6)),
        "jax": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "jax.scalar": jnp.float32(3),
    }
    save_weights(tmp_path, {}, params | {"big": base.astype(">f4")})
    assert_same(load_weights(tmp_path)[1], params | {"big": base})


def test_arrays_are_read_only_views_of_the_mapped_file(saved):
    _, params, _ = load_weights(saved)
    for name, array in params.items():
        assert isinstance(array.base, np.memmap) or not array.size, name
        assert not array.flags.writeable and array.flags.aligned, name


def test_config_keeps_its_order_and_is_readable(saved):
    text = (saved / "config.json").read_text()
    assert text.startswith('{\n  "name": "emoji64",') and text.endswith("}\n")


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_both_files_get_the_usual_mode(tmp_path):
    before = os.umask(0o027)
    try:
        save_weights(tmp_path, {}, PARAMS)
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path.name


# ---------------------------------------------------------------- failures


def test_saving_over_files_that_are_mapped(saved):
    _, old, _ = load_weights(saved)
    doubled = {"w": np.asarray(old["a/b/kernel"]), "v": old["a/b/kernel"] * 2}
    save_weights(saved, {"version": 2}, doubled)
    assert_same(old, PARAMS)
    config, params, metadata = load_weights(saved)
    assert (config, metadata) == ({"version": 2}, {})
    assert_same(params, {"w": PARAMS["a/b/kernel"], "v": PARAMS["a/b/kernel"] * 2})


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    "function", [(store, "_write_arrays"), (os, "fsync"), (Path, "write_text"), (Path, "replace")]
)
def test_a_failure_leaves_the_old_files_unchanged(saved, monkeypatch, function, error):
    before = contents(saved)

    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(*function, fail)
    expected = GlideError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        save_weights(saved, {"version": 2}, {"w": np.ones(3)})
    if expected is GlideError:
        reason = "(No space left on device): check its space and permissions"
        assert one_line(caught) == f"cannot save to {saved} {reason}"
        assert caught.value.exit_code == 1
    assert contents(saved) == before  # There are no temporary files either.


def test_files_are_on_the_disk_before_they_get_their_names(saved, monkeypatch):
    """In another order, a power cut could leave an empty file under the final name."""
    events = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor):
        events.append("flush")
        fsync(descriptor)

    def note_replace(self, target):
        events.append(Path(target).name)
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    save_weights(saved, {}, PARAMS)
    assert events[:4] == ["flush", "flush", "model.safetensors", "config.json"]


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_full_disk(saved):
    """A limit on the size of files makes the writer fail, as a full disk does."""
    import resource

    before = contents(saved)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, hard))
    try:
        with pytest.raises(GlideError) as caught:
            save_weights(saved, {"version": 2}, {"w": np.zeros(10**5)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = one_line(caught)
    assert message.startswith(f"cannot save to {saved} (") and "File too large" in message
    assert contents(saved) == before


def test_folders_that_cannot_be_written(saved, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GlideError, match="cannot save to") as caught:
        save_weights(tmp_path / "file" / "model", {}, PARAMS)
    one_line(caught)
    (saved / "config.json").unlink()
    (saved / "config.json").mkdir()
    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(GlideError, match="config.json is a folder: remove it"):
        save_weights(saved, {}, {"w": np.ones(2)})
    assert (saved / "model.safetensors").read_bytes() == before
    assert len(list(saved.iterdir())) == 2


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_folder_without_permission(saved):
    before = contents(saved)
    saved.chmod(0o500)
    try:
        with pytest.raises(GlideError, match="Permission denied"):
            save_weights(saved, {}, PARAMS)
        assert contents(saved) == before
    finally:
        saved.chmod(0o700)


@pytest.mark.parametrize(
    ("config", "params", "metadata", "reason"),
    [
        ({"a": {1, 2}}, PARAMS, None, "this config cannot be written as JSON"),
        ({"a": float("nan")}, PARAMS, None, "this config cannot be written as JSON"),
        ({}, {"w": np.array([None])}, None, "w is of dtype object: convert it"),
        ({}, {"w": np.array(["a"])}, None, "w is of dtype <U1: convert it"),
        ({}, {"w": np.zeros(2, np.complex64)}, None, "w is of dtype complex64"),
        ({}, {"a//b": np.zeros(2)}, None, "'a//b' cannot name a parameter"),
        ({}, {3: np.zeros(2)}, None, "3 cannot name a parameter"),
        ({}, {"a/b": np.zeros(2), "a": np.zeros(2)}, None, "'a' cannot be a parameter beside"),
        ({}, {"__metadata__": np.zeros(2)}, None, "'__metadata__' cannot name a parameter"),
        ({}, PARAMS, {"step": 3}, "metadata must be text"),
    ],
)
def test_values_that_cannot_be_stored(saved, config, params, metadata, reason):
    before = contents(saved)
    with pytest.raises(UsageError) as caught:
        save_weights(saved, config, params, metadata)
    assert reason in one_line(caught)
    assert contents(saved) == before


# ---------------------------------------------------------------- broken folders


def failure(folder: Path) -> str:
    with pytest.raises(GlideError) as caught:
        load_weights(folder)
    assert str(folder) in str(caught.value) and caught.value.exit_code == 1
    return one_line(caught)


def test_missing_folders_and_files(saved):
    assert "does not exist: give a folder with config.json" in failure(saved / "none")
    assert "is not a folder" in failure(saved / "config.json")
    (saved / "config.json").rename(saved / "aside")
    assert "config.json is missing: copy it there" in failure(saved)
    (saved / "aside").rename(saved / "config.json")
    (saved / "model.safetensors").unlink()
    assert "model.safetensors is missing: copy it there" in failure(saved)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "is not valid JSON (line 1: Expecting value)"),
        (b'{"a": 1,\n "b": }', "is not valid JSON (line 2: Expecting value)"),
        (b'{"a": 1', "is not valid JSON (line 1: Expecting"),
        (b"[1, 2]", "must hold a JSON object"),
        (b"\xff\xfe\x00", "is not a JSON file"),
        (b"[" * 10**6, "is not a JSON file"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_bad_configs(saved, text, reason):
    (saved / "config.json").write_bytes(text)
    message = failure(saved)
    assert message.startswith(str(saved / "config.json")) and reason in message
    assert message.endswith("copy it again")


def test_every_truncation_is_noticed(saved):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 11), len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert failure(saved) == (
            f"{path} is incomplete or damaged: download it or save the model again"
        )


def header(entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(**changes) -> bytes:
    return header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes})


@pytest.mark.parametrize(
    "start",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**9) + b"{}",
        header([1]),
        header({"w": 3}),
        header({"__metadata__": {"a": 3}}),
        header({"__metadata__": "a"}),
        header({"w": {"dtype": "F32", "shape": [2]}}),
        entry(extra=1),
        entry(dtype="C64"),
        entry(dtype="\n" * 99),
        entry(dtype=["F32"]),
        entry(dtype="F64"),
        entry(shape=[3]),
        entry(shape=[-2]),
        entry(shape=[-1, -2]),
        entry(shape=[2.0]),
        entry(shape=[True, 2]),
        entry(shape=2),
        entry(shape=[0, 2**62], data_offsets=[0, 0]),
        entry(shape=[2**62], data_offsets=[0, 2**64]),
        entry(shape=[1] * 65),
        entry(data_offsets=[20, 28]),
        entry(data_offsets=[-8, 0]),
        entry(data_offsets=[-16, -8]),
        entry(data_offsets=[0, 24]),
        entry(data_offsets=[8, 0]),
        entry(data_offsets=[0, 4]),
        entry(data_offsets=[0.0, 8.0]),
        entry(data_offsets=[0]),
        struct.pack("<Q", 10**6) + b"[" * 10**6,
        b"<html>404</html>" * 9,
    ],
    ids=lambda start: str(start[8:60]),
)
def test_wrong_headers(saved, start):
    (saved / "model.safetensors").write_bytes(start + bytes(24))
    message = failure(saved)
    assert message.startswith(str(saved / "model.safetensors"))
    assert "is incomplete or damaged" in message or ": convert it to float32" in message


def test_the_header_of_the_test_above_is_right_without_changes(saved):
    (saved / "model.safetensors").write_bytes(entry() + bytes(24))
    assert_same(load_weights(saved)[1], {"w": np.zeros(2, np.float32)})


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_that_cannot_be_read(saved, monkeypatch, name):
    really_open = Path.open

    def deny(self, *args, **kwargs):
        if self.name == name:
            raise PermissionError(13, "Permission denied")
        return really_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", deny)
    monkeypatch.setattr(Path, "read_text", lambda self, **_: self.open().read())
    assert failure(saved) == f"cannot read {saved / name}: Permission denied"


# ---------------------------------------------------------------- trees


def test_flatten_and_unflatten():
    tree = {"a": {"b": {"kernel": 1, "bias": [2]}, "c": None}, "d": 4}
    flat = {"a/b/kernel": 1, "a/b/bias": [2], "a/c": None, "d": 4}
    assert flatten(tree) == flat and list(flatten(tree)) == list(flat)
    assert unflatten(flat) == tree
    assert flatten({}) == unflatten({}) == {}
    assert flatten(UserDict(a=UserDict(b=1), e={})) == {"a/b": 1}


@pytest.mark.parametrize("key", ["", "a/b", 3, None, "/"])
def test_keys_that_cannot_be_joined(key):
    with pytest.raises(UsageError, match="cannot be a key of a parameter tree"):
        flatten({"x": {key: 1}})


@pytest.mark.parametrize("flat", [{"a": 1, "a/b": 2}, {"a/b/c": 1, "a/b": {"d": 3}}])
def test_a_name_is_a_leaf_or_a_branch(flat):
    for items in (flat, dict(reversed(flat.items()))):
        with pytest.raises(UsageError, match="rename one"):
            unflatten(items)
