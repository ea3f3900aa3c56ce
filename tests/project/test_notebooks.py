"""The notebooks run from top to bottom on the embedded models; they have no output."""

import importlib.util
import os

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

from tests.support.commands import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Few steps and images: the test is that every line runs, not what is generated.
QUICK = {
    "text2im": {"STEPS": 3, "UPSAMPLER_STEPS": 1, "NUM": 1},
    "inpaint": {"STEPS": 3, "NUM": 1},
    "clip_guided": {"STEPS": 2, "NUM": 1},
    "train": {"STEPS": 2, "BATCH": 2, "PROMPTS": ("a blue ring",)},
}
# The notebook that trains ends with weights.
FILES = {"train": ("runs/mine/config.json", "my-weights/model.safetensors")}
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def first_cell(path):
    return code_cells(nbformat.read(path, as_version=4))[0].source


def test_all_are_there():
    assert {path.stem for path in NOTEBOOKS} == set(QUICK)


@each
def test_it_is_valid_and_without_output(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    cells = code_cells(book)
    assert cells and not any(cell.outputs for cell in cells)
    assert {cell.execution_count for cell in cells} == {None}
    assert "widgets" not in book.metadata


def install(monkeypatch, folder, *, installed=False):
    """Run the first cell in a folder; return what it asks pip to install."""
    asked, find_spec = [], importlib.util.find_spec

    class Shell:
        def run_line_magic(self, name, line):
            asked.append((name, line, namespace["package"]))

    def found(name, *rest):
        return find_spec(name, *rest) if installed or name != "glide_jax" else None

    namespace = {"get_ipython": Shell}
    monkeypatch.setattr(importlib.util, "find_spec", found)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("os.path.exists", lambda path: False)
    monkeypatch.chdir(folder)
    exec(TransformerManager().transform_cell(first_cell(NOTEBOOKS[0])), namespace)
    assert all(call[:2] == ("pip", 'install -q "{package}"') for call in asked)
    return [call[2] for call in asked]


def copy_of_the_repository(folder):
    (folder / "glide_jax").mkdir(parents=True)
    (folder / "setup.cfg").touch()
    return folder


def test_the_first_cell_is_the_same_in_all():
    assert len({first_cell(path) for path in NOTEBOOKS}) == 1


def test_the_first_cell_installs_nothing_if_the_package_is_there(monkeypatch, tmp_path):
    assert install(monkeypatch, copy_of_the_repository(tmp_path), installed=True) == []


def test_the_first_cell_works_in_the_repository(monkeypatch):
    assert install(monkeypatch, ROOT / "notebooks") == [str(ROOT)]


@pytest.mark.parametrize("where", [".", "..", "glide-jax-main"])
def test_the_first_cell_finds_a_copy_of_the_repository(monkeypatch, tmp_path, where):
    here = tmp_path / "content"
    here.mkdir()
    copy = copy_of_the_repository((here / where).resolve())
    assert install(monkeypatch, here) == [str(copy)]


def test_the_first_cell_finds_a_wheel(monkeypatch, tmp_path):
    wheel = tmp_path / "glide_jax-0.2.0-py3-none-any.whl"
    wheel.touch()
    assert install(monkeypatch, tmp_path) == [str(wheel)]


def test_the_first_cell_says_what_is_missing(monkeypatch, tmp_path):
    # A package without `setup.cfg` beside it is not a copy of the repository.
    (tmp_path / "glide_jax").mkdir()
    with pytest.raises(ModuleNotFoundError) as error:
        install(monkeypatch, tmp_path)
    assert str(error.value) == (
        "glide-jax is not here: clone or upload its repository, or upload its wheel, into "
        f"{tmp_path}, and run this cell again"
    )


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
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 7
    assert list(tmp_path.rglob("*.png"))
    assert all((tmp_path / name).is_file() for name in FILES.get(path.stem, ()))
