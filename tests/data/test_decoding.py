"""Decoding images and cropping them to squares."""

import numpy as np
import pytest
from PIL import Image

from glide_jax.data.decoding import Encoded, load_image, random_square, square
from glide_jax.data.storage import BrokenRecord
from tests.support.shards import encode


def test_transparent_images_are_composed_on_white():
    image = np.zeros((4, 4, 4), np.uint8)
    image[0, 0] = (255, 0, 0, 255)
    decoded = np.asarray(load_image(Encoded(encode(image, "PNG"), "a.png")))
    assert decoded[0, 0].tolist() == [255, 0, 0] and decoded[3, 3].tolist() == [255, 255, 255]


def test_sixteen_bit_grey_keeps_its_range():
    grey = np.array([[0, 32768], [65535, 256]], np.uint16)
    decoded = np.asarray(load_image(Encoded(encode(grey, "PNG"), "a.png")))
    assert decoded[..., 0].tolist() == [[0, 128], [255, 1]]


def test_a_photo_taken_sideways_is_turned_upright():
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # upright after a turn of 90 degrees clockwise
    decoded = np.asarray(load_image(Encoded(encode(image, exif=exif, quality=100), "a.jpg")))
    assert decoded.shape == (32, 16, 3)
    assert decoded[2].min() > 250 and decoded[-2].max() < 5


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n" + b"x" * 99])
def test_the_error_of_an_unreadable_image_names_it(data):
    with pytest.raises(BrokenRecord, match="cannot read the image a/b.png") as caught:
        load_image(Encoded(data, "a/b.png"))
    assert " at 0x" not in str(caught.value)  # an address would make every message different


def test_a_suspiciously_large_image_is_broken(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encode(np.zeros((50, 50, 3), np.uint8), "PNG")
    with pytest.raises(BrokenRecord, match="decompression bomb"):
        load_image(Encoded(data, "a.png"))


def test_a_jpeg_decoded_at_a_fraction_looks_the_same():
    y, x = np.mgrid[:480, :640] / 640
    image = np.stack([x, y, (np.sin(40 * x * y) + 1) / 2], -1)
    encoded = Encoded(encode((255 * image).astype(np.uint8), quality=95), "a.jpg")
    assert load_image(encoded, 64).size == (320, 240)
    assert load_image(encoded, 30).size == (80, 60)
    assert load_image(encoded, 200).size == (640, 480)
    small, full = (square(load_image(encoded, side), 64) for side in (64, None))
    assert np.abs(small.astype(float) - full).mean() < 1


def test_images_are_cropped_to_their_centre_and_scaled():
    image = np.zeros((8, 12, 3), np.uint8)
    image[:, 2:10] = 100
    image[::2, 2:10] = 200
    assert (square(image, 4) == 150).all()
    assert (square(image, 8) == image[:, 2:10]).all()
    assert square(image, 16).shape == (16, 16, 3)
    assert (square(image, 2, share=0.5, position=(0, 0))[:, 1] == 150).all()
    assert (square(image, 4, share=0.5, position=(0, 1)) == image[:4, 8:]).all()
    with pytest.raises(BrokenRecord, match="uint8"):
        square(image.astype(np.float32), 4)


def test_shrinking_averages_areas_for_odd_ratios_too():
    stripes = np.zeros((100, 100, 3), np.uint8)
    stripes[::2] = 200
    assert np.abs(square(stripes, 7).astype(float) - 100).max() <= 8  # 1 / 14.3 of 200, halved


def test_random_squares_have_the_right_distribution_of_scale_and_position():
    """1 / share is uniform in [1, 1 / min_share].

    The image is a ramp, so the mean and the slope of a square give its position and side.
    """
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3)).copy()
    rng = np.random.default_rng(0)
    squares = [
        random_square(ramp, 10, rng, min_share=0.5)[5, :, 0].astype(float) for _ in range(2000)
    ]
    side = np.array([(s[-1] - s[0]) / 9 * 10 for s in squares])
    centre = np.array([s.mean() + 0.5 for s in squares])
    assert 49 < side.min() < 51 and 98 < side.max() < 101
    inverse = 100 / side
    assert abs(inverse.mean() - 1.5) < 0.03 and abs(inverse.std() - 1 / 12**0.5) < 0.02
    position = (centre - side / 2) / (200 - side)
    assert abs(position.mean() - 0.5) < 0.03 and abs(position.std() - 1 / 12**0.5) < 0.02
