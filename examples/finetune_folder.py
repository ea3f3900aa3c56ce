"""Fine-tune the embedded model on a folder of images, then sample from the result.

The caption of `cat.png` is in `cat.txt`, in the same folder.

python examples/finetune_folder.py images runs/mine "a caption like yours"
"""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import glide_jax as glide
from glide_jax.data.data_config import DataConfig
from glide_jax.folders import SCRIPTS
from glide_jax.training.recipes import load_recipe


def finetune(
    images: str, out: str, steps: int = 300, weights: str = "emoji64", recipe: str = "emoji64"
) -> None:
    """Train weights further on a folder of images; the run is written to `out`."""
    base = load_recipe(recipe)
    config = replace(
        base,
        init_from=weights,
        out=out,
        data=DataConfig(source=images),
        optimiser=replace(base.optimiser, learning_rate=2e-4, warmup=20, lr_decay="constant"),
        steps=steps,
        minutes=0,  # no time limit
        batch_size=8,
        save_every=100,
    )
    # `train.py`: the same function as `glide-jax train`.
    runpy.run_path(str(SCRIPTS / "train.py"))["train"](config)


def main(images: str, out: str = "runs/mine", prompt: str = "", steps: str = "300") -> None:
    finetune(images, out, int(steps))
    pipe = glide.load(out, clip_model="none")
    for path in pipe(prompt, num=4, steps=15).save(Path(out) / "images"):
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:5])
