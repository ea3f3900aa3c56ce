"""The noise-prediction loss of weights on splits: the same pictures, timesteps and noise each time.

Of a network that predicts v it is the error of the noise that its output means, so that models
compare: `E |eps_theta(x_t, t, c) - eps|^2`, timesteps drawn evenly  (DDPM, 2006.11239, eq. 14).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from glide_jax.diffusion.losses import Tables, at, make_tables
from glide_jax.diffusion.schedule import make_schedule, to_eps
from glide_jax.models.unet import GLIDE, init_params
from glide_jax.devices.runtime import trunk_dtype
from glide_jax.training.config import TrainConfig
from glide_jax.training.objectives import QUARTILES, Objective, denoising_loss
from glide_jax.training.validation import Validation
from glide_jax.weights.registry import Model


@dataclass(frozen=True)
class NoisePredictor:
    """A GLIDE model as one whose output is the noise, without a variance.

    Its parameters are `{"model": ..., "captions": whether it is given them}`: with captions and
    without is one compiled program.
    """

    model: GLIDE
    tables: Tables
    prediction: str

    def apply(self, variables: Any, *inputs: Any, method: Any = None, **given: Any) -> Any:
        """As `GLIDE.apply`."""
        params = variables["params"]
        variables = {"params": params["model"]}
        if method is not None:
            tokens, mask = inputs
            mask = mask & params["captions"]
            return self.model.apply(variables, tokens, mask, method=method, **given)
        x_t, t, _ = inputs
        output = self.model.apply(variables, *inputs, **given)[..., : x_t.shape[-1]]
        alpha, sigma = at(self.tables.alpha, t), at(self.tables.sigma, t)
        return to_eps(self.prediction, output, x_t, alpha, sigma)


def noise_loss(
    model: Model,
    config: TrainConfig,
    split: str,
    *,
    pictures: int = 256,
    batch_size: int = 16,
    dtype: str = "auto",
) -> dict[str, Any]:
    """The loss of weights on a split, with the captions and without, also by quarter of the chain.

    Args:
        config: the recipe, for data and captions; the rest is as the weights have it, at
            the size at which they draw.
        pictures: at least so many are drawn from the split, in shuffled passes, each with a
            timestep: whole batches, which a small split makes smaller.

    Returns:
        `{"pictures": how many, "captions": {"loss", "quartiles"}, "no captions": {...}}`; of a
        quarter without pictures, None.

    Raises:
        UsageError, GlideError: the split cannot be had.
    """
    schedule = make_schedule(model.schedule, model.diffusion_steps)
    tables = make_tables(schedule)
    module = GLIDE(model.config, trunk_dtype(dtype))
    size = min(batch_size, pictures)
    recipe = replace(
        config,
        model=model.config,
        prediction="eps",
        weighting="none",
        low_res_noise=config.low_res_noise if model.config.low_res_level else 0.0,
        caption_dropout=0.0,
        train_size=0,
        batch_size=size * jax.device_count(),
        accumulate=1,
        validation_split=split,
    )
    predictor = NoisePredictor(module, tables, model.prediction)
    loss = partial(denoising_loss, model=predictor, tables=tables, config=recipe)
    measure = Validation(recipe, Objective(predictor, partial(init_params, module), loss))
    params = jax.tree.map(jnp.asarray, model.params)
    count = -(-pictures // measure.batch_size)
    found: dict[str, Any] = {"pictures": count * measure.batch_size}
    for name, captions in (("captions", True), ("no captions", False)):
        values = measure({"model": params, "captions": jnp.asarray(captions)}, count)
        quartiles = [values.get(f"loss_quartile_{i}") for i in range(QUARTILES)]
        found[name] = {"loss": values["loss"], "quartiles": quartiles}
    return found


def report(model: Model, config: TrainConfig, splits: Sequence[str], **how: Any) -> dict[str, Any]:
    """`noise_loss` on several splits; see there."""
    return {split: noise_loss(model, config, split, **how) for split in splits}
