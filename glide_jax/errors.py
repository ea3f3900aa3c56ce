"""Errors that a user can cause and can fix."""

import difflib
import errno
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class GlideError(Exception):
    """An error whose message is one line: what is wrong, and what to do.

    The commands print the line and exit with `exit_code`: 2 if the call is wrong (an unknown
    option, a bad value), 1 if something else is (a missing or broken file, a full disk).
    """

    exit_code = 1


class UsageError(GlideError):
    """A call that is wrong in itself: an unknown option, a bad value."""

    exit_code = 2


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `", did you mean 'x'?"` if a known name is close to `name`, else an empty string."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f", did you mean {close[0]!r}?" if close else ""


@contextmanager
def one_line_errors(stopped: str = "stopped") -> Iterator[None]:
    """End a command with one line and an exit code if the user can fix the error.

    Args:
        stopped: the line to print after an interrupt from the keyboard.
    """
    try:
        yield
    except GlideError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        print(f"error: {error.strerror}: {error.filename or 'the disk'}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        sys.exit(130)
