"""What a row of the sampler costs the host: python -m benchmarks.host_rows [ARRAYS]

It streams 200 rows of a network that computes nothing, with as many arrays of weights as the
released base model has (783), or as many as are named. The result is the best of five runs.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.diffusion.guidance import Network, clamp_x_0, classifier_free
from glide_jax.diffusion.sampling import make_plan, stream_plan
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.diffusion.solvers import SOLVERS

ROWS, ARRAYS = 200, 783


def network(params: dict[str, jax.Array], x: jax.Array, t: jax.Array, cond: object) -> jax.Array:
    """Return noise and variance that depend on the first weight."""
    return jnp.concatenate([x * params["0"], x], axis=-1)


def milliseconds(arrays: int) -> float:
    """Return the time of a row."""
    networks = {"main": Network(network, {str(i): jnp.float32(0.1) for i in range(arrays)})}
    guidance = [classifier_free(scale=3.0), clamp_x_0()]
    timesteps = np.linspace(990, 0, ROWS)
    run = make_plan(make_schedule("cosine", 1000), timesteps, SOLVERS["dpm++2m"], guidance)
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    keys = jax.random.split(jax.random.key(1), 1)
    times = []
    for _ in range(6):
        begun = time.perf_counter()
        *_, (_, last) = stream_plan(networks, {"caption": {}, "null": {}}, run, x, keys)
        last.x.block_until_ready()
        times.append(time.perf_counter() - begun)
    return min(times[1:]) / ROWS * 1e3


def main() -> None:
    """Print the time of a row."""
    arrays = int(sys.argv[1]) if len(sys.argv) > 1 else ARRAYS
    print(f"{milliseconds(arrays):.2f} ms a row, {arrays} arrays of weights")


if __name__ == "__main__":
    main()
