"""The command line of sampling, by group of options."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from glide_jax.errors import UsageError
from glide_jax.folders import expand_words
from glide_jax.pipeline.image_files import Fit
from glide_jax.pipeline.prompt_files import read_prompt_file
from glide_jax.pipeline.settings import Settings, SettingsArguments, setting_texts
from glide_jax.training.runs import sampling_defaults
from glide_jax.weights.registry import NONE

# The defaults that the help shows: those of the weights that will be used.
_shown: dict[str, Any] = {}
# For options whose help says what happens without them.
NO_DEFAULT_SHOWN = arg(help_behavior_hint="")
COMPANION_DEFAULT = arg(
    help_behavior_hint="(default: the one that belongs to the weights, if any: emoji_upsample256 "
    "for emoji64)"
)
# Options whose values are text: `~` has no meaning in them.
UNEXPANDED_OPTIONS = ("--negative-prompt", "--image-caption", "--prompts-field")


@dataclass(frozen=True)
class NetworkOptions:
    """The weights, and the dtype of the computation.

    Attributes:
        weights: A name (emoji64, openai/base, ...), a folder of weights, a .pt file, the folder of
            a training run, or hf://user/name of the Hugging Face Hub.
        dtype: Dtype of the trunk, which is most of the network: float32, bfloat16 or float16. The
            rest is float32. auto: bfloat16 on TPUs, on recent GPUs and on CPUs that have AMX;
            float16 on older GPUs; float32 on other CPUs. The variable GLIDE_JAX_DTYPE, if set, says
            what auto is on every device.
    """

    weights: str = "emoji64"
    dtype: str = "auto"


@dataclass(frozen=True)
class SharedModelOptions(NetworkOptions):
    """The model, and the devices it runs on.

    Attributes:
        upsampler: Weights of the upsampler that enlarges each image, or none.
        clip_model: Weights of a noised CLIP (openai/clip, or a folder) for --clip-guidance-scale,
            or none. Default: the one that belongs to the weights (emoji_clip64 for emoji64), if
            any.
        weak_model: Weights of a weaker model, for --autoguidance-scale: a smaller one, or one that
            was trained less. It must have the same variant, image size and noise schedule.
        devices: Number of devices that share each batch, or all. It changes an image by rounding
            errors: in float32 by at most 1 (of 0 to 255) per colour value, in 16 bits by more.
        batch_size: Images generated at a time, in total over all devices. More needs more memory.
            It changes an image by rounding errors, as --devices does. Default per device at 64x64:
            16 on a CPU, 64 on other devices; a quarter of that at 256x256.
    """

    upsampler: Annotated[str | None, COMPANION_DEFAULT] = None
    clip_model: Annotated[str | None, NO_DEFAULT_SHOWN] = None
    weak_model: Annotated[str | None, NO_DEFAULT_SHOWN] = None
    devices: str = "1"
    batch_size: Annotated[int | None, NO_DEFAULT_SHOWN] = None

    def load_arguments(self) -> dict[str, Any]:
        """Return the arguments of `glide_jax.load`."""
        names = ("weights", "upsampler", "clip_model", "weak_model", "lora", "dtype", "devices")
        return {name: value for name, value in vars(self).items() if name in names}


@dataclass(frozen=True)
class SampleModelOptions(SharedModelOptions):
    """The model with its LoRA and the settings of its upsampler, and the devices it runs on.

    Attributes:
        upsampler_steps: Number of sampling steps of the upsampler, as --steps. If its weights have
            a default strength below 1, the upsampler starts from the enlarged image and runs only
            that share of the steps, the last ones.
        upsampler_sampler: Sampler of the upsampler, as --sampler.
        lora: LoRA to add to the weights: the folder of a run with LoRA, or a .safetensors file. A
            weight may follow a colon (runs/mine:0.5). A larger weight changes the images more. A
            negative one does the opposite of what was learned. The option may be given several
            times.
    """

    upsampler_steps: Annotated[str | None, NO_DEFAULT_SHOWN] = None
    upsampler_sampler: Annotated[str | None, NO_DEFAULT_SHOWN] = None
    lora: Annotated[UseAppendAction[tuple[str, ...]], NO_DEFAULT_SHOWN] = ()


@dataclass(frozen=True)
class EditingOptions:
    """Editing images.

    Attributes:
        image: The image to edit, together with --mask (inpainting), --strength (img2img)
            or --variation.
        mask: The mask of --image, an image. White is regenerated. Black is kept,
            unchanged if the input already has the size of the output. A transparent layer is also
            accepted: its painted part is regenerated. A copy of the image with a part erased is
                accepted too: the erased
            part is regenerated.
        invert_mask: Regenerate the part that the mask keeps, and keep the other part.
        allow_uniform_mask: Accept a mask that keeps, or regenerates, the whole image. Without this
            option such a mask is an error.
        fit: How to make an image square. crop takes its central square, pad adds white borders.
        variation: Generate variations of --image with this share of new noise, from 0 (the image
            itself, approximately) to 1 (an unrelated image). The sampler is then dpm++2m and
            guidance is off, whatever the defaults of the weights, unless you set them.
        image_caption: Caption of the input image, for --variation, if the prompt does not describe
            that image.
        interpolate: Generate --num images (2 or more) from one prompt to another, from
            one seed to another (--seed to --to-seed), or both.
        to_seed: The seed at the end of --interpolate.
    """

    image: Annotated[Path | None, NO_DEFAULT_SHOWN] = None
    mask: Annotated[Path | None, NO_DEFAULT_SHOWN] = None
    invert_mask: Annotated[bool, NO_DEFAULT_SHOWN] = False
    allow_uniform_mask: Annotated[bool, NO_DEFAULT_SHOWN] = False
    fit: Fit = "crop"
    variation: Annotated[float | None, NO_DEFAULT_SHOWN] = None
    image_caption: Annotated[str | None, NO_DEFAULT_SHOWN] = None
    interpolate: Annotated[bool, NO_DEFAULT_SHOWN] = False
    to_seed: Annotated[int | None, NO_DEFAULT_SHOWN] = None


def _sampling_option(name: str, kind: Any) -> tuple[str, Any, Any]:
    """Return the field for a setting: None where the option is left out.

    The help shows the text of `Settings`, and the default of the chosen weights.
    """
    text = _SETTING_TEXTS.get(name, "")

    def hint(_: str) -> str:
        value = _shown.get(name)
        return "" if value in (None, "") else f"(default: {value})"

    shown = arg(help=text[:1].upper() + text[1:], help_behavior_hint=hint)
    return name, Annotated[kind, shown], None


# --steps, --sampler, --guidance-scale and so on: one option for each field of `Settings`.
_SETTING_TEXTS = setting_texts()
# A command line has one guidance scale for all images, and no functions.
_KINDS = get_type_hints(SettingsArguments) | {"guidance_scale": float | None}
_SAMPLING = [_sampling_option(name, kind) for name, kind in _KINDS.items() if name != "guidance"]


class SamplingOptions(make_dataclass("SamplingOptions", _SAMPLING, frozen=True)):
    """How images are sampled. The defaults shown are those of the chosen weights.

    Where {none} is listed, the word none turns off a default of the weights.
    """

    def given_settings(self) -> dict[str, Any]:
        """Return the settings that are not left to the weights."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class ShardOptions:
    """Tar shards of images. Repeat the command to continue where it stopped.

    Attributes:
        shard_size: Images per shard. An interruption loses at most one unfinished shard.
        num_processes: Number of processes that share the shards. Not needed on TPU slices, under
            Slurm or under Open MPI.
        process_id: Index of this process, from 0.
    """

    shard_size: int = 1000
    num_processes: Annotated[int | None, NO_DEFAULT_SHOWN] = None
    process_id: Annotated[int | None, NO_DEFAULT_SHOWN] = None


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
        shards: Folder for tar shards of thousands of images, instead of --out. A shard has three
            files per image: the .png, the prompt as .txt and the metadata as .json. Finished shards
            are kept, and several commands may write to the same folder.
        preview: Write intermediate x_0 estimates to preview.png in the --out folder.
    """

    prompts: Annotated[
        Positional[tuple[str, ...]], arg(metavar="[PROMPT ...]", help_behavior_hint="")
    ] = ()
    prompts_file: Annotated[Path | None, NO_DEFAULT_SHOWN] = None
    prompts_field: Annotated[str | None, NO_DEFAULT_SHOWN] = None
    num: Annotated[int, arg(aliases=["-n"])] = 1
    seed: int = 0
    first_index: int = 0
    out: Annotated[Path, arg(aliases=["-o"])] = Path("samples")
    shards: Annotated[Path | None, NO_DEFAULT_SHOWN] = None
    preview: Annotated[bool, NO_DEFAULT_SHOWN] = False
    sharding: OmitArgPrefixes[ShardOptions] = field(default_factory=ShardOptions)
    editing: OmitArgPrefixes[EditingOptions] = field(default_factory=EditingOptions)
    model: OmitArgPrefixes[SampleModelOptions] = field(default_factory=SampleModelOptions)
    sampling: OmitArgPrefixes[SamplingOptions] = field(default_factory=SamplingOptions)


def read_options(description: str, arguments: Sequence[str] | None = None) -> Options:
    """Return the options of a command line, by default of this process.

    The help shows the sampling defaults of the weights that the command line names.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    show_defaults_of(_named(words, "--weights") or SampleModelOptions.weights, words)
    plain = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)
    option_words, prompts = split_prompts(words)
    option_words = expand_words(option_words, UNEXPANDED_OPTIONS)
    words = [*option_words, "--", *prompts] if prompts else option_words
    return tyro.cli(Options, description=description, args=words, config=plain)


def split_prompts(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into options, with their values, and prompts; both in any order.

    All that follows `--` is prompts.
    """
    value_counts, option_words, prompts = _value_counts(Options), [], []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if word == "--":
            return option_words, prompts + remaining
        if not word.startswith("-") or " " in word.partition("=")[0] or word == "-":
            prompts.append(word)
            continue
        option_words.append(word)
        if "=" not in word:
            count = value_counts.get(word.replace("_", "-"), 0)
            count = min(count, 1) if remaining[:1] == [NONE] else count
            option_words += remaining[:count]
            del remaining[:count]
    return option_words, prompts


def _value_counts(kind: Any) -> dict[str, int]:
    """Return the number of values that each option takes."""
    value_counts: dict[str, int] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        marks = [mark for mark in getattr(hint, "__metadata__", ()) if hasattr(mark, "aliases")]
        plain = get_type_hints(kind)[name]
        if is_dataclass(plain):
            value_counts |= _value_counts(plain)
            continue
        tuples = [
            get_args(option_type)
            for option_type in (plain, *get_args(plain))
            if get_origin(option_type) is tuple
        ]
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

    The config of weights of the Hub is downloaded for this.
    """
    if not {"-h", "--help"} & set(words):
        return
    settings = Settings().changed(**sampling_defaults(weights))
    _shown.clear()
    _shown.update({f.name: getattr(settings, f.name) for f in fields(settings)})


def _named(words: Sequence[str], option: str) -> str | None:
    """Return the value of `--option value` or `--option=value`."""
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
    editing, varies = options.editing, options.editing.variation is not None
    sharding = options.sharding
    writes_shards = options.shards is not None
    for wrong, message in (
        (varies and editing.image is None, "--variation needs an image: give --image"),
        (
            varies and editing.mask is not None,
            "--variation changes the whole image: it takes no --mask",
        ),
        (
            editing.mask is None and (editing.invert_mask or editing.allow_uniform_mask),
            "--invert-mask and --allow-uniform-mask are for --mask",
        ),
        (
            editing.fit != "crop" and editing.image is None,
            "--fit is for --image",
        ),
        (editing.image_caption is not None and not varies, "--image-caption is for --variation"),
        (editing.to_seed is not None and not editing.interpolate, "--to-seed is for --interpolate"),
        (
            editing.interpolate and (editing.image is not None or editing.mask is not None),
            "--interpolate takes prompts: it has no --image or --mask",
        ),
        (
            writes_shards
            and (editing.interpolate or editing.image is not None or editing.mask is not None),
            "--shards takes prompts: it has no --image, --mask or --interpolate",
        ),
        (writes_shards and options.preview, "--shards has no --preview"),
        (
            writes_shards and options.out != Options.out,
            "--shards names the folder: give no --out",
        ),
        (
            not writes_shards and (sharding.num_processes, sharding.process_id) != (None, None),
            "--num-processes and --process-id are for --shards",
        ),
        (
            not writes_shards and sharding.shard_size != ShardOptions.shard_size,
            "--shard-size is for --shards",
        ),
        (
            options.prompts_field is not None and options.prompts_file is None,
            "--prompts-field is for --prompts-file",
        ),
    ):
        if wrong:
            raise UsageError(message)
    check_scales(options.model, options.sampling.given_settings())


def check_scales(model: SharedModelOptions, given: Mapping[str, Any]) -> None:
    """Check that a CLIP or a weak model that is named also acts.

    Args:
        given: the settings that are not left to the weights.

    Raises:
        UsageError: a CLIP or a weak model has no scale, neither set nor among the defaults of the
            weights.
    """
    for name, scale in (
        ("clip_model", "clip_guidance_scale"),
        ("weak_model", "autoguidance_scale"),
    ):
        if getattr(model, name) in (None, NONE) or scale in given:
            continue
        settings = Settings().changed(**sampling_defaults(model.weights))
        if getattr(settings, scale) == getattr(Settings, scale):
            option, missing = (f"--{word.replace('_', '-')}" for word in (name, scale))
            raise UsageError(f"{option} has no effect without a scale: give {missing}")


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
