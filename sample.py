"""Generate images from text: python sample.py "a red apple"

If glide-jax is installed, write `glide-jax sample` instead of `python sample.py` in the examples.

Without a prompt it generates a few example images or, with --image, uses the empty prompt.
Several prompts give several images. Within one prompt, AND and NOT join captions, each with an
optional weight. Examples:

  python sample.py "a red apple" "a rocket" --num 4 --steps 20 --sampler unipc2
  python sample.py "a red apple AND a tulip :0.5 NOT a rose" --guidance-scale 4
  python sample.py "a top hat" --image cat.png --mask mask.png           inpainting
  python sample.py "a cat face" --image sketch.png --strength 0.6        img2img
  python sample.py --image cat.png --variation 0.3 --num 4               variations
  python sample.py "a red apple" "a rocket" --interpolate --num 8        interpolation
  python sample.py --prompts-file captions.txt --shards out              thousands, in tar shards

Each image is a PNG file with its prompt, seed, index and settings as metadata. To reproduce one
image, repeat the command with only its prompt, and with --seed and --first-index from its metadata.
Images of --interpolate cannot be reproduced alone.
"""

from pathlib import Path

import jax

import glide_jax as glide
from glide_jax.devices.processes import own_process
from glide_jax.devices.runtime import prepare_process
from glide_jax.errors import UsageError, one_line_errors
from glide_jax.folders import check_writable
from glide_jax.pipeline.images import Images
from glide_jax.pipeline.options import (
    Options,
    check_options,
    prompts_of,
    read_options,
)
from glide_jax.pipeline.prompts import read_prompt
from glide_jax.pipeline.sharded import sample_shards


def generate(options: Options, process: tuple[int, int] = (0, 1)) -> None:
    """Generate what the options ask for, and save it.

    Args:
        process: for --shards: index of this process, and number of processes.
    """
    # -- weights, prompts -------------------------------------------------------------------------
    check_options(options)
    check_writable(options.shards or options.out)
    model, editing = options.model, options.editing
    # Read before the weights are loaded: a wrong prompt ends the command at once.
    given_prompts = prompts_of(options)
    for prompt in given_prompts:
        read_prompt(prompt)
    pipe = glide.load(**model.load_arguments())
    example_prompts = pipe.model.prompts if editing.image is None else ()
    prompts = given_prompts or example_prompts or ("",)
    if note := pipe.tokenizer.too_long(
        [part.text for prompt in prompts for part in read_prompt(prompt).parts]
    ):
        print(note)

    # -- generate ---------------------------------------------------------------------------------
    device, model_name = jax.devices()[0], pipe.model.name
    print(f"{model_name} on {device.device_kind}; a run with new sizes or guidances compiles first")
    upsampler = {"steps": model.upsampler_steps, "sampler": model.upsampler_sampler}
    call_arguments = {
        "num": options.num,
        "seed": options.seed,
        "first_index": options.first_index,
        "batch_size": model.batch_size,
        "upsampler": {name: value for name, value in upsampler.items() if value is not None},
        "preview": (lambda images: images.save_preview(options.out)) if options.preview else None,
        **options.sampling.given_settings(),
    }
    if options.shards is not None:
        shards = {"folder": options.shards, "shard_size": options.sharding.shard_size}
        del call_arguments["preview"]
        print(sample_shards(pipe, prompts, process=process, **shards, **call_arguments))
        return
    image = editing.image
    if editing.interpolate:
        if len(prompts) > 2 or (len(prompts) == 1 and editing.to_seed is None):
            raise UsageError("--interpolate takes two prompts, or one and --to-seed")
        images = pipe.interpolate(*prompts, to_seed=editing.to_seed, **call_arguments)
    elif editing.variation is not None:
        if len(prompts) > 1:
            raise UsageError("--variation takes one prompt")
        variation_arguments = {
            "variation": editing.variation,
            "image_caption": editing.image_caption,
            "fit": editing.fit,
        }
        images = pipe.variations(image, *prompts, **variation_arguments, **call_arguments)
    else:
        reading = {
            "fit": editing.fit,
            "invert_mask": editing.invert_mask,
            "allow_uniform_mask": editing.allow_uniform_mask,
        }
        images = pipe(prompts, image=image, mask=editing.mask, **reading, **call_arguments)

    # -- save -------------------------------------------------------------------------------------
    report(images, images.save(options.out))


def report(images: Images, files: list[Path]) -> None:
    """Print how the images were sampled and where they are."""
    print(images.summary())
    for path, prompt in zip(files, images.prompts, strict=False):
        print(f"{path}  {prompt}")
    if len(files) > len(images):
        print(f"{files[-1]}  all of them")


def main() -> None:
    """Run the command line."""
    with one_line_errors("stopped; no image was saved"):
        options = read_options(__doc__ or "")
        sharding = options.sharding
        process = (0, 1)
        if options.shards:
            process = own_process(sharding.process_id, sharding.num_processes)
        prepare_process()
        generate(options, process)


if __name__ == "__main__":
    main()
