"""Folders of this package and of the user, and files that are whole or absent."""

import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from glide_jax.errors import GlideError

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None

_PACKAGE = Path(__file__).parent
# In a checkout they lie beside the package, in a wheel inside it: the same files.
SCRIPTS = _PACKAGE / "scripts" if (_PACKAGE / "scripts").is_dir() else _PACKAGE.parent
RECIPES = SCRIPTS / "configs"


def package_version() -> str:
    """Return the installed version, or "source" in a checkout that is not installed."""
    try:
        return version("glide-jax")
    except PackageNotFoundError:
        return "source"


def cache_folder() -> Path:
    """Return the cache folder of this package: `$GLIDE_JAX_CACHE`, or below `$XDG_CACHE_HOME`.

    It holds compiled programs, downloaded weights, and indices of shards. A user without a home
    gets a folder of their own among the temporary files.
    """
    if explicit := os.environ.get("GLIDE_JAX_CACHE"):
        return expand_home(explicit)
    base = expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if not str(base).startswith("~"):
        return base / "glide_jax"
    return _private_folder(Path(tempfile.gettempdir()) / f"glide_jax-{os.getuid()}")


def _private_folder(folder: Path) -> Path:
    """Return a folder only this user can write: programs in it are executed."""
    with suppress(OSError):
        folder.mkdir(mode=0o700)
    with suppress(OSError):
        info = folder.lstat()
        if stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o22:
            return folder
    return Path(tempfile.mkdtemp(prefix="glide_jax-"))


# --- `~`


def expand_home(path: str | Path) -> Path:
    """Return a path with `~` and `~user` at its start replaced, where the home is known."""
    return Path(os.path.expanduser(path))


def expand_words(words: Sequence[str], texts: Sequence[str] = ()) -> list[str]:
    """Return the words of a command line with `~` replaced at the start of each path.

    A shell leaves `~` as it is in `--out=~/images`, and inside quotation marks.

    Args:
        words: of the command line.
        texts: options whose values are text rather than paths.
    """
    expanded = list(words)
    for i, word in enumerate(words):
        option, joined, value = word.partition("=")
        if joined and option.startswith("--") and value.startswith("~") and option not in texts:
            expanded[i] = f"{option}={expand_home(value)}"
        elif word.startswith("~") and (i == 0 or words[i - 1] not in texts):
            expanded[i] = str(expand_home(word))
    return expanded


# --- whole files


def check_writable(folder: Path) -> None:
    """Create a folder, and check that it can be written before anything is computed.

    Raises:
        GlideError: it cannot.
    """
    folder = expand_home(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except FileExistsError:
        raise GlideError(f"cannot write to {folder}: it is a file, not a folder") from None
    except OSError as error:
        raise GlideError(f"cannot write to {folder}: {error.strerror}") from None


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside its place, and rename it: an old file is replaced as a whole.

    Raises:
        OSError: it cannot be written; the old file, if any, is unchanged.
    """
    with _temporary_beside(path, data) as part:
        part.replace(path)


def write_new(path: Path, data: bytes) -> None:
    """Write a file that is not there yet, whole or not at all.

    Raises:
        FileExistsError: there is one of this name.
        OSError: it cannot be written.
    """
    with _temporary_beside(path, data) as part:
        try:
            os.link(part, path)
        except FileExistsError:
            raise
        except OSError:
            # A file system without hard links: the name is claimed by an empty file.
            path.open("xb").close()
            part.replace(path)


@contextmanager
def _temporary_beside(path: Path, data: bytes) -> Iterator[Path]:
    part = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            # Otherwise the name may reach the disk before the data.
            os.fsync(file.fileno())
        yield part
    except FileExistsError:
        raise
    except OSError as error:
        # A write that fails names no file, a rename the temporary one.
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


# --- locks


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process holds a folder, and hold it.

    Does nothing on a file system without locks.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
