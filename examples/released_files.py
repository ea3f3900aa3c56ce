"""Sample from OpenAI's released `.pt` files: base, upsampler and, if given, the noised CLIP.

The files are read without PyTorch, and no code in them is run. Without paths they are downloaded.

python examples/released_files.py "an oil painting of a corgi" base.pt upsample.pt
"""

import sys
import tempfile
from pathlib import Path

import glide_jax as glide
from glide_jax.weights.clip_registry import clip_from_files, save_clip


def load(base: str, large: str, clip_files: list[str]) -> glide.Pipeline:
    """Return the released cascade; a noised CLIP is two files, image and text encoder."""
    if not clip_files:
        return glide.load(base, upsampler=large)
    image, text = map(Path, clip_files)
    with tempfile.TemporaryDirectory() as folder:
        # `load` takes a noised CLIP as one folder, not as two files.
        save_clip(clip_from_files(image, text), Path(folder) / "clip")
        return glide.load(base, upsampler=large, clip_model=Path(folder) / "clip")


def main(
    prompt: str = "an oil painting of a corgi",
    base: str = "openai/base",
    large: str = "openai/upsample",
    *clip_files: str,
    out: str = "samples",
    **settings,
) -> list[Path]:
    pipe = load(base, large, list(clip_files))
    if clip_files:
        # The paper's CLIP guidance: scale 3, without classifier-free guidance.
        settings = {"guidance_scale": 1.0, "clip_guidance_scale": 3.0} | settings
    files = pipe(prompt, **settings).save(out)
    print(*files, sep="\n")
    return files


if __name__ == "__main__":
    main(*sys.argv[1:])
