"""Sets of images: folders and arrays, their order, sizes and faults."""

import os

import numpy as np
import pytest
from PIL import Image

from glide_jax.data.decoding import square
from glide_jax.errors import GlideError, UsageError
from glide_jax.evaluation.image_sets import has_images, open_images
from glide_jax.pipeline.images import Images
from tests.support.extractor_weights import random_images

IMAGES = random_images(12, 8, 8, seed=0)


def write(folder, images=IMAGES, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}{suffix}")
    return folder


def test_numbers_in_names_are_numbers(tmp_path):
    found = open_images(write(tmp_path / "a"))
    assert found.names[:3] == ("0.png", "1.png", "2.png") and found.names[-1] == "11.png"
    assert np.array_equal(list(found.images()), IMAGES) and len(found) == 12
    assert np.array_equal(list(found.images(5)), IMAGES[5:])


def test_subfolders_are_read_and_texts_and_hidden_files_are_not(tmp_path):
    folder = write(tmp_path / "a" / "sub", IMAGES[:2])
    (tmp_path / "a" / "notes.txt").write_text("")
    (folder / "._0.png").write_text("")
    assert open_images(tmp_path / "a").names == ("sub/0.png", "sub/1.png")


def test_grids_and_previews_of_samples_are_left_out(tmp_path):
    samples = Images(IMAGES[:3], ("b", "a", "c"), 0, (0, 1, 2), "none", {})
    samples.save(tmp_path / "a")
    samples.save_preview(tmp_path / "a")
    assert len(list((tmp_path / "a").iterdir())) == 5
    found = open_images(tmp_path / "a")
    assert found.names == ("00000_b.png", "00001_a.png", "00002_c.png")
    # Elsewhere such names are images like others.
    Image.fromarray(IMAGES[0]).save(write(tmp_path / "b", IMAGES[:1]) / "preview.png")
    assert open_images(tmp_path / "b").names == ("0.png", "preview.png")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("labels", [{}, {"arr_1": np.arange(12)}])
def test_arrays_equal_folders(tmp_path, save, labels):
    save(tmp_path / "samples.npz", IMAGES, **labels)
    found = open_images(tmp_path / "samples.npz")
    assert np.array_equal(list(found.images()), IMAGES) and found.names == ()
    assert np.array_equal(list(found.images(7)), IMAGES[7:])


def test_a_size_makes_central_squares_of_all(tmp_path):
    wide = random_images(1, 8, 20, seed=1)[0]
    write(tmp_path / "a", [IMAGES[0], wide])
    with pytest.raises(
        UsageError, match=r"1\.png has 20 x 8 pixels, images before it 8 x 8: --size 256"
    ):
        list(open_images(tmp_path / "a").images())
    found = list(open_images(tmp_path / "a", 4).images())
    assert np.array_equal(found, [square(IMAGES[0], 4), square(wide, 4)])
    np.savez(tmp_path / "b.npz", wide[None])
    assert np.array_equal(list(open_images(tmp_path / "b.npz", 4).images()), found[1:])


def test_images_after_an_interruption_must_have_the_size_of_those_before(tmp_path):
    found = open_images(write(tmp_path / "a"))
    with pytest.raises(UsageError, match="images before it 9 x 7"):
        next(found.images(3, (7, 9)))


def test_images_are_decoded_as_in_training(tmp_path):
    clear = np.concatenate([IMAGES[0], np.zeros((8, 8, 1), np.uint8)], axis=-1)
    write(tmp_path / "a", [clear])
    assert (next(open_images(tmp_path / "a").images()) == 255).all()


def test_the_fingerprint_changes_with_the_files_and_the_size(tmp_path):
    folder = write(tmp_path / "a")
    prints = [open_images(folder).fingerprint, open_images(folder, 4).fingerprint]
    assert open_images(folder).fingerprint == prints[0]
    os.utime(folder / "3.png", (1, 1))
    prints.append(open_images(folder).fingerprint)
    (folder / "4.png").rename(folder / "x.png")
    prints.append(open_images(folder).fingerprint)
    assert len(set(prints)) == 4


def test_files_of_statistics_alone_are_told_apart(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(1), sigma=np.eye(1))
    np.savez(tmp_path / "both.npz", IMAGES, mu=np.zeros(1), sigma=np.eye(1))
    assert not has_images(tmp_path / "s.npz")
    assert has_images(tmp_path / "both.npz") and has_images(tmp_path)


def test_what_is_no_set_of_images_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("")
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", images=IMAGES)
    np.savez(tmp_path / "float.npz", IMAGES / 255)
    np.savez(tmp_path / "first.npz", IMAGES.transpose(0, 3, 1, 2))
    np.savez(tmp_path / "order.npz", np.asfortranarray(IMAGES))
    np.savez(tmp_path / "none.npz", IMAGES[:0])
    for name, message in (
        ("absent", "does not exist: give a folder of images, or an .npz with images under arr_0"),
        ("empty", "has no images: no files, so none with the suffix of an image"),
        ("texts", "has no images: 1 files, none with the suffix of an image"),
        ("text.npz", "is no readable .npz file"),
        ("other.npz", "holds images: give a folder of images"),
        ("float.npz", r"arr_0 must be images \(N, H, W, 3\) uint8, not \(12, 8, 8, 3\) float64"),
        ("first.npz", r"not \(12, 3, 8, 8\) uint8"),
        ("order.npz", "uint8, in Fortran order"),
        ("none.npz", r"not \(0, 8, 8, 3\) uint8"),
    ):
        with pytest.raises(GlideError, match=rf"{name}:? {message}|{name}: .*{message}"):
            open_images(tmp_path / name)
    with pytest.raises(UsageError, match="--size must be at least 1, not 0"):
        open_images(tmp_path, 0)


def test_a_broken_image_and_a_cut_file_are_named(tmp_path):
    folder = write(tmp_path / "a")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    with pytest.raises(GlideError, match=r"cannot read the image .*3\.png"):
        list(open_images(folder).images())
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", random_images(12, 64, 64, seed=0))
        data = bytearray((tmp_path / "a.npz").read_bytes())
        data[40000:40100] = bytes(100)
        (tmp_path / "a.npz").write_bytes(data)
        with pytest.raises(GlideError, match=r"a\.npz is damaged at image \d+"):
            list(open_images(tmp_path / "a.npz").images())
