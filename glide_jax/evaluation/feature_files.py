"""Features of a set of images, in files: what was computed once is read the second time.

The features of each 1,024 images are a file of their own, so an interrupted run continues there.
"""

import hashlib
import io
import json
from itertools import islice
from pathlib import Path

import numpy as np
import tqdm

from glide_jax.errors import GlideError, UsageError
from glide_jax.evaluation.features import FeatureSpace, Scorer
from glide_jax.evaluation.image_sets import ImageSet
from glide_jax.folders import write_atomically

PART = 1024  # images of a file
BATCH = 64  # images in memory at a time
# Changes with the way to compute features, so that old files are not read.
FORMAT = 1


def identity(space: FeatureSpace) -> dict[str, str]:
    """Return what tells features of one network from those of another."""
    name = space.name
    if isinstance(space, Scorer):
        name += f", {space.views} views" if space.views > 1 else ", 1 view"
    return {"extractor": name, "checksum": space.checksum}


def features_of(
    images: ImageSet, space: FeatureSpace, folder: Path
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the features of all images, and the height and width of these.

    Args:
        folder: for the files of features; those of other images or networks may be in it too.

    Returns:
        `(N, D)` float32, and the size.

    Raises:
        GlideError: an image cannot be read, has another size than the others, or the network
            refuses it; or a file cannot be written.
    """
    known = {"format": FORMAT, "images": images.fingerprint, **identity(space)}
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:20]
    own_folder = folder / key
    parts: list[np.ndarray] = []
    shape: tuple[int, int] | None = None
    starts = range(0, len(images), PART)
    for start in starts:
        saved = _read(own_folder / f"{start:08}.npz", min(PART, len(images) - start))
        if saved is None:
            break
        parts.append(saved[0])
        shape = saved[1]
    remaining = starts[len(parts) :]
    if remaining:
        try:
            own_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GlideError(f"cannot write {own_folder}: {error.strerror}") from None
        source = images.images(remaining[0], shape)
        name = Path(images.path).name or images.path
        # Quiet where nobody watches.
        with tqdm.tqdm(total=len(images), initial=remaining[0], desc=name, disable=None) as bar:
            for start in remaining:
                rows = []
                for size in _sizes(min(PART, len(images) - start)):
                    batch = np.stack(list(islice(source, size)))
                    shape = (batch.shape[1], batch.shape[2])
                    rows.append(_encoded(space, batch, images.path))
                    bar.update(size)
                parts.append(np.concatenate(rows))
                assert shape is not None
                _write(own_folder / f"{start:08}.npz", parts[-1], shape)
    assert shape is not None
    return np.concatenate(parts), shape


def _sizes(count: int) -> list[int]:
    return [min(BATCH, count - first) for first in range(0, count, BATCH)]


def _encoded(space: FeatureSpace, batch: np.ndarray, path: str) -> np.ndarray:
    if isinstance(space, Scorer) and batch.shape[1] != batch.shape[2]:
        raise UsageError(
            f"{path} has images of {batch.shape[2]} x {batch.shape[1]} pixels; {space.name} need "
            "squares: --size 256 takes the central square of each"
        )
    features = np.asarray(space(batch), np.float32)
    if not np.isfinite(features).all():
        raise GlideError(f"{space.name}: features of {path} are not finite: the weights are broken")
    return features


def _read(path: Path, count: int) -> tuple[np.ndarray, tuple[int, int]] | None:
    """Return features and the size of the images; None if there is no whole file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            features, (height, width) = file["features"], file["size"]
    except Exception:  # a file of an interrupted copy: it is computed again
        return None
    if features.ndim != 2 or len(features) != count:
        return None
    return features, (int(height), int(width))


def _write(path: Path, features: np.ndarray, shape: tuple[int, int]) -> None:
    data = io.BytesIO()
    np.savez(data, features=features, size=np.array(shape))
    try:
        write_atomically(path, data.getvalue())
    except OSError as error:
        raise GlideError(f"cannot write {path}: {error.strerror}") from None
