"""The distribution of the timesteps, and so of the noise levels, in training."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.diffusion.schedule import make_schedule
from glide_jax.training.config import TrainConfig
from glide_jax.training.loss_aware import sample_timestep


@dataclass(frozen=True, eq=False)
class TimestepDistribution:
    """A distribution of timesteps.

    Attributes:
        length: timesteps are below this number.
        half_log_snr: `(T,)` log(alpha / sigma) of each timestep, for a normal distribution of it;
            None: uniform timesteps.
        mean, std: of the normal distribution.
        uniform_share: share of timesteps that are sampled uniformly.
        probability: `(T,)` of each timestep; if given, the other fields have no effect.
    """

    length: int
    half_log_snr: np.ndarray | None = None
    mean: float = 0.0
    std: float = 1.0
    uniform_share: float = 0.0
    probability: jax.Array | None = None

    def sample(self, key: jax.Array) -> jax.Array:
        """Return one timestep, int32."""
        if self.probability is not None:
            return sample_timestep(key, self.probability)
        if self.half_log_snr is None:
            return jax.random.randint(key, (), 0, self.length)
        normal_key, share_key, t_key = jax.random.split(key, 3)
        half_log_snr = self.mean + self.std * jax.random.normal(normal_key)
        # np.interp needs increasing points; half_log_snr falls with t.
        t = jnp.interp(-half_log_snr, -self.half_log_snr, np.arange(self.length, dtype=np.float32))
        t = jnp.round(t).astype(jnp.int32)
        everywhere = jax.random.uniform(share_key) < self.uniform_share
        return jnp.where(everywhere, jax.random.randint(t_key, (), 0, self.length), t)


def make_timestep_distribution(config: TrainConfig) -> TimestepDistribution:
    """Return the distribution of a recipe's timesteps  (log-normal: EDM, 2206.00364, sec. 5).

    Loss-aware timesteps are uniform where there is no history of losses: in held-out losses.
    """
    length = config.diffusion_steps
    if config.timestep_distribution != "log-normal":
        return TimestepDistribution(length)
    half_log_snr = make_schedule(config.noise_schedule, length).half_log_snr(np.arange(length))
    return TimestepDistribution(
        length,
        half_log_snr.astype(np.float32),
        config.half_log_snr_mean,
        config.half_log_snr_std,
        config.uniform_timestep_share,
    )
