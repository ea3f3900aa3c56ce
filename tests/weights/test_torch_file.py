"""Reading PyTorch files: exact values of files that torch wrote, errors for broken files."""

import json
import pickle
import random
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from glide_jax.errors import GlideError
from glide_jax.weights import torch_file
from glide_jax.weights.torch_file import read_torch_file
from tests.support.torch_by_hand import (
    FOUR,
    body,
    in_both_formats,
    refusal,
    state,
    tensor,
    write_legacy,
    write_zip,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
WRITTEN = FIXTURES / "torch"


# ---------------------------------------------------------------- files that torch wrote


def assert_as_expected(found: dict[str, np.ndarray], expected: Path) -> None:
    with np.load(expected) as archive:
        arrays = {name: archive[name] for name in archive.files}
    dtypes = json.loads(str(arrays.pop("dtypes")))
    assert list(found) == list(dtypes)
    for name, array in found.items():
        dtype = dtypes[name]
        assert array.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype)), name
        assert array.shape == arrays[name].shape, name
        assert array.tobytes() == arrays[name].tobytes(), name
        assert not array.flags.writeable, name


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("kinds_zip.pt", "kinds_zip.npz"),
        ("kinds_legacy.pt", "kinds_legacy.npz"),
        ("module_zip.pt", "module.npz"),
        ("module_legacy.pt", "module.npz"),
        ("module_protocol4.pt", "module.npz"),
        ("checkpoint_zip.pt", "module.npz"),
        ("checkpoint_legacy.pt", "module.npz"),
        ("nested.pt", "nested.npz"),
    ],
)
def test_values_shapes_and_dtypes_are_those_of_torch(file, expected):
    assert_as_expected(read_torch_file(WRITTEN / file), WRITTEN / expected)


def test_golden_weights():
    found = read_torch_file(FIXTURES / "golden" / "weights_superres.pt")
    with np.load(FIXTURES / "golden" / "weights_superres.npz") as golden:
        assert list(found) == golden.files and len(found) == 181
        for name, array in found.items():
            assert array.dtype == np.float32
            assert np.array_equal(array, golden[name].astype(np.float32)), name


@pytest.mark.parametrize("file", ["kinds_zip.pt", "kinds_legacy.pt"])
def test_arrays_are_views_of_the_mapped_file_and_tied_ones_share_it(file):
    found = read_torch_file(WRITTEN / file)
    for name, array in found.items():
        if array.size:
            assert isinstance(array.base, np.memmap), name
    assert np.shares_memory(found["tied.a"], found["tied.b"])
    assert np.shares_memory(found["tied.a"], found["tied.tail"])
    assert not np.shares_memory(found["tied.a"], found["float32"])


def test_legacy_views_need_not_be_aligned_and_still_compute():
    array = read_torch_file(WRITTEN / "kinds_legacy.pt")["transposed"]
    assert not array.flags.aligned  # Otherwise this test has no purpose.
    copy = np.ascontiguousarray(array)
    assert np.array_equal(array @ array.T, copy @ copy.T)


# ---------------------------------------------------------------- limits and bounds


@in_both_formats
@pytest.mark.parametrize(
    ("view", "reason"),
    [
        ({"offset": 1}, "has less data than its tensor w needs"),
        ({"offset": 4, "shape": (), "strides": ()}, "has less data"),
        ({"offset": -1}, "(an impossible size)"),
        ({"offset": True}, "(an impossible size)"),
        ({"offset": 2**61}, "has less data"),
        ({"shape": (5,)}, "has less data"),
        ({"shape": (-1,)}, "(an impossible size)"),
        ({"shape": (-2, -2), "strides": (1, 1)}, "(an impossible size)"),
        ({"shape": (4.0,)}, "(an impossible size)"),
        ({"shape": "4"}, "(an impossible shape)"),
        ({"shape": (2, 2)}, "(a shape that does not fit its strides)"),
        ({"shape": (2**62,)}, "(an impossible size)"),
        ({"shape": (2**61,)}, "has less data"),
        ({"shape": (10**1000,)}, "(an impossible size)"),
        ({"shape": (2**32, 2**32), "strides": (0, 0)}, "repeats its data to more than 2**24"),
        ({"shape": (2**25,), "strides": (0,)}, "repeats its data to more than 2**24"),
        ({"shape": (0, 2**61), "strides": (1, 1)}, "is incomplete or damaged"),
        ({"shape": (1,) * 33, "strides": (1,) * 33}, "(an impossible shape)"),
        ({"shape": (2,), "strides": (4,)}, "has less data"),
        ({"shape": (2,), "strides": (-1,)}, "(an impossible size)"),
        ({"shape": (2,), "strides": (2**61,)}, "has less data"),
        ({"shape": (2, 2), "strides": (2, 2)}, "has less data"),
        ({"count": 5}, ""),  # The two formats have different messages.
        ({"count": 3}, ""),
        ({"count": -4}, "(an impossible size)"),
        ({"count": 2**61}, ""),
        ({"kind": "torch\nDoubleStorage"}, ""),
        ({"kind": "collections\nOrderedDict"}, "(a storage without name)"),
        ({"key": "1"}, ""),
        ({"key": "../data.pkl"}, ""),
        ({"key": 0}, "(a storage without name)"),
        ({"metadata": {"neg": True}}, "(a negated or conjugated tensor)"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_no_tensor_reaches_outside_its_storage(write, view, reason, tmp_path):
    assert reason in refusal(write(tmp_path / "a.pt", state({"w": tensor(**view)})))


def test_a_missing_or_short_record_is_named(tmp_path):
    path = write_zip(tmp_path / "a.pt", state({"w": tensor()}), {})
    assert f"{path} lacks its record x/data/0: download it again" == refusal(path)
    path = write_zip(tmp_path / "b.pt", state({"w\n": tensor()}), {"data/0": b"1234"})
    assert f"{path} has less data than its tensor w\\n needs: download it again" == refusal(path)


def test_the_size_of_a_pickle_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "_MAX_PICKLE", 100)
    path = write_zip(tmp_path / "a.pt", state({"w": tensor()}))
    assert "(a pickle of more than 16 MiB)" in refusal(path)
    refusal(write_legacy(tmp_path / "b.pt", state({"w": tensor()})))


def test_compressed_records_are_refused(tmp_path):
    zeros = {"data/0": bytes(10**7)}
    path = write_zip(tmp_path / "a.pt", state({"w": tensor()}), zeros, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**5
    assert "was compressed after PyTorch wrote it" in refusal(path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_opening_uses_no_memory(tmp_path):
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024

    count = 2**24
    pickled = state({"w": tensor(shape=(count,), count=count)})
    big = write_zip(tmp_path / "a.pt", pickled, {"data/0": bytes(4 * count)})
    read_torch_file(WRITTEN / "nested.pt")  # The memory that the first call needs.
    before = resident()
    found = read_torch_file(big)
    opened = resident()
    assert found["w"].nbytes == 2**26 and opened - before < 2**22
    assert found["w"][::1024].sum() == 0 and resident() - opened > 2**24


# ---------------------------------------------------------------- broken and foreign files


@pytest.mark.parametrize("file", ["nested.pt", "module_legacy.pt"])
def test_every_truncation_is_noticed(file, tmp_path):
    whole = (WRITTEN / file).read_bytes()
    path = tmp_path / "cut.pt"
    for size in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert "again" in refusal(path) or "not from PyTorch" in refusal(path)


def test_a_zip_directory_that_points_outside_the_file(tmp_path):
    whole = write_zip(tmp_path / "whole.pt", state({"w": tensor()})).read_bytes()
    path = tmp_path / "a.pt"
    path.write_bytes(whole[:4] + whole[14:])
    assert "(a record before its start)" in refusal(path)
    entry = whole.rindex(b"PK\x01\x02")  # The entry of data/0; its sizes follow at 20 bytes.
    sizes = struct.pack("<2L", 2**31, 2**31)
    path.write_bytes(whole[: entry + 20] + sizes + whole[entry + 28 :])
    assert "(a record beyond its end)" in refusal(path)


@pytest.mark.parametrize("file", ["nested.pt", "module_legacy.pt", "module_protocol4.pt"])
def test_damage_raises_only_one_kind_of_error(file, tmp_path):
    whole = (WRITTEN / file).read_bytes()
    rng = random.Random(2112)
    path = tmp_path / "damaged.pt"
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 2, 8])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            for array in read_torch_file(path).values():
                array.tobytes()
        except GlideError as error:
            refused += 1
            assert str(error).isprintable() and str(path) in str(error)
    assert refused > 100


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty: download it again"),
        (b"<html>\n<body>404</body>", 'is not a PyTorch file (starts with "<html>"): download it'),
        (b"\n <!DOCTYPE html><html lang='en'>", 'starts with "<!DOCTYPE html><html lan"'),
        (b"\x93NUMPY\x01\x00", "is not a PyTorch file (starts with bytes 93 4e 55 4d 50 59 01 00)"),
        (b"\xff\n", "is not a PyTorch file (starts with bytes ff 0a)"),
        (b"x" * 257 + b"ustar" + bytes(300), "was written by PyTorch 0.1"),
        (pickle.dumps({"w": [1.0]}, 2), "is a pickle, but not from PyTorch"),
        (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(7, 2), "is a pickle, but not from"),
        (b"PK\x03\x04 and no more", "no zip directory at its end"),
    ],
)
def test_the_error_for_other_files_names_their_kind(content, reason, tmp_path):
    path = tmp_path / "base.pt"
    path.write_bytes(content)
    assert reason in refusal(path)


def test_missing_files_and_folders(tmp_path):
    assert refusal(tmp_path / "none.pt").endswith(
        "none.pt does not exist: give the path of a .pt file"
    )
    assert "is not a file" in refusal(tmp_path)
    assert "none.pt" in refusal(tmp_path / ("x" * 300) / "none.pt")


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.pt", state({"w": tensor()}))

    def deny(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    assert refusal(path) == f"cannot read {path}: Permission denied"


def test_other_archives(tmp_path):
    np.savez(tmp_path / "a.npz", w=FOUR)
    assert "is a zip archive, but not from PyTorch" in refusal(tmp_path / "a.npz")
    script = write_zip(tmp_path / "script.pt", state({}), {"constants.pkl": b"", "code/m.py": b""})
    assert "is a TorchScript program" in refusal(script)
    assert "torch.nn.modules.container.Sequential" in refusal(WRITTEN / "whole_model.pt")
    path = write_zip(tmp_path / "two.pt", state({"w": tensor()}))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("x/data.pkl", state({}))
    assert "(two records of one name)" in refusal(path)


def test_big_endian_files(tmp_path):
    records = {"byteorder": b"big", "data/0": FOUR.tobytes()}
    path = write_zip(tmp_path / "a.pt", state({"w": tensor()}), records)
    assert "is big-endian" in refusal(path)
    records["byteorder"] = b"little"
    assert len(read_torch_file(write_zip(path, state({"w": tensor()}), records))) == 1
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": False}]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head))
    assert "is big-endian" in refusal(path)


# ---------------------------------------------------------------- names


@in_both_formats
def test_files_without_names_or_tensors(write, tmp_path):
    assert "holds no tensors" in refusal(
        write(tmp_path / "a.pt", state({"n": body(3)}), data_of(write))
    )
    assert "a tensor without name" in refusal(
        write(tmp_path / "b.pt", b"\x80\x02" + tensor() + b".")
    )
    twice = state({"a.b": tensor(), "a": b"}" + body("b") + tensor() + b"s"})
    assert "two tensors named a.b" in refusal(write(tmp_path / "c.pt", twice))
    assert "1000 characters" in refusal(write(tmp_path / "d.pt", state({"x" * 1001: tensor()})))


def data_of(write):
    """Return no storages for a legacy file without tensors."""
    return {} if write is write_zip else b"\x80\x02]."


@in_both_formats
@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_checkpoints_are_unwrapped(write, wrapper, tmp_path):
    inner = b"}" + body("w") + tensor() + b"s"
    optimizer = b"}" + body("moment") + tensor() + b"s"
    path = write(tmp_path / "a.pt", state({"optimizer": optimizer, wrapper: inner}))
    assert list(read_torch_file(path)) == ["w"]
    path = write(tmp_path / "b.pt", state({"optimizer": optimizer, "weights": inner}))
    assert list(read_torch_file(path)) == ["optimizer.moment", "weights.w"]


def test_pickles_in_a_legacy_file_must_agree_with_its_data(tmp_path):
    valid = state({"w": tensor()})
    missing = write_legacy(tmp_path / "a.pt", valid, b"\x80\x02].", b"")
    refusal(missing)
    short = write_legacy(tmp_path / "b.pt", valid, data=struct.pack("<q", 4) + bytes(15))
    assert "(a storage beyond its end)" in refusal(short)
    for count in (5, -1, 2**62):
        path = write_legacy(tmp_path / "c.pt", valid, data=struct.pack("<q", count) + bytes(99))
        assert "(a storage of another size)" in refusal(path)
    two = {"w": tensor(), "v": tensor(kind="torch\nIntStorage")}
    assert "two descriptions" in refusal(write_legacy(tmp_path / "d.pt", state(two)))
