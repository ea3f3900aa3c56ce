"""Uploads and masks: what is read, what is kept, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from glide_jax.demo.uploads import keep, painted_mask, read_upload
from glide_jax.errors import GlideError


def test_an_upload_of_the_right_size_is_kept_to_the_byte(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = read_upload(tmp_path / "a.png", 16)
    assert np.array_equal(found, pixels)
    assert np.array_equal(np.asarray(Image.open(keep(found, tmp_path / "in", "input"))), pixels)


def test_the_middle_square_of_an_upright_photo_is_taken(tmp_path):
    photo = Image.new("RGB", (30, 10), "red")
    photo.paste("blue", (10, 0, 20, 10))
    photo.save(tmp_path / "wide.png")
    assert (read_upload(tmp_path / "wide.png", 10) == (0, 0, 255)).all()
    # On its side, as telephones write photos: the left end becomes the top.
    exif = Image.Exif()
    exif[274] = 6
    half = Image.new("RGB", (20, 20), "white")
    half.paste("black", (0, 0, 10, 20))
    half.save(tmp_path / "side.png", exif=exif)
    upright = read_upload(tmp_path / "side.png", 20)
    assert (upright[:10] == 0).all() and (upright[10:] == 255).all()


@pytest.mark.parametrize("name", ["text.png", "empty.jpg", "cut.png", "bomb.png"])
def test_a_bad_upload_gets_one_line_with_its_own_name(name, tmp_path, monkeypatch):
    file = tmp_path / name
    file.write_bytes(b"hello" if name == "text.png" else b"")
    if name == "cut.png":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
        file.write_bytes(file.read_bytes()[:2000])
    if name == "bomb.png":
        Image.new("L", (40, 40)).save(file)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(GlideError) as found:
        read_upload(file, 16)
    text = str(found.value)
    assert text.startswith(f"cannot read the image {name}: ")
    assert str(tmp_path) not in text and "\n" not in text


def test_paint_becomes_a_mask():
    layer = np.zeros((32, 32, 4), np.uint8)
    assert painted_mask([], 16) is None and painted_mask([layer, None], 16) is None
    layer[8:16, 0:4, 3] = 255
    layer[20, 20, 3] = 10  # the soft edge of a stroke
    mask = painted_mask([layer], 32)
    assert mask.dtype == np.uint8 and np.array_equal(mask > 0, layer[..., 3] > 63)
    assert set(np.unique(mask)) == {0, 255}
    # A canvas of another size is scaled by nearest neighbour.
    assert np.array_equal(painted_mask([layer], 16), mask[::2, ::2])
    # Layers add up.
    other = np.zeros_like(layer)
    other[0, 0, 3] = 200
    assert painted_mask([layer, other], 32)[0, 0] == 255


def test_the_same_content_is_kept_once(tmp_path):
    pixels = np.zeros((4, 4), np.uint8)
    assert keep(pixels, tmp_path, "mask") == keep(pixels.copy(), tmp_path, "mask")
    assert keep(pixels + 1, tmp_path, "mask") != keep(pixels, tmp_path, "mask")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GlideError, match=r"cannot write .*file/mask-"):
        keep(np.zeros((4, 4), np.uint8), tmp_path / "file", "mask")
