"""Distances between sets of pictures in a feature space, and agreement of pictures with captions.

Features are `(N, D)`, in float64 inside. A Frechet distance is FID only on the features, the
resizing and the number of pictures of its paper: say which features were used.
"""

import numpy as np

from glide_jax.errors import UsageError


def frechet_distance(real: np.ndarray, drawn: np.ndarray) -> float:
    """`|m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))`  (FID, 1706.08500, eq. 6).

    Biased upwards at few pictures, and the more so the more dimensions: compare equal numbers.
    """
    real, drawn = _features(real, drawn)
    means = real.mean(axis=0), drawn.mean(axis=0)
    # The trace of the root is the nuclear norm of A B^T, where C = A^T A: no root of a matrix that
    # is only nearly of full rank.
    a, b = ((x - m) / np.sqrt(len(x) - 1) for x, m in zip((real, drawn), means, strict=True))
    small = [np.linalg.qr(x, mode="r") if len(x) > x.shape[1] else x for x in (a, b)]
    overlap = np.linalg.svd(small[0] @ small[1].T, compute_uv=False).sum()
    traces = (a**2).sum() + (b**2).sum()
    return float(max(((means[0] - means[1]) ** 2).sum() + traces - 2 * overlap, 0.0))


def kernel_distance(real: np.ndarray, drawn: np.ndarray) -> float:
    """Squared MMD with the kernel `(x . y / D + 1)^3`, unbiased  (KID, 1801.01401, sec. 4)."""
    real, drawn = _features(real, drawn)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        k = kernel(x, x)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    return float(within(real) + within(drawn) - 2 * kernel(real, drawn).mean())


def precision_recall(real: np.ndarray, drawn: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Shares of drawn pictures among the real, and of real among the drawn  (1904.06991).

    A picture is among others if it lies as near to one of them as that one's k-th neighbour.
    """
    real, drawn = _features(real, drawn)
    if min(len(real), len(drawn)) <= k:
        raise UsageError(f"precision and recall need more than {k} pictures of each kind")
    return _among(drawn, real, k), _among(real, drawn, k)


def _among(points: np.ndarray, others: np.ndarray, k: int) -> float:
    # The nearest of all is the point itself.
    radius = np.partition(_distances(others, others), k, axis=1)[:, k]
    return float((_distances(points, others) <= radius).any(axis=1).mean())


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squared, 0))


def r_precision(similarity: np.ndarray, right: np.ndarray) -> float:
    """The share of pictures whose own caption is the most similar of all  (1711.10485, sec. 4.2).

    Args:
        similarity: `(N, M)` of N pictures with M captions.
        right: `(N,)`, the column of each picture's own caption. A tie is not a hit.
    """
    own = np.take_along_axis(similarity, right[:, None], axis=1)
    return float(((similarity >= own).sum(axis=1) == 1).mean())


def inception_score(probabilities: np.ndarray) -> float:
    """`exp(E[KL(p(y | x) || p(y))])` of class probabilities `(N, K)`  (1606.03498, sec. 4)."""
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2 or not np.isfinite(p).all() or np.abs(p.sum(axis=1) - 1).max() > 1e-3:
        raise UsageError(f"class probabilities must be (N, K) and sum to 1, not {p.shape}")
    mean = p.mean(axis=0)
    ratio = np.divide(p, mean, out=np.ones_like(p), where=p > 0)
    return float(np.exp((p * np.log(ratio)).sum(axis=1).mean()))


def _features(real: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    real, drawn = (np.asarray(x, np.float64) for x in (real, drawn))
    if real.ndim != 2 or drawn.ndim != 2 or real.shape[1] != drawn.shape[1]:
        raise UsageError(f"features must be (N, D) and (M, D), not {real.shape} and {drawn.shape}")
    if min(len(real), len(drawn)) < 2:
        raise UsageError("a distance between sets needs two pictures of each")
    if not (np.isfinite(real).all() and np.isfinite(drawn).all()):
        raise UsageError("features are not finite: a broken picture or network")
    return real, drawn
