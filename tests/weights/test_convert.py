"""Writing `.pt` files like those of PyTorch, and the command `glide-jax weights convert`."""

import io
import os
import tracemalloc
import zipfile
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from glide_jax.commands.convert import convert, main
from glide_jax.errors import GlideError, UsageError
from glide_jax.models.presets import PRESETS
from glide_jax.pipeline.clip_guide import load_clip
from glide_jax.weights import (
    clip_registry,
    load_model,
    read_torch_file,
    save_weights,
    to_released,
    write_torch_file,
)
from glide_jax.weights.torch_pickle import unpickle
from tests.models.test_clip import config as clip_config
from tests.support import golden

OF_TORCH = golden.FOLDER / "weights_superres.pt"
RNG = np.random.default_rng(2112)
KINDS = {
    "float32": RNG.standard_normal((3, 4, 5)).astype(np.float32),
    "transposed": RNG.standard_normal((3, 4)).astype(np.float32).T,
    "scalar": np.array(2.5, np.float64),
    "empty": np.zeros((0, 3), np.float32),
    "bfloat16": RNG.standard_normal(7).astype(ml_dtypes.bfloat16),
    "half": np.array([1.5, -0.0, np.inf], np.float16),
    "one.wide": np.ones((1, 3, 1, 1), np.float32),
    "flags": np.array([[True, False]]),
    "many": np.arange(70_000, dtype=np.int64),
    **{kind: np.arange(3).astype(kind) for kind in ("int8", "int16", "int32", "uint8")},
    "ä\n'": np.ones(1, np.float32),
}


def assert_same(found, expected) -> None:
    assert list(found) == list(expected)
    for name, array in found.items():
        wanted = np.asarray(expected[name])
        assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape), name
        assert array.tobytes() == wanted.tobytes(), name


def described(path: Path) -> dict:
    """Return name -> storage and view, as the pickle in a `.pt` file describes them."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
        return unpickle(path, io.BytesIO(archive.read(name)))


# ---------------------------------------------------------------- the writer


def test_round_trip_of_every_kind_of_array(tmp_path):
    big_endian = KINDS["many"].astype(">i8")
    write_torch_file(tmp_path / "a.pt", KINDS | {"big": big_endian, "jax": jnp.ones((2, 3))})
    expected = KINDS | {"big": KINDS["many"], "jax": np.ones((2, 3), np.float32)}
    assert_same(read_torch_file(tmp_path / "a.pt"), expected)


def test_one_array_at_a_time_is_in_memory(tmp_path):
    """A model of several GB is mapped, transposed, and written array by array."""
    transposed = {f"w{i}": np.zeros((1000, 250), np.float32).T for i in range(16)}  # 1 MB each.
    for write in (
        lambda: save_weights(tmp_path / "folder", {}, transposed),
        lambda: write_torch_file(tmp_path / "a.pt", transposed),
    ):
        tracemalloc.start()
        write()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 10**6 <= peak < 4 * 10**6


def test_a_file_describes_its_tensors_as_torch_does(tmp_path):
    """Storages, offsets, shapes and strides are equal, and so are the records that torch reads."""
    path = tmp_path / "a.pt"
    write_torch_file(path, read_torch_file(OF_TORCH))
    assert_same(read_torch_file(path), read_torch_file(OF_TORCH))
    assert described(path) == described(OF_TORCH)
    with zipfile.ZipFile(path) as ours, zipfile.ZipFile(OF_TORCH) as theirs:
        records = {name.partition("/")[2]: name for name in theirs.namelist()}
        for name in ("version", "byteorder", "data/0", "data/180"):
            assert ours.read(f"archive/{name}") == theirs.read(records[name])
        assert not any(info.compress_type for info in ours.infolist())
        assert ours.testzip() is None


def test_tensors_are_aligned_for_mapping_and_equal_weights_give_equal_files(tmp_path):
    for name in ("a.pt", "b.pt"):
        write_torch_file(tmp_path / name, KINDS)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    for name, array in read_torch_file(tmp_path / "a.pt").items():
        assert not array.size or array.ctypes.data % 64 == 0, name


@pytest.mark.parametrize("dtype", [np.uint16, np.complex64, object, "<U1"])
def test_a_dtype_that_has_no_storage_is_named(dtype, tmp_path):
    with pytest.raises(UsageError, match=r"^w is of dtype .*: convert it"):
        write_torch_file(tmp_path / "a.pt", {"w": np.zeros(2).astype(dtype)})
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_old_file_unchanged(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.pt"
    write_torch_file(path, KINDS)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, hard))
    try:
        with pytest.raises(GlideError, match=r"cannot save to .*File too large.*check its space"):
            write_torch_file(path, {"w": np.zeros(10**5)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.pt"]


# ---------------------------------------------------------------- the command


@pytest.fixture
def small(monkeypatch) -> dict[str, np.ndarray]:
    """Weights (float16) of a small upsampler, whose sizes are among the presets of this test."""
    monkeypatch.setitem(PRESETS, "small", lambda: golden.config("superres"))
    return dict(golden.load("weights_superres"))


def test_from_a_file_to_a_folder_and_back(small, tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ("a.pt", "folder", "b.pt")]
    write_torch_file(paths[0], small)
    convert((paths[0], paths[1]))
    convert((paths[1], paths[2]))
    assert capsys.readouterr().out.endswith(f"MB: {paths[2]}\n")
    model, back = load_model(paths[1]), read_torch_file(paths[2])
    assert model.defaults["temperature"] == 0.997 and model.noise_schedule == "linear"
    for found in (back, to_released(model.params)):
        assert found.keys() == small.keys()
        for name, array in small.items():
            assert array.dtype == np.float16
            assert found[name].dtype == np.float32
            assert np.array_equal(found[name], array.astype(np.float32)), name


def test_a_noised_clip_is_two_files(tmp_path, monkeypatch):
    """The two are recognised by their parameter names, in either order."""
    monkeypatch.setattr(clip_registry, "clip64", clip_config)
    image, text, folder = (str(tmp_path / name) for name in ("i.pt", "t.pt", "clip"))
    for side, path in (("image", image), ("text", text)):
        write_torch_file(path, golden.load(f"weights_clip_{side}"))
    convert((text, image, folder))
    assert load_clip(folder).config == clip_config()
    back = [str(tmp_path / name) for name in ("i2.pt", "t2.pt")]
    convert((folder, *back))
    for side, path in zip(("image", "text"), back, strict=True):
        found, wanted = read_torch_file(path), golden.load(f"weights_clip_{side}")
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[name], wanted[name]) for name in found)

    for paths, reason in (
        ((folder, str(tmp_path / "one.pt")), "written to two files, for image and text, not 1"),
        ((image, image, str(tmp_path / "b")), "give its image and its text encoder"),
        ((image, str(OF_TORCH), str(tmp_path / "b")), "give its image and its text encoder"),
    ):
        with pytest.raises(UsageError, match=reason):
            convert(paths)
    assert sorted(os.listdir(tmp_path)) == ["clip", "i.pt", "i2.pt", "t.pt", "t2.pt"]


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        ([], 2, "name what to read, then what to write: convert base.pt FOLDER"),
        (["a.pt"], 2, "name what to read"),
        (["a.pt", "b", "c"], 2, "name what to read"),
        (["a", "b.pt", "c"], 2, "name what to read"),
        (["a.pt", "b.pt", "c.pt", "d"], 2, "name what to read"),
        (["nothing.pt", "to"], 2, "there are no weights 'nothing.pt'"),
        (["cut.pt", "to"], 1, "cut.pt is incomplete or damaged"),
        (["page.pt", "to"], 1, 'page.pt is not a PyTorch file (starts with "<html>")'),
        (["good.pt", "taken"], 2, "taken/config.json exists: remove it, or write elsewhere"),
        (["good.pt", "good.pt"], 2, "good.pt exists: remove it"),
        (["good.pt", "page.pt"], 2, "page.pt exists: remove it"),
        (["good.pt", "page.pt/to"], 1, "cannot save to page.pt/to (Not a directory)"),
        (["other.pt", "to"], 1, "these 1 arrays fit none of the known sizes"),
        (["good.pt", "other.pt", "to"], 2, "two files are a noised CLIP"),
    ],
)
def test_an_error_of_the_command_is_one_line(
    arguments, code, reason, small, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_torch_file("good.pt", small)
    Path("cut.pt").write_bytes(Path("good.pt").read_bytes()[:-100])
    Path("page.pt").write_text("<html>\n")
    write_torch_file("other.pt", {"w": np.ones(3, np.float32)})
    Path("taken").mkdir()
    Path("taken/config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main(["convert", *arguments])
    error = capsys.readouterr().err
    assert caught.value.code == code and error.startswith("error: ") and error.count("\n") == 1
    assert reason in error
    assert sorted(tmp_path.rglob("*")) == before


def test_the_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    shown = capsys.readouterr().out
    assert "\n  convert base.pt base " in shown and "openai/clip" in shown
