"""One run in a folder at a time: a lock that ends with its process."""

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from glide_jax.devices.processes import on_first_process
from glide_jax.errors import GlideError

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None

LOCK = "lock"


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Hold the folder of a run; the kernel ends the lock with this process, however that ends.

    Of several processes of a run the first holds the lock for all. A run that ends before it has
    written anything leaves no folder. On a file system without locks a note says so.

    Raises:
        GlideError: another run holds it, or the folder cannot be written.
    """
    held: list[int] = []
    is_new = not folder.exists()
    try:
        on_first_process(lambda: held.append(_lock(folder / LOCK)))
        yield
    finally:
        for descriptor in held:
            # While it is still held: a run that opened the file meanwhile notices (`_lock`).
            with suppress(OSError):
                if is_new and [path.name for path in folder.iterdir()] == [LOCK]:
                    (folder / LOCK).unlink()
                    folder.rmdir()
            os.close(descriptor)


def _lock(path: Path) -> int:
    """Return the descriptor of a locked file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not inherited by the programs that this one starts: the workers must not keep the lock.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise GlideError(f"cannot write {path}: {error.strerror or error}") from None
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise GlideError(
                f"another process{f' ({holder})' if holder else ''} trains in {path.parent}: wait "
                "until it ends, or choose another --out"
            ) from None
        print(f"note: {path.parent} has no file locks: start no second run there", file=sys.stderr)
    if not (path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())):
        os.close(descriptor)
        return _lock(path)  # the run before removed the file since it was opened
    # For the message to a second run; the lock holds without it.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor
