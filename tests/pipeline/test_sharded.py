"""Tar shards of samples: interrupted, shared between processes, refused; their readers."""

import errno
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

import glide_jax as glide
from glide_jax.data.data_config import DataConfig
from glide_jax.data.sources import open_source
from glide_jax.devices.processes import own_process
from glide_jax.errors import GlideError, UsageError
from glide_jax.evaluation.captioned_sets import read_captions
from glide_jax.evaluation.image_sets import open_images
from glide_jax.pipeline import shard_files, sharded
from glide_jax.pipeline.options import check_options, read_options
from glide_jax.pipeline.pipeline import Pipeline
from glide_jax.pipeline.shard_files import claimed
from glide_jax.pipeline.sharded import sample_shards
from tests.support.commands import make_weights, one_line, run

PROMPTS = [f"red {i}" for i in range(4)] + ["a AND b", "ü"]
CALL = {"num": 2, "seed": 3, "shard_size": 5, "batch_size": 2, "steps": 2, "progress": False}
NAMES = ["000000.tar", "000001.tar", "000002.tar", "shards.json"]


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    line = sample_shards(pipe, PROMPTS, folder, **CALL)
    assert line == f"3 of 3 shards of 12 images are in {folder}"
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def members(path):
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def test_a_shard_has_images_prompts_and_metadata(whole, pipe):
    assert sorted(contents(whole)) == NAMES
    last = members(whole / "000002.tar")
    assert list(last) == [
        f"0000000{i}.{suffix}" for i in ("10", "11") for suffix in ("png", "txt", "json")
    ]
    assert last["000000011.txt"].decode() == "ü"
    made = json.loads(last["000000011.json"])
    image = Image.open(io.BytesIO(last["000000011.png"]))
    assert json.loads(image.text["glide_jax"]) == made
    assert (made["prompt"], made["seed"], made["index"], made["steps"]) == ("ü", 3, 11, 2)
    # The image is that of its prompt, index and seed alone.
    alone = pipe("ü", seed=3, first_index=11, steps=2, progress=False).images[0]
    assert np.abs(alone.astype(int) - np.asarray(image)).max() <= 1


def test_settings_with_a_value_per_image_are_those_of_its_images(pipe, tmp_path):
    captions = ["red", "green", "blue"]
    call = {"seed": 3, "steps": 2, "progress": False}
    per_image = {
        "scale": {"guidance_scale": [1.0, 2.0, 4.0]},
        "guidance": {
            "guidance": [glide.combine_prompts([None, captions[::-1]], [[1.0, 2.0, 3.0], 0.5])],
        },
    }
    for name, settings in per_image.items():
        folder = tmp_path / name
        sample_shards(pipe, captions, folder, shard_size=2, batch_size=1, **call, **settings)
        found = members(folder / "000000.tar") | members(folder / "000001.tar")
        images = [
            np.array(Image.open(io.BytesIO(found[key])), int)
            for key in sorted(found)
            if key.endswith(".png")
        ]
        wanted = pipe(captions, batch_size=1, **call, **settings).images
        assert len(images) == 3 and np.abs(images - wanted.astype(int)).max() <= 1
        scalar = {"guidance_scale": 1.0} if name == "scale" else {"guidance": []}
        plain = pipe(captions, batch_size=1, **call, **scalar).images
        assert (np.abs(images - plain.astype(int)).max((1, 2, 3))[1:] > 1).all()


def test_a_wrong_number_of_values_is_refused_before_the_first_image(pipe, tmp_path):
    with pytest.raises(UsageError) as caught:
        sample_shards(pipe, ["a", "b"], tmp_path / "x", guidance_scale=[1.0, 2.0, 3.0], **CALL)
    assert str(caught.value) == "guidance_scale has 3 values for 4 images: give one each"
    assert not (tmp_path / "x").exists()


def test_an_interrupted_run_continues_to_the_same_bytes(whole, pipe, tmp_path, monkeypatch):
    calls = []

    def interrupts(self, prompts, **arguments):
        calls.append(prompts)
        if len(calls) == 5:  # in the second shard
            raise KeyboardInterrupt
        return generate(self, prompts, **arguments)

    generate = Pipeline.__call__
    monkeypatch.setattr(Pipeline, "__call__", interrupts)
    with pytest.raises(KeyboardInterrupt) as stopped:
        sample_shards(pipe, PROMPTS, tmp_path, **CALL)
    assert str(stopped.value) == (
        f"stopped; 1 of 3 shards of 12 images are in {tmp_path}, and the same command continues"
    )
    assert sorted(contents(tmp_path)) == ["000000.tar", "shards.json"]
    calls.clear()
    # What a killed process leaves.
    (tmp_path / ".000001.tar.part").write_bytes(b"half a shard")
    calls += [None] * 5
    sample_shards(pipe, PROMPTS, tmp_path, **CALL)
    assert contents(tmp_path) == contents(whole)
    assert len(calls) == 5 + 3 + 1  # the first shard was not generated again


def test_processes_share_the_shards(whole, pipe, tmp_path):
    line = sample_shards(pipe, PROMPTS, tmp_path, process=(1, 2), **CALL)
    assert line == f"1 of 3 shards of 12 images are in {tmp_path}"
    sample_shards(pipe, PROMPTS, tmp_path, process=(0, 2), **CALL)
    assert contents(tmp_path) == contents(whole)


def test_a_shard_that_another_process_writes_is_left_to_it(whole, pipe, tmp_path):
    with claimed(tmp_path / "000001.tar") as file:
        assert file is not None
        line = sample_shards(pipe, PROMPTS, tmp_path, **CALL)
        assert line == (
            f"2 of 3 shards of 12 images are in {tmp_path}; other processes write 1 of the "
            "missing ones"
        )
        file.write(b"whole")
    assert (tmp_path / "000001.tar").read_bytes() == b"whole"
    with claimed(tmp_path / "000001.tar") as file:
        assert file is None
    assert sorted(contents(tmp_path)) == NAMES


def test_without_locks_a_shard_is_written_all_the_same(tmp_path, monkeypatch):
    def refuses(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(shard_files.fcntl, "flock", refuses)
    with claimed(tmp_path / "0.tar") as a, claimed(tmp_path / "0.tar") as b:
        a.write(b"the same")
        b.write(b"the same")
    assert contents(tmp_path) == {"0.tar": b"the same"}


def test_a_full_disk_ends_in_one_line_and_keeps_finished_shards(pipe, tmp_path, monkeypatch):
    def full(tar, images):
        if images.indices[0] >= 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(tar, images)

    add = sharded.add_images
    monkeypatch.setattr(sharded, "add_images", full)
    with pytest.raises(GlideError) as error:
        sample_shards(pipe, PROMPTS, tmp_path, **CALL)
    assert str(error.value) == (
        f"cannot write shards: No space left on device; 1 of 3 shards of 12 images are in "
        f"{tmp_path}, and the same command continues"
    )
    assert sorted(contents(tmp_path)) == ["000000.tar", "shards.json"]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 4}, "seed 3, here 4"),
        ({"steps": 3, "guidance_scale": 2.0}, "steps 2, here 3; guidance_scale 3.0, here 2.0"),
        ({"shard_size": 6}, "shards 3, here 2; shard_size 5, here 6"),
        ({"num": 1}, "images 12, here 6; shards 3, here 2; num 2, here 1"),
        ({"first_index": 12}, "first_index 0, here 12"),
    ],
)
def test_another_run_is_refused(whole, pipe, change, difference):
    with pytest.raises(UsageError) as error:
        sample_shards(pipe, PROMPTS, whole, **CALL | change)
    assert str(error.value) == (
        f"{whole} has shards of another run ({difference}): give another folder to --shards, or "
        "repeat its command"
    )


def test_other_prompts_and_other_weights_are_refused(whole, pipe, tmp_path):
    with pytest.raises(UsageError, match=r"another run \(other prompts\)"):
        sample_shards(pipe, ["blue", *PROMPTS[1:]], whole, **CALL)
    other = glide.load(make_weights(tmp_path / "other", seed=1))
    with pytest.raises(UsageError, match=r"another run \(other weights\)"):
        sample_shards(other, PROMPTS, whole, **CALL)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "000000.tar").touch()
    with pytest.raises(UsageError, match="has 000000.tar, but no shards.json: give a new folder"):
        sample_shards(pipe, PROMPTS, tmp_path / "out", **CALL)


def test_batches_and_devices_change_nothing_but_rounding(whole, pipe, tmp_path):
    sample_shards(pipe, PROMPTS, tmp_path, **CALL | {"batch_size": None})
    one, two = (np.stack(list(open_images(f).images())).astype(int) for f in (whole, tmp_path))
    assert np.abs(one - two).max() <= 1


def test_training_and_evaluation_read_the_shards(whole, capsys):
    images = open_images(whole)
    expected = [prompt for prompt in PROMPTS for _ in range(2)]
    assert len(images) == 12 and read_captions("beside", images) == expected
    source = open_source(DataConfig(source=str(whole)))
    assert [source[i]["caption"] for i in range(12)] == expected
    assert capsys.readouterr().err == ""
    for start in (0, 7):
        assert np.array_equal(
            list(images.images(start)), [source[i]["image"] for i in range(start, 12)]
        )
    assert np.array_equal(list(open_images(whole / "000002.tar").images()), list(images.images(10)))


def test_an_unfinished_folder_is_not_scored(pipe, tmp_path):
    sample_shards(pipe, PROMPTS, tmp_path, process=(0, 2), **CALL)
    with pytest.raises(GlideError) as error:
        open_images(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} has 2 of 3 shards: the command that generated them continues"
    )


def test_the_index_of_a_process(monkeypatch):
    assert own_process(3, 4) == (3, 4)
    for wrong in ((None, 4), (1, None), (2, 2), (0, 0)):
        with pytest.raises(UsageError, match="give --num-processes N and --process-id I"):
            own_process(*wrong)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    assert own_process() == (2, 3)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    assert own_process() == (0, 1)


def test_as_a_command(whole, weights, tmp_path):
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"p": p}) + "\n" for p in PROMPTS))
    words = ("sample.py", "--prompts-file", tmp_path / "c.jsonl", "--prompts-field", "p",
             "--weights", weights, "--num", 2, "--seed", 3, "--batch-size", 2, "--steps", 2,
             "--shards", tmp_path / "out", "--shard-size", 5)  # fmt: skip
    for process in (0, 1):
        result = run(*words, "--num-processes", 2, "--process-id", process)
        assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == (
        f"3 of 3 shards of 12 images are in {tmp_path / 'out'}"
    )
    assert contents(tmp_path / "out") == contents(whole)
    assert "seed 3, here 4" in one_line(run(*words, "--seed", 4), 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shards", "o", "--preview"), "--shards has no --preview"),
        (("--shards", "o", "--out", "x"), "--shards names the folder: give no --out"),
        (("--shards", "o", "--mask", "m.png"), "--shards takes prompts: it has no --image"),
        (("--shard-size", "5"), "--shard-size is for --shards"),
        (
            ("--num-processes", "2", "--process-id", "0"),
            "--num-processes and --process-id are for --shards",
        ),
        (("--prompts-field", "a"), "--prompts-field is for --prompts-file"),
    ],
)
def test_options_without_effect_are_refused(words, message):
    with pytest.raises(UsageError, match=message):
        check_options(read_options("", ["red", *words]))
