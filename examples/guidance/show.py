"""Save images without a guidance beside images with it: the same prompts, seed and noise.

python examples/guidance/show.py runs every example of this folder.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image

import glide_jax as glide
from glide_jax import Guidance

CFG = glide.classifier_free(1.5)
# A sampler without noise of its own: the difference of the two images is that of the guidance.
SAMPLER = {"sampler": "dpm++2m", "steps": 8}


def show(
    name: str,
    prompts: Sequence[str],
    before: Sequence[Guidance],
    after: Sequence[Guidance],
    *,
    weights: str = "emoji64",
    out: str = "samples",
    view: Callable[[np.ndarray], np.ndarray] = lambda images: images,
    **settings,
) -> list[np.ndarray]:
    """Write `out/name.png`, before on the left, after on the right; return both, uint8."""
    settings = SAMPLER | settings
    pipe = glide.load(weights, upsampler="none", clip_model="none")
    both = [
        pipe(prompts, seed=0, guidance=[*guidance, glide.clamp_x_0()], **settings).images
        for guidance in (before, after)
    ]
    save(Path(out) / f"{name}.png", *map(view, both))
    return both


def save(path: Path, before: np.ndarray, after: np.ndarray) -> None:
    """Save two rows of images side by side, each pixel enlarged to 2x2."""
    left, right = (np.concatenate(images, axis=1) for images in (before, after))
    gap = np.full((left.shape[0], 16, 3), 128, np.uint8)
    sheet = np.concatenate([left, gap, right], axis=1).repeat(2, 0).repeat(2, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path, optimize=True)
    print(f"without | with: {path}")


if __name__ == "__main__":
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if file.stem != "show":
            import_module(file.stem).main(*sys.argv[1:])
