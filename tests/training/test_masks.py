"""Random masks for training inpainting models."""

from functools import partial

import jax
import numpy as np
import pytest

from glide_jax.training.masks import OUTSIDE, RECTANGLES, random_known


@partial(jax.jit, static_argnums=1)
def random_masks(keys, size, mask_all_share):
    return jax.vmap(partial(random_known, size=size, mask_all_share=mask_all_share))(keys)


def masks(seed=0, size=32, mask_all_share=0.0):
    """Return 400 masks, `(400, size, size)`, 1 where the pixel is known."""
    found = np.asarray(
        random_masks(jax.random.split(jax.random.key(seed), 400), size, mask_all_share)
    )
    assert found.shape == (400, size, size, 1) and found.dtype == np.float32
    assert ((found == 0) | (found == 1)).all()
    return found[..., 0]


def test_a_third_of_an_image_is_erased_and_shares_vary():
    erased = 1 - masks().mean(axis=(1, 2))
    # An eighth of the masks are inverted.
    share = np.where(erased > 0.75, 1 - erased, erased)
    assert share.mean() == pytest.approx(0.32, abs=0.05)
    assert (erased > 0).all() and (erased < 1).all()
    assert np.quantile(erased, 0.1) < 0.2 and np.quantile(erased, 0.9) > 0.55


def test_rectangles_and_strokes_are_about_equally_frequent():
    """A union of n rectangles has at most 2 n + 1 different rows, strokes have more."""
    kinds = np.array([len(np.unique(mask, axis=0)) for mask in masks()])
    most = 2 * RECTANGLES + 1
    assert 0.4 < (kinds <= most).mean() < 0.65
    assert (kinds > most + 5).mean() > 0.25


def test_every_pixel_is_erased_in_some_masks():
    erased = 1 - np.mean([masks(seed).mean(axis=0) for seed in (1, 2, 3)], axis=0)
    assert erased.min() > 0.1 and erased.max() < 0.7
    # Corners are erased by an eighth of the masks at least: the inverted ones.
    corner = erased[0, 0]
    assert corner == pytest.approx(OUTSIDE, abs=0.06)


def test_everything_is_erased_at_the_rate_of_share_all():
    everything = masks(mask_all_share=0.3).max(axis=(1, 2)) == 0
    assert everything.mean() == pytest.approx(0.3, abs=0.07)
    assert (masks(mask_all_share=1.0) == 0).all()


def test_a_mask_scales_with_the_image():
    small, large = masks(size=32), masks(size=64)
    coarse = large.reshape(-1, 32, 2, 32, 2).mean(axis=(2, 4))
    assert np.abs(small - coarse).mean() < 0.03
