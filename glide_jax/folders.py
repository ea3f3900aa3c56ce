"""Folders of this package: the cache, and the scripts `sample.py`, `train.py`, `configs/`."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).parent
# In a checkout they lie beside the package, in a wheel inside it: the same files.
SCRIPTS = _PACKAGE / "scripts" if (_PACKAGE / "scripts").is_dir() else _PACKAGE.parent
RECIPES = SCRIPTS / "configs"


def cache_folder() -> Path:
    """Return the cache folder of this package: `$GLIDE_JAX_CACHE`, or below `$XDG_CACHE_HOME`.

    It holds compiled programs, downloaded weights, and indices of shards.
    """
    if explicit := os.environ.get("GLIDE_JAX_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "glide_jax"
