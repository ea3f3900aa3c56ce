"""Distances between sets of images in a feature space, and agreement of images with captions.

Features are `(N, D)` and are converted to float64. A Frechet distance is FID only with the
features, the resizing and the number of images of its paper: always name the features.
"""

from collections.abc import Iterator

import numpy as np

from glide_jax.errors import UsageError

# Values of an (N, M) matrix that are in memory at the same time: 128 MiB in float64.
BLOCK = 2**24


def frechet_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """`|m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))`  (FID, 1706.08500, eq. 6).

    It is biased upwards for few images, more so in more dimensions: compare equal numbers.
    """
    real, generated = _features(real, generated)
    means = real.mean(axis=0), generated.mean(axis=0)
    # The trace of the root is the nuclear norm of A B^T, where C = A^T A. No root is taken of a
    # matrix that is only nearly of full rank.
    a, b = ((x - m) / np.sqrt(len(x) - 1) for x, m in zip((real, generated), means, strict=True))
    small = [np.asarray(np.linalg.qr(x, mode="r")) if len(x) > x.shape[1] else x for x in (a, b)]
    overlap = np.linalg.svd(small[0] @ small[1].T, compute_uv=False).sum()
    traces = (a**2).sum() + (b**2).sum()
    return float(max(((means[0] - means[1]) ** 2).sum() + traces - 2 * overlap, 0.0))


def kernel_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """Squared MMD with the kernel `(x . y / D + 1)^3`, unbiased  (KID, 1801.01401, sec. 4)."""
    real, generated = _features(real, generated)

    def total(a: np.ndarray, b: np.ndarray) -> float:
        return sum(((a[rows] @ b.T / a.shape[1] + 1) ** 3).sum() for rows in _blocks(a, b))

    def within(x: np.ndarray) -> float:
        diagonal = (((x**2).sum(axis=1) / x.shape[1] + 1) ** 3).sum()
        return (total(x, x) - diagonal) / (len(x) * (len(x) - 1))

    between = total(real, generated) / (len(real) * len(generated))
    return float(within(real) + within(generated) - 2 * between)


def _blocks(a: np.ndarray, b: np.ndarray) -> Iterator[slice]:
    """Yield slices of the rows of `a`, whose distances to all of `b` fit into a block."""
    size = max(BLOCK // len(b), 1)
    for first in range(0, len(a), size):
        yield slice(first, first + size)


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Return precision and recall of generated images  (1904.06991).

    Precision is the share of generated images that lie among the real ones; recall is the share of
    real images that lie among the generated ones. An image lies among others if it is at least as
    near to one of them as that one's k-th neighbour.

    Raises:
        UsageError: a set has k images or fewer.
    """
    real, generated = _features(real, generated)
    if min(len(real), len(generated)) <= k:
        raise UsageError(f"precision and recall need more than {k} images of each kind")
    return _share_among(generated, real, k), _share_among(real, generated, k)


def _share_among(points: np.ndarray, others: np.ndarray, k: int) -> float:
    # The nearest of all is the point itself.
    radius = np.concatenate(
        [
            np.partition(_distances(others[rows], others), k, axis=1)[:, k].copy()
            for rows in _blocks(others, others)
        ]
    )
    covered = sum(
        np.count_nonzero((_distances(points[rows], others) <= radius).any(axis=1))
        for rows in _blocks(points, others)
    )
    return covered / len(points)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squared, 0))


def r_precision(similarity: np.ndarray, right: np.ndarray) -> float:
    """Return the share of images whose own caption is the most similar  (1711.10485, sec. 4.2).

    Args:
        similarity: `(N, M)`, of N images with M captions.
        right: `(N,)`, the column of each image's own caption. A tie counts as wrong.
    """
    right_similarity = np.take_along_axis(similarity, right[:, None], axis=1)
    return float(((similarity >= right_similarity).sum(axis=1) == 1).mean())


def inception_score(probabilities: np.ndarray) -> float:
    """`exp(E[KL(p(y | x) || p(y))])` of class probabilities `(N, K)`  (1606.03498, sec. 4).

    Raises:
        UsageError: the array is not a set of distributions.
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2 or not np.isfinite(p).all() or np.abs(p.sum(axis=1) - 1).max() > 1e-3:
        raise UsageError(f"class probabilities must be (N, K) and sum to 1, not {p.shape}")
    mean = p.mean(axis=0)
    ratio = np.divide(p, mean, out=np.ones_like(p), where=p > 0)
    return float(np.exp((p * np.log(ratio)).sum(axis=1).mean()))


def _features(real: np.ndarray, generated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise UsageError(
            f"features must be (N, D) and (M, D), not {real.shape} and {generated.shape}"
        )
    if min(len(real), len(generated)) < 2:
        raise UsageError("a distance between sets needs at least two images of each")
    if not (np.isfinite(real).all() and np.isfinite(generated).all()):
        raise UsageError("features are not finite: an image or the network is broken")
    return real, generated
