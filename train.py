"""Trains a GLIDE model: python train.py --config configs/emoji64.py

A recipe (`configs/*.py`) says everything; each of its fields can be set here too, for example
`--steps 1000 --data.source pictures --optimiser.learning-rate 3e-4`. A run that was
stopped goes on where its newest checkpoint was made; `--help` after a recipe lists its fields.
"""

import sys
from functools import partial

import jax

from glide_jax import parallel
from glide_jax.data.pipeline import make_batches, to_batch
from glide_jax.data.sources import open_source
from glide_jax.diffusion.losses import make_tables
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.errors import one_line_errors
from glide_jax.models.unet import GLIDE, init_params
from glide_jax.runtime import enable_compilation_cache, trunk_dtype
from glide_jax.training.checkpoint import Checkpoints
from glide_jax.training.command_line import parse_recipe
from glide_jax.training.config import TrainConfig, begin_run
from glide_jax.training.metrics import Logger
from glide_jax.training.state import init_state, make_optimiser, params_from
from glide_jax.training.step import train_step


def train(config: TrainConfig) -> None:
    """Runs a recipe to its end, from its newest checkpoint if there is one."""
    # -- data -------------------------------------------------------------------------------
    source = open_source(config.data)
    batches = make_batches(
        source,
        config.data,
        batch_size=config.batch_size,
        context=config.model.text_ctx,
        size=config.model.image_size,
        seed=config.seed,
    )

    # -- model and optimiser ----------------------------------------------------------------
    devices = jax.local_devices()
    model = GLIDE(config.model, trunk_dtype(config.dtype))
    schedule = make_schedule(config.schedule, config.diffusion_steps)
    optimiser = make_optimiser(config.optimiser, config.steps)
    if config.init_from:
        params = params_from(config.init_from, config.model)
    else:
        params = jax.jit(partial(init_params, model))(jax.random.key(config.seed))
    state = init_state(params, optimiser)

    # -- one step, mapped over the devices ----------------------------------------------------
    step_fn = parallel.pmapped(
        partial(
            train_step,
            model=model,
            optimiser=optimiser,
            tables=make_tables(schedule),
            caption_dropout=config.caption_dropout,
            prediction=config.prediction,
            ema=config.optimiser.ema,
            axis=parallel.AXIS,
        ),
        devices,
    )
    key = jax.random.fold_in(jax.random.key(config.seed), 1)

    # -- resume, or begin -------------------------------------------------------------------
    with Checkpoints(config.folder / "checkpoints", config.keep) as checkpoints:
        begin_run(config)
        if checkpoints.latest is not None:
            state = checkpoints.restore(state, batches)
        first = int(state.step)
        state = parallel.replicate(state, devices)

        # -- the loop -------------------------------------------------------------------------
        with Logger(config, first, len(source), len(devices)) as log:
            for step in range(first + 1, config.steps + 1):
                batch = parallel.split_batch(to_batch(next(batches)), len(devices))
                state, metrics = step_fn(state, batch, key)
                log.step(step, metrics)
                last = step == config.steps
                if step % config.save_every == 0 or last:
                    checkpoints.save(step, jax.device_get(parallel.unreplicate(state)), batches)
                if config.sample_every and (step % config.sample_every == 0 or last):
                    log.samples(step, jax.device_get(parallel.unreplicate(state).ema))
    print(f"{config.steps} steps done: {config.folder}")


def main() -> None:
    """The command line."""
    with one_line_errors("stopped; the same command goes on from the newest checkpoint"):
        config = parse_recipe(sys.argv[1:], __doc__)
        enable_compilation_cache()
        train(config)


if __name__ == "__main__":
    main()
