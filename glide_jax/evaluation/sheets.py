"""Contact sheets of unselected samples: each with its prompt and whether the image is right."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 128  # of an image on the sheet, unless the image itself is larger
RIGHT, WRONG = (20, 140, 50), (200, 40, 40)
FONT_SIZE, LINE = 11, 13

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, eq=False)
class Tile:
    """An image on a sheet.

    Attributes:
        image: `(H, W, 3)` uint8.
        lines: the text below it.
        right: mark it as right or as wrong; None: no mark.
        small: a smaller image below, with its own text and mark.
    """

    image: np.ndarray
    lines: tuple[str, ...]
    right: bool | None = None
    small: np.ndarray | None = None
    small_lines: tuple[str, ...] = ()
    small_right: bool | None = None


def contact_sheet(tiles: Sequence[Tile], columns: int = 10) -> Image.Image:
    """Arrange tiles in rows, in their order."""
    columns = min(columns, len(tiles))
    side = max(SIDE, tiles[0].image.shape[0])
    width = side + 12
    lines = max(len(tile.lines) for tile in tiles)
    with_small = any(tile.small is not None for tile in tiles)
    height = side + 10 + lines * LINE + (side // 2 + 6 if with_small else 0)
    canvas = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT_SIZE)
    for i, tile in enumerate(tiles):
        x, y = i % columns * width + 6, i // columns * height + 4
        canvas.paste(_scaled(tile.image, side), (x, y))
        _mark(pen, (x + side - 14, y + side + 2), tile.right)
        _write(pen, font, (x, y + side + 2), tile.lines, side, tile.right)
        if tile.small is not None:
            top = y + side + lines * LINE + 4
            canvas.paste(_scaled(tile.small, side // 2), (x, top))
            _mark(pen, (x + side - 14, top), tile.small_right)
            at = x + side // 2 + 4, top
            _write(pen, font, at, tile.small_lines, side // 2 - 4, tile.small_right)
    return canvas


def _scaled(image: np.ndarray, side: int) -> Image.Image:
    # Enlarged without interpolation: the sheet shows the pixels that were generated.
    kind = Image.Resampling.NEAREST if side >= len(image) else Image.Resampling.BOX
    return Image.fromarray(image).resize((side, side), kind)


def _mark(pen: ImageDraw.ImageDraw, at: tuple[int, int], right: bool | None) -> None:
    """Paint a tick or a cross in a box; None paints nothing."""
    if right is None:
        return
    x, y = at
    pen.rectangle((x, y, x + 13, y + 13), fill="white", outline=RIGHT if right else WRONG)
    if right:
        pen.line([(x + 3, y + 7), (x + 6, y + 10), (x + 11, y + 3)], fill=RIGHT, width=2)
    else:
        pen.line([(x + 3, y + 3), (x + 10, y + 10)], fill=WRONG, width=2)
        pen.line([(x + 10, y + 3), (x + 3, y + 10)], fill=WRONG, width=2)


def _write(
    pen: ImageDraw.ImageDraw,
    font: Font,
    at: tuple[int, int],
    lines: Sequence[str],
    width: int,
    right: bool | None,
) -> None:
    for i, line in enumerate(lines):
        # The mark stands at the end of the first line, outside the image.
        room = width - 16 if i == 0 and right is not None else width
        while line and pen.textlength(line, font=font) > room:
            line = line[:-1]
        pen.text((at[0], at[1] + i * LINE), line, fill="black" if i == 0 else "dimgray", font=font)
