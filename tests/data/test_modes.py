"""A table of files and pixels: each kind of image, and the RGB that it is read as."""

import io

import numpy as np
import pytest
from PIL import Image

from glide_jax.data.decoding import MAX_PIXELS, Encoded, decode
from glide_jax.data.modes import UnfitPixels, to_bytes, to_rgb
from glide_jax.data.storage import BrokenRecord
from glide_jax.errors import UsageError
from tests.support.pngs import chunked_png, shorts

WHITE, DEEP = "laid on white where it is transparent", "reduced from 16 bits to 8"
INKS, UNIT = "converted from CMYK", "scaled from values between 0 and 1"
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def grey(*values):
    return [(v, v, v) for v in values]


def saved(image, kind="PNG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


def array(values, dtype, kind="PNG", **options):
    return saved(Image.fromarray(np.array([values], dtype)), kind, **options)


def new(mode, colour, kind="PNG", **options):
    return saved(Image.new(mode, (2, 1), colour), kind, **options)


def animation(kind):
    frames = [Image.new("RGB", (2, 1), colour) for colour in (GREEN, RED, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def palette(alpha=None):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putdata([0, 1])
    return saved(image, transparency=alpha) if alpha is not None else saved(image)


TABLE = {
    "8-bit grey": (array([7, 200], np.uint8), grey(7, 200), ()),
    "1 bit": (new("1", 1), grey(255, 255), ()),
    "grey with alpha": (new("LA", (7, 0)), grey(255, 255), (WHITE,)),
    "opaque grey with alpha": (new("LA", (7, 255)), grey(7, 7), ()),
    "half transparent": (new("RGBA", (255, 0, 0, 51)), [(255, 204, 204)] * 2, (WHITE,)),
    "palette": (palette(), [RED, GREEN], ()),
    "palette, a transparent index": (palette(1), [RED, (255, 255, 255)], (WHITE,)),
    "palette, alpha bytes": (palette(b"\xff\x00"), [RED, (255, 255, 255)], (WHITE,)),
    "16-bit grey": (array([0, 32768, 65535, 256], np.uint16), grey(0, 128, 255, 1), (DEEP,)),
    "16-bit grey, a transparent value": (
        chunked_png(3, 1, 16, 0, [shorts(300, 301, 60000)], [(b"tRNS", shorts(300))]),
        grey(255, 1, 234),
        (DEEP, WHITE),
    ),
    "16-bit grey with alpha": (
        chunked_png(2, 1, 16, 4, [shorts(60000, 65535, 60000, 0)]),
        grey(234, 255),
        (WHITE,),
    ),
    "16-bit RGB": (chunked_png(1, 1, 16, 2, [shorts(0, 32768, 65535)]), [(0, 128, 255)], ()),
    "16-bit RGB, a transparent colour": (
        chunked_png(2, 1, 16, 2, [shorts(*[300] * 3, *[301] * 3)], [(b"tRNS", shorts(*[300] * 3))]),
        grey(255, 1),
        (WHITE,),
    ),
    "8-bit grey, a transparent value": (
        chunked_png(2, 1, 8, 0, [bytes([3, 9])], [(b"tRNS", shorts(3))]),
        grey(255, 9),
        (WHITE,),
    ),
    "8-bit RGB, a transparent colour": (
        chunked_png(2, 1, 8, 2, [bytes([1, 2, 3, 1, 2, 4])], [(b"tRNS", shorts(1, 2, 3))]),
        [(255, 255, 255), (1, 2, 4)],
        (WHITE,),
    ),
    "4-bit grey, a transparent value": (
        chunked_png(2, 1, 4, 0, [b"\x3a"], [(b"tRNS", shorts(3))]), grey(255, 170), (WHITE,)
    ),
    "2-bit grey, a transparent value": (
        chunked_png(2, 1, 2, 0, [b"\x60"], [(b"tRNS", shorts(1))]), grey(255, 170), (WHITE,)
    ),
    "1-bit grey, a transparent value": (
        chunked_png(2, 1, 1, 0, [b"\x40"], [(b"tRNS", shorts(0))]), grey(255, 255), (WHITE,)
    ),
    "CMYK JPEG": (
        new("CMYK", (0, 255, 255, 0), "JPEG", quality=100), [RED] * 2, (INKS,)
    ),
    "CMYK TIFF": (new("CMYK", (0, 255, 0, 0), "TIFF"), [(255, 0, 255)] * 2, (INKS,)),
    "LAB TIFF": (new("LAB", (255, 128, 128), "TIFF"), grey(255, 255), ("converted from LAB",)),
    "16-bit TIFF": (array([0, 65535], np.uint16, "TIFF"), grey(0, 255), (DEEP,)),
    "16-bit PGM": (array([0, 256], np.uint16, "PPM"), grey(0, 1), (DEEP,)),
    "16-bit JPEG 2000": (array([0, 65535], np.uint16, "JPEG2000"), grey(0, 255), (DEEP,)),
    "32-bit TIFF of bytes": (array([0, 200], np.int32, "TIFF"), grey(0, 200), ()),
    "float TIFF, 0 to 1": (
        array([0, 0.5, 1], np.float32, "TIFF"), grey(0, 128, 255), (UNIT,)
    ),
    "float TIFF, -1 to 1": (
        array([-1, 1], np.float32, "TIFF"), grey(0, 255), ("scaled from values between -1 and 1",)
    ),
    "float TIFF, 0 to 255": (
        array([0, 99.6, 255], np.float32, "TIFF"), grey(0, 100, 255), ("rounded to 8 bits",)
    ),
    "GIF": (animation("GIF"), [GREEN] * 2, ("reduced to the first of 3 frames",)),
    "WebP animation": (animation("WEBP"), [GREEN] * 2, ("reduced to the first of 3 frames",)),
    "APNG": (animation("PNG"), [GREEN] * 2, ("reduced to the first of 3 frames",)),
    "pages of TIFF": (animation("TIFF"), [GREEN] * 2, ("reduced to the first of 3 frames",)),
    "1x1": (saved(Image.new("RGB", (1, 1), RED)), [RED], ()),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLE)
def test_each_kind_of_image_has_its_exact_pixels(kind):
    data, pixels, changes = TABLE[kind]
    found = decode(Encoded(data, "x"))
    assert found.image.mode == "RGB"
    lossy = 1 if kind in ("CMYK JPEG", "LAB TIFF") else 0
    assert np.abs(np.asarray(found.image)[0].astype(int) - pixels).max() <= lossy
    assert found.changes == changes
    # An image in memory is read like its file, up to the lower bytes that Pillow drops.
    if "first of" not in str(changes) and "16-bit RGB, a" not in kind:
        again = decode(Image.open(io.BytesIO(data)))
        assert np.array_equal(again.image, found.image) and again.changes == changes


def test_premultiplied_modes():
    for mode, colour, wanted in (("La", (0, 0), 255), ("RGBa", (0, 0, 0, 255), 0)):
        image, _ = to_rgb(Image.new(mode, (1, 1), colour))
        assert image.getpixel((0, 0)) == (wanted,) * 3


UNTURN = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270} | {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    7: Image.Transpose.TRANSVERSE,
}


def stored_turned(image, orientation, kind, **options):
    """Return a file that is upright after a turn by its EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = UNTURN.get(orientation)
    return saved(image if turn is None else image.transpose(turn), kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", range(10))
def test_each_orientation_is_turned_upright(kind, orientation):
    blocks = np.array([[RED, GREEN, BLUE], [(255, 255, 255), (9, 9, 9), (255, 255, 0)]], np.uint8)
    wanted = np.kron(blocks, np.ones((16, 16, 1), np.uint8))
    options = {"JPEG": {"quality": 100}, "MPO": {"quality": 100}, "WEBP": {"lossless": True}}
    data = stored_turned(Image.fromarray(wanted), orientation, kind, **options.get(kind, {}))
    found = decode(Encoded(data, "x"))
    assert found.size == found.image.size == (48, 32)
    assert found.changes == (("turned upright",) if 2 <= orientation <= 8 else ())
    centres = np.asarray(found.image)[8::16, 8::16].astype(int)
    assert np.abs(centres - blocks).max() <= (8 if kind in ("JPEG", "MPO") else 0)


def test_sixteen_bits_with_a_transparent_value_are_turned_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    # Stored 2 wide and 1 high; upright, 1 wide and 2 high.
    data = chunked_png(
        2, 1, 16, 0, [shorts(300, 60000)], [(b"tRNS", shorts(300)), (b"eXIf", exif.tobytes()[6:])]
    )
    found = decode(Encoded(data, "x"))
    assert found.size == (1, 2) and np.asarray(found.image)[:, 0, 0].tolist() == [255, 234]
    assert found.changes == ("turned upright", DEEP, WHITE)


def test_broken_exif_is_no_reason_to_refuse_an_image():
    data = saved(Image.new("RGB", (2, 1), RED), exif=b"Exif\0\0garbage that is no TIFF header")
    assert decode(Encoded(data, "x")).orientation == 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty (0 bytes); remove or repair it"),
        (b"hello", "its format is unknown; remove or repair it"),
        (b"\n<!DOCTYPE html>", "it is a web page: download the image itself"),
        (b"<svg xmlns=''>", "it is an SVG drawing: export it as PNG"),
        (b"%PDF-1.7", "it is a PDF document: export the page as PNG"),
        (b"\0\0\0\x18ftypheic", "HEIC is not supported: convert it to JPEG or PNG"),
        (b"\0\0\0\x18ftypmp42", "it is a video: export a frame as PNG"),
        (b"version https://git-lfs.", "it is a Git LFS pointer: run `git lfs pull`"),
        (b"\x89PNG\r\n\x1a\n", "it is a broken or truncated PNG file; remove or repair it"),
        (
            saved(noise())[:600],
            "image file is truncated; remove or repair it",
        ),
        (
            saved(noise(), "WEBP")[:-300],
            "it is a broken or truncated WebP file; remove or repair it",
        ),
        (
            array([np.nan, 1], np.float32, "TIFF"),
            "some of its values are not finite numbers; remove or repair it",
        ),
        (
            array([0, 70000], np.int32, "TIFF"),
            "its values run from 0 to 70000: scale them to 0 to 1, or to 0 to 255",
        ),
    ],
)
def test_what_is_not_an_image_is_named(data, reason):
    with pytest.raises(BrokenRecord) as caught:
        decode(Encoded(data, "a/b.png"))
    assert str(caught.value) == f"cannot read the image a/b.png: {reason}"


def test_the_limit_of_pixels_can_be_raised(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = saved(Image.new("RGB", (50, 50)))
    with pytest.raises(BrokenRecord) as caught:
        decode(Encoded(data, "a.png"))
    assert str(caught.value) == (
        "cannot read the image a.png: it has 50 x 50 pixels, more than the limit of 200 "
        "(a decompression bomb?): if it is genuine, set GLIDE_JAX_MAX_PIXELS=2500"
    )
    monkeypatch.setenv(MAX_PIXELS, "2_500")
    assert decode(Encoded(data, "a.png")).size == (50, 50)
    monkeypatch.setenv(MAX_PIXELS, "many")
    with pytest.raises(UsageError, match="GLIDE_JAX_MAX_PIXELS is a number of pixels, not 'many'"):
        decode(Encoded(data, "a.png"))
    assert Image.MAX_IMAGE_PIXELS == 100


def test_the_pixels_of_a_reduced_jpeg_count(monkeypatch):
    monkeypatch.setenv(MAX_PIXELS, "10000")
    data = saved(Image.new("RGB", (320, 160), RED), "JPEG")
    found = decode(Encoded(data, "a.jpg"), 16)
    assert found.image.size == (80, 40) and found.size == (320, 160)
    with pytest.raises(BrokenRecord, match="320 x 160"):
        decode(Encoded(data, "a.jpg"))


def test_values_that_are_no_image_are_refused():
    for values, message in (
        (np.array([0.0, 2.5]), "its values run from 0 to 2.5: scale"),
        (np.array([-3, 9]), "its values run from -3 to 9: scale"),
        (np.array([1j]), "complex128, not numbers"),
        (np.array([np.inf]), "not finite"),
    ):
        with pytest.raises(UnfitPixels, match=message):
            to_bytes(values)
    assert to_bytes(np.array([True, False]))[0].tolist() == [255, 0]
    assert to_bytes(np.array([-0.01, 1.02]))[0].tolist() == [0, 255]
