"""Sheets for a blind test by eye: python -m benchmarks.blind_sheet --data256 emoji256.npz

Generated images stand among real images of other concepts, numbered, in random order and without
names. A viewer who has not seen `key.json` writes down what each one shows, whether it is real, and
a grade of the drawing from 1 to 5. `key.json` has the answers.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

import glide_jax as glide
from glide_jax.devices.runtime import enable_compilation_cache
from glide_jax.errors import one_line_errors
from glide_jax.evaluation.captions import one_of_each_concept, prompt_of, training_pairs
from glide_jax.evaluation.reports import write_json, write_png
from glide_jax.evaluation.sheets import Tile, contact_sheet
from glide_jax.folders import check_writable
from glide_jax.training.recipes import load_recipe


@dataclass(frozen=True)
class Options:
    """Generate trained concepts and mix them with real images.

    Attributes:
        data256: The data set at 256x256, an .npz file.
        recipe: The recipe whose concepts are tested, by name or path.
        weights: The weights that generate.
        out: Folder for sheet_00.png and so on, and key.json.
        images: Number of generated images; as many real ones are added.
        columns: Images in a row of a sheet.
        rows: Rows of a sheet.
        seed: Seed from 0 to 2^32 - 1; it selects and seeds the images.
    """

    data256: str = "emoji256.npz"
    recipe: str = "emoji64"
    weights: str = "emoji64"
    out: Path = Path("blind")
    images: int = 50
    columns: int = 5
    rows: int = 2
    seed: int = 0


def main() -> None:
    """Run the command line."""
    options = tyro.cli(Options, prog="python -m benchmarks.blind_sheet")
    with one_line_errors():
        enable_compilation_cache()
        check_writable(options.out)
        config = load_recipe(options.recipe)
        config = replace(config, data=replace(config.data, source=options.data256))
        # The same selection as `glide-jax evaluate ranking` makes for the generated ones.
        rng = np.random.default_rng((options.seed, 0))
        records = one_of_each_concept(training_pairs(config), 2 * options.images, rng)
        chosen, others = records[: options.images], records[options.images :]
        prompts = [prompt_of(record) for record in chosen]
        generated = glide.load(options.weights)(prompts, seed=options.seed).images
        images = [*generated, *(record["image"] for record in others)]
        answers = [
            {"prompt": prompt, "real": i >= options.images}
            for i, prompt in enumerate([*prompts, *map(prompt_of, others)])
        ]
        order = rng.permutation(len(images))
        page = options.columns * options.rows
        for number, start in enumerate(range(0, len(order), page)):
            tiles = [
                Tile(images[i], (str(start + place + 1),))
                for place, i in enumerate(order[start : start + page])
            ]
            sheet = contact_sheet(tiles, options.columns)
            write_png(options.out / f"sheet_{number:02}.png", sheet)
        key = {str(place + 1): answers[i] for place, i in enumerate(order)}
        write_json(options.out / "key.json", key)
        print(json.dumps({"generated": len(generated), "real": len(others)}))


if __name__ == "__main__":
    main()
