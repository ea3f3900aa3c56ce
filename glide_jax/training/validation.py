"""The held-out loss, with the same images, timesteps and noise each time."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from glide_jax.data.batches import make_batches
from glide_jax.data.records import Source
from glide_jax.data.sources import open_source
from glide_jax.devices.parallel import Parallel
from glide_jax.errors import UsageError
from glide_jax.training.config import RunConfig
from glide_jax.training.objectives import (
    Batch,
    Metrics,
    Objective,
    Params,
    make_tokenizer,
    to_batch,
)
from glide_jax.training.quartiles import named_metrics


class Validation:
    """The loss of the EMA weights on images that training does not see.

    An image's timestep and noise depend on its position in the order, not on the batch size.

    Attributes:
        batch_size: images processed at a time, on all devices: a microbatch of training, if there
            are as many, and a multiple of the devices.
    """

    def __init__(
        self,
        config: RunConfig,
        objective: Objective,
        trained_on: Source | None = None,
        parallel: Parallel | None = None,
    ):
        """Open the held-out split.

        Args:
            config: the recipe.
            objective: its loss.
            trained_on: the training data, which must differ; None: any split may be measured.
            parallel: the devices of the run; None: one device.

        Raises:
            UsageError: the source has no such split, or it is the training data.
        """
        data = replace(config.data, split=config.validation_split, workers=0)
        source = open_source(data)
        if trained_on is not None and source.fingerprint == trained_on.fingerprint:
            raise UsageError(
                "validate_every needs images that are not trained on: "
                f"{config.data.source} has no split {config.validation_split!r} of its own"
            )
        devices = 1 if parallel is None else len(parallel.devices)
        size = min(config.batch_size // config.accumulate, len(source))
        self.batch_size = max(size // devices, 1) * devices
        self._data, self._source, self._config = data, source, config
        self._process = (0, 1) if parallel is None else (jax.process_index(), jax.process_count())

        def measure(params: Params, batch: Batch, key: jax.Array, *, axis: str | None) -> Metrics:
            return objective.loss(params, batch, key, axis=axis)[1]

        self._measure = (
            jax.jit(partial(measure, axis=None))
            if parallel is None
            else parallel.compile_measure(measure)
        )

    def __call__(self, params: Params, count: int | None = None) -> dict[str, float]:
        """Return the mean loss and its terms over `count` batches.

        With several processes, all must call it.

        Args:
            params: the weights: those of a state, as they lie on the devices.
            count: number of batches; None: the recipe's `validation_batches`.
        """
        config = self._config
        batches = make_batches(
            self._source,
            self._data,
            batch_size=self.batch_size,
            tokenizer=make_tokenizer(config),
            size=config.side,
            seed=0,
            process=self._process,
        )
        measured: list[dict[str, Any]] = []
        for i in range(count or config.validation_batches):
            batch = to_batch(next(batches))
            batch = batch._replace(row=batch.row + np.int32(i * self.batch_size))
            measured.append(jax.device_get(self._measure(params, batch, jax.random.key(0))))
        batches.close()
        return named_metrics(
            {name: np.mean([m[name] for m in measured], axis=0) for name in measured[0]}
        )
