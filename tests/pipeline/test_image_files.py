"""Images to edit: a table of what is passed, its pixels as a square, and the line that says so."""

import numpy as np
import pytest
from PIL import Image

import glide_jax as glide
from glide_jax.data.decoding import Encoded, load_image, square
from glide_jax.pipeline.image_files import open_images, read_images
from glide_jax.pipeline.sampling_inputs import read_input_images

GREEN, WHITE = (0, 160, 0), (255, 255, 255)


def blocks(*rows):
    """An image of 8x8 blocks of grey values."""
    values = np.kron(np.array(rows, np.uint8), np.ones((8, 8), np.uint8))
    return values[..., None].repeat(3, axis=2)


WIDE = blocks([10, 60, 90, 200], [20, 70, 100, 210])


def note_of(capsys, *arguments, **options):
    read_input_images(*arguments, **options)
    return capsys.readouterr().err


def test_an_image_is_cropped_to_its_centre_or_padded():
    assert np.array_equal(read_images(WIDE, 16, 1)[0], WIDE[:, 8:24])
    padded = read_images(WIDE, 32, 1, fit="pad")[0]
    assert np.array_equal(padded[8:24], WIDE)
    assert (padded[:8] == 255).all() and (padded[24:] == 255).all()
    tall = read_images(WIDE.transpose(1, 0, 2), 16, 1, fit="pad")[0]
    assert (tall[:, :4] == 255).all() and (tall[:, 12:] == 255).all()
    assert np.array_equal(tall[::4, 4:12:4, 0], [[10, 20], [60, 70], [90, 100], [200, 210]])
    with pytest.raises(glide.UsageError, match="fit is crop or pad, not 'stretch'"):
        read_images(WIDE, 16, 1, fit="stretch")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_editing_and_training_read_the_same_pixels(tmp_path, suffix):
    rng = np.random.default_rng(0)
    path = tmp_path / f"p.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rng.integers(0, 256, (90, 300, 3), np.uint8)).save(path, exif=exif)
    trained = square(load_image(Encoded(path.read_bytes(), "p"), 16), 16)
    assert np.array_equal(read_images(path, 16, 1)[0], trained)


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (WIDE[:, 8:24], 60),
        (WIDE[:, 8:24, 0], 60),
        (WIDE[:, 8:24, :1], 60),
        (WIDE[:, 8:24] / 255.0, 60),
        (WIDE[:, 8:24].astype(np.float32) / 127.5 - 1, 60),
        (WIDE[:, 8:24].astype(np.int64), 60),
        (WIDE[:, 8:24].astype(float), 60),
        (WIDE[:, 8:24].astype(np.uint16) * 257, 60),
        (WIDE[:, 8:24] > 65, 0),
        (np.concatenate([WIDE[:, 8:24], np.full((16, 16, 1), 0, np.uint8)], 2), 255),
        (WIDE[:, 8:24].tolist(), 60),
        (Image.fromarray(WIDE[:, 8:24]), 60),
        ([Image.fromarray(WIDE[:, 8:24])], 60),
        ([WIDE[:, 8:24]], 60),
    ],
)
def test_arrays_of_each_kind_are_images(array, wanted):
    found = read_images(array, 16, 1)
    assert found.shape == (1, 16, 16, 3) and found.dtype == np.uint8
    assert (found[0, 0, 0] == wanted).all()


NAN = np.full((4, 4, 3), np.nan)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), "an image is (H, W, 3) uint8, not (3, 8, 8) uint8: put the "
         "channels last"),
        (np.zeros((8, 8, 5)), "an image is (H, W, 3) uint8, not (8, 8, 5) float64"),
        (np.zeros(8), "an image is (H, W, 3) uint8, not (8,) float64"),
        (np.zeros((0, 4, 3)), "an image is a file, a PIL.Image or an array of numbers, not "
         "(0, 4, 3) float64"),
        (NAN, "cannot read the array (4, 4, 3) as an image: some of its values are not finite "
         "numbers"),
        (np.full((4, 4, 3), 3.5), "cannot read the array (4, 4, 3) as an image: its values run "
         "from 3.5 to 3.5: scale them to 0 to 1, or to 0 to 255"),
        (b"bytes", "an image is a file, a PIL.Image or an array of numbers, not bytes"),
        (object(), "an image is a file, a PIL.Image or an array of numbers, not object"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_said(source, message):
    with pytest.raises(glide.UsageError) as caught:
        open_images(source)
    assert str(caught.value) == message


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for name, reason in (
        ("missing.png", "No such file or directory; check the path"),
        ("folder", "Is a directory; check the path"),
    ):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(glide.GlideError) as caught:
            open_images(tmp_path / name)
        assert str(caught.value) == f"cannot read the image {tmp_path / name}: {reason}"


def test_names_of_any_script_and_of_the_home_folder_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.fromarray(WIDE).save(tmp_path / "\u732b \u00e9.png")
    found = open_images("~/\u732b \u00e9.png")
    assert found.name == "~/\u732b \u00e9.png" and found.images[0].size == (32, 16)


def test_one_line_says_what_was_changed(tmp_path, capsys):
    path = tmp_path / "photo.png"
    exif = Image.Exif()
    exif[0x0112] = 8
    layered = Image.new("RGBA", (96, 64), (255, 140, 0, 128))
    layered.save(path, exif=exif)
    assert note_of(capsys, path, None, None, 16) == (
        f"note: {path} was turned upright, laid on white where it is transparent, cropped to its "
        "central 64x64 of 64x96 and reduced from 64x64 to 16x16\n"
    )
    assert note_of(capsys, WIDE, None, None, 16) == (
        "note: the image was cropped to its central 16x16 of 32x16\n"
    )
    assert note_of(capsys, WIDE, None, None, 64, fit="pad") == (
        "note: the image was padded with white to 32x32 of 32x16 and enlarged from 32x32 to 64x64\n"
    )
    # Nothing to say where all is as it was; nor twice of the same source.
    assert note_of(capsys, WIDE[:, :16], None, None, 16) == ""
    assert note_of(capsys, open_images(WIDE), None, None, 16) == ""


def test_small_images_to_enlarge_keep_their_size(capsys):
    sources = read_input_images(None, None, WIDE, 64)
    assert np.array_equal(sources.low_res.squares(None, 1)[0], WIDE[:, 8:24])
    assert capsys.readouterr().err == (
        "note: low_res: the image was cropped to its central 16x16 of 32x16\n"
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)])
def test_tiny_and_very_long_images_become_squares(size, capsys):
    image = Image.new("RGB", size, GREEN)
    assert (read_images(image, 8, 1) == GREEN).all()
    padded = read_images(image, 8, 1, fit="pad")[0]
    inside = (padded == GREEN).all(axis=2).sum()
    assert inside == (64 if size == (1, 1) else 8)


def test_a_jpeg_is_decoded_at_a_fraction(tmp_path):
    path = tmp_path / "large.jpg"
    Image.new("RGB", (1600, 800), GREEN).save(path)
    found = open_images(path, 32)
    assert found.images[0].image.size == (200, 100) and found.images[0].size == (1600, 800)
    assert found.changes(32) == [
        "cropped to its central 800x800 of 1600x800",
        "reduced from 800x800 to 32x32",
    ]


def test_images_of_several_sizes():
    several = [Image.fromarray(WIDE), WIDE[:, :16]]
    assert read_images(several, 16, 2).shape == (2, 16, 16, 3)
    with pytest.raises(glide.UsageError, match="2 images for 3 prompts: give one, or one each"):
        read_images(several, 16, 3)
    uneven = [WIDE, WIDE[:8, :8]]
    with pytest.raises(glide.UsageError, match="several sizes"):
        read_images(uneven, None, 2)
