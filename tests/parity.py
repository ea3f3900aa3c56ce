"""Worst errors against the original code: python -m tests.parity --report docs/parity.md"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import tyro

from tests import golden

FILES = (
    "test_layers.py",
    "test_models.py",
    "test_clip.py",
    "test_schedule.py",
    "test_losses.py",
    "test_sampling.py",
    "test_release_loops.py",
)
INTRODUCTION = """# Parity with the original code

Each row is a test against outputs of the original PyTorch code on small networks with random
weights (float32, dropout off), all matrix products at full float32 precision, on a CPU: the
comparison of the test that came closest to its tolerance. Made by

```sh
python -m tests.parity --report docs/parity.md
```

| test | largest error | allowed |
|---|---:|---:|
"""


@dataclass(frozen=True)
class Options:
    """Runs the parity tests and prints the worst error of each."""

    report: Path | None = None
    """A Markdown file to write the table to."""


def worst_of_each(comparisons: list[tuple[str, float, float]]) -> dict[str, tuple[float, float]]:
    """The comparison of each test that used most of its tolerance: `{test: (error, allowed)}`."""
    worst: dict[str, tuple[float, float]] = {}
    for test, found, allowed in comparisons:
        if test not in worst or used(found, allowed) > used(*worst[test]):
            worst[test] = (found, allowed)
    return worst


def used(found: float, allowed: float) -> float:
    """The share of its tolerance that a comparison used; where none is allowed, none or all."""
    return found / allowed if allowed else float(found > 0)


def main() -> int:
    """The command line; the exit code is that of the tests."""
    options = tyro.cli(Options, prog="python -m tests.parity")
    folder = Path(__file__).parent
    code = pytest.main(["-q", "-p", "no:cacheprovider", *(str(folder / name) for name in FILES)])
    rows = [
        f"| `{test.removeprefix('tests/')}` | {found:.1e} | {allowed:.1e} |"
        for test, (found, allowed) in worst_of_each(golden.COMPARISONS).items()
    ]
    print("\n".join(rows))
    if options.report is not None:
        options.report.write_text(INTRODUCTION + "\n".join(rows) + "\n")
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main())
