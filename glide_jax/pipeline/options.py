"""The command line of sampling, by group of options."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from glide_jax.errors import UsageError
from glide_jax.folders import expand_words
from glide_jax.pipeline.image_files import Fit
from glide_jax.pipeline.prompt_files import read_prompt_file
from glide_jax.pipeline.settings import Settings
from glide_jax.training.runs import sampling_defaults

# The defaults that the help shows: those of the weights that will be used.
_shown: dict[str, Any] = {}


def _default(name: str) -> Any:
    """Show the default of the chosen weights; the option itself is None where it is left out."""

    def hint(_: str) -> str:
        value = _shown.get(name)
        return "" if value in (None, "") else f"(default: {value})"

    return arg(help_behavior_hint=hint)


# For options whose help says what happens without them.
HIDDEN = arg(help_behavior_hint="")
# Options whose values are text: `~` has no meaning in them.
TEXTS = ("--negative-prompt", "--init-caption", "--prompts-field")


@dataclass(frozen=True)
class WeightsOptions:
    """The model, and the devices it runs on.

    Attributes:
        weights: A name (emoji64, openai/base, ...), a folder of weights, a .pt file, the folder of
            a training run, or hf://user/name of the Hugging Face Hub.
        upsampler: Weights of the upsampler that enlarges each image, or none. Default: the one
            that belongs to the weights (emoji_upsample256 for emoji64), if any.
        upsampler_steps: Number of sampling steps of the upsampler, as --steps. If its weights have
            a default strength below 1, the upsampler starts from the enlarged image and runs only
            that share of the steps, the last ones.
        upsampler_sampler: Sampler of the upsampler, as --sampler.
        clip: Weights of a noised CLIP (openai/clip, or a folder) for --clip-scale, or none.
            Default: the one that belongs to the weights (emoji_clip64 for emoji64), if any.
        weak_model: Weights of a weaker model, for --autoguidance-scale: a smaller one, or one that
            was trained less. It must have the same variant, image size and noise schedule.
        lora: LoRA to add to the weights: the folder of a run with LoRA, or a .safetensors file. A
            weight may follow a colon (runs/mine:0.5). A larger weight changes the images more. A
            negative one does the opposite of what was learned. The option may be given several
            times.
        dtype: Dtype of the networks: float32, bfloat16 or float16. auto: bfloat16 on TPUs and
            recent GPUs, float16 on older GPUs, float32 on CPUs.
        devices: Number of devices that share each batch, or all. It changes an image by rounding
            errors only.
        batch_size: Images generated at a time, in total over all devices. More needs more memory.
            It changes an image by rounding errors only. Default per device at 64x64: 16 on a CPU,
            64 on other devices; a quarter of that at 256x256.
    """

    weights: str = "emoji64"
    upsampler: Annotated[str | None, HIDDEN] = None
    upsampler_steps: Annotated[str | None, HIDDEN] = None
    upsampler_sampler: Annotated[str | None, HIDDEN] = None
    clip: Annotated[str | None, HIDDEN] = None
    weak_model: Annotated[str | None, HIDDEN] = None
    lora: Annotated[UseAppendAction[tuple[str, ...]], HIDDEN] = ()
    dtype: str = "auto"
    devices: str = "1"
    batch_size: Annotated[int | None, HIDDEN] = None

    def loaded(self) -> dict[str, Any]:
        """Return the arguments of `glide_jax.load`."""
        names = ("weights", "upsampler", "clip", "weak_model", "lora", "dtype", "devices")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class EditingOptions:
    """Editing images.

    Attributes:
        init_image: The image to edit, together with --mask (inpainting), --strength (img2img)
            or --variation.
        mask: The mask of --init-image, an image. White is regenerated. Black is kept, exactly if
            the input has the size of the output. A transparent layer is also accepted: its painted
            part is regenerated. So is a copy of the image with a part erased: the erased part is
            regenerated.
        invert_mask: Regenerate the part that the mask keeps, and keep the other part.
        allow_uniform_mask: Accept a mask that keeps, or regenerates, the whole image. Without this
            option such a mask is an error.
        fit: How to make an image square. crop takes its central square, pad adds white borders.
        variation: Generate variations of --init-image with this strength, from 0 (its DDIM
            reconstruction) to 1 (an unrelated image).
        init_caption: Caption of the input image, for --variation, if the prompt does not describe
            that image.
        interpolate: Generate --num images (2 or more) from one prompt to another, from
            one seed to another (--seed to --to-seed), or both.
        to_seed: The seed at the end of --interpolate.
    """

    init_image: Annotated[Path | None, HIDDEN] = None
    mask: Annotated[Path | None, HIDDEN] = None
    invert_mask: Annotated[bool, HIDDEN] = False
    allow_uniform_mask: Annotated[bool, HIDDEN] = False
    fit: Fit = "crop"
    variation: Annotated[float | None, HIDDEN] = None
    init_caption: Annotated[str | None, HIDDEN] = None
    interpolate: Annotated[bool, HIDDEN] = False
    to_seed: Annotated[int | None, HIDDEN] = None


@dataclass(frozen=True)
class SamplingOptions:
    """How images are sampled. The defaults shown are those of the chosen weights.

    Attributes:
        steps: Number of sampling steps N (noise levels), from 1 to 1000. More is slower and more
            accurate. A respacing string of OpenAI's code is accepted too, such as ddim50 or fast27.
            N steps need N network evaluations; heun and dpm++2s need 2N - 1, plms N + 7 (if N is 5
            or more), and prk 4(N - 2). The options --restart and --repaint add evaluations.
        sampler: Deterministic: dpm++2m, dpm++3m, dpm++2s, unipc2, unipc3, heun, deis, lms, ipndm,
            plms, prk, ddim. With noise at each step: ddpm (the paper's, learned variance),
            ddpm-small and ddpm-large (fixed variance), dpm++2m-sde, sa. For few-step students:
            consistency.
        spacing: Spacing of the noise levels: logsnr (even in log(alpha/sigma)), uniform (even in
            time, as in OpenAI's code), rho (EDM), trailing (even in time, from the noisiest
            timestep), trailing-capped (as trailing, without the very noisiest timesteps: for few
            steps), or optimised (for the sampler and the number of steps).
        eta: Noise added at each step, from 0 (none) to 1, by the samplers ddim (default 0),
            dpm++2m-sde and sa (default 1).
        temperature: Factor of the initial noise. Below 1 the images are smoother and less varied.
        restart: Restart sampling: LOW HIGH REPEATS, for example 0.3 2 3. At the noise level
            LOW (sigma/alpha), noise is added up to level HIGH, and the steps from HIGH to LOW are
            run again. This happens REPEATS times.
        guidance_scale: Classifier-free guidance scale; 1 = off, larger follows the prompt more
            closely with less variety. For the method cfg++ it is from 0 to 1.
        guidance_method: cfg (classifier-free), cfg++, or apg, which saturates less at high
            scales.
        guidance_interval: LOW HIGH: guide only at noise levels sigma/alpha between LOW and HIGH.
            Default: at all levels.
        guidance_rescale: CFG rescale factor from 0 (off) to 1; larger removes more of the contrast
            that guidance adds.
        negative_prompt: Guide away from this prompt instead of the empty one.
        autoguidance_scale: Autoguidance scale (weak model from --weak-model); 1 = off, larger
            is stronger.
        clip_scale: Scale of CLIP guidance, which is added to classifier-free guidance; 0 = off,
            larger follows the prompt more closely. OpenAI's notebook uses 3, with guidance scale 1
            and the sampler ddpm. With other samplers than ddpm, ddpm-small and ddpm-large, the
            change of x_0 in each step is limited.
        dynamic_threshold: Quantile of dynamic thresholding, for example 0.995. Without it x_0 is
            clipped to [-1, 1].
        strength: Strength of img2img (SDEdit), above 0 and up to 1: the share of the steps that is
            run. Larger changes the image more.
        repaint: RePaint: JUMP RESAMPLINGS. Groups of JUMP steps are run RESAMPLINGS times each.
            Default: 5 4 for inpainting with a model that was not trained to inpaint, otherwise off.
    """

    steps: Annotated[int | str | None, _default("steps")] = None
    sampler: Annotated[str | None, _default("sampler")] = None
    spacing: Annotated[str | None, _default("spacing")] = None
    eta: Annotated[float | None, _default("eta")] = None
    temperature: Annotated[float | None, _default("temperature")] = None
    restart: Annotated[tuple[float, float, int] | None, _default("restart")] = None
    guidance_scale: Annotated[float | None, _default("guidance_scale")] = None
    guidance_method: Annotated[str | None, _default("guidance_method")] = None
    guidance_interval: Annotated[tuple[float, float] | None, _default("guidance_interval")] = None
    guidance_rescale: Annotated[float | None, _default("guidance_rescale")] = None
    negative_prompt: Annotated[str | None, _default("negative_prompt")] = None
    autoguidance_scale: Annotated[float | None, _default("autoguidance_scale")] = None
    clip_scale: Annotated[float | None, _default("clip_scale")] = None
    dynamic_threshold: Annotated[float | None, _default("dynamic_threshold")] = None
    strength: Annotated[float | None, _default("strength")] = None
    repaint: Annotated[tuple[int, int] | None, _default("repaint")] = None

    def chosen(self) -> dict[str, Any]:
        """Return the settings that are not left to the weights."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class ShardOptions:
    """Write thousands of images to tar shards. Repeat the command to continue where it stopped.

    Attributes:
        shards: Folder for tar shards, instead of --out. A shard has three files per image:
            the .png, the prompt as .txt and the metadata as .json. Finished shards are kept, and
            several commands may write to the same folder.
        shard_size: Images per shard. An interruption loses at most one unfinished shard.
        processes: Number of processes that share the shards. Not needed on TPU slices, under Slurm
            or under Open MPI.
        process: Index of this process, from 0.
    """

    shards: Annotated[Path | None, HIDDEN] = None
    shard_size: int = 1000
    processes: Annotated[int | None, HIDDEN] = None
    process: Annotated[int | None, HIDDEN] = None


@dataclass(frozen=True)
class Options:
    """What to generate.

    Attributes:
        prompts: Prompts, for example "a red apple" "a rocket, Twitter flat style".
        prompts_file: A file with prompts: a text file with one per line; or a table or JSON file
            with captions: .csv, .tsv, .parquet, .jsonl, or .json such as COCO's.
        prompts_field: The column or field of --prompts-file that has the prompts. Default: caption,
            text, prompt or a similar name.
        num: Images per prompt.
        seed: Seed from 0 to 2^32 - 1; the same seed and settings give the same images.
        first_index: Index of the first image. Seed and index together reproduce an image.
        out: Folder for the images. No image in it is overwritten.
        preview: Write intermediate x_0 estimates to preview.png in the --out folder.
    """

    prompts: Annotated[
        Positional[tuple[str, ...]], arg(metavar="[PROMPT ...]", help_behavior_hint="")
    ] = ()
    prompts_file: Annotated[Path | None, HIDDEN] = None
    prompts_field: Annotated[str | None, HIDDEN] = None
    num: Annotated[int, arg(aliases=["-n"])] = 1
    seed: int = 0
    first_index: int = 0
    out: Annotated[Path, arg(aliases=["-o"])] = Path("samples")
    preview: Annotated[bool, HIDDEN] = False
    sharding: OmitArgPrefixes[ShardOptions] = field(default_factory=ShardOptions)
    editing: OmitArgPrefixes[EditingOptions] = field(default_factory=EditingOptions)
    model: OmitArgPrefixes[WeightsOptions] = field(default_factory=WeightsOptions)
    sampling: OmitArgPrefixes[SamplingOptions] = field(default_factory=SamplingOptions)


def read_options(description: str, arguments: Sequence[str] | None = None) -> Options:
    """Return the options of a command line, by default of this process.

    The help shows the sampling defaults of the weights that the command line names.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    show_defaults_of(_named(words, "--weights") or WeightsOptions.weights, words)
    plain = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)
    chosen, prompts = split_prompts(words)
    chosen = expand_words(chosen, TEXTS)
    words = [*chosen, "--", *prompts] if prompts else chosen
    return tyro.cli(Options, description=description, args=words, config=plain)


def split_prompts(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into options, with their values, and prompts; both in any order.

    All that follows `--` is prompts.
    """
    value_counts, chosen, prompts = _value_counts(Options), [], []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if word == "--":
            return chosen, prompts + remaining
        if not word.startswith("-") or " " in word.partition("=")[0] or word == "-":
            prompts.append(word)
            continue
        chosen.append(word)
        if "=" not in word:
            count = value_counts.get(word.replace("_", "-"), 0)
            chosen += remaining[:count]
            del remaining[:count]
    return chosen, prompts


def _value_counts(kind: Any) -> dict[str, int]:
    """Return the number of values that each option takes."""
    value_counts: dict[str, int] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        marks = [mark for mark in getattr(hint, "__metadata__", ()) if hasattr(mark, "aliases")]
        plain = get_type_hints(kind)[name]
        if is_dataclass(plain):
            value_counts |= _value_counts(plain)
            continue
        tuples = [get_args(kind) for kind in (plain, *get_args(plain)) if get_origin(kind) is tuple]
        if any(Ellipsis in kinds for kinds in tuples):
            if name == "prompts":
                continue
            count = 1  # an option that may be given several times
        else:
            count = 0 if plain is bool else len(tuples[0]) if tuples else 1
        names = [f"--{name.replace('_', '-')}", *(a for mark in marks for a in mark.aliases or ())]
        value_counts |= dict.fromkeys(names, count)
    return value_counts


def show_defaults_of(weights: str, words: Sequence[str]) -> None:
    """Make the help show the sampling defaults of these weights, if a command line asks for it.

    For weights of the Hub it downloads their config.
    """
    if not {"-h", "--help"} & set(words):
        return
    settings = Settings().changed(**sampling_defaults(weights))
    _shown.clear()
    _shown.update({f.name: getattr(settings, f.name) for f in fields(settings)})


def _named(words: Sequence[str], option: str) -> str | None:
    """The value of `--option value` or `--option=value`."""
    for i, word in enumerate(words):
        if word == option and i + 1 < len(words):
            return words[i + 1]
        if word.startswith(f"{option}="):
            return word.removeprefix(f"{option}=")
    return None


def check_options(options: Options) -> None:
    """Check that options go together.

    Raises:
        UsageError: two options exclude each other, or one has no effect.
    """
    e, varies = options.editing, options.editing.variation is not None
    sharding = options.sharding
    into = sharding.shards is not None
    for wrong, message in (
        (varies and e.init_image is None, "--variation needs an image: give --init-image"),
        (varies and e.mask is not None, "--variation changes the whole image: it takes no --mask"),
        (
            e.mask is None and (e.invert_mask or e.allow_uniform_mask),
            "--invert-mask and --allow-uniform-mask are for --mask",
        ),
        (
            e.fit != "crop" and e.init_image is None,
            "--fit is for --init-image",
        ),
        (e.init_caption is not None and not varies, "--init-caption is for --variation"),
        (e.to_seed is not None and not e.interpolate, "--to-seed is for --interpolate"),
        (
            e.interpolate and (e.init_image is not None or e.mask is not None),
            "--interpolate takes prompts: it has no --init-image or --mask",
        ),
        (
            into and (e.interpolate or e.init_image is not None or e.mask is not None),
            "--shards takes prompts: it has no --init-image, --mask or --interpolate",
        ),
        (into and options.preview, "--shards has no --preview"),
        (
            into and options.out != Options.out,
            "--shards names the folder: leave --out out",
        ),
        (
            not into and (sharding.processes is not None or sharding.process is not None),
            "--processes and --process are for --shards",
        ),
        (
            not into and sharding.shard_size != ShardOptions.shard_size,
            "--shard-size is for --shards",
        ),
        (
            options.prompts_field is not None and options.prompts_file is None,
            "--prompts-field is for --prompts-file",
        ),
    ):
        if wrong:
            raise UsageError(message)


def prompts_of(options: Options) -> tuple[str, ...]:
    """Return the prompts of the command line, then those of the file.

    Raises:
        UsageError: the file cannot be read, or there is no prompt.
    """
    if options.prompts_file is None:
        return options.prompts
    prompts = read_prompt_file(options.prompts_file, options.prompts_field)
    if not prompts and not options.prompts:
        raise UsageError(f"{options.prompts_file} holds no prompt: write one a line")
    return options.prompts + prompts
