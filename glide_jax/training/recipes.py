"""Recipe files: `configs/cfg64.py`, or `configs/cfg64.py:paper` for one of its sizes."""

import importlib.util
import inspect
from dataclasses import replace
from pathlib import Path

from glide_jax.errors import UsageError, nearest
from glide_jax.models.presets import toy_clip, toy_model
from glide_jax.training.config import CLIPTrainConfig, RunConfig

# A size that every recipe has.
TOY = "toy"


def load_recipe(name: str | Path) -> RunConfig:
    """What `get_config` of a recipe file returns.

    Args:
        name: a path, and after a colon one of the sizes that the recipe lists in `SIZES`, or
            "toy"; without one, the recipe's own choice.

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
    if size == TOY:
        return toy(module.get_config())
    sizes = (*getattr(module, "SIZES", ()), TOY)
    if size not in sizes or not inspect.signature(module.get_config).parameters:
        hint = nearest(size, sizes)
        raise UsageError(f"{path} has no size {size!r}: choose one of {', '.join(sizes)}{hint}")
    return module.get_config(size)


def toy(config: RunConfig) -> RunConfig:
    """The same recipe with a small network, at rates and lengths that suit it.

    Two CPU cores overfit sixteen pictures with it in a minute or two. What is trained, and how it
    is weighted, averaged, frozen and spread, stays the recipe's. Weights to begin with are yours
    to name: those of the recipe do not fit.
    """
    clip = isinstance(config, CLIPTrainConfig)
    upsamples = not clip and config.model.upsamples
    inpaints = not clip and config.model.inpaints
    return replace(
        config,
        name=f"{config.name}-toy",
        model=toy_clip(config.model) if clip else toy_model(config.model),
        data=replace(config.data, workers=0),
        optimiser=replace(
            config.optimiser,
            learning_rate=1e-3 if clip else 2e-3,
            decay="constant",
            warmup=10,
            ema=0.95,
            ema_every=15,
        ),
        # Where the text transformer is frozen, captions are learned late.
        steps=300 if clip or inpaints or config.optimiser.freeze else 150,
        batch_size=8 if upsamples else 16,
        accumulate=min(config.accumulate, 2),
        remat=False,
        init_from="",
        save_every=50,
        log_every=10,
        sample_every=0,
        **({} if clip else {"train_size": 0}),
    )
