"""Files that fine-tuners write: prefixes, wrappers, several models, objects beside the weights."""

import argparse
import collections
import pathlib
import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file

from glide_jax.commands.convert import convert
from glide_jax.errors import UsageError
from glide_jax.models.presets import PRESETS
from glide_jax.training.runs import open_clip
from glide_jax.weights import (
    clip_registry,
    load_model,
    read_torch_file,
    save_weights,
    to_released,
    write_torch_file,
)
from glide_jax.weights.registry import save_model
from tests.models.test_clip import config as clip_config
from tests.support import golden
from tests.support.torch_by_hand import body, refusal, state, tensor, write_zip


@pytest.fixture
def small(monkeypatch) -> dict[str, np.ndarray]:
    """Weights of a small upsampler, whose sizes are among the presets of this test."""
    monkeypatch.setitem(PRESETS, "small", lambda: golden.config("superres"))
    return {name: np.asarray(array) for name, array in golden.load("weights_superres").items()}


def assert_is(model, arrays) -> None:
    found = to_released(model.params)
    assert found.keys() == arrays.keys()
    assert all(
        np.array_equal(found[name], array.astype(np.float32)) for name, array in arrays.items()
    )


def prefixed(prefix, arrays):
    return {f"{prefix}{name}": array for name, array in arrays.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        "module.", "_orig_mod.", "model.", "ema.", "state_dict.", "model_state_dict.", "net.unet.",
        "state_dict.module._orig_mod.model.",
    ],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["pt", "ckpt", "safetensors"])
def test_a_prefix_is_left_out_and_said_in_one_note(prefix, ending, small, tmp_path, capsys):
    path = tmp_path / f"a.{ending}"
    beside = {"step": np.ones(1, np.float32), "optimizer.state.0.exp_avg": np.ones(2, np.float32)}
    arrays = prefixed(prefix, small) | beside
    if ending == "safetensors":
        save_file(arrays, path)
    else:
        write_torch_file(path, arrays)
    assert_is(load_model(path), small)
    assert capsys.readouterr().err == (
        f"note: {path}: the model under {prefix[:-1]!r} is read; 2 other arrays are left out\n"
    )


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_released_names_alone_need_no_note(dtype, ending, small, tmp_path, capsys):
    path, arrays = tmp_path / f"a.{ending}", {n: a.astype(dtype) for n, a in small.items()}
    save_file(arrays, path) if ending == "safetensors" else write_torch_file(path, arrays)
    assert_is(load_model(path), arrays)
    assert capsys.readouterr().err == ""


def test_a_file_of_several_models_asks_which(small, tmp_path, capsys):
    path = tmp_path / "both.ckpt"
    other = {name: array + np.asarray(1, array.dtype) for name, array in small.items()}
    write_torch_file(path, prefixed("model.", small) | prefixed("ema.module.", other))
    with pytest.raises(UsageError) as error:
        load_model(path)
    assert str(error.value) == (
        f"{path} holds several models: its models are ema.module, model; choose one, for example "
        f"{path}:ema.module"
    )
    assert_is(load_model(f"{path}:model"), small)
    for name in ("ema", "ema.module"):
        assert_is(load_model(f"{path}:{name}"), other)
    convert((f"{path}:ema", str(tmp_path / "folder")))
    assert_is(load_model(tmp_path / "folder"), other)
    with pytest.raises(UsageError, match="holds no single model 'emma': its models are ema.module"):
        load_model(f"{path}:emma")


def test_a_model_without_prefix_beside_one_with_it(small, tmp_path):
    path = tmp_path / "both.safetensors"
    other = {name: array + np.asarray(1, array.dtype) for name, array in small.items()}
    save_file(small | prefixed("ema.", other), path)
    with pytest.raises(UsageError, match=r"its models are top, ema; .*both\.safetensors:ema$"):
        load_model(path)
    assert_is(load_model(f"{path}:top"), small)
    assert_is(load_model(f"{path}:ema"), other)


def test_the_arrays_of_a_folder_of_weights_are_the_folder(small, tmp_path):
    write_torch_file(tmp_path / "a.pt", small)
    save_model(load_model(tmp_path / "a.pt"), tmp_path / "folder")
    assert_is(load_model(tmp_path / "folder" / "model.safetensors"), small)


def test_settings_beside_the_weights_are_not_loaded(tmp_path, small):
    """A trainer's checkpoint: an argparse namespace, paths, a random state, counters."""
    beside = {
        "hyper_parameters": argparse.Namespace(lr=1e-4, path=pathlib.PurePosixPath("/x")),
        "counts": collections.Counter("aab"),
        "lists": collections.deque([1, 2]),
        "random": np.random.default_rng(0).bit_generator.state,
        "scalar": np.float64(2.5),
        "array": np.arange(3),
    }
    inner = state({"w": tensor()})[3:-2]
    for protocol in (2, 4):
        # First, since `MEMOIZE` counts from the start; without head, frame and end.
        rest = pickle.dumps(beside, protocol)[2:-1]
        rest = rest[9:] if rest[:1] == b"\x95" else rest
        key = b"X\x06\x00\x00\x00beside"
        inside = body("state_dict") + b"}" + inner + b"u"
        path = write_zip(tmp_path / "a.ckpt", b"\x80\x04}(" + key + rest + inside + b"u.")
        assert list(read_torch_file(path)) == ["w"]


def test_an_unknown_object_beside_the_weights_is_refused(tmp_path):
    evil = body("x") + b"cposix\nsystem\n(" + body("touch x") + b"tR"
    path = write_zip(tmp_path / "a.pt", b"\x80\x02}(" + body("w") + tensor() + evil + b"u.")
    assert refusal(path).startswith("refusing to load posix.system")


def test_an_embedded_clip_is_converted(tmp_path):
    convert(("emoji_clip64", str(tmp_path / "clip")))
    before, after = open_clip("emoji_clip64"), open_clip(tmp_path / "clip")
    assert after.config == before.config
    a, b = before.params["image"]["head"], after.params["image"]["head"]
    assert np.array_equal(a["kernel"], b["kernel"])


def test_the_two_files_of_a_clip_have_prefixes_too(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_registry, "clip64", clip_config)
    paths = [str(tmp_path / name) for name in ("i.safetensors", "t.ckpt")]
    save_file(prefixed("module.", dict(golden.load("weights_clip_image"))), paths[0])
    write_torch_file(paths[1], prefixed("model.", dict(golden.load("weights_clip_text"))))
    convert((*paths, str(tmp_path / "clip")))
    assert open_clip(tmp_path / "clip").config == clip_config()


def test_a_folder_is_not_named_like_a_file(tmp_path, small):
    save_weights(tmp_path / "x", {}, {"w": np.ones(1)})
    with pytest.raises(UsageError, match=r"to\.safetensors is the name of a file: name a folder"):
        convert((str(tmp_path / "x"), str(tmp_path / "to.safetensors")))
