"""The built wheel, alone in an empty folder: it has all that sampling needs."""

import subprocess
import sys

from tests.commands import ROOT, environment

CODE = """
import sys, pathlib, glide_jax
assert pathlib.Path(glide_jax.__file__).is_relative_to(sys.argv[1]), glide_jax.__file__
pipe = glide_jax.load("emoji64", upsampler="none")
pictures = pipe("a red apple", steps=2, progress=False)
assert pictures.images.shape == (1, 64, 64, 3), pictures.images.shape
from glide_jax.tokenizers import CLIPTokenizer
assert CLIPTokenizer()("a red apple").lengths.tolist() == [5]
"""


def test_the_wheel_samples_alone_in_an_empty_folder(tmp_path):
    def pip(*arguments):
        command = [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)]
        subprocess.run(command, check=True, cwd=tmp_path, timeout=300)

    # A copy, since building leaves its traces beside the sources.
    source = tmp_path / "source"
    ignore = ["--exclude=./.git", "--exclude=./tests", "--exclude=./build"]
    packed = subprocess.run(["tar", "c", *ignore, "."], cwd=ROOT, capture_output=True, check=True)
    source.mkdir()
    subprocess.run(["tar", "x"], cwd=source, input=packed.stdout, check=True)

    pip("wheel", "--no-deps", "--wheel-dir", tmp_path / "wheels", source)
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    (wheel,) = (tmp_path / "wheels").glob("glide_jax-*.whl")
    pip("install", "--no-deps", "--target", site, wheel)
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(site)],
        cwd=empty,
        env=environment() | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not list(empty.iterdir())
