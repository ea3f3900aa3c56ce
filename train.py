"""Train a GLIDE model or its noised CLIP: python train.py --config cfg64 --data.source FOLDER

If glide-jax is installed, write `glide-jax train` instead of `train.py` in the examples.

A recipe is a Python file. --config takes the name of a recipe in configs/ (cfg64), or the path of
your own (my/recipe.py). A size may follow a colon (cfg64:paper). Every field of the recipe is an
option:

  train.py --config cfg64 --data.source images --steps 1000 --optimiser.learning-rate 3e-4
  train.py --config cfg64 --help              all options, with the values of this recipe
  train.py --config cfg64 --dry-run v5e:4x4   estimates memory and time for TPUs, without one
  train.py --config cfg64 --dry-run cpu       the same for this machine

Repeat the command to resume a stopped run from its newest checkpoint. On SIGTERM and Ctrl-C the
training saves a checkpoint and ends with exit code 0.

Several machines: start the same command on each of them, with an --out folder that they share. The
processes find each other on TPU slices and under Slurm, Open MPI and Kubernetes. On other clusters
add the options --coordinator HOST:PORT --num-processes N --process-id I.
"""

import sys
from contextlib import closing
from dataclasses import replace
from functools import partial

import jax

from glide_jax.data.sources import open_source
from glide_jax.devices import processes
from glide_jax.devices.parallel import make_parallel
from glide_jax.devices.runtime import prepare_process
from glide_jax.errors import one_line_errors
from glide_jax.pipeline.loading import sample_grid
from glide_jax.pipeline.plan_checks import check_defaults
from glide_jax.training.checkpoint import Checkpoints
from glide_jax.training.checksums import checksums
from glide_jax.training.clock import Clock
from glide_jax.training.command_line import parse_recipe, take_process_options
from glide_jax.training.config import RunConfig, TrainConfig, check_same_model, write_config
from glide_jax.training.dry_run import dry_run
from glide_jax.training.feeding import compile_steps, open_batches, steps_of_next_call
from glide_jax.training.initial import frozen_base, initial_state
from glide_jax.training.locking import lock_run
from glide_jax.training.logger import Logger
from glide_jax.training.objectives import make_objective, make_tokenizer
from glide_jax.training.post_hoc_ema import save_ema_snapshots
from glide_jax.training.resuming import print_changes
from glide_jax.training.runs import model_of
from glide_jax.training.state import abstract_state, fit_loss_scale, saved_part
from glide_jax.training.step import Control, make_step
from glide_jax.training.stopping import Stopping
from glide_jax.training.unused_fields import check_no_unused_fields
from glide_jax.training.validation import Validation


def train(config: RunConfig) -> None:
    """Train a recipe to its last step, from its newest checkpoint if there is one."""
    # -- data -------------------------------------------------------------------------------
    check_recipe(config)
    check_same_model(config)
    source = open_source(config.data)
    batches = open_batches(
        config,
        source,
        make_tokenizer(config),
        process=(jax.process_index(), jax.process_count()),
    )

    # -- model, and one step over all devices -------------------------------------------------
    objective = make_objective(config)
    parallel = make_parallel(
        config.parallelism, config.batch_size // config.accumulate, config.devices_per_copy
    )
    train_steps = compile_steps(config, make_step(config, objective), batches, parallel)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    validation = Validation(config, objective, source, parallel) if config.validate_every else None

    # -- resume, or start ---------------------------------------------------------------------
    with (
        closing(batches),
        Checkpoints(config.folder / "checkpoints", config.keep, config.keep_every) as checkpoints,
        Stopping() as stopping,
    ):
        if checkpoints.latest is None:
            start_step, state, loop_state = 0, initial_state(config, objective, parallel), {}
        else:
            saved_shapes = saved_part(abstract_state(config, objective), objective)
            restore_target = parallel.restore_target(saved_shapes)
            start_step, state, loop_state = checkpoints.restore(restore_target, source.fingerprint)
            print_changes(config, start_step, loop_state.get("seconds", 0.0))
            state = fit_loss_scale(state, objective)
            if base := frozen_base(config, objective):
                state = replace(state, reference_params=base)
            state = parallel.put_state(state)
            batches.set_state(loop_state)
        clock = Clock(config, loop_state)
        processes.on_first_process(partial(write_config, config))
        processes.on_first_process(partial(source.faults.save, config.folder / "left_out.txt"))

        # -- the loop -------------------------------------------------------------------------
        step, stop = start_step, clock.over
        with Logger(config, start_step, len(source), sample_grid) as log:
            # The clock is read once a pass: where it stops the run, a checkpoint is saved.
            while step < config.steps and not stop:
                count = steps_of_next_call(batches, step)
                lr_factor, item = clock.lr_factor(), next(batches)
                control = Control(key, lr_factor, clock.time_share)
                state, metrics = train_steps(state, item, control)
                clock.started(metrics)
                step += count
                log.steps(step, count, parallel.gather(metrics), checkpoints.latest)
                stop = stopping(step) or clock.over
                if stop or due(step, config.save_every, config.steps):
                    # On CPUs, a save can take a thread that the collectives of the step wait for.
                    jax.block_until_ready(state)
                    saved = saved_part(state, objective)
                    checkpoints.save(
                        step,
                        parallel.for_checkpoint(saved),
                        batches.get_state() | clock.get_state(),
                        source.fingerprint,
                        checksums(parallel.one_copy(saved)),
                    )
                save_ema_snapshots(config, step, map(parallel.gather, state.power_emas))
                if stop:
                    break
                if validation and due(step, config.validate_every, config.steps):
                    with log.paused(), clock.paused():
                        log.held_out(
                            step,
                            validation(objective.full_params(state.ema, state.reference_params)),
                        )
                if due(step, config.sample_every, config.steps):
                    with log.paused(), clock.paused():
                        full_params = objective.full_params(state.ema, state.reference_params)
                        log.samples(step, parallel.for_sampling(full_params))
            log.end(step, checkpoints.latest)
    if jax.process_index() == 0:
        print(f"{step:,} of {config.steps:,} steps done: {config.folder}")


def check_recipe(config: RunConfig) -> None:
    """Check a recipe before training.

    These checks are not made when a stored recipe is read, so that older runs can be read.

    Raises:
        UsageError: a field has no effect, or the model cannot be sampled with its `sample_` fields.
    """
    check_no_unused_fields(config)
    if isinstance(config, TrainConfig):
        check_defaults(model_of(config, {}))


def due(step: int, every: int, last: int) -> bool:
    """Whether this is the last step or a multiple of `every`; never for 0."""
    return every > 0 and (step % every == 0 or step == last)


def main() -> None:
    """Run the command line."""
    with one_line_errors("stopped; the same command resumes from the newest checkpoint"):
        arguments, membership = take_process_options(sys.argv[1:])
        config, hardware = parse_recipe(arguments, __doc__ or "")
        if hardware is not None:
            prepare_process(dry_run=True)
            check_recipe(config)
            print(dry_run(config, hardware))
            return
        links = processes.join(membership)
        prepare_process()
        again = "start all processes again, with the same command"
        with processes.ending_with_peers(links, again), lock_run(config.folder):
            train(config)


if __name__ == "__main__":
    main()
