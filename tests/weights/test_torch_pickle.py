"""A pickle can describe tensors, within limits, and can do nothing else."""

import io
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from glide_jax.weights.torch_file import read_torch_file
from glide_jax.weights.torch_pickle import unpickle
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


@in_both_formats
def test_the_handmade_files_are_valid(write, tmp_path):
    """Otherwise the errors in the tests below could have other reasons."""
    found = read_torch_file(write(tmp_path / "a.pt", state({"w": tensor()})))
    assert list(found) == ["w"] and np.array_equal(found["w"], FOUR)
    view = state({"w": tensor(offset=1, shape=(2, 1), strides=(2, 2**62 - 1))})
    found = read_torch_file(write(tmp_path / "b.pt", view))
    assert np.array_equal(found["w"], [[1], [3]])


class Hostile:
    """An object that touches a file when the standard library unpickles it."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@in_both_formats
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.skipif(os.name != "posix", reason="the name of os.system and `touch`")
def test_no_code_of_the_file_runs(write, protocol, tmp_path):
    marker = tmp_path / "marker"
    hostile = pickle.dumps({"w": Hostile(marker)}, protocol)
    pickle.loads(hostile)
    assert marker.exists()  # With the standard library the pickle does harm.
    marker.unlink()
    path = write(tmp_path / "base.pt", hostile)
    bare = tmp_path / "bare.pt"
    bare.write_bytes(hostile)
    if protocol:
        assert refusal(path).startswith(f"refusing to load posix.system from {path}: ")
    else:  # It stops earlier, at the opcode that made dictionaries in protocol 0.
        assert refusal(path).startswith("refusing to load")
    assert ("refusing to load posix.system" if protocol > 1 else "not a PyTorch") in refusal(bare)
    assert not marker.exists()


@in_both_formats
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (b"cbuiltins\neval\n(" + body("1") + b"tR", "refusing to load builtins.eval from"),
        (b"(" + body("1") + b"iposix\nsystem\n", "refusing to load posix.system from"),
        (b"(icollections\nOrderedDict\n", "damaged (an unexpected call)"),
        (b"ccollections\nOrderedDict\n)\x85\x85R", "damaged (an impossible dictionary)"),
        (b"c__builtin__\nset\n" + body("text") + b"\x85R", "damaged (an impossible set)"),
        (b"(\x87", "damaged (a tuple that lacks elements)"),
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
        (b"ctorch\nfloat32\n)R", "damaged (a call of something that is not a function)"),
        (body("text") + b")R", "damaged (a call of something that is not a function)"),
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
def test_a_pickle_can_do_nothing_else(write, code, reason, tmp_path):
    assert reason in refusal(write(tmp_path / "a.pt", state({"w": tensor(), "x": code})))


@in_both_formats
def test_attributes_set_by_a_file_have_no_effect(write, tmp_path):
    """BUILD must not change objects of this package for the next file."""
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
    pairs = b"ccollections\nOrderedDict\n](](" + body("w") + tensor() + b"ee\x85R."
    found = read_torch_file(write(tmp_path / "b.pt", b"\x80\x02" + pairs))
    assert np.array_equal(found["w"], FOUR)


@in_both_formats
def test_nesting_and_repetition_are_limited(write, tmp_path):
    deep = b"]" * 10**5 + b"a" * (10**5 - 1)
    doubled = b"(]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)) + b"t"
    cycle = b"}q\x07(" + body("me") + b"h\x07u"
    for name, code in {"deep": deep, "doubled": doubled, "cycle": cycle}.items():
        path = write(tmp_path / f"{name}.pt", state({"w": tensor(), "x": code}))
        assert "is nested too deeply" in refusal(path)


def test_nothing_nested_is_hashed(tmp_path):
    """The hash of a tuple that is nested so deeply overflows the C stack and ends the process."""
    nested = b")" + b"\x85" * 200_000
    pickled = b"\x80\x02}(" + body("w") + tensor() + nested + b"Nu."
    assert "neither text nor number" in refusal(write_zip(tmp_path / "a.pt", pickled))
    path = write_legacy(tmp_path / "b.pt", state({"w": tensor()}), b"\x80\x02](" + nested + b"e.")
    assert "a storage that no tensor uses" in refusal(path)


@in_both_formats
def test_a_huge_memo_index_uses_no_memory(write, tmp_path):
    code = b"Nr\xff\xff\xff\xffj\xff\xff\xff\xff"
    begin = time.perf_counter()
    pickled = b"\x80\x02](" + code + tensor() + b"e."
    found = read_torch_file(write(tmp_path / "a.pt", pickled))
    assert list(found) == ["2"] and time.perf_counter() - begin < 1


def test_files_of_old_pythons_and_old_torches(tmp_path):
    """Python 2 wrote byte strings and ordered pairs, PyTorch 0.3 parts of storages."""
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


def test_the_position_in_the_file_is_after_the_pickle():
    """Legacy files contain several pickles."""
    file = io.BytesIO(pickle.dumps([1, "a", {2: None}], 2) + pickle.dumps((True, b"x", {3}), 4))
    assert unpickle(Path("a.pt"), file) == [1, "a", {2: None}]
    assert unpickle(Path("a.pt"), file) == (True, b"x", [3])
    with pytest.raises(ValueError, match="exhausted"):
        unpickle(Path("a.pt"), file)
