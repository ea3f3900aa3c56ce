"""The errors that a user can cause and a user can mend."""

import difflib
import errno
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class GlideError(Exception):
    """One line that says what is wrong and what to do; the command lines print it and exit.

    `exit_code` is 2 where the call itself is wrong (an unknown option, a bad value) and
    1 where the world is (a missing or broken file, a full disk).
    """

    exit_code = 1


class UsageError(GlideError):
    """The call cannot be carried out as it was written."""

    exit_code = 2


def nearest(name: str, names: Iterable[str]) -> str:
    """`", did you mean 'x'?"` where a known name is close to `name`, else an empty string."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f", did you mean {close[0]!r}?" if close else ""


@contextmanager
def one_line_errors(stopped: str = "stopped") -> Iterator[None]:
    """Ends a command with one line and an exit code, where a user can mend what went wrong.

    Args:
        stopped: what to say when it is interrupted from the keyboard.
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
