"""Errors that a user can cause and can fix."""

import difflib
import errno
import io
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np


class GlideError(Exception):
    """An error whose message is one line: what is wrong, and what to do.

    The commands print the line and exit with `exit_code`: 2 if the call is wrong (an unknown
    option, a bad value), 1 if something else is (a missing or broken file, a full disk).
    """

    exit_code = 1


class UsageError(GlideError):
    """A call that is wrong in itself: an unknown option, a bad value."""

    exit_code = 2


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return `", did you mean 'x'?"` if a known name is close to `name`, else an empty string."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f", did you mean {close[0]!r}?" if close else ""


def check_finite(values: Mapping[str, Any], *, unbounded: Iterable[str] = ()) -> None:
    """Check that numbers, also those in sequences and arrays, are finite; other values pass.

    Args:
        values: by the names that messages use.
        unbounded: names of those that may be infinite; none may be nan.

    Raises:
        UsageError: one is not.
    """
    for name, value in values.items():
        try:
            numbers = np.asarray(value)
        except (TypeError, ValueError):
            continue  # no numbers, or not known yet (traced)
        if numbers.dtype.kind != "f":
            continue
        if name in unbounded:
            if np.isnan(numbers).any():
                raise UsageError(f"{name} must be a number, not {value}")
        elif not np.isfinite(numbers).all():
            raise UsageError(f"{name} must be finite, not {value}")


# Faults of the disk, of a path or of its permissions.
_OF_THE_DISK = {
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE"),
        *("ENOTDIR", "EISDIR", "ENAMETOOLONG", "ELOOP", "EMFILE", "ENFILE"),
    )
    if hasattr(errno, name)
}
# The exit code of a program that the closed end of a pipe stops.
_PIPE_CLOSED = 141


@contextmanager
def one_line_errors(stopped: str = "stopped") -> Iterator[None]:
    """End a command with one line and an exit code if the user can fix the error.

    A closed pipe ends it without a word. A character that the terminal cannot print is printed as
    an escape.

    Args:
        stopped: line printed after Ctrl-C if the exception has no message.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        except SystemExit:
            _flush()
            raise
        _flush()
    except GlideError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        _silence_output()
        sys.exit(_PIPE_CLOSED)
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        print(f"error: {error.strerror}: {error.filename or 'the disk'}", file=sys.stderr)
        try:
            _flush()
        except OSError:
            _silence_output()
        sys.exit(1)
    except RuntimeError as error:
        if type(error).__name__ != "JaxRuntimeError":
            raise
        print(f"error: {_device_error_line(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        print(interrupt if interrupt.args else stopped, file=sys.stderr)
        sys.exit(130)


def one_line(error: object) -> str:
    """Return a message with its white space, also that of a file's name, on one line."""
    return " ".join(str(error).split())


def _device_error_line(error: RuntimeError) -> str:
    """Return one line on an error of a device, with the remedy where it is known."""
    lines = str(error).strip().splitlines() or [""]
    remedy = ""
    if "RESOURCE_EXHAUSTED" in lines[0]:
        remedy = "; use a smaller --batch-size"
    elif not os.path.exists("/proc/self") and sys.platform == "linux":
        remedy = "; jax needs /proc on a CPU: mount it"
    return one_line(lines[0]) + remedy


def _flush() -> None:
    """Write what is buffered, so that its errors come here, not at the end of the interpreter."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _silence_output() -> None:
    """Send what is still buffered nowhere: the interpreter flushes it at its end."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
