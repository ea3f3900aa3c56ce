"""The held-out loss and samples on eight devices: values of one device, weights in parts."""

import json

import numpy as np
import pytest

from tests.support.commands import make_images, run


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """The report of `tests.support.mesh_evaluation` on eight devices."""
    folder = tmp_path_factory.mktemp("mesh")
    for split in ("train", "validation"):
        make_images(folder / "images" / split, count=16)
    report = folder / "report.json"
    arguments = ("-m", "tests.support.mesh_evaluation", folder / "images", report)
    result = run(*arguments, devices=8)
    assert result.returncode == 0, result.stderr
    return json.loads(report.read_text())


@pytest.mark.parametrize("name", ["pmap", "fsdp", "clip-pmap", "clip-fsdp"])
def test_eight_devices_measure_the_held_out_loss_of_one(eight, name):
    found = eight[name]
    assert found["one"].keys() == found["all"].keys() >= {"loss"}
    for key, value in found["one"].items():
        assert found["all"][key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize("name", ["pmap", "fsdp"])
def test_eight_devices_make_the_samples_of_one(eight, name):
    one, grid = (np.array(eight[name][key]) for key in ("one_grid", "grid"))
    assert one.std() > 5
    assert np.abs(one - grid).max() <= 1
    # The batch is split over all of them.
    assert eight[name]["devices"] == [[8, False]]


def test_no_device_holds_the_sharded_weights_and_nothing_gathers_them(eight):
    found = eight["fsdp"]
    whole = found["bytes"]["whole"]
    for held in (found["bytes"], found["spread"]):
        assert held["whole"] == whole and held["device"] < whole / 6
    # With the trunk in bfloat16, in the pipeline that samples.
    assert found["network"]["whole"] == found["cast"]
    assert found["network"]["device"] < found["cast"] / 6
    # Metrics are gathered, not weights.
    for name in ("fsdp", "clip-fsdp", "pmap", "clip-pmap"):
        assert eight[name]["moved"] < 1000


def test_replicated_weights_are_sampled_from_where_they_lie(eight):
    found = eight["pmap"]
    assert found["spread"] == {"whole": found["bytes"]["whole"] // 8} | {
        "device": found["bytes"]["whole"] // 8
    }
