"""The order of a run's records: one shuffled pass over the source after another."""

from functools import lru_cache

import numpy as np
from grain.experimental import index_shuffle

from glide_jax.data.records import Part, Source
from glide_jax.data.storage import BrokenRecord
from glide_jax.errors import UsageError

# grain's shuffle needs no memory, but takes milliseconds per record of a small source.
_PERMUTED = 1 << 15
# Rounds of grain's shuffle. With 4, neighbours in the order of a million records correlate at 0.4,
# with 8 still at 0.04; with 16 no correlation is left.
ROUNDS = 16
# Of runs that were begun before the rounds were part of the state of the data iterator.
UNRECORDED_ROUNDS = 4


def shuffled(position: int, count: int, seed: int, rounds: int = ROUNDS) -> int:
    """Return the index of the record at a position of the run's order.

    Each pass contains every record once, in an order of its own.

    Args:
        position: from 0 on, without end.
        count: number of records.
        seed: of the run.
        rounds: of the shuffle of many records; even, at least 4.
    """
    number, i = divmod(position, count)
    if count < _PERMUTED:
        return int(_permutation(count, seed, number)[i])
    (pass_seed,) = np.random.SeedSequence((seed % 2**32, number)).generate_state(1)
    return index_shuffle(i, max_index=count - 1, seed=int(pass_seed), rounds=rounds)


def mixed(position: int, parts: tuple[Part, ...], seed: int, rounds: int = ROUNDS) -> int:
    """Return the index of the record at a position of the order of a mixture.

    Positions form blocks as long as the sum of the weights. In each block every part has as many
    positions as its weight, in random order; its records follow in a shuffled order of its own.
    """
    weights = tuple(part.weight for part in parts)
    block, i = divmod(position, sum(weights))
    owners, earlier = _block(weights, seed, block)
    number = int(owners[i])
    (own_seed,) = np.random.SeedSequence((seed % 2**32, number, 3)).generate_state(1)
    taken = block * weights[number] + int(earlier[i])
    first = sum(part.count for part in parts[:number])
    return first + shuffled(taken, parts[number].count, int(own_seed), rounds)


@lru_cache(maxsize=4)
def _block(weights: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the part of each position of a block, and how many earlier ones have that part."""
    owners = np.repeat(np.arange(len(weights), dtype=np.int32), weights)
    owners = np.random.default_rng((seed % 2**32, block, 4)).permutation(owners)
    earlier = np.empty(len(owners), np.int32)
    for number, weight in enumerate(weights):
        earlier[owners == number] = np.arange(weight)
    return owners, earlier


@lru_cache(maxsize=16)  # of each part of a mixture
def _permutation(count: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng((seed % 2**32, number, 0)).permutation(count)


def shuffled_groups(position: int, groups: bytes, seed: int) -> int:
    """Return the index of the record at a position, where the records of a group are neighbours.

    Like `shuffled`, with `groups` from `groups_of`.
    """
    number, i = divmod(position, len(groups) // 4)
    return int(_group_permutation(groups, seed, number)[i])


@lru_cache(maxsize=4)
def _group_permutation(groups: bytes, seed: int, number: int) -> np.ndarray:
    ids = np.frombuffer(groups, np.int32)
    rng = np.random.default_rng((seed % 2**32, number, 2))
    # The last key is the primary one: a random number per group, then one per record.
    return np.lexsort((rng.random(len(ids)), rng.permutation(ids.max() + 1)[ids]))


def groups_of(source: Source, field: str) -> bytes:
    """Return each record's group number; records with the same text in a field form a group.

    Returns:
        N int32 values, as bytes because a cache needs a hash.

    Raises:
        UsageError: a record has no such field.
    """
    values = []
    for number in range(len(source)):
        try:
            value = source.records[number].get(field)
        except BrokenRecord:
            value = ""  # replaced at its position
        if not isinstance(value, str):
            raise UsageError(f"group_by: record {number} of {source} has no text field {field!r}")
        values.append(value)
    return np.unique(values, return_inverse=True)[1].astype(np.int32).tobytes()
