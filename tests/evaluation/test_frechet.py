"""The Frechet distance between Gaussians, against closed forms and pytorch-fid's formula."""

import numpy as np
import pytest
from scipy import linalg

from glide_jax.errors import GlideError, UsageError
from glide_jax.evaluation import frechet
from glide_jax.evaluation.frechet import (
    Moments,
    distance,
    moments,
    read_statistics,
    save_statistics,
)
from glide_jax.evaluation.metrics import frechet_distance

RNG = np.random.default_rng(0)


def features(count, dimensions, shift=0.0):
    mixing = RNG.standard_normal((dimensions, dimensions)) / np.sqrt(dimensions)
    return (RNG.standard_normal((count, dimensions)) @ mixing + shift).astype(np.float32)


def by_the_formula(a, b):
    """Return the distance with a matrix root, from features in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    one, two = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(one @ two).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + two - 2 * root)


def test_diagonal_covariances_have_a_closed_form():
    """`|m_1 - m_2|^2 + sum (s_1 - s_2)^2`."""
    a = Moments(np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    b = Moments(np.array([1.0, 2.0, 0.0]), np.diag([4.0, 4.0, 1.0]))
    assert distance(a, b) == pytest.approx(5 + (1 + 0 + 4), abs=1e-12)
    assert distance(a, a) == pytest.approx(0, abs=1e-12)


def test_a_scaled_gaussian_has_a_closed_form():
    """`C_2 = c^2 C_1` gives `(1 - c)^2 tr C_1`, for any covariance."""
    x = features(300, 20)
    found = distance(moments(x), moments(3 * x))
    trace = np.trace(np.cov(x.astype(np.float64), rowvar=False))
    mean = x.mean(axis=0, dtype=np.float64)
    assert found == pytest.approx(4 * trace + 4 * (mean**2).sum(), rel=1e-6)


@pytest.mark.parametrize("dimensions", [2, 64, 200])
def test_it_equals_the_formula_with_a_matrix_root(dimensions):
    a, b = features(500, dimensions), features(700, dimensions, shift=0.3)
    expected = by_the_formula(a, b)
    assert distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_no_full_rank_needs_no_correction():
    a, b = features(20, 100), features(30, 100, shift=1.0)
    assert distance(moments(a), moments(b)) == pytest.approx(frechet_distance(a, b), rel=1e-5)
    # In directions where the other set does not vary, its own variance counts.
    line = Moments(np.zeros(2), np.diag([4.0, 0.0]))
    across = Moments(np.zeros(2), np.diag([0.0, 9.0]))
    assert distance(line, across) == pytest.approx(13)


def test_moments_are_those_of_float64_in_any_blocks(monkeypatch):
    x = (features(101, 5) + 3000).astype(np.float32)
    for rows in (7, 4096):
        monkeypatch.setattr(frechet, "ROWS", rows)
        found = moments(x)
        np.testing.assert_allclose(found.mean, x.astype(np.float64).mean(0), rtol=1e-12)
        expected = np.cov(x.astype(np.float64), rowvar=False)
        np.testing.assert_allclose(found.covariance, expected, rtol=1e-9, atol=1e-12)
    assert found.count == 101 and found.dimensions == 5


def test_statistics_are_read_as_they_were_saved(tmp_path):
    saved = moments(features(9, 4), (("extractor", "a"), ("checksum", "b"), ("size", "8x8")))
    save_statistics(tmp_path / "new" / "s.npz", saved)
    found = read_statistics(tmp_path / "new" / "s.npz")
    assert np.array_equal(found.mean, saved.mean)
    np.testing.assert_allclose(found.covariance, saved.covariance, rtol=1e-15)
    assert (found.count, found.source) == (9, saved.source)


def test_files_of_other_programs_need_mu_and_sigma_alone(tmp_path):
    path = tmp_path / "adm.npz"
    np.savez(path, mu=np.zeros(3, "f4"), sigma=np.eye(3), mu_s=np.ones(5), sigma_s=np.eye(5))
    found = read_statistics(path)
    assert found.covariance.dtype == np.float64 and (found.count, found.source) == (None, ())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "lacks sigma: reference statistics are an .npz with mu and sigma"),
        ({"x": np.zeros(3)}, "lacks mu and sigma: .*; this one has x"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"sigma \(D, D\), not \(3,\) and \(4, 4\)"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "mu or sigma is not finite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 5], [0, 1]])}, "sigma is not symmetric"),
        ({"mu": np.array([None]), "sigma": np.eye(1)}, "is no readable .npz file"),
    ],
)
def test_broken_statistics_are_refused_by_name(tmp_path, arrays, message):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(GlideError, match=rf"s\.npz.*{message}"):
        read_statistics(tmp_path / "s.npz")


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    for path, message in (
        (tmp_path / "absent.npz", "absent.npz does not exist: give an .npz with mu and sigma"),
        (tmp_path, "is a folder: give an .npz with mu and sigma"),
        (tmp_path / "text.npz", "text.npz is no readable .npz file"),
    ):
        with pytest.raises(GlideError, match=message):
            read_statistics(path)


def test_what_has_no_distance_is_refused():
    with pytest.raises(UsageError, match="3 dimensions are not 2"):
        distance(Moments(np.zeros(3), np.eye(3)), Moments(np.zeros(2), np.eye(2)))
    with pytest.raises(UsageError, match="not finite"):
        moments(np.array([[np.nan], [1.0]]))
    with pytest.raises(UsageError, match="N at least 2"):
        moments(np.ones((1, 2)))
