"""Recipe files: `configs/cfg64.py`, or `configs/cfg64.py:paper` for one of its sizes."""

import importlib.util
import inspect
from pathlib import Path

from glide_jax.errors import UsageError, nearest
from glide_jax.training.config import RunConfig


def load_recipe(name: str | Path) -> RunConfig:
    """What `get_config` of a recipe file returns.

    Args:
        name: a path, and after a colon one of the sizes that the recipe lists in `SIZES`; without
            one, the recipe's own choice.

    Raises:
        UsageError: there is no such file or size, or it has no `get_config`.
    """
    path, colon, size = str(name).rpartition(":")
    if not colon or not path.endswith(".py"):
        path, size = str(name), ""
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        hint = f": {path.parent} has {', '.join(near)}" if near else ""
        raise UsageError(f"there is no recipe {path}{hint}")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UsageError(f"{path} is no recipe: it has no function get_config()")
    if not size:
        return module.get_config()
    sizes = tuple(getattr(module, "SIZES", ()))
    if size not in sizes or not inspect.signature(module.get_config).parameters:
        listed = (
            f"choose one of {', '.join(sizes)}{nearest(size, sizes)}" if sizes else "it has one"
        )
        raise UsageError(f"{path} has no size {size!r}: {listed}")
    return module.get_config(size)
