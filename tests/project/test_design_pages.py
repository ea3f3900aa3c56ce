"""The programs on the pages of docs/design run as they are written."""

import importlib.util
import re
import sys
from zipfile import ZipFile

from PIL import Image

from glide_jax.data.data_config import DataConfig
from tests.support.commands import ROOT, run


def python_blocks(page):
    text = (ROOT / "docs" / "design" / page).read_text()
    return re.findall(r"^( *)```python\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)


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
