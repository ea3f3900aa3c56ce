"""Masks: a table of kinds, and the pixels that each regenerates."""

import numpy as np
import pytest
from PIL import Image

import glide_jax as glide
from glide_jax.pipeline.image_files import open_images
from glide_jax.pipeline.mask_files import open_masks
from glide_jax.pipeline.sampling_inputs import read_input_images

RNG = np.random.default_rng(0)
REGION = np.zeros((64, 64), bool)
REGION[16:48, 16:48] = True
H = REGION.astype(np.uint8)
NOISE = RNG.integers(0, 256, (64, 64, 3), np.uint8)
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]


def layer(colour, alpha):
    """A colour, one for all or `(64, 64, 3)`, with an alpha."""
    pixels = np.empty((64, 64, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = colour, alpha
    return Image.fromarray(pixels)


def labels(values, palette=None):
    image = Image.fromarray(values.astype(np.uint8)).convert("P")
    image.putpalette(palette if palette is not None else [9, 9, 9] * 256)
    return image


def soft():
    """A mask with soft edges: half of the range lies on the border of `REGION`."""
    distance = np.maximum(*np.abs(np.mgrid[:64, :64] - 31.5))
    return np.clip(255 * (0.5 + (16 - distance) / 8), 0, 255).astype(np.uint8)


def with_spots():
    """Labels 0, 1 and 2; both of the latter in the region."""
    values = H.copy()
    values[20:30, 20:30] = 2
    return values


def colours(*values):
    return np.array(values, np.uint8)[with_spots()]


def black_and_white():
    """White and black strokes on a transparent layer."""
    white = np.where(REGION[..., None], 255, 0) * np.ones(3, np.uint8)
    alpha = np.zeros((64, 64), np.uint8)
    alpha[8:56, 8:56] = 255
    return layer(white, alpha)


BINARY = Image.fromarray(H * 255)
LEVELS = {
    "white on black": BINARY,
    "1 bit": BINARY.convert("1"),
    "RGB": BINARY.convert("RGB"),
    "CMYK": BINARY.convert("RGB").convert("CMYK"),
    "grey on black": Image.fromarray(H * 100),
    "light grey on dark": Image.fromarray(H * 60 + 90),
    "soft edges": Image.fromarray(soft()),
    "16 bits": Image.fromarray(H.astype(np.uint16) * 65235 + 300),
    "16 bits, low": Image.fromarray(H.astype(np.uint16) * 900),
    "labels 0 and 1": Image.fromarray(H),
    "labels 0 and 1 of 16 bits": Image.fromarray(H.astype(np.uint16)),
    "labels 0, 1, 2": Image.fromarray(with_spots()),
    "palette of greys, white first": labels(1 - H, [255, 255, 255, 0, 0, 0]),
    "palette without colours": labels(H),
    "opaque alpha": layer(np.where(REGION[..., None], 255, 0), 255),
    "alpha that hardly varies": layer(
        np.where(REGION[..., None], 255, 0), RNG.integers(250, 256, 1)
    ),
}
READ = {
    "brush": (layer(255, 255 * H), "its opaque part"),
    "red brush": (layer((255, 0, 0), 255 * H), "its opaque part"),
    "black brush": (layer(0, 255 * H), "its opaque part"),
    "half transparent brush": (layer((255, 0, 0), 128 * H), "its opaque part"),
    "brush, LA": (layer(255, 255 * H).convert("LA"), "its opaque part"),
    "erased from grey": (layer(90, 255 * (1 - H)), "its transparent part"),
    "erased from a photo": (layer(NOISE, 255 * (1 - H)), "its transparent part"),
    "erased, LA": (layer(90, 255 * (1 - H)).convert("LA"), "its transparent part"),
    "erased by half": (layer(NOISE, 255 - 128 * H), "its transparent part"),
    "strokes of black and white": (black_and_white(), "its white part"),
    "labels of VOC": (labels(with_spots(), VOC), "its coloured part"),
    "colours on black": (
        Image.fromarray(colours((0, 0, 0), (0, 0, 255), (255, 255, 0))), "its coloured part",
    ),
    "palette without black": (labels(H, [68, 1, 84, 253, 231, 37]), "its labels above 0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*LEVELS, *READ])
@pytest.mark.parametrize("stored", ["memory", "file"])
def test_each_kind_of_mask_has_its_exact_region(kind, stored, tmp_path):
    image, reading = READ[kind] if kind in READ else (LEVELS[kind], "")
    if stored == "file":
        path = tmp_path / ("m.tif" if image.mode == "CMYK" else "m.png")
        image.save(path)
        image = path
    found = open_masks(image)
    assert np.array_equal(found.regions[0], REGION) and found.reading == reading
    inverted = open_masks(image, invert=True)
    assert np.array_equal(inverted.regions[0], ~REGION) and inverted.reading.startswith("inverted")


def test_a_jpeg_mask_has_no_region_in_the_noise_of_its_black(tmp_path):
    path = tmp_path / "m.jpg"
    BINARY.save(path, quality=60)
    assert np.array_equal(open_masks(path).regions[0], REGION)
    Image.fromarray(RNG.integers(0, 9, (64, 64), np.uint8)).save(path)
    assert not open_masks(path).regions[0].any()


@pytest.mark.parametrize(
    "array",
    [
        REGION,
        H,
        H * 255,
        H.astype(np.float32),
        H * 0.2,
        H.astype(np.int64),
        H.astype(np.uint16) * 65535,
        REGION[..., None],
        REGION[None],
        REGION[None, ..., None],
        H.tolist(),
        np.asarray(layer(255, 255 * H)),
        soft(),
    ],
)
def test_arrays_are_masks(array):
    assert np.array_equal(open_masks(array).regions[0], REGION)


def test_an_erased_object_on_white_is_told_from_a_white_layer_by_its_image():
    photo = np.full((64, 64, 3), 255, np.uint8)
    photo[REGION] = (0, 160, 0)
    erased = layer(255, 255 * (1 - H))
    assert np.array_equal(open_masks(erased, open_images(photo)).regions[0], REGION)
    assert np.array_equal(open_masks(erased, open_images(NOISE)).regions[0], ~REGION)


WIDE = np.zeros((32, 96, 3), np.uint8)


def test_a_mask_follows_the_crop_of_its_image():
    mask = np.zeros((32, 96), bool)
    mask[:, 32:48] = True
    for scale in (1, 2):
        large = mask.repeat(scale, 0).repeat(scale, 1)
        found = open_masks(large, open_images(WIDE)).squares(16)[0]
        assert found[:, :8].all() and not found[:, 8:].any()
    padded = open_masks(mask, open_images(WIDE, fit="pad")).squares(96)[0]
    assert np.array_equal(padded[32:64], mask) and padded.sum() == mask.sum()
    # A square one lies on the square.
    for fit in ("crop", "pad"):
        found = open_masks(REGION, open_images(WIDE, fit=fit)).squares(64)[0]
        assert np.array_equal(found, REGION)


def test_a_mask_of_other_proportions_is_refused():
    with pytest.raises(glide.UsageError) as caught:
        open_masks(np.eye(40, 60), open_images(WIDE))
    assert str(caught.value) == (
        "the mask is 60x40 and the image 96x32: make it of the image's proportions, or square to "
        "lie on the square that is made of it"
    )
    # A pixel of rounding is none.
    open_masks(np.eye(21, 64), open_images(WIDE))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("own", [True, False])
def test_a_mask_is_turned_like_its_image(tmp_path, orientation, own):
    """With its own EXIF orientation, or drawn on the photo as it is stored."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.zeros((32, 96, 3), np.uint8)
    stored[4:12, 10:40] = 255
    Image.fromarray(stored).save(tmp_path / "photo.png", exif=exif)
    options = {"exif": exif} if own else {}
    Image.fromarray(stored[..., 0]).save(tmp_path / "mask.png", **options)
    photo = open_images(tmp_path / "photo.png")
    found = open_masks(tmp_path / "mask.png", photo).regions[0]
    upright = np.asarray(photo.images[0].image)[..., 0] > 0
    if own or orientation > 4 or orientation == 1:
        assert np.array_equal(found, upright)
    else:  # its size does not tell: as people see it
        assert np.array_equal(found, stored[..., 0] > 0)


def test_masks_are_scaled_without_grey():
    half = np.zeros((64, 64), bool)
    half[:, :33] = True
    assert open_masks(half).squares(32)[0][0].tolist() == [True] * 17 + [False] * 15
    corner = np.eye(4, dtype=bool)
    large = open_masks(corner).squares(16)[0]
    assert np.array_equal(large, corner.repeat(4, 0).repeat(4, 1))


ALLOW = "; change it, or allow it with --allow-uniform-mask (allow_uniform_mask=True)"
ORDER = "(white is regenerated, black is kept)"


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((8, 8), bool), f"the mask has no masked region {ORDER}{ALLOW}"),
        (np.ones((8, 8), bool), f"the mask masks the whole image: nothing is kept {ORDER}{ALLOW}"),
        (Image.new("L", (8, 8), 0), f"the mask has no masked region {ORDER}{ALLOW}"),
        (
            Image.new("L", (8, 8), 255),
            f"the mask masks the whole image: nothing is kept {ORDER}{ALLOW}",
        ),
        (
            np.stack([REGION, np.zeros((64, 64), bool)]),
            f"the mask number 1 has no masked region {ORDER}{ALLOW}",
        ),
        (
            np.eye(64, dtype=bool) & (np.arange(64) < 1),
            f"the mask has no masked region at 16x16 pixels (draw larger){ALLOW}",
        ),
        (
            Image.new("RGBA", (8, 8), (255, 255, 255, 0)),
            "the mask is transparent everywhere: paint on it what is regenerated",
        ),
        (
            Image.fromarray(colours((255, 255, 255), (255, 0, 0), (0, 0, 255))),
            "the mask has colours and no black: white is regenerated, black is kept, or paint on a "
            "transparent layer",
        ),
        (
            np.full((8, 8), np.nan),
            "the mask has values that are not finite numbers: replace them",
        ),
        (
            np.zeros((2, 8, 8, 8)),
            "a mask is (H, W), or one for each of the prompts, not (2, 8, 8, 8)",
        ),
        (b"bytes", "a mask is a file, a PIL.Image or an array of numbers, not bytes"),
    ],
)
def test_masks_without_meaning_are_refused(mask, message):
    photo = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(glide.UsageError) as caught:
        read_input_images(photo, mask, None, 16)
    assert str(caught.value) == message


def test_the_share_is_said_with_the_changes_of_the_image(tmp_path, capsys):
    path = tmp_path / "brush.png"
    layer(255, 255 * H).save(path)
    read_input_images(np.zeros((64, 64, 3), np.uint8), path, None, 64)
    assert capsys.readouterr().err == (
        f"note: the mask {path} regenerates 25% of the image (its opaque part)\n"
    )
    read_input_images(WIDE, REGION, None, 32, invert_mask=True)
    assert capsys.readouterr().err == (
        "note: the image was cropped to its central 32x32 of 96x32; the mask regenerates 75% of "
        "the image (inverted)\n"
    )
    read_input_images(WIDE, ~REGION | REGION, None, 32, allow_uniform_mask=True)
    assert "the mask regenerates 100% of the image\n" in capsys.readouterr().err
