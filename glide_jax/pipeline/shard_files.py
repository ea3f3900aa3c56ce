"""Tar shards of samples, as webdataset reads them, and the description of the run they belong to.

000000.tar: 000000000.png 000000000.txt 000000000.json 000000001.png ...    shards.json
"""

import errno
import io
import json
import os
import secrets
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from glide_jax.data.webdataset import MANIFEST
from glide_jax.errors import GlideError, UsageError
from glide_jax.folders import locked, write_atomically
from glide_jax.pipeline.images import Images, png

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None

FORMAT = 1
# Entries of the manifest that say where the weights came from; a moved folder changes nothing.
_NAMES = "names"


def shard_path(folder: Path, number: int) -> Path:
    """Return the path of a shard."""
    return folder / f"{number:06}.tar"


def add_images(tar: tarfile.TarFile, images: Images) -> None:
    """Add images to a shard: for each a `.png`, its prompt as `.txt`, its metadata as `.json`."""
    for i, image in enumerate(images.pil()):
        made, name = images.metadata(i), f"{images.indices[i]:09}"
        members = {
            "png": png(image, made),
            "txt": made["prompt"].encode(),
            "json": json.dumps(made).encode(),
        }
        for suffix, data in members.items():
            # No time and no owner: the same images are the same bytes.
            info = tarfile.TarInfo(f"{name}.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


# --- one writer a shard


@contextmanager
def claimed(path: Path) -> Iterator[BinaryIO | None]:
    """Open a shard for writing, or yield None if it is there or another process writes it.

    It is written beside its place under a lock, and renamed when the block ends; after an error it
    is removed. The kernel ends the lock with this process, however that ends, and the next process
    writes the shard from its beginning.

    Raises:
        OSError: it cannot be written.
    """
    lock = None if path.exists() else _lock(path)
    if lock is None:
        yield None
        return
    descriptor, part = lock
    with open(descriptor, "wb") as file:
        try:
            yield file
            file.flush()
            # Otherwise the name may reach the disk before the data.
            os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            # What is still buffered may not fit on the disk: it is wanted no more.
            with suppress(OSError):
                file.close()
            raise


def _lock(path: Path) -> tuple[int, Path] | None:
    """Return an empty file beside a shard, as a descriptor that holds its lock, and its path."""
    part = path.with_name(f".{path.name}.part")
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is None:
            raise OSError(errno.ENOLCK, "no locks")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        # Without locks two runs may write the same shard, each into a file of its own.
        with suppress(OSError):
            part.unlink()
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        return os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), part
    # The process that held the lock may have renamed or removed the file since it was opened.
    with suppress(FileNotFoundError):
        if not path.exists() and os.path.samestat(os.fstat(descriptor), part.stat()):
            os.ftruncate(descriptor, 0)
            return descriptor, part
    if path.exists() and not os.path.samestat(os.fstat(descriptor), path.stat()):
        with suppress(OSError):
            part.unlink(missing_ok=True)
    os.close(descriptor)
    return None if path.exists() else _lock(path)


# --- the run they belong to


def check_same_run(folder: Path, description: dict[str, Any]) -> None:
    """Write the description of a run into a new folder, or compare it with the one there.

    Raises:
        UsageError: the folder has shards of another run, or of none.
        GlideError: it cannot be read or written.
    """
    description = json.loads(json.dumps({"format": FORMAT, **description}))
    path = folder / MANIFEST
    try:
        with locked(folder):
            if not path.exists():
                if strange := sorted(p.name for p in folder.glob("*.tar")):
                    raise UsageError(
                        f"{folder} has {strange[0]}, but no {MANIFEST}: give a new folder to "
                        "--shards"
                    )
                write_atomically(path, json.dumps(description, indent=1).encode() + b"\n")
                return
        manifest = read_manifest(folder)
    except OSError as error:
        raise GlideError(f"cannot write {path}: {error.strerror or error}") from None
    if differences := _differences(manifest, description):
        more = f" and {len(differences) - 3} more" if differences[3:] else ""
        raise UsageError(
            f"{folder} has shards of another run ({'; '.join(differences[:3])}{more}): give "
            "another folder to --shards, or repeat its command"
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the description of the run whose shards a folder has.

    Raises:
        GlideError: it cannot be read.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("it is not an object")
        return manifest
    except OSError as error:
        raise GlideError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise GlideError(
            f"{path} cannot be read ({error}): give a new folder to --shards"
        ) from None


def missing_shards(folder: Path) -> str:
    """Return "29 of 30" if a folder of samples lacks shards; "" if it has all, or no manifest."""
    if not (folder / MANIFEST).is_file():
        return ""
    count = read_manifest(folder).get("shards")
    if not isinstance(count, int):
        print(f"note: {folder / MANIFEST} does not say how many shards there are", file=sys.stderr)
        return ""
    present = sum(shard_path(folder, number).exists() for number in range(count))
    return "" if present == count else f"{present} of {count}"


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what differs between two descriptions: `seed 1, here 2`, `other prompts`."""
    differences = []
    for name in dict.fromkeys([*old, *new]):
        a, b = old.get(name), new.get(name)
        if name == _NAMES or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            differences += _differences(a, b)
        elif isinstance(b, str) and name.endswith("digest"):
            differences.append(f"other {name.removesuffix(' digest')}")
        else:
            differences.append(f"{name} {a}, here {b}")
    return differences
