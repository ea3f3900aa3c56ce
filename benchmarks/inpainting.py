"""How well masked regions are filled, and their edge: python -m benchmarks.inpainting

Writes `inpainting.png`, a sheet with five rows: real images; the masked region in them; the region
filled by the model; filled with resampling (RePaint) besides; and the left edge of the third row,
enlarged. `inpainting.json` has the mean change of a pixel across the edge,
and the same for the real images.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

import glide_jax as glide
from glide_jax.devices.runtime import enable_compilation_cache
from glide_jax.errors import one_line_errors
from glide_jax.evaluation.captions import prompt_of, random_records, training_pairs
from glide_jax.folders import check_writable
from glide_jax.pipeline.images import image_grid
from glide_jax.pipeline.runner import check_32_bits
from glide_jax.pipeline.settings import DEFAULT_REPAINT
from glide_jax.training.recipes import load_recipe

# Top, bottom, left, right of the masked region, as shares of the side: the middle.
REGION = (0.3, 0.7, 0.3, 0.7)
# Pixels on each side of the edge in the enlarged row.
AROUND = 8


@dataclass(frozen=True)
class Options:
    """Fill the middle of training images.

    Attributes:
        data: The data set, an .npz file.
        recipe: The recipe whose training images are used, by name or path.
        weights: The weights that fill, trained to inpaint or not.
        out: Folder for inpainting.png and inpainting.json.
        images: Number of images.
        seed: Seed from 0 to 2^32 - 1; it selects the images and seeds what fills them.
    """

    data: str = "emoji64.npz"
    recipe: str = "emoji64"
    weights: str = "emoji64"
    out: Path = Path("docs/results/images")
    images: int = 8
    seed: int = 0


def edge_change(images: np.ndarray, box: tuple[int, int, int, int]) -> float:
    """Return the mean change of a pixel across the edge of the masked region, in levels of 255.

    Args:
        images: `(N, H, W, 3)` uint8.
        box: top, bottom, left, right of the region.
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
    """Run the command line."""
    options = tyro.cli(Options, prog="python -m benchmarks.inpainting")
    with one_line_errors():
        enable_compilation_cache()
        check_writable(options.out)
        check_32_bits("seed", options.seed)
        config = load_recipe(options.recipe)
        config = replace(config, data=replace(config.data, source=options.data))
        rng = np.random.default_rng(options.seed)
        records = random_records(training_pairs(config), options.images, rng)
        real = np.stack([record["image"] for record in records])
        side = real.shape[1]
        top, bottom, left, right = (round(share * side) for share in REGION)
        box = top, bottom, left, right
        mask = np.zeros((side, side), bool)
        mask[top:bottom, left:right] = True
        prompts = [prompt_of(record) for record in records]

        rows = {"real": real, "masked": np.where(mask[..., None], np.uint8(127), real)}
        pipe = glide.load(options.weights, upsampler="none")
        for name, repaint in (("plain", None), ("resampling", DEFAULT_REPAINT)):
            call = {"image": real, "mask": mask, "seed": options.seed, "repaint": repaint}
            rows[name] = pipe(prompts, **call).images
        kept = {name: bool((rows[name][:, ~mask] == real[:, ~mask]).all()) for name in rows}
        found = {
            "weights": options.weights,
            "images": prompts,
            "known_pixels_kept": {n: kept[n] for n in ("plain", "resampling")},
            "change_over_the_edge": {
                n: round(edge_change(rows[n], box), 1) for n in ("real", "plain", "resampling")
            },
        }
        text = json.dumps(found, indent=1)
        (options.out / "inpainting.json").write_text(text + "\n", encoding="utf-8")
        # The middle of the left edge; the factor enlarges it to the size of an image.
        middle = (top + bottom) // 2
        part = slice(middle - AROUND, middle + AROUND), slice(left - AROUND, left + AROUND)
        factor = side // (2 * AROUND)
        edges = [image[part].repeat(factor, 0).repeat(factor, 1) for image in rows["plain"]]
        rows["edge"] = np.stack(edges)
        sheet = image_grid(np.concatenate(list(rows.values())), columns=options.images)
        Image.fromarray(sheet).save(options.out / "inpainting.png")
        print(text)


if __name__ == "__main__":
    main()
