"""Reading PyTorch files: exact values from files that torch wrote, refusal of files made to harm."""

import io
import json
import os
import pickle
import random
import struct
import time
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from glide_jax.errors import GlideError
from glide_jax.weights import torch_file
from glide_jax.weights.torch_file import read_torch_file

FIXTURES = Path(__file__).parent / "fixtures"
WRITTEN = FIXTURES / "torch"


def refusal(path: Path) -> str:
    """The message of the error that `path` must give: one printable line that names the file."""
    with pytest.raises(GlideError) as caught:
        read_torch_file(path)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 600 and str(path) in message
    assert caught.value.exit_code == 1
    return message


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
    assert not array.flags.aligned  # otherwise this test shows nothing
    copy = np.ascontiguousarray(array)
    assert np.array_equal(array @ array.T, copy @ copy.T)


# ---------------------------------------------------------------- files made by hand


def body(value: object) -> bytes:
    """The pickle of a plain value without its frame, to be put between other opcodes."""
    return pickle.dumps(value, 2)[2:-1]


def storage(key="0", count=4, kind="torch\nFloatStorage", tail=b"") -> bytes:
    kind_code = b"c" + kind.encode() + b"\n"
    return b"(" + body("storage") + kind_code + body(key) + body("cpu") + body(count) + tail + b"tQ"


def tensor(offset=0, shape=(4,), strides=(1,), **of_storage) -> bytes:
    view = storage(**of_storage) + body(offset) + body(shape) + body(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + view + b"\x89ccollections\nOrderedDict\n)RtR"


def state(tensors: dict[str, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(body(name) + t for name, t in tensors.items()) + b"u."


FOUR = np.arange(4, dtype=np.float32)


def write_zip(path: Path, pickled: bytes, records=None, method=zipfile.ZIP_STORED) -> Path:
    records = {"data/0": FOUR.tobytes()} if records is None else records
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, data in records.items():
            archive.writestr(f"x/{name}", data)
    return path


def write_legacy(path: Path, pickled: bytes, keys=b"\x80\x02](X\x01\x00\x00\x000e.", data=None):
    data = struct.pack("<q", 4) + FOUR.tobytes() if data is None else data
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + pickled + keys + data)
    return path


@pytest.fixture(params=[write_zip, write_legacy], ids=["zip", "legacy"])
def write(request):
    return request.param


def test_the_handmade_files_are_sound(write, tmp_path):
    """Else the refusals below might have other reasons than those they are meant to show."""
    found = read_torch_file(write(tmp_path / "a.pt", state({"w": tensor()})))
    assert list(found) == ["w"] and np.array_equal(found["w"], FOUR)
    view = state({"w": tensor(offset=1, shape=(2, 1), strides=(2, 10**30 % 2**62))})
    found = read_torch_file(write(tmp_path / "b.pt", view))
    assert np.array_equal(found["w"], [[1], [3]])


class Hostile:
    """Touches a file when it is unpickled by the standard library."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.skipif(os.name != "posix", reason="the name of os.system and `touch`")
def test_no_code_of_the_file_runs(write, protocol, tmp_path):
    marker = tmp_path / "marker"
    hostile = pickle.dumps({"w": Hostile(marker)}, protocol)
    pickle.loads(hostile)
    assert marker.exists()  # the pickle does harm where it is let
    marker.unlink()
    path = write(tmp_path / "base.pt", hostile)
    bare = tmp_path / "bare.pt"
    bare.write_bytes(hostile)
    if protocol:
        assert refusal(path).startswith(f"refusing to load posix.system from {path}: ")
    else:  # stopped before, at the opcode that made dictionaries then
        assert refusal(path).startswith("refusing to load")
    assert ("refusing to load posix.system" if protocol > 1 else "not a PyTorch") in refusal(bare)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (b"cbuiltins\neval\n(" + body("1") + b"tR", "refusing to load builtins.eval from"),
        (b"(" + body("1") + b"iposix\nsystem\n", "refusing to load posix.system from"),
        (b"(icollections\nOrderedDict\n", "damaged"),
        (body("os") + body("system") + b"\x93", "refusing to load os.system from"),
        (body("torch") + body("Size.__new__") + b"\x93", "refusing to load torch.Size.__new__"),
        (b"ctorch\nload\n" + body("x") + b"\x85R", "refusing to load torch.load from"),
        (b"ctorch.storage\n_load_from_bytes\n", "refusing to load torch.storage._load_from_bytes"),
        (b"cbuiltins\ngetattr\n", "refusing to load builtins.getattr from"),
        (b"c__main__\nNet\n)\x81", "refusing to load __main__.Net from"),
        (b"c\x1b[31m\nevil\n", r"refusing to load \x1b[31m.evil from"),
        (body("os\r\x85") + body("\u202e") + b"\x93", r"refusing to load os\r\x85.\u202e from"),
        (b"c" + b"a" * 10**5 + b"\nb\n", "refusing to load " + "a" * 80 + " from"),
        (b"ccollections\nOrderedDict\n)\x81", "weights need no pickle opcode NEWOBJ"),
        (b"\x82\x01", "weights need no pickle opcode EXT1"),
        (b"Pid\n", "weights need no pickle opcode PERSID"),
        (b"ctorch\nfloat32\n)R", "damaged (a call of something that is no function)"),
        (body("text") + b")R", "damaged (a call of something that is no function)"),
        (b"ctorch\nSize\n" + body("text") + b"R", "damaged (a call of something"),
        (b"(" + body("module") + b"NNNtQ", "holds a whole model"),
        (b"(" + body("module") + b"NNN", "damaged"),
        (body("storage") + b"Q", "damaged (a storage without name)"),
        (
            b"ctorch._utils\n_rebuild_tensor_v2\n(K\x00K\x00))tR",
            "damaged (a tensor without storage)",
        ),
        (b"ctorch._utils\n_rebuild_parameter\n(NNNtR", "damaged (a parameter without tensor)"),
        (b"ctorch._utils\n_rebuild_parameter\n)R", "damaged"),
        (b"h\x63", "damaged"),
        (b"R" * 9, "damaged"),
        (b"X\xff\xff\xff\xff", "damaged"),
        (b"\x8d" + b"\xff" * 8, "damaged"),
        (b"\x8b\xff\xff\xff\x7f", "damaged"),
    ],
)
def test_a_pickle_can_make_nothing_else(write, code, reason, tmp_path):
    assert reason in refusal(write(tmp_path / "a.pt", state({"w": tensor(), "x": code})))


def test_attributes_set_by_a_file_have_no_effect(write, tmp_path):
    """BUILD on what the file was handed must not change it for the next file."""
    attack = b"c%b\n}(" + body("__call__") + b"N" + body("call") + b"N" + body("clear") + b"Nub"
    attacks = [
        attack % name
        for name in (b"collections\nOrderedDict", b"torch\nFloatStorage", b"torch\nSize")
    ]
    path = write(
        tmp_path / "a.pt", state({"w": tensor(), **dict(zip("abc", attacks, strict=True))})
    )
    for _ in range(2):
        assert list(read_torch_file(path)) == ["w"]
    assert_as_expected(read_torch_file(WRITTEN / "kinds_zip.pt"), WRITTEN / "kinds_zip.npz")


@pytest.mark.parametrize(
    "view",
    [
        {"offset": 1},
        {"offset": 4, "shape": (), "strides": ()},
        {"offset": -1},
        {"offset": True},
        {"offset": 2**61},
        {"shape": (5,)},
        {"shape": (-1,)},
        {"shape": (-2, -2), "strides": (1, 1)},
        {"shape": (4.0,)},
        {"shape": "4"},
        {"shape": (2, 2)},
        {"shape": (2**62,)},
        {"shape": (2**61,)},
        {"shape": (2**32, 2**32), "strides": (0, 0)},
        {"shape": (2**25,), "strides": (0,)},
        {"shape": (10**100,)},
        {"shape": (0, 2**61), "strides": (1, 1)},
        {"shape": (1,) * 33, "strides": (1,) * 33},
        {"shape": (2,), "strides": (4,)},
        {"shape": (2,), "strides": (-1,)},
        {"shape": (2,), "strides": (2**61,)},
        {"shape": (2, 2), "strides": (2, 2)},
        {"count": 5},
        {"count": 3},
        {"count": -4},
        {"count": 2**61},
        {"kind": "torch\nDoubleStorage"},
        {"kind": "collections\nOrderedDict"},
        {"key": "1"},
        {"key": "../data.pkl"},
        {"key": 0},
    ],
    ids=str,
)
def test_no_tensor_reaches_outside_its_storage(write, view, tmp_path):
    refusal(write(tmp_path / "a.pt", state({"w": tensor(**view)})))


def test_a_missing_or_short_record_is_named(tmp_path):
    path = write_zip(tmp_path / "a.pt", state({"w": tensor()}), {})
    assert f"{path} lacks its record x/data/0: download it again" == refusal(path)
    path = write_zip(tmp_path / "b.pt", state({"w\n": tensor()}), {"data/0": b"1234"})
    assert f"{path} has less data than its tensor w\\n needs: download it again" == refusal(path)


# ---------------------------------------------------------------- exhaustion


def test_nesting_and_repetition_are_limited(write, tmp_path):
    deep = b"]" * 10**5 + b"a" * (10**5 - 1)
    doubled = b"(]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)) + b"t"
    cycle = b"}q\x07(" + body("me") + b"h\x07u"
    for name, code in {"deep": deep, "doubled": doubled, "cycle": cycle}.items():
        path = write(tmp_path / f"{name}.pt", state({"w": tensor(), "x": code}))
        assert "is nested too deeply" in refusal(path)


def test_nothing_nested_is_hashed(tmp_path):
    """The hash of a tuple nested this deep ends the process (the C stack overflows)."""
    nested = b")" + b"\x85" * 300_000
    pickled = b"\x80\x02}(" + body("w") + tensor() + nested + b"Nu."
    assert "neither text nor number" in refusal(write_zip(tmp_path / "a.pt", pickled))
    path = write_legacy(tmp_path / "b.pt", state({"w": tensor()}), b"\x80\x02](" + nested + b"e.")
    assert "a storage that no tensor uses" in refusal(path)


def test_a_huge_memo_index_costs_no_memory(write, tmp_path):
    code = b"Nr\xff\xff\xff\xffj\xff\xff\xff\xff"
    begin = time.perf_counter()
    pickled = b"\x80\x02](" + code + tensor() + b"e."
    found = read_torch_file(write(tmp_path / "a.pt", pickled))
    assert list(found) == ["2"] and time.perf_counter() - begin < 1


def test_a_pickle_has_a_greatest_size(tmp_path, monkeypatch):
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
def test_opening_costs_no_memory(tmp_path):
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024

    count = 2**24
    pickled = state({"w": tensor(shape=(count,), count=count)})
    big = write_zip(tmp_path / "a.pt", pickled, {"data/0": bytes(4 * count)})
    read_torch_file(WRITTEN / "nested.pt")  # what the first call ever needs
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
        assert "again" in refusal(path) or "not one of PyTorch" in refusal(path)


@pytest.mark.parametrize("file", ["nested.pt", "module_legacy.pt", "module_protocol4.pt"])
def test_damage_ends_in_one_kind_of_error(file, tmp_path):
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
        (pickle.dumps({"w": [1.0]}, 2), "is a pickle, but not one of PyTorch"),
        (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(7, 2), "is a pickle, but not one"),
        (b"PK\x03\x04 and no more", "no zip directory at its end"),
    ],
)
def test_other_files_are_named_for_what_they_are(content, reason, tmp_path):
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
    assert "is a zip archive, but not one of PyTorch" in refusal(tmp_path / "a.npz")
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
    """A legacy file without tensors has no storages either."""
    return {} if write is write_zip else b"\x80\x02]."


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_checkpoints_are_unwrapped(write, wrapper, tmp_path):
    inner = b"}" + body("w") + tensor() + b"s"
    optimizer = b"}" + body("moment") + tensor() + b"s"
    path = write(tmp_path / "a.pt", state({"optimizer": optimizer, wrapper: inner}))
    assert list(read_torch_file(path)) == ["w"]
    path = write(tmp_path / "b.pt", state({"optimizer": optimizer, "weights": inner}))
    assert list(read_torch_file(path)) == ["optimizer.moment", "weights.w"]


def test_files_of_old_pythons_and_old_torches(tmp_path):
    """Python 2 wrote byte strings and ordered pairs; PyTorch 0.3, parts of storages."""
    part = b"(" + body("7") + body(1) + body(2) + b"t"
    view = tensor(shape=(2,), tail=part)
    pairs = b"](](U\x01w" + view + b"e](U\x01v" + tensor(kind="torch.cuda\nFloatStorage") + b"ee"
    pickled = b"\x80\x02ccollections\nOrderedDict\n" + pairs + b"\x85R."
    found = read_torch_file(write_legacy(tmp_path / "a.pt", pickled))
    assert np.array_equal(found["w"], FOUR[1:3]) and np.array_equal(found["v"], FOUR)
    outside = tensor(shape=(3,), tail=part)
    refusal(write_legacy(tmp_path / "b.pt", state({"w": outside})))
    part = b"(" + body("7") + body(3) + body(2) + b"t"
    path = write_legacy(tmp_path / "c.pt", state({"w": tensor(shape=(1,), tail=part)}))
    assert "a storage outside its own" in refusal(path)


def test_pickles_in_a_legacy_file_must_agree_with_its_data(tmp_path):
    sound = state({"w": tensor()})
    missing = write_legacy(tmp_path / "a.pt", sound, b"\x80\x02].", b"")
    refusal(missing)
    short = write_legacy(tmp_path / "b.pt", sound, data=struct.pack("<q", 4) + bytes(15))
    assert "(a storage beyond its end)" in refusal(short)
    for count in (5, -1, 2**62):
        path = write_legacy(tmp_path / "c.pt", sound, data=struct.pack("<q", count) + bytes(99))
        assert "(a storage of another size)" in refusal(path)
    two = {"w": tensor(), "v": tensor(kind="torch\nIntStorage")}
    assert "two descriptions" in refusal(write_legacy(tmp_path / "d.pt", state(two)))


def test_the_reader_leaves_the_file_behind_its_pickle():
    """Legacy files hold several in a row."""
    from glide_jax.weights.torch_pickle import unpickle

    file = io.BytesIO(pickle.dumps([1, "a", {2: None}], 2) + pickle.dumps((True, b"x", {3}), 4))
    assert unpickle(Path("a.pt"), file) == [1, "a", {2: None}]
    assert unpickle(Path("a.pt"), file) == (True, b"x", [3])
    with pytest.raises(ValueError, match="exhausted"):
        unpickle(Path("a.pt"), file)
