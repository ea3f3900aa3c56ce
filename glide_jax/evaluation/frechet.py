"""Mean and covariance of features, the distance between two such pairs, and files of them.

The files are those of pytorch-fid and of ADM: an `.npz` with `mu` and `sigma`.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glide_jax.errors import GlideError, UsageError
from glide_jax.folders import write_atomically

# Images whose deviations from the mean are in memory at the same time.
ROWS = 4096


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of the features of a set of images.

    Attributes:
        mean: `(D,)` float64.
        covariance: `(D, D)` float64, with the denominator N - 1.
        count: number of images, N; None: unknown.
        source: what made the features: extractor, its checksum, the size of the images. Empty:
            unknown, as in the files of other programs.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None
    source: tuple[tuple[str, str], ...] = ()

    @property
    def dimensions(self) -> int:
        """Number of features, D."""
        return len(self.mean)


def moments(features: np.ndarray, source: tuple[tuple[str, str], ...] = ()) -> Moments:
    """Return mean and covariance of features `(N, D)`, accumulated in float64.

    Raises:
        UsageError: there are fewer than two images, or features that are not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise UsageError(f"a covariance needs (N, D) features, N at least 2: {features.shape}")
    mean = features.mean(axis=0, dtype=np.float64)
    if not np.isfinite(mean).all():
        raise UsageError("features are not finite: an image or the network is broken")
    total = np.zeros((features.shape[1],) * 2)
    for first in range(0, len(features), ROWS):
        deviation = features[first : first + ROWS] - mean
        total += deviation.T @ deviation
    return Moments(mean, total / (len(features) - 1), len(features), source)


def distance(a: Moments, b: Moments) -> float:
    """`|m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))`  (FID, 1706.08500, eq. 6).

    The root has the eigenvalues of the root of `C_1^(1/2) C_2 C_1^(1/2)`, which is symmetric: they
    are real, and covariances without full rank need no correction.

    Raises:
        UsageError: the numbers of features differ.
    """
    if a.dimensions != b.dimensions:
        raise UsageError(
            f"features must come from one network: {a.dimensions} dimensions are not {b.dimensions}"
        )
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    overlap = np.linalg.eigvalsh(root @ b.covariance @ root)
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    between = ((a.mean - b.mean) ** 2).sum()
    return float(max(between + traces - 2 * np.sqrt(np.maximum(overlap, 0)).sum(), 0.0))


def save_statistics(path: Path, moments: Moments) -> None:
    """Write mean and covariance, with their origin, to an `.npz` that pytorch-fid reads too.

    Raises:
        GlideError: the file cannot be written.
    """
    data = io.BytesIO()
    more: dict[str, Any] = {name: np.array(text) for name, text in moments.source}
    if moments.count is not None:
        more["count"] = np.array(moments.count)
    np.savez(data, mu=moments.mean, sigma=moments.covariance, **more)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data.getvalue())
    except OSError as error:
        raise GlideError(f"cannot write {path}: {error.strerror}") from None


def read_statistics(path: Path) -> Moments:
    """Read mean and covariance from an `.npz` of this project, pytorch-fid or ADM.

    Raises:
        GlideError: the file cannot be read, or holds none.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if lacking := [name for name in ("mu", "sigma") if name not in file.files]:
                raise GlideError(
                    f"{path} lacks {' and '.join(lacking)}: reference statistics are an .npz with "
                    f"mu and sigma; this one has {', '.join(file.files[:5]) or 'nothing'}"
                )
            mean, covariance = (np.asarray(file[name], np.float64) for name in ("mu", "sigma"))
            count = int(file["count"]) if "count" in file.files else None
            names = ("extractor", "checksum", "size")
            source = tuple((name, str(file[name])) for name in names if name in file.files)
    except FileNotFoundError:
        raise GlideError(f"{path} does not exist: give an .npz with mu and sigma") from None
    except IsADirectoryError:
        raise GlideError(f"{path} is a folder: give an .npz with mu and sigma") from None
    except GlideError:
        raise
    except Exception as error:  # zipfile and numpy raise errors of many kinds on malformed bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise GlideError(f"{path} is no readable .npz file ({reason:.120})") from None
    if mean.ndim != 1 or covariance.shape != (mean.size,) * 2:
        raise GlideError(
            f"{path}: mu must be (D,) and sigma (D, D), not {mean.shape} and {covariance.shape}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise GlideError(f"{path}: mu or sigma is not finite: make the statistics again")
    scale = max(np.abs(covariance).max(initial=0), 1e-12)
    if np.abs(covariance - covariance.T).max(initial=0) > 1e-3 * scale:
        raise GlideError(f"{path}: sigma is not symmetric, so it is no covariance")
    return Moments(mean, (covariance + covariance.T) / 2, count, source)
