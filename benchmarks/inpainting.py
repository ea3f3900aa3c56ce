"""How well holes are filled, and the seam: python -m benchmarks.inpainting --data emoji64.npz

Draws `inpainting.png`: real pictures, the hole in them, how the inpainting model fills it, how the
base model does by resampling (RePaint), and the seam of the former enlarged, the edge of the hole
in its middle. `inpainting.json` has how much pixels change over the edge, beside how much they do
there in the real pictures.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

import glide_jax as glide
from glide_jax.drawing import check_32_bits
from glide_jax.errors import one_line_errors
from glide_jax.evaluation.captions import prompt_of, some, training_cells
from glide_jax.pictures import image_grid, writable
from glide_jax.runtime import enable_compilation_cache
from glide_jax.training.recipes import load_recipe

# Top, bottom, left, right of the hole, as shares of the side: the middle.
HOLE = (0.3, 0.7, 0.3, 0.7)
# Pixels on each side of the edge in the enlarged seam.
AROUND = 8


@dataclass(frozen=True)
class Options:
    """Fills the middle of pictures of the training set."""

    data: str = "emoji64.npz"
    """The data set, an .npz file."""
    recipe: Path = Path("configs/emoji64.py")
    """The recipe that says which of its pictures."""
    inpainter: str = "emoji_inpaint64"
    """Weights that learned to fill holes."""
    base: str = "emoji64"
    """Weights that did not."""
    out: Path = Path("docs/images")
    """Folder for inpainting.png and inpainting.json."""
    pictures: int = 8
    """How many."""
    seed: int = 0
    """Of the choice of pictures, and of what fills them."""


def edge_change(images: np.ndarray, box: tuple[int, int, int, int]) -> float:
    """Mean change of a pixel over the edge of the hole, in levels of 255.

    Args:
        images: `(N, H, W, 3)` uint8.
        box: top, bottom, left, right of the hole.
    """
    x = images.astype(np.float32)
    top, bottom, left, right = box
    rows, columns = slice(top, bottom), slice(left, right)
    pairs = (
        (x[:, top - 1, columns], x[:, top, columns]),
        (x[:, bottom - 1, columns], x[:, bottom, columns]),
        (x[:, rows, left - 1], x[:, rows, left]),
        (x[:, rows, right - 1], x[:, rows, right]),
    )
    return float(np.mean([np.abs(a - b).mean() for a, b in pairs]))


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__, prog="python -m benchmarks.inpainting")
    with one_line_errors():
        enable_compilation_cache()
        writable(options.out)
        check_32_bits("seed", options.seed)
        config = load_recipe(options.recipe)
        config = replace(config, data=replace(config.data, source=options.data))
        rng = np.random.default_rng(options.seed)
        records = some(training_cells(config), options.pictures, rng)
        real = np.stack([record["image"] for record in records])
        side = real.shape[1]
        box = tuple(round(share * side) for share in HOLE)
        hole = np.zeros((side, side), bool)
        hole[box[0] : box[1], box[2] : box[3]] = True
        prompts = [prompt_of(record) for record in records]

        rows = {"real": real, "given": np.where(hole[..., None], np.uint8(127), real)}
        for name, weights in (("inpainter", options.inpainter), ("resampling", options.base)):
            pipe = glide.load(weights, upsampler="none")
            rows[name] = pipe(prompts, image=real, mask=hole, seed=options.seed).images
        known = {name: bool((rows[name][:, ~hole] == real[:, ~hole]).all()) for name in rows}
        found = {
            "weights": {"inpainter": options.inpainter, "resampling": options.base},
            "pictures": prompts,
            "known_pixels_kept": {n: known[n] for n in ("inpainter", "resampling")},
            "change_over_the_edge": {
                n: round(edge_change(rows[n], box), 1) for n in ("real", "inpainter", "resampling")
            },
        }
        text = json.dumps(found, indent=1)
        (options.out / "inpainting.json").write_text(text + "\n", encoding="utf-8")
        # The middle of the hole's left edge; the factor makes a whole picture of it.
        part = tuple(slice(n - AROUND, n + AROUND) for n in ((box[0] + box[1]) // 2, box[2]))
        factor = side // (2 * AROUND)
        seams = [image[part].repeat(factor, 0).repeat(factor, 1) for image in rows["inpainter"]]
        rows["seam"] = np.stack(seams)
        sheet = image_grid(np.concatenate(list(rows.values())), columns=options.pictures)
        Image.fromarray(sheet).save(options.out / "inpainting.png")
        print(text)


if __name__ == "__main__":
    main()
