"""Sixteen captioned pictures."""
from pathlib import Path
import numpy as np
from PIL import Image

COLOURS = {
    "red": (220, 40, 40), "green": (40, 170, 70), "blue": (50, 70, 210), "yellow": (240, 210, 60),
    "purple": (140, 60, 170), "orange": (245, 140, 40), "pink": (245, 150, 190), "black": (20, 20, 20),
}
GROUNDS = {"white": (240, 240, 240), "yellow": (230, 200, 40), "pink": (245, 150, 190), "grey":(128,128,128)}
SHAPES=tuple(GROUNDS)

def picture(colour, shape, size):
    y, x = (np.mgrid[:size, :size] + 0.5) / size - 0.5
    image = np.full((size, size, 3), GROUNDS[shape], np.uint8)
    image[x**2 + y**2 < 0.12] = COLOURS[colour]
    return image

def make(folder, colours, size=32):
    folder = Path(folder); folder.mkdir(parents=True, exist_ok=True)
    for c in colours:
        for s in SHAPES:
            Image.fromarray(picture(c, s, size)).save(folder / f"{c}-{s}.png")
            (folder / f"{c}-{s}.txt").write_text(f"a {c} {s}")
    return folder
if __name__ == "__main__":
    make("/tmp/recipes/a", list(COLOURS)[:4]); make("/tmp/recipes/b", list(COLOURS)[4:])
