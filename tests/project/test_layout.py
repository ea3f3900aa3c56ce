"""The shape of the house: import directions, circles, names and sizes of files, docstrings."""

import ast
import re
from collections import Counter

import pytest

from tests.support.commands import ROOT
from tests.support.imports import circle, forbidden, import_graph, room

PACKAGE = ROOT / "glide_jax"
GRAPH = import_graph(PACKAGE)
# What each room may import; errors and folders are free for all.
FREE = {"errors", "folders"}
BASE = {"models", "diffusion", "data", "devices"}
ALLOWED = {
    "errors": set(),
    "folders": {"errors"},
    "models": FREE,
    "diffusion": FREE,
    "data": FREE,
    "devices": FREE,
    "weights": FREE | {"models"},
    "training": FREE | BASE | {"weights"},
    "pipeline": FREE | BASE | {"weights", "training"},
    "evaluation": FREE | BASE | {"weights", "training", "pipeline"},
    "commands": FREE | BASE | {"weights", "training", "pipeline", "evaluation", ""},
    "demo": FREE | BASE - {"data"} | {"weights", "pipeline"},
    "__main__": FREE | {"commands", "demo"},
    # The public names.
    "": FREE | BASE | {"weights", "pipeline"},
}


def python_files():
    folders = (PACKAGE, ROOT / "configs", ROOT / "tests", ROOT / "benchmarks", ROOT / "examples")
    return [ROOT / "train.py", ROOT / "sample.py", *(p for f in folders for p in f.rglob("*.py"))]


def test_no_circle_of_imports():
    assert circle(GRAPH) == []


def test_imports_go_one_way():
    assert forbidden(GRAPH, ALLOWED) == []


def test_pipeline_reads_runs_and_checksums_of_training_and_nothing_else():
    pipeline = [module for module in GRAPH if room(module) == "pipeline"]
    found = {name for module in pipeline for name in GRAPH[module] if room(name) == "training"}
    assert found == {"glide_jax.training.runs", "glide_jax.training.checksums"}


DESIGN = (ROOT / "docs/design/index.md").read_text().split("## Import directions")


def test_the_table_of_imports_says_what_is_tested():
    rows = re.findall(r"^\| (`.*) \| (.*) \|$", DESIGN[1], re.M)
    table = {
        name: set(re.findall(r"`(\w+)`", allowed))
        for names, allowed in rows
        for name in re.findall(r"`(\w+)`", names)
    }
    # The table says this row in words.
    assert (
        table.pop("commands")
        == {"demo"}
        == set(ALLOWED)
        - ALLOWED["commands"]
        - {
            "commands",
            "__main__",
        }
    )
    assert table == {name: ALLOWED[name] - FREE for name in table}
    assert set(table) == {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()} - {
        "assets",
        "commands",
    }


def test_the_map_names_every_file_and_no_other():
    table = re.split(r"^\| \*\*`(\w+)/`\*\* \|", DESIGN[0], flags=re.M)
    named = {
        name: set(
            re.findall(r"`(\w+/|\w+\.py)`", "\n".join(re.findall(r"^\| (`.*?) \|", text, re.M)))
        )
        for name, text in zip(table[1::2], table[2::2], strict=True)
    }
    assert named.pop("assets") == {"errors.py", "folders.py"}
    folders = {name: [p for p in (PACKAGE / name).iterdir()] for name in named}
    there = {
        name: {p.name for p in paths if p.suffix == ".py" and not p.name.startswith("__")}
        | {f"{p.name}/" for p in paths if (p / "__init__.py").exists()}
        for name, paths in folders.items()
    }
    missing = {f"{name}/{f}" for name in there for f in there[name] - named[name]}
    gone = {f"{name}/{f}" for name in there for f in named[name] - there[name]}
    assert (missing, gone) == (set(), set()), "mend the map in docs/design/index.md"


def test_a_planted_circle_and_a_planted_direction_are_found(tmp_path):
    package = tmp_path / "house"
    for name, text in {
        "__init__": "",
        "models/__init__": "",
        "models/a": "def late():\n    from house.models import b",
        "models/b": "from house.models.c import x",
        "models/c": "import typing\nif typing.TYPE_CHECKING:\n    import house.models.a",
        "weights/__init__": "",
        "weights/d": "import house.models.a",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text(text)
    graph = import_graph(package)
    assert circle(graph) == ["house.models.a", "house.models.b", "house.models.c"]
    allowed = {"": set(), "models": set(), "weights": set()}
    assert forbidden(graph, allowed) == ["house.weights.d imports house.models.a"]
    assert forbidden(graph, allowed | {"weights": {"models"}}) == []


def test_every_room_has_its_directions():
    assert {room(module) for module in GRAPH} == set(ALLOWED)


def test_at_most_four_loose_modules():
    assert len(list(PACKAGE.glob("*.py"))) <= 4


def test_no_two_modules_share_a_name():
    names = Counter(p.stem for p in PACKAGE.rglob("*.py") if not p.stem.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_file_is_longer_than_400_lines():
    long = {str(p): n for p in python_files() if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}


def documented(tree, name):
    """Each public definition of a file, with its qualified name and docstring."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield f"{name}.{node.name}", ast.get_docstring(node)
            if isinstance(node, ast.ClassDef):
                yield from documented(node, f"{name}.{node.name}")


# Their methods are documented by the protocols `Parallel` and `Writer`.
PROTOCOLS = ("PMap.", "FSDP.", "TensorBoard.", "Wandb.", "MultiWriter.", "NullWriter.")


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_docstrings_begin_with_a_sentence_that_stands_alone(module):
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text())
    texts = [(module, ast.get_docstring(tree)), *documented(tree, module)]
    missing = [
        name
        for name, text in texts
        if not text and "__" not in name and not name.endswith(".setup")
        and not any(p in name for p in PROTOCOLS)
        and path.read_text().strip()
    ]  # fmt: skip
    weak = [
        name
        for name, text in texts
        if text and text.split()[0] in ("Of", "What's", "Those", "Whither", "So", "It", "As")
    ]
    assert not missing and not weak


# Files whose docstrings are the help of options.
HELP = [
    *PACKAGE.glob("commands/*.py"),
    *PACKAGE.glob("*/*config.py"),
    *(PACKAGE / name for name in ("pipeline/options.py", "evaluation/sweep_options.py")),
    *(PACKAGE / name for name in ("models/presets.py", "demo/launch.py")),
]


@pytest.mark.parametrize("path", HELP, ids=lambda path: path.stem)
def test_no_sentence_of_the_help_is_broken(path):
    """The help begins a new paragraph where a line of the docstring begins with no letter."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    for lines in ((ast.get_docstring(node) or "").splitlines() for node in nodes):
        listed = [line for line in lines if line.startswith(8 * " ")]
        assert [line for line in listed if not line[8].isalnum() and line[8] != " "] == []
