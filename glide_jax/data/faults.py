"""Files and rows that a source does not use, counted by reason and named in one line."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from glide_jax.errors import GlideError
from glide_jax.folders import write_atomically

_NAMED = 3  # names of each reason in the line; the log of a run has all of them
HIDDEN = "hidden"


class Fault(NamedTuple):
    """A file, link, folder or row that is not used, and why."""

    name: str
    reason: str


class Faults(NamedTuple):
    """What a source does not use.

    Attributes:
        left_out: would-be records: images without a caption, malformed rows.
        broken: records that cannot be read. Another record takes their place in training.
        unused: other files, such as hidden ones.
        empty: captions without text. They are used.
    """

    left_out: tuple[Fault, ...] = ()
    broken: tuple[Fault, ...] = ()
    unused: tuple[Fault, ...] = ()
    empty: tuple[Fault, ...] = ()

    def line(self, where: str, records: int) -> str:
        """Return the line that names them; empty if there are none.

        Args:
            where: path of the source.
            records: number of records in use.
        """
        parts = []
        if self.left_out:
            total = records + len(self.left_out)
            parts.append(
                f"left out {len(self.left_out)} of {total:,}: {group_by_reason(self.left_out)}"
            )
        if self.broken:
            parts.append(
                f"{len(self.broken)} of {records:,} records are broken, and others take their "
                f"place: {group_by_reason(self.broken)}"
            )
        if self.unused:
            parts.append(f"not used: {group_by_reason(self.unused)}")
        if self.empty:
            parts.append(f"used without a caption: {group_by_reason(self.empty)}")
        return f"{where}: {'; '.join(parts)}" if parts else ""

    def say(self, where: str, records: int) -> None:
        """Print the line on stderr, if there is one."""
        if line := self.line(where, records):
            print(line, file=sys.stderr)

    def save(self, path: Path) -> None:
        """Write a file with one line for every file that is not used, or remove an old one.

        Raises:
            GlideError: the file cannot be written.
        """
        lines = [
            f"{kind}: {_shown(fault.name)}: {fault.reason}"
            for kind, faults in zip(("left out", "broken", "not used", "used"), self, strict=True)
            for fault in faults
        ]
        content = "".join(f"{line}\n" for line in lines)
        try:
            if lines:
                write_atomically(path, content.encode("utf-8", "backslashreplace"))
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise GlideError(f"cannot write {path}: {error.strerror}") from None


NO_FAULTS = Faults()


def group_by_reason(faults: Iterable[Fault]) -> str:
    """Return one line with the first names of each reason, and how many there are.

    For example `a.png, b.png, c.png and 7 more (no caption: 10), notes.md (suffix .md: 1)`.
    """
    groups: dict[str, list[str]] = {}
    for fault in faults:
        groups.setdefault(fault.reason, []).append(fault.name)
    return ", ".join(
        f"{_first_names(names)} ({why}: {len(names)})" for why, names in groups.items()
    )


def _first_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(_shown, names[:_NAMED])) + more


def _shown(name: str) -> str:
    """Return a name as it is, or with escapes if it would not print on one line."""
    return name if name.isprintable() else ascii(name)
