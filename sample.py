"""Draws pictures from text: python sample.py "a red apple"

Without a prompt it draws a few that show the model well. Several prompts are several pictures;
within one, AND and NOT join captions, each with a weight if it has one:

  sample.py "a red apple" "a rocket" --num 4 --steps 20 --sampler unipc2
  sample.py "a red apple AND a leaf :0.5 NOT a worm" --guidance-scale 4
  sample.py "a party hat" --init-image cat.png --mask hole.png       fill a hole
  sample.py "a cat" --init-image sketch.png --strength 0.6           redraw a picture
  sample.py --init-image cat.png --variation 0.3 --num 4             pictures like it
  sample.py "a red apple" "a rocket" --between --num 8               from one to the other

Each picture is saved with its prompt, seed and settings in its PNG metadata; --seed and --first
from there make it again, whatever was drawn beside it.
"""

from pathlib import Path

import jax

import glide_jax as glide
from glide_jax.errors import UsageError, one_line_errors
from glide_jax.options import Options, chosen_weights, read_options, read_prompts, refuse
from glide_jax.pictures import Pictures, writable
from glide_jax.prompts import read_prompt
from glide_jax.runtime import enable_compilation_cache


def draw(options: Options) -> None:
    """Draws what the options ask for."""
    # -- weights, prompts -------------------------------------------------------------------------
    writable(options.out)
    refuse(options)
    model, editing = options.model, options.editing
    pipe = glide.load(
        chosen_weights(options),
        upsampler=model.upsampler,
        clip=model.clip,
        guide=model.guide,
        dtype=model.dtype,
        devices=model.devices,
    )
    shown = pipe.model.prompts if editing.init_image is None else ()
    prompts = read_prompts(options) or shown or ("",)
    for caption in (part.text for prompt in prompts for part in read_prompt(prompt).parts):
        if cut := pipe.tokenizer.overflow(caption):
            print(
                f"note: the last {cut} tokens of {caption[:40]!r}... are beyond the model's reach"
            )

    # -- draw -----------------------------------------------------------------------------------
    device, name = jax.devices()[0], pipe.model.name
    print(f"{name} on {device.device_kind}; the first run compiles, later ones do not")
    upsampler = {"steps": model.upsampler_steps, "sampler": model.upsampler_sampler}
    call = {
        "num": options.num,
        "seed": options.seed,
        "first": options.first,
        "batch_size": model.batch_size,
        "upsampler": {name: value for name, value in upsampler.items() if value is not None},
        "preview": (lambda p: p.preview(options.out)) if options.preview else None,
        **vars(options.sampling),
    }
    image = editing.init_image
    if editing.between:
        if len(prompts) > 2 or (len(prompts) == 1 and editing.to_seed is None):
            raise UsageError("--between takes two prompts, or one and --to-seed")
        pictures = pipe.between(*prompts, to_seed=editing.to_seed, **call)
    elif editing.variation is not None:
        if len(prompts) > 1:
            raise UsageError("--variation takes one prompt")
        near = {"amount": editing.variation, "caption": editing.init_caption}
        pictures = pipe.variations(image, *prompts, **near, **call)
    else:
        pictures = pipe(prompts, image=image, mask=editing.mask, **call)

    # -- save -----------------------------------------------------------------------------------
    report(pictures, pictures.save(options.out))


def report(pictures: Pictures, files: list[Path]) -> None:
    """Says where the pictures are."""
    for path, prompt in zip(files, pictures.prompts, strict=False):
        print(f"{path}  {prompt}")
    if len(files) > len(pictures):
        print(f"{files[-1]}  all of them")


def main() -> None:
    """The command line."""
    options = read_options(__doc__)
    with one_line_errors("stopped; nothing was written"):
        enable_compilation_cache()
        draw(options)


if __name__ == "__main__":
    main()
