"""The imports of a package, read from its files: circles and forbidden directions."""

import ast
from collections.abc import Mapping
from pathlib import Path

Graph = dict[str, set[str]]


def module_name(path: Path, root: Path) -> str:
    """Return the dotted name of a file below `root`, which is the folder of the package."""
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(root: Path) -> Graph:
    """Return the modules of a package and what each imports of it, wherever in the file."""
    files = {module_name(path, root): path for path in sorted(root.rglob("*.py"))}
    return {name: _imports(path, set(files)) for name, path in files.items()}


def _imports(path: Path, modules: set[str]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from package import module` imports the module.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in names]
        else:
            continue
        found |= set(names) & modules
    return found


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the modules of a circle of imports, in order; empty if there is none."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for imported in sorted(graph[module]):
            if found := search(imported, [*path, module]):
                return found
        done.add(module)
        return []

    for module in sorted(graph):
        if found := search(module, []):
            return found
    return []


def room(module: str) -> str:
    """Return the folder of a module, or its own name where it lies loose in the package."""
    return [*module.split("."), ""][1]


def forbidden(graph: Mapping[str, set[str]], allowed: Mapping[str, set[str]]) -> list[str]:
    """Return the imports that go against the directions.

    Args:
        allowed: for each room, the other rooms that it may import.
    """
    return [
        f"{module} imports {imported}"
        for module, imports in sorted(graph.items())
        for imported in sorted(imports)
        if room(imported) not in allowed[room(module)] | {room(module)}
    ]
