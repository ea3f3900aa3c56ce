"""Metrics between sets of features, on cases with a known answer."""

import tracemalloc

import numpy as np
import pytest

from glide_jax.errors import UsageError
from glide_jax.evaluation import metrics
from glide_jax.evaluation.metrics import (
    frechet_distance,
    kernel_distance,
    precision_recall,
    r_precision,
)

RNG = np.random.default_rng(0)


def exactly(mean, covariance, count=200):
    """Return points with exactly this sample mean and covariance."""
    x = RNG.standard_normal((count, len(mean)))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T)).T)
    return x @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_between_gaussians():
    """Covariances that commute give `|m|^2 + sum (s_1 - s_2)^2`."""
    a = exactly(np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    b = exactly(np.array([1.0, 2.0, 0.0]), np.diag([4.0, 4.0, 1.0]), count=150)
    assert frechet_distance(a, b) == pytest.approx(5 + (1 + 0 + 4), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_covariances_that_do_not_commute():
    a, b = np.array([[2.0, 1.0], [1.0, 2.0]]), np.diag([1.0, 5.0])
    root = np.sqrt(np.linalg.eigvals(a @ b)).sum()
    expected = np.trace(a) + np.trace(b) - 2 * root
    found = frechet_distance(exactly(np.zeros(2), a), exactly(np.zeros(2), b))
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_with_fewer_images_than_dimensions():
    x = RNG.standard_normal((10, 50))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 1) == pytest.approx(50, rel=1e-9)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    same = [kernel_distance(*RNG.standard_normal((2, 50, 8))) for _ in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same))
    assert kernel_distance(RNG.standard_normal((200, 8)), RNG.standard_normal((200, 8)) + 1) > 1


def test_kernel_distance_by_hand():
    """One dimension and two points each: all kernel values are cubes of small numbers."""
    real, generated = np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])
    expected = 1 + 27 - 2 * np.mean([1, 1, 8, 27])
    assert kernel_distance(real, generated) == pytest.approx(expected)


def test_precision_and_recall_of_distant_nested_and_equal_sets():
    real = RNG.standard_normal((300, 2))
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    precision, recall = precision_recall(real, 0.05 * RNG.standard_normal((300, 2)))
    assert precision > 0.95 and recall < 0.1


def test_r_precision_counts_only_the_most_similar_caption():
    similarity = np.array([[3.0, 1, 2], [1, 1, 0], [0, 1, 2]])
    assert r_precision(similarity, np.array([0, 1, 1])) == pytest.approx(1 / 3)


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, precision_recall])
def test_features_that_cannot_be_compared_are_refused(metric):
    with pytest.raises(UsageError, match="features"):
        metric(np.zeros((5, 2)), np.zeros((5, 3)))
    with pytest.raises(UsageError, match="two images"):
        metric(np.zeros((5, 2)), np.zeros((1, 2)))
    with pytest.raises(UsageError, match="finite"):
        metric(np.zeros((5, 2)), np.full((5, 2), np.nan))


def plain_kernel_distance(real, generated):
    """KID with whole matrices."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(x):
        k = kernel(x, x)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    return within(real) + within(generated) - 2 * kernel(real, generated).mean()


def plain_precision_recall(real, generated, k):
    """Precision and recall with whole matrices."""

    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=-1))

    def share(points, others):
        radius = np.sort(distances(others, others), axis=1)[:, k]
        return (distances(points, others) <= radius).any(axis=1).mean()

    return share(generated, real), share(real, generated)


@pytest.mark.parametrize("block", [1, 40, 100, 1 << 24])
def test_matrices_in_blocks_give_exactly_the_plain_values(block, monkeypatch):
    """Whole numbers and a power of two as D: every sum is exact, in any order."""
    rng = np.random.default_rng(0)
    real = rng.integers(-9, 10, (37, 8)).astype(float)
    generated = rng.integers(-6, 13, (23, 8)).astype(float)
    monkeypatch.setattr(metrics, "BLOCK", block)
    assert kernel_distance(real, generated) == plain_kernel_distance(real, generated)
    for k in (1, 3):
        found = precision_recall(real, generated, k)
        assert found == plain_precision_recall(real, generated, k)
        assert 0 < found[0] < 1 and 0 < found[1] < 1


def test_no_matrix_of_all_pairs_is_made(monkeypatch):
    rng = np.random.default_rng(0)
    real, generated = rng.standard_normal((2, 1500, 4))
    monkeypatch.setattr(metrics, "BLOCK", 1500 * 10)
    for measure in (kernel_distance, precision_recall):
        tracemalloc.start()
        measure(real, generated)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1500**2 * 8 / 5
