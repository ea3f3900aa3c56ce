"""Mixtures: several sources, each seen in the share that its weight says."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any

import numpy as np

from glide_jax.data.faults import Fault, Faults
from glide_jax.data.records import Part, Records, Source, digest, locate
from glide_jax.errors import UsageError

# Records of the largest block in which every source has its exact share.
_LONGEST = 1 << 20


def parse_mixture(texts: Iterable[str]) -> dict[str, Fraction]:
    """Return the weight of each source of `images:3`, or of `images:3,gs://bucket/more:1`.

    The weight follows the last colon, so a name may have colons itself.

    Raises:
        UsageError: a weight is missing or not positive, or a source is there twice.
    """
    weights: dict[str, Fraction] = {}
    for text in texts:
        start = 0
        for weight in re.finditer(r":\s*([-+\w.]+)\s*(?:,|$)", text):
            if not _is_number(weight.group(1)):
                continue
            name = text[start : weight.start()].strip()
            if not name:
                raise UsageError(f"mixture: {text!r} names no source before {weight.group()!r}")
            if name in weights:
                raise UsageError(f"mixture names {name} twice: add its weights")
            value = float(weight.group(1))
            if not (math.isfinite(value) and value > 0):
                raise UsageError(
                    f"mixture: the weight of {name} must be positive and finite, not "
                    f"{weight.group(1)}"
                )
            weights[name] = Fraction(weight.group(1))
            start = weight.end()
        if unweighted := text[start:].strip():
            raise UsageError(
                f"mixture: {unweighted!r} has no weight: write SOURCE:WEIGHT, such as images:1"
            )
        if not start:
            raise UsageError("mixture names an empty source: write SOURCE:WEIGHT, such as images:1")
    integer_weights(list(weights.values()))
    return weights


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def integer_weights(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Return the smallest integers in the proportion of some weights.

    Raises:
        UsageError: their sum is too large.
    """
    common = math.lcm(*(weight.denominator for weight in weights))
    integers = [int(weight * common) for weight in weights]
    integers = [number // math.gcd(*integers) for number in integers]
    if sum(integers) > _LONGEST:
        raise UsageError(
            f"mixture: the weights are in proportion {' : '.join(f'{n:.7g}' for n in integers)}: "
            f"round them, so that these numbers have a sum of at most {_LONGEST:,}"
        )
    return tuple(integers)


@dataclass(frozen=True, eq=False)
class MixedRecords:
    """The records of several sources, one source after the other.

    Attributes:
        parts: the records of each source.
        ends: `(len(parts),)`, the number of records up to and including each source.
    """

    parts: tuple[Records, ...]
    ends: np.ndarray

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Any:
        part, index_in_part = locate(self.ends, index)
        return self.parts[part][index_in_part]


def mix(sources: dict[str, Source], weights: Sequence[Fraction]) -> Source:
    """Return one source of several.

    Args:
        sources: by their names.
        weights: of each source.

    Raises:
        UsageError: a source is empty.
    """
    if empty := next((name for name, source in sources.items() if not len(source)), ""):
        raise UsageError(f"mixture: there are no records in {empty}")
    opened, integers = list(sources.values()), integer_weights(weights)
    counts = [len(source) for source in opened]
    records = MixedRecords(tuple(source.records for source in opened), np.cumsum(counts))
    shares = [f"{weight} x {source.label}" for weight, source in zip(integers, opened, strict=True)]
    named = (_named(name, source.faults) for name, source in sources.items())
    faults = Faults(*(tuple(chain(*kind)) for kind in zip(*named, strict=True)))
    return Source(
        records,
        f"a mixture of {', '.join(shares)}",
        digest([*(source.fingerprint for source in opened), repr(integers)]),
        sum(source.left_out for source in opened),
        faults,
        tuple(Part(count, weight) for count, weight in zip(counts, integers, strict=True)),
    )


def _named(source: str, faults: Faults) -> Faults:
    """Return faults whose names begin with that of their source."""
    return Faults(*(tuple(Fault(f"{source}: {f.name}", f.reason) for f in kind) for kind in faults))
