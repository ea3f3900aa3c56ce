"""Recipes by name or by path: `cfg64`, `cfg64:paper`, `my/recipe.py`, `my/recipe.py:toy`."""

import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from glide_jax.errors import UsageError, did_you_mean
from glide_jax.folders import RECIPES, expand_home
from glide_jax.models.presets import toy_clip, toy_model
from glide_jax.training.config import CLIPTrainConfig, RunConfig, TrainConfig
from glide_jax.training.optimiser_config import OptimiserConfig

# A size that every recipe has.
TOY = "toy"


def load_recipe(name: str | Path) -> RunConfig:
    """Return the config that a recipe's `get_config` makes.

    Args:
        name: a recipe of `configs/` without its ending, or the path of a `.py` file; then
            optionally a colon and a size, one of the recipe's `SIZES` or "toy". Without a size the
            recipe chooses one.

    Raises:
        UsageError: there is no such recipe or size, or the file has no `get_config`.
    """
    text, colon, size = str(name).rpartition(":")
    if not colon or size.endswith(".py"):
        text, size = str(name), ""
    path = find_recipe(text)
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
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
        hint = did_you_mean(size, sizes)
        choose = f"choose one of {', '.join(sizes)}"
        raise UsageError(f"{text} has no size {size!r}{hint or ':'} {choose}")
    return module.get_config(size)


def find_recipe(name: str) -> Path:
    """Return the file of a recipe: the name itself if it ends in `.py`, else one of `configs/`.

    Raises:
        UsageError: there is no such file.
    """
    by_path = name.endswith(".py")
    path = expand_home(name) if by_path else RECIPES / f"{name}.py"
    if path.is_file():
        return path
    folder = path.parent if by_path else RECIPES
    known = sorted(p.name if by_path else p.stem for p in folder.glob("*.py"))
    if not known:
        raise UsageError(f"there is no recipe {name}: name one (cfg64), or the path of a .py file")
    hint = did_you_mean(Path(name).name, known)
    choose = f"choose one of {', '.join(known)}"
    where = f" in {folder}" if by_path else ", or name a .py file"
    raise UsageError(f"there is no recipe {name}{hint or ':'} {choose}{where}")


def toy(config: RunConfig) -> RunConfig:
    """Return the same recipe with a small network, and with rates and lengths that suit it.

    Two CPU cores overfit it to sixteen images in a minute or two. Objective, weighting, EMA, frozen
    parts and parallelism stay those of the recipe. The weights that the recipe starts from do not
    fit: `init_from` and the teacher are empty.
    """
    rate = 2e-3
    # With a frozen text transformer captions take longer.
    slow_captions = bool(config.optimiser.freeze)
    changes: Mapping[str, Any]
    if isinstance(config, CLIPTrainConfig):
        rate = 1e-3
        changes = {"model": toy_clip(config.model), "steps": 300, "batch_size": 16}
    else:
        assert isinstance(config, TrainConfig)
        model = config.model
        if config.objective == "consistency":
            rate = 5e-4  # it starts from trained weights
        changes = {
            "model": toy_model(model),
            "steps": 300 if slow_captions or model.inpaints else 150,
            "batch_size": 8 if model.upsamples else 16,
            "train_image_size": 0,
        }
        if config.objective == "consistency":
            low, high = config.distillation.guidance_scales
            changes["distillation"] = replace(
                config.distillation,
                teacher="",
                guidance_scales=(low, high) if low < high else (1.0, 1.0),
                teacher_steps=(4, 16),
            )
    return replace(
        config,
        name=f"{config.name}-toy",
        data=replace(config.data, workers=0),
        optimiser=replace(
            config.optimiser,
            learning_rate=rate,
            lr_decay="constant",
            lr_decay_share=OptimiserConfig.lr_decay_share,
            warmup=10,
            ema=0.95,
            ema_snapshot_every=15
            if config.optimiser.ema_widths
            else OptimiserConfig.ema_snapshot_every,
        ),
        minutes=0.0,
        accumulate=min(config.accumulate, 2),
        remat=False,
        init_from="",
        save_every=50,
        log_every=10,
        sample_every=0,
        **changes,
    )
