"""The notebooks run from top to bottom on the embedded models; they have no output."""

import os

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.commands import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Few steps and images: the test is that every line runs, not what is generated.
QUICK = {
    "text2im": {"STEPS": 3, "UPSAMPLER_STEPS": 1, "NUM": 1},
    "inpaint": {"STEPS": 3, "NUM": 1},
}
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def test_both_are_there():
    assert {"text2im", "inpaint"} <= {path.stem for path in NOTEBOOKS}


@each
def test_it_is_valid_and_without_output(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    cells = code_cells(book)
    assert cells and not any(cell.outputs for cell in cells)
    assert {cell.execution_count for cell in cells} == {None}
    assert "widgets" not in book.metadata


@each
def test_the_first_cell_installs_what_is_missing(path):
    book = nbformat.read(path, as_version=4)
    first = code_cells(book)[0].source
    assert 'find_spec("glide_jax") is None' in first and "%pip install" in first
    source = first.split('SOURCE = "')[1].split('"')[0]
    assert (path.parent / source / "setup.cfg").is_file()


@each
def test_it_runs(path, tmp_path):
    book = nbformat.read(path, as_version=4)
    settings = QUICK[path.stem]
    at = [i for i, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", ())]
    assert len(at) == 1
    parameters = book.cells[at[0]].source
    assert all(f"\n{name} = " in f"\n{parameters}" for name in settings)
    changed = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    book.cells.insert(at[0] + 1, nbformat.v4.new_code_cell(changed))

    client = NotebookClient(
        book, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=dict(os.environ))

    cells = code_cells(book)
    assert all(cell.execution_count for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8
    assert list(tmp_path.rglob("*.png"))
