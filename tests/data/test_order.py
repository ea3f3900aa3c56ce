"""The order of the records: a test by statistics, and the rounds that a resumed run keeps."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from glide_jax.data.batches import make_batches
from glide_jax.data.data_config import DataConfig
from glide_jax.data.order import ROUNDS, UNRECORDED_ROUNDS, shuffled
from glide_jax.data.records import Source
from glide_jax.data.resident import make_resident
from glide_jax.models.tokenizers import GPT2Tokenizer

COUNTS = 40_000, 65_536, 1_000_000
POSITIONS, LAGS, BATCH, BINS = 65_536, 32, 2048, 64


@cache
def places(count: int, rounds: int) -> np.ndarray:
    """Return the first records of an order, as shares of the data from 0 to 1."""
    seen = [shuffled(i, count, 5, rounds) for i in range(min(count, POSITIONS))]
    return np.array(seen) / count


def correlations(x: np.ndarray) -> np.ndarray:
    """Return the correlation of positions at each lag, in standard deviations of chance."""
    x = (x - x.mean()) / x.std()
    return np.array([(x[k:] * x[:-k]).sum() / np.sqrt(len(x) - k) for k in range(1, LAGS + 1)])


def batch_excess(x: np.ndarray, count: int) -> float:
    """Return the mean chi-square of batches over bins of the data, in standard deviations."""
    whole = x[: len(x) // BATCH * BATCH].reshape(-1, BATCH)
    found = np.stack([np.bincount((row * BINS).astype(int), minlength=BINS) for row in whole])
    even = BATCH / BINS
    values = ((found - even) ** 2 / even).sum(axis=1)
    # A batch is sampled without replacement.
    expected = (BINS - 1) * (count - BATCH) / (count - 1)
    return (values.mean() - expected) / (expected * np.sqrt(2 / (BINS - 1) / len(values)))


@pytest.mark.parametrize("count", COUNTS)
def test_the_order_of_many_records_is_random(count):
    """The bounds are those of chance, about one in a thousand; the order is fixed by its seed."""
    x = places(count, ROUNDS)
    assert np.abs(correlations(x)).max() < 4.2
    assert abs(batch_excess(x, count)) < 3.3
    near = (np.abs(np.diff(x)) < 0.1).mean()
    assert near == pytest.approx(0.19, abs=0.005)


@pytest.mark.parametrize("count", COUNTS)
def test_four_rounds_fail_the_same_test(count):
    assert np.abs(correlations(places(count, UNRECORDED_ROUNDS))).max() > 20


def many() -> Source:
    """Return more records than a permutation in memory is made for."""
    image = np.zeros((4, 4, 3), np.uint8)
    return Source([{"image": image, "caption": str(i)} for i in range(40_000)])


@pytest.mark.parametrize("kind", ["loader", "resident"])
def test_a_resumed_run_keeps_the_rounds_that_it_began_with(kind):
    source, config = many(), DataConfig(threads=1, prefetch=1)
    common = {"batch_size": 4, "tokenizer": GPT2Tokenizer(8), "size": 4, "seed": 3}

    def opened():
        if kind == "loader":
            return make_batches(source, config, **common)
        on_device = replace(config, on_device="yes")
        return make_resident(source, on_device, steps_per_item=1, **common)

    def records(batches):
        item = next(batches)
        if kind == "resident":
            return item.image[0].tolist()
        tokens = zip(item["tokens"], item["caption_mask"], strict=True)
        return [int(GPT2Tokenizer(8).decode(ids[mask])) for ids, mask in tokens]

    def ordered(rounds):
        return [shuffled(i, 40_000, 3, rounds) for i in range(4, 8)]

    batches = opened()
    next(batches)
    assert batches.get_state() == {"position": 4, "rounds": ROUNDS}
    assert records(batches) == ordered(ROUNDS)
    # A state of an earlier version does not name them.
    batches.set_state({"position": 4})
    assert batches.get_state() == {"position": 4, "rounds": UNRECORDED_ROUNDS}
    assert records(batches) == ordered(UNRECORDED_ROUNDS) != ordered(ROUNDS)
    batches.set_state({"position": 4, "rounds": ROUNDS})
    assert records(batches) == ordered(ROUNDS)
