"""Released names in any file: with prefixes, in wrappers, and one model of several."""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from glide_jax.errors import UsageError
from glide_jax.folders import expand_home
from glide_jax.weights.store import map_arrays
from glide_jax.weights.torch_file import read_torch_file
from glide_jax.weights.torch_pickle import printable

SAFETENSORS = ".safetensors"
# One array of each network that OpenAI released: what comes before its name is a prefix.
ANCHORS = ("input_blocks.0.0.weight", "blocks.input.patch_proj", "blocks.input.w_voc")
# The name of a model without prefix, beside others with one.
TOP = "top"


def split_choice(name: str | Path) -> tuple[Path, str]:
    """Return the file that `FILE` or `FILE:MODEL` names, and the model, "" if none is named."""
    path = expand_home(name)
    file, colon, choice = str(name).rpartition(":")
    if colon and not path.exists() and expand_home(file).is_file():
        return expand_home(file), choice
    return path, ""


def read_released(name: str | Path) -> dict[str, np.ndarray]:
    """Return the arrays under OpenAI's names of a `.pt`, `.ckpt` or `.safetensors` file.

    Prefixes such as `module.` or `ema.`, and dictionaries around the model, are recognised and
    left out; a note on stderr says so.

    Args:
        name: the file; `FILE:MODEL` chooses one of several models in it.

    Raises:
        UsageError: the file holds several models, and none of them or an unknown one is chosen.
        GlideError: the file is broken or hostile.
    """
    path, choice = split_choice(name)
    if path.suffix == SAFETENSORS:
        arrays, _ = map_arrays(path)
    else:
        arrays = read_torch_file(path, unwrap=False)
    return choose(path, arrays, choice)


def choose(path: Path, arrays: Mapping[str, np.ndarray], choice: str = "") -> dict[str, np.ndarray]:
    """Return the arrays of one model, without their prefix.

    Raises:
        UsageError: see `read_released`.
    """
    models = _models(arrays)
    if not models:
        if choice:
            raise UsageError(f"{path} holds no models to choose from: leave out {choice!r}")
        return dict(arrays)
    wanted = _matching(list(models), choice) if choice else list(models)
    if len(wanted) != 1:
        names = [printable(name) for name in models]
        example = next((n for n in names if n != TOP and "ema" in n.lower()), names[0])
        what = f"no single model {choice!r}" if choice else "several models"
        raise UsageError(
            f"{path} holds {what}: its models are {', '.join(names)}; choose one, for example "
            f"{path}:{example}"
        )
    (name,) = wanted
    chosen = models[name]
    if name != TOP:
        unread = len(arrays) - len(chosen)
        left = f"; {unread} other arrays are left out" if unread else ""
        print(f"note: {path}: the model under {printable(name)!r} is read{left}", file=sys.stderr)
    return chosen


def _models(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Return the arrays of each model by its prefix, without it."""
    prefixes = {
        name.removesuffix(anchor)
        for name in arrays
        for anchor in ANCHORS
        if name == anchor or name.endswith(f".{anchor}")
    }
    models: dict[str, dict[str, np.ndarray]] = {p.rstrip(".") or TOP: {} for p in sorted(prefixes)}
    longest = sorted(prefixes, key=len, reverse=True)
    for name, array in arrays.items():
        prefix = next((p for p in longest if name.startswith(p)), None)
        if prefix is not None:
            models[prefix.rstrip(".") or TOP][name.removeprefix(prefix)] = array
    return models


def _matching(names: list[str], choice: str) -> list[str]:
    """Return the names that are a choice, or else those of which it is a part."""
    if choice in names:
        return [choice]
    return [name for name in names if f".{choice}." in f".{name}."]
