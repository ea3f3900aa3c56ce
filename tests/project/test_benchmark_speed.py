"""The benchmark of speed: its measurements, its output, and a small measurement."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.speed import (
    Measurement,
    Options,
    _answer,
    measured,
    measurements,
    tables,
    write,
)
from benchmarks.speed_parts import config_of, random_params
from glide_jax.errors import UsageError
from glide_jax.models.presets import base64, upsample256
from glide_jax.weights import abstract_params

# A busy machine may need a long time.
SMALL = Options(
    size="toy", only=("forward",), batches=(2,), dtypes=("float32",), repeats=1, limit=1800
)


def test_all_measurements(tmp_path):
    (tmp_path / "glide_text2im").mkdir()
    ours, both = measurements(Options()), measurements(Options(original=tmp_path))
    # 3 batches of 2 models in 2 dtypes, 3 procedures, 2 trainings; 3 x 2 and 3 of the original's.
    assert len(ours) == 12 + 3 + 2 and len(both) == len(ours) + 9
    assert [one for one in both if one.code == "glide-jax"] == ours
    assert len(set(both)) == len(both)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"only": ("forwards",)}, "did you mean 'forward'"),
        ({"size": "paper"}, "released or toy"),
        ({"original": Path("/nowhere")}, "no glide_text2im"),
        ({"batches": ()}, "at least one"),
        ({"only": ()}, "nothing to measure"),
    ],
)
def test_wrong_options(change, message):
    with pytest.raises(UsageError, match=message):
        measurements(replace(Options(), **change))


def test_the_sizes_are_those_of_openai():
    assert config_of("base", "released") == base64()
    assert config_of("upsampler", "released") == upsample256()


def test_random_weights_keep_the_scale():
    config = config_of("base", "toy")
    params, abstract = random_params(config), abstract_params(config)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, abstract)
    for leaf in jax.tree.leaves(params):
        if leaf.ndim > 1 and leaf.size > 4000:
            inputs = np.prod(leaf.shape[:-1])
            assert leaf.std() * np.sqrt(inputs) == pytest.approx(1, abs=0.1)


@pytest.fixture(scope="module")
def forward():
    return measured(Measurement("glide-jax", "forward", "base", "float32", 2), SMALL)


def test_a_measurement_is_complete(forward):
    assert "error" not in forward, forward
    assert forward["ms"] > 0 and forward["compile_s"] > 0 and len(forward["all_ms"]) == 1
    assert forward["images_s"] == pytest.approx(2000 / forward["ms"])
    assert forward["peak_of"] == "process" and forward["peak_bytes"] > 1e8
    # A toy of 16x16 pixels: between 0.01 and 1 GFLOP for two of them.
    assert 1e7 < forward["tflops"] * 1e12 * forward["ms"] / 1000 < 1e9


def test_the_output(tmp_path, forward):
    original = forward | {"code": "original", "ms": 3 * forward["ms"]}
    lost = forward | {"batch": 64, "error": "out of memory"}
    write(tmp_path, SMALL, [forward, original, lost])
    kept = json.loads((tmp_path / "speed.json").read_text())
    assert kept["results"] == [forward, original, lost]
    assert kept["settings"]["size"] == "toy"
    rows = [
        line for line in (tmp_path / "speed.md").read_text().splitlines() if "| float32" in line
    ]
    assert len(rows) == 3 and len({row.count("|") for row in rows}) == 1
    assert rows[0].endswith("| 3.00x |") and rows[1].endswith("|  |")
    assert "| out of memory |" in rows[2]
    assert tables([]) == ""


def test_the_kinds_of_failure():
    def ended(code, error):
        return _answer(subprocess.CompletedProcess([], code, "", error))["error"]

    assert ended(1, "...\nXlaRuntimeError: RESOURCE_EXHAUSTED: 80 GB\nmore") == "out of memory"
    assert ended(1, "torch.OutOfMemoryError: CUDA out of memory.") == "out of memory"
    assert ended(-9, "") == "out of memory"
    assert ended(1, "a\nValueError: b\n") == "ValueError: b"
    assert ended(3, "") == "exit 3"


def test_a_measurement_that_hangs_is_an_entry():
    wrong = Measurement("glide-jax", "forward", "base", "float7", 1)
    hung = measured(wrong, replace(SMALL, limit=0.01))
    assert hung["error"] == "stopped after 0.01 s" and hung["batch"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["procedure", "training"])
def test_the_other_kinds(kind):
    model = "base" if kind == "training" else "both"
    found = measured(Measurement("glide-jax", kind, model, "float32", 2), SMALL)
    assert "error" not in found and found["ms"] > 0


def test_the_original_is_called_with_its_path(tmp_path):
    """The original code is not here: a stand-in for Python records its arguments."""
    (tmp_path / "glide_text2im").mkdir()
    python = tmp_path / "python"
    answer = {"ms": 1.0, "images_s": 1.0, "dtype": "float32", "peak_bytes": 1, "peak_of": "x"}
    python.write_text(
        f"#!/bin/sh\necho \"$@\" > {tmp_path}/arguments\necho '{json.dumps(answer)}'\n"
    )
    os.chmod(python, 0o755)
    options = replace(SMALL, original=tmp_path, original_python=python)
    found = measured(Measurement("original", "forward", "base", "own", 2), options)
    script, path, text = (tmp_path / "arguments").read_text().split(" ", 2)
    assert script.endswith("benchmarks/speed_original.py") and path == str(tmp_path.resolve())
    assert json.loads(text)["batch"] == 2 and json.loads(text)["size"] == "toy"
    assert found["dtype"] == "float32" and found["ms"] == 1.0 and "error" not in found


def test_a_wrong_option_of_the_command(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed", "--out", tmp_path, "--only", "backward"],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2 and "unknown kind 'backward'" in found.stderr
