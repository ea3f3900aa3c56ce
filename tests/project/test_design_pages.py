"""The programs on the pages of docs/design run as they are written; what the pages name exists."""

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from zipfile import ZipFile

import pytest
from PIL import Image

from glide_jax.data.data_config import DataConfig
from tests.support.commands import ROOT, make_weights, run

DESIGN = ROOT / "docs" / "design"
PAGES = sorted(path.name for path in DESIGN.glob("*.md"))
# Programs in one process: the imports of each would take longer than the program.
RUN_ALL = "import runpy, sys; [runpy.run_path(name) for name in sys.argv[1:]]"


def python_blocks(page):
    text = (DESIGN / page).read_text()
    return re.findall(r"^( *)```python\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights") / "tiny")


def run_programs(folder, weights, programs):
    """Run programs in a folder, with tiny weights in place of `emoji64`."""
    names = [f"program_{i}.py" for i in range(len(programs))]
    for name, program in zip(names, programs, strict=True):
        (folder / name).write_text(program.replace('"emoji64"', repr(str(weights))))
    result = run("-c", RUN_ALL, *names, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


@cache
def words_and_files():
    """Return all words of the project's programs, and the names of these."""
    folders = ("glide_jax", "configs", "tests", "examples", "benchmarks")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    paths += [ROOT / "sample.py", ROOT / "train.py"]
    text = "\n".join(path.read_text() for path in paths if path != Path(__file__))
    words = set(re.findall(r"\w+", text)) | {path.stem for path in paths}
    return words, {str(path.relative_to(ROOT)) for path in paths}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    words, files = words_and_files()
    prose = re.sub(r"```\w*\n.*?```", "", (DESIGN / page).read_text(), flags=re.DOTALL)
    programs = "\n".join(program for _, program in python_blocks(page))
    # A page may name what its own programs define, and the files that they are saved in.
    words = words | set(re.findall(r"\w+", programs))
    saved = set(re.findall(r"[Ss]ave (?:it|this) as `(\w+\.py)`", prose))
    spans = re.findall(r"`([^`]+)`", prose)
    named = {word for span in spans for word in re.findall(r"[A-Za-z_]\w+", span)}
    named -= {name.removesuffix(".py") for name in saved}
    assert named - words == set()
    named_files = {path for span in spans for path in re.findall(r"[\w/]+\.py\b", span)} - saved
    unknown = {path for path in named_files if not any(f"/{f}".endswith(f"/{path}") for f in files)}
    assert unknown == set()


def test_the_sampler_of_the_page_has_the_order_that_the_page_states(tmp_path, weights):
    page = "add-a-sampler.md"
    (_, solver), (_, check), (_, sample) = python_blocks(page)
    (tmp_path / "my_sampler.py").write_text(solver)
    printed = run_programs(tmp_path, weights, [check, sample])
    (stated,) = re.findall(r"It prints `(.*?)`", (DESIGN / page).read_text())
    assert stated.startswith("order 1.") and stated in printed.splitlines()
    assert (tmp_path / "samples" / "00000_a-red-apple.png").is_file()


def test_the_guidances_of_the_page_run_and_change_nothing_when_off(tmp_path, weights):
    page = "add-a-guidance.md"
    (_, fading), (_, use), (_, perp_neg), (_, use_negative), (_, check) = python_blocks(page)
    (tmp_path / "my_guidance.py").write_text(f"{fading}\n\n{perp_neg}")
    run_programs(tmp_path, weights, [use, use_negative, check])
    assert len(list((tmp_path / "samples").glob("*.png"))) == 3


def save_source(folder):
    (_, source), (_, check), (_, call) = python_blocks("add-a-data-source.md")
    (folder / "zip_source.py").write_text(source)
    (folder / "check.py").write_text(check)
    return call


def test_the_data_source_of_the_page_passes_its_check(tmp_path):
    save_source(tmp_path)
    result = run("check.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "a blue square (64, 80, 3)" in result.stdout
    assert "'image': (4, 32, 32, 3)" in result.stdout


def test_the_data_source_of_the_page_is_opened_by_name_with_filters(tmp_path, monkeypatch):
    call = save_source(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    text = (ROOT / "glide_jax" / "data" / "sources.py").read_text()
    before = '    if name.endswith(".npz")'
    assert text.count(before) == 1, "the page says: before the test for .npz"
    (tmp_path / "mended.py").write_text(
        text.replace(before, f"{call}{before}").replace(
            "import os\n", "import os\nfrom zip_source import open_zip\n", 1
        )
    )
    spec = importlib.util.spec_from_file_location("mended", tmp_path / "mended.py")
    mended = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mended)
    path = tmp_path / "squares.zip"
    write_squares(path, {"small": 8, "large": 32})
    assert len(mended.open_source(DataConfig(source=str(path)))) == 2
    (record,) = mended.open_source(DataConfig(source=str(path), min_side=16))
    assert (record["caption"], record["image"].shape) == ("a large square", (32, 32, 3))
    sys.modules.pop("zip_source")


def write_squares(path, sides):
    with ZipFile(path, "w") as archive:
        for name, side in sides.items():
            Image.new("RGB", (side, side)).save(path.parent / "square.png")
            archive.write(path.parent / "square.png", f"{name}.png")
            archive.writestr(f"{name}.txt", f"a {name} square")
