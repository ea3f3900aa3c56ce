"""Trains a GLIDE model or its noised CLIP: python train.py --config configs/emoji64.py

A recipe (`configs/*.py`, `configs/cfg64.py:paper` for another of its sizes) says everything; each
of its fields can be set here too, for example `--steps 1000 --data.source pictures
--optimiser.learning-rate 3e-4`. A run that was stopped goes on where its newest checkpoint was
made; `--help` after a recipe lists its fields.

`--dry-run v5e:4x4` compiles the step for a TPU slice instead, and says what it needs there.

Several machines: the same command on each of them, with a folder that they share, and
`--coordinator auto` where jax can ask the cluster (TPU slices, Slurm, Open MPI, Kubernetes), else
`--coordinator HOST:PORT --processes N --process I`. SIGTERM or Ctrl-C saves, and ends with exit
code 0.
"""

import sys
from functools import partial

import jax

from glide_jax import parallel
from glide_jax.data.pipeline import make_batches, to_batch
from glide_jax.data.sources import open_source
from glide_jax.dry_run import dry_run
from glide_jax.errors import one_line_errors
from glide_jax.runtime import enable_compilation_cache
from glide_jax.training.checkpoint import Checkpoints
from glide_jax.training.command_line import parse_recipe, take_peers
from glide_jax.training.config import RunConfig, begin_run, check_run
from glide_jax.training.initial import abstract_state, begin_state
from glide_jax.training.metrics import Logger
from glide_jax.training.objectives import make_objective, make_tokenizer
from glide_jax.training.posthoc import snapshot
from glide_jax.training.step import make_step
from glide_jax.training.stopping import Stopping
from glide_jax.training.validation import Validation


def train(config: RunConfig) -> None:
    """Runs a recipe to its end, from its newest checkpoint if there is one."""
    # -- data -------------------------------------------------------------------------------
    check_run(config)
    source = open_source(config.data)
    batches = make_batches(
        source,
        config.data,
        batch_size=config.batch_size,
        tokenizer=make_tokenizer(config),
        size=config.side,
        seed=config.seed,
        process=(jax.process_index(), jax.process_count()),
    )

    # -- model, and one step spread over the devices --------------------------------------------
    objective = make_objective(config)
    spread = parallel.spread(
        config.spread, make_step(config, objective), config.batch_size // config.accumulate
    )
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    held_out = Validation(config, objective, source) if config.validate_every else None

    # -- resume, or begin -------------------------------------------------------------------
    with (
        Checkpoints(config.folder / "checkpoints", config.keep, config.keep_every) as checkpoints,
        Stopping() as stopping,
    ):
        if checkpoints.latest is None:
            first, state = 0, begin_state(config, objective, spread)
        else:
            like = spread.layout(abstract_state(config, objective))
            first, state, position = checkpoints.restore(like, source.fingerprint)
            state = spread.place_state(state)
            batches.set_state(position)
        parallel.on_first(partial(begin_run, config))

        # -- the loop -------------------------------------------------------------------------
        step = first
        with Logger(config, first, len(source)) as log:
            for step in range(first + 1, config.steps + 1):
                batch = spread.place_batch(to_batch(next(batches)))
                state, metrics = spread.step(state, batch, key)
                log.step(step, spread.one_copy(metrics), checkpoints.latest)
                stop = stopping(step)
                if stop or due(step, config.save_every, config.steps):
                    checkpoints.save(
                        step, spread.saved(state), batches.get_state(), source.fingerprint
                    )
                snapshot(config, step, map(spread.whole, state.powers))
                if stop:
                    break
                if held_out and due(step, config.validate_every, config.steps):
                    log.held_out(step, held_out(spread.whole(state.ema)))
                if due(step, config.sample_every, config.steps):
                    log.samples(step, spread.whole(state.ema))
    if jax.process_index() == 0:
        print(f"{step:,} of {config.steps:,} steps done: {config.folder}")


def due(step: int, every: int, last: int) -> bool:
    """Whether to do at this step what is done every so many (0: never), and at the last one."""
    return every > 0 and (step % every == 0 or step == last)


def main() -> None:
    """The command line."""
    with one_line_errors("stopped; the same command goes on from the newest checkpoint"):
        arguments, peers = take_peers(sys.argv[1:])
        config, hardware = parse_recipe(arguments, __doc__)
        if peers:
            parallel.join(peers)
        enable_compilation_cache()
        if hardware is None:
            train(config)
        else:
            print(dry_run(config, hardware))


if __name__ == "__main__":
    main()
