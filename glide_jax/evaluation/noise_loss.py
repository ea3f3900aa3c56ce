"""The noise-prediction loss of weights on splits, with fixed images, timesteps and noise.

`E |eps_theta(x_t, t, c) - eps|^2`, timesteps sampled uniformly  (DDPM, 2006.11239, eq. 14). For a
network that predicts v it is the error of the noise that its output implies: models compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from glide_jax.devices.runtime import trunk_dtype
from glide_jax.diffusion.losses import LossTables, at_timesteps, make_tables
from glide_jax.diffusion.schedule import make_schedule, to_eps
from glide_jax.models.unet import GLIDE, init_params
from glide_jax.training.config import TrainConfig
from glide_jax.training.objectives import Objective, denoising_loss
from glide_jax.training.quartiles import QUARTILES
from glide_jax.training.validation import Validation
from glide_jax.weights.registry import Model


@dataclass(frozen=True, eq=False)
class EpsNetwork:
    """A GLIDE model as a network whose output is the noise, without a variance.

    Its parameters are `{"model": ..., "captions": bool}`. If `captions` is False, the network gets
    empty captions: one compiled program serves both.
    """

    model: GLIDE
    tables: LossTables
    prediction_type: str

    def apply(self, variables: Any, *inputs: Any, method: Any = None, **options: Any) -> Any:
        """Return the predicted noise; with a `method`, what that method of `GLIDE` returns.

        It is called like `GLIDE.apply`. A prediction of v or x_0 is converted to noise, and the
        variance output is dropped. The `method` encodes captions, as empty ones if `captions` is
        False.
        """
        params = variables["params"]
        variables = {"params": params["model"]}
        if method is not None:
            tokens, mask = inputs
            mask = mask & params["captions"]
            return self.model.apply(variables, tokens, mask, method=method, **options)
        x_t, t, _ = inputs
        output = self.model.apply(variables, *inputs, **options)
        assert isinstance(output, jax.Array)
        alpha, sigma = at_timesteps(self.tables.alpha, t), at_timesteps(self.tables.sigma, t)
        return to_eps(self.prediction_type, output[..., : x_t.shape[-1]], x_t, alpha, sigma)


def noise_loss(
    model: Model,
    config: TrainConfig,
    split: str,
    *,
    images: int = 256,
    batch_size: int = 16,
    dtype: str = "auto",
) -> dict[str, Any]:
    """Return the loss on a split with and without captions, also by quarter of the timesteps.

    Args:
        config: the recipe, for data and captions. Sizes and schedule are those of the weights, and
            images have the size at which the weights generate.
        images: at least this many are read from the split, in shuffled passes, each with one
            timestep. Only whole batches are measured; a small split makes batches smaller.
        batch_size: images at a time; it does not change which images are read.
        dtype: dtype of the trunk; see `glide_jax.load`.

    Returns:
        `{"images": how many, "captions": {"loss", "quartiles"}, "no captions": {...}}`. A quarter
        without images is None.

    Raises:
        UsageError, GlideError: the split does not exist or cannot be read.
    """
    schedule = make_schedule(model.noise_schedule, model.diffusion_steps)
    tables = make_tables(schedule)
    module = GLIDE(model.config, trunk_dtype(dtype))
    size = min(batch_size, images)
    share = config.low_res_timestep_share if model.config.low_res_timestep else 0.0
    recipe = replace(
        config,
        model=model.config,
        prediction_type="eps",
        weighting="none",
        low_res_timestep_share=share,
        caption_dropout=0.0,
        train_image_size=0,
        batch_size=size,
        accumulate=1,
        validation_split=split,
    )
    # `denoising_loss` names GLIDE as its model, and calls only `apply`.
    predictor: Any = EpsNetwork(module, tables, model.prediction_type)
    loss = partial(denoising_loss, model=predictor, tables=tables, config=recipe)
    measure = Validation(recipe, Objective(predictor, partial(init_params, module), loss))
    params = jax.tree.map(jnp.asarray, model.params)
    count = -(-images // measure.batch_size)
    losses: dict[str, Any] = {"images": count * measure.batch_size}
    for name, captions in (("captions", True), ("no captions", False)):
        values = measure({"model": params, "captions": jnp.asarray(captions)}, count)
        quartiles = [values.get(f"loss_quartile_{i}") for i in range(QUARTILES)]
        losses[name] = {"loss": values["loss"], "quartiles": quartiles}
    return losses


def report(
    model: Model, config: TrainConfig, splits: Sequence[str], **options: Any
) -> dict[str, Any]:
    """Return `noise_loss` of each split; see there for the options."""
    return {split: noise_loss(model, config, split, **options) for split in splits}
