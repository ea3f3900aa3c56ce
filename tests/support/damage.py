"""Damage to files, at random places, that is undone afterwards; and what reading them comes to."""

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glide_jax.errors import GlideError

# Shares of kinds of damage to a file; the rest: one byte gets another value.
TRUNCATED, EXTENDED, DELETED = 0.06, 0.03, 0.03


@contextmanager
def damaged(files: Sequence[Path], rng: random.Random) -> Iterator[str]:
    """Damage one of some files, provide a description, and undo the damage at the end.

    Half of the damages are spread over the files, the other half over their bytes.
    """
    sizes = [path.stat().st_size for path in files]
    path = rng.choice(files) if rng.random() < 0.5 else rng.choices(files, sizes)[0]
    whole, kind = path.read_bytes(), rng.random()
    place = rng.randrange(max(1, len(whole)))
    try:
        if kind < DELETED:
            what = "deleted"
            path.unlink()
        elif kind < DELETED + EXTENDED or not whole:
            extra = rng.randbytes(rng.randrange(1, 64))
            what = f"{len(extra)} bytes more"
            path.write_bytes(whole + extra)
        elif kind < DELETED + EXTENDED + TRUNCATED:
            what = f"cut to {place} bytes"
            path.write_bytes(whole[:place])
        else:
            # A bit flips, or the byte gets any other value.
            flip = 1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(1, 256)
            value = whole[place] ^ flip
            what = f"byte {place} from {whole[place]} to {value}"
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        yield f"{path}: {what}"
    finally:
        path.write_bytes(whole)


@dataclass
class Tally:
    """Numbers of outcomes, and the first cases of those that must not be.

    Attributes:
        counts: outcome -> number.
        bad: descriptions.
        slowest: seconds of the slowest case.
    """

    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def add(self, case: str, read: Callable[[], str], limit: float = 60.0) -> str:
        """Count what a read comes to.

        Args:
            case: a description.
            read: returns the outcome; "accepted" must not be. A GlideError of one line is
                "refused", any other exception a "traceback".
            limit: seconds after which a case is "slow", which must not be.
        """
        begun, about = time.monotonic(), ""
        try:
            outcome = read()
        except GlideError as error:
            about = str(error)
            outcome = "refused" if "\n" not in about.strip() else "several lines"
        except Exception as error:  # any other type is what the tool looks for
            outcome, about = "traceback", f"{type(error).__name__}: {error}"
        took = time.monotonic() - begun
        self.slowest = max(self.slowest, took)
        outcome = "slow" if took > limit else outcome
        self.counts[outcome] += 1
        if outcome in ("accepted", "traceback", "several lines", "slow"):
            self.bad.append(f"{outcome}: {case}: {about}")
        return outcome

    def values(self) -> dict[str, Any]:
        """Return the numbers, for a file."""
        return {
            "cases": self.counts.total(),
            **{kind: self.counts[kind] for kind in ("accepted", "traceback")},
            **self.counts,
            "slowest_seconds": round(self.slowest, 3),
            "bad": self.bad[:20],
        }


def report(found: dict[str, Tally], sentence: str) -> None:
    """Print the numbers and their sentence, and end with an error if a case must not be."""
    print(json.dumps({kind: tally.values() for kind, tally in found.items()}, indent=2))
    print(sentence)
    if bad := [case for tally in found.values() for case in tally.bad]:
        sys.exit(f"{len(bad)} cases must not be: {bad[0]}")
