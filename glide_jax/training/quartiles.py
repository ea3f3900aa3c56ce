"""The loss by quarters of the timesteps, the least noisy first."""

import jax
import jax.numpy as jnp
import numpy as np

QUARTILES = 4


def quartile_losses(
    loss: jax.Array, t: jax.Array, steps: int, weight: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Return the loss `(B,)` summed over quarters of the timesteps, and the records in each.

    Both are divided by the size of the batch, so that they average over devices; `named_metrics`
    divides one by the other.

    Args:
        weight: of each record, already in its loss; None: 1.
    """
    quarter = t * QUARTILES // steps
    inside = (quarter[:, None] == jnp.arange(QUARTILES)).astype(jnp.float32)
    share = inside if weight is None else inside * weight[:, None]
    return {"quartile_sum": (inside * loss[:, None]).mean(0), "quartile_share": share.mean(0)}


def named_metrics(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    """Return averaged metrics as named numbers; a quartile without records has none."""
    values = {k: float(v) for k, v in metrics.items() if np.ndim(v) == 0}
    if "quartile_sum" in metrics:
        for i, (total, share) in enumerate(
            zip(metrics["quartile_sum"], metrics["quartile_share"], strict=True)
        ):
            if share:
                values[f"loss_quartile_{i}"] = float(total / share)
    return values
