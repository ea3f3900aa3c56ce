"""The built wheel: complete, built without a warning, and enough to sample and train alone."""

import configparser
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.commands import ROOT, environment

CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg")
SCRIPTS = {"sample.py": ROOT / "sample.py", "train.py": ROOT / "train.py"} | {
    f"configs/{path.name}": path for path in (ROOT / "configs").iterdir() if path.is_file()
}
FILES = {
    path.relative_to(ROOT): path
    for path in (ROOT / "glide_jax").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
LOADS = """
import sys, pathlib, glide_jax
assert pathlib.Path(glide_jax.__file__).is_relative_to(sys.argv[1]), glide_jax.__file__
from glide_jax.models.tokenizers import CLIPTokenizer
assert CLIPTokenizer()("a red apple").lengths.tolist() == [5]
"""


def test_the_list_of_packages_is_that_of_the_folders():
    folders = {path.parent for path in FILES}
    scripts = {"glide_jax.scripts", "glide_jax.scripts.configs"}
    listed = CONFIG["options"]["packages"].split()
    assert len(listed) == len(set(listed))
    assert set(listed) == {".".join(folder.parts) for folder in folders} | scripts


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of a copy of the project, since building leaves its traces beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    left_out = (".git", ".venv", "tests", "build", "*.egg-info", "runs", "samples", "data")
    exclude = [f"--exclude=./{name}" for name in left_out]
    packed = subprocess.run(["tar", "c", *exclude, "."], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "x"], cwd=source, input=packed.stdout, check=True)
    # setuptools warns where Python is not to write bytecode: that is no fault of the project.
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", folder, source],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    # Of Python and of setuptools; those of pip are in capitals.
    warnings = re.findall(r".*(?:\bwarning|Warning): .*", built.stdout + built.stderr)
    assert not warnings, "\n".join(warnings)
    (path,) = folder.glob("glide_jax-*.whl")
    return path


def test_it_has_every_file_of_the_package_and_the_scripts_unchanged(wheel):
    expected = {path.as_posix(): source for path, source in FILES.items()}
    expected |= {f"glide_jax/scripts/{name}": source for name, source in SCRIPTS.items()}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("glide_jax/")}
        assert names == set(expected)
        for name, source in expected.items():
            assert archive.read(name) == source.read_bytes(), name


def test_it_samples_and_trains_alone_in_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site]
    subprocess.run([*install, wheel], check=True, cwd=tmp_path, timeout=300)
    images = tmp_path / "images"
    images.mkdir()
    for name, colour in {"red": (220, 30, 30), "blue": (40, 60, 220)}.items():
        Image.fromarray(np.full((16, 16, 3), colour, np.uint8)).save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(name)
    empty.mkdir()

    def run(*command: object) -> str:
        result = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=empty,
            env=environment() | {"PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    run("-c", LOADS, site)
    # The script that pip made of the entry point.
    command = site / "bin" / "glide-jax"
    run(command, "sample", "a red apple", "--steps", 2, "--upsampler", "none")
    assert [p.suffix for p in (empty / "samples").iterdir()] == [".png"]
    # A recipe by name.
    train = ("--config", "cfg64:toy", "--data.source", images, "--steps", 2, "--batch-size", 2)
    run(command, "train", *train, "--save-every", 2, "--sample-every", 0, "--out", "run")
    assert (empty / "run" / "checkpoints").is_dir()
    assert "glide_jax" in run(command, "env")
    assert {p.name for p in empty.iterdir()} == {"samples", "run"}
