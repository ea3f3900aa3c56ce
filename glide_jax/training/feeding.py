"""How batches reach the training step.

They come from a loader, one step per call, or from device memory, several steps per call. Both ways
give the same records with the same random numbers.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from glide_jax.data.batches import Batches, make_batches
from glide_jax.data.records import Source
from glide_jax.data.resident import Picks, Resident, ResidentBatches, make_resident, take
from glide_jax.devices.parallel import Parallel
from glide_jax.training.config import RunConfig
from glide_jax.training.objectives import Batch, to_batch
from glide_jax.training.step import Control, scan_steps

# More steps in a call gain nothing once the host keeps up.
MAX_STEPS = 20


def steps_per_call(config: RunConfig) -> int:
    """Return the steps of one call, so that checkpoints, samples and the end fall between calls."""
    if jax.default_backend() == "cpu":
        return 1  # XLA runs the operations of a loop on one core
    events = [config.steps, config.save_every, config.keep_every]
    events += [config.sample_every, config.validate_every]
    if config.optimiser.ema_widths:
        events.append(config.optimiser.ema_snapshot_every)
    common = math.gcd(*events)
    return max(k for k in range(1, MAX_STEPS + 1) if common % k == 0)


def open_batches(
    config: RunConfig, source: Source, tokenizer: Any, *, process: tuple[int, int]
) -> Batches | ResidentBatches:
    """Return an endless iterator of the batches of one call each, of one step or several.

    Raises:
        UsageError: see `make_batches` and `make_resident`.
    """
    common: dict[str, Any] = {
        "batch_size": config.batch_size,
        "tokenizer": tokenizer,
        "size": config.side,
        "seed": config.seed,
        "process": process,
    }
    steps = steps_per_call(config)
    resident = make_resident(source, config.data, steps_per_item=steps, **common)
    return make_batches(source, config.data, **common) if resident is None else resident


def steps_of_next_call(batches: Batches | ResidentBatches, step: int) -> int:
    """Set the steps of the next call so that it ends at a multiple of the steps per call.

    So calls end where a checkpoint or a sample is due. `step` is the number of steps done. Only the
    first call of a run that was stopped between two such steps is shorter, which compiles a second
    program.

    Returns:
        The number of steps of the next call.
    """
    if not isinstance(batches, ResidentBatches):
        return 1
    batches.steps_of_next = batches.steps_per_item - step % batches.steps_per_item
    return batches.steps_of_next


def compile_steps(
    config: RunConfig,
    step: Callable[..., Any],
    batches: Batches | ResidentBatches,
    parallel: Parallel,
) -> Callable[[Any, Any, Control], tuple[Any, Any]]:
    """Return the compiled `(state, item, control) -> (state, metrics)` over all devices.

    Args:
        config: the recipe.
        step: from `make_step`.
        batches: from `open_batches`; each call takes an item.
        parallel: the devices.
    """
    if isinstance(batches, ResidentBatches):

        def read(data: Resident, picks: Picks) -> Batch:
            return to_batch(take(data, picks, config.side))

        program = parallel.compile_steps(partial(scan_steps, step=step, read=read), batches.data)
        return lambda state, item, control: program(state, parallel.put_items(item), control)

    def single_step(
        state: Any, batch: Batch, control: Control, *, axis: str | None
    ) -> tuple[Any, Any]:
        return step(state, batch, *control, axis=axis)

    single = parallel.compile(single_step)

    def call(state: Any, item: Any, control: Control) -> tuple[Any, Any]:
        return single(state, parallel.put_batch(to_batch(item)), control)

    return call
