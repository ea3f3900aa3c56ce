"""What the page can ask for: one call of a pipeline, also as Python and as a command line."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glide_jax.errors import UsageError
from glide_jax.pipeline.images import Images
from glide_jax.pipeline.options import SampleModelOptions
from glide_jax.pipeline.pipeline import Pipeline, Preview
from glide_jax.pipeline.settings import Settings
from glide_jax.weights.registry import NONE

# The upper end of an interval of guidance that has none. The noisiest level is about 20,000.
NO_LIMIT = 100_000.0
# What guides only with a scale, and that scale; `glide-jax sample` refuses it without one.
SCALES = {"clip_model": "clip_guidance_scale", "weak_model": "autoguidance_scale"}
FILL, IMG2IMG, VARY = "Fill", "Img2img", "Vary"


@dataclass(frozen=True)
class Controls:
    """The values of the page's controls.

    Attributes:
        prompt: the prompt.
        num, seed: images, and the seed of the run.
        steps, sampler, guidance_scale, negative_prompt, clip_guidance_scale, autoguidance_scale:
            fields of `Settings`; `steps` may be text.
        low, high: the noise levels between which guidance acts; None or 0: no limit.
    """

    prompt: str
    num: int
    seed: int
    steps: int | str
    sampler: str
    guidance_scale: float
    negative_prompt: str
    clip_guidance_scale: float
    autoguidance_scale: float
    low: float | None = None
    high: float | None = None

    def sampling(self, defaults: Settings) -> dict[str, Any]:
        """Return the steps and the sampler, where they differ from the defaults."""
        return _changed(
            {"steps": read_steps(self.steps, defaults), "sampler": self.sampler}, defaults
        )

    def guidance(self, defaults: Settings) -> dict[str, Any]:
        """Return the settings of guidance that differ from the defaults."""
        values: dict[str, Any] = {
            "guidance_scale": number(self.guidance_scale),
            "negative_prompt": single_line(self.negative_prompt),
            "clip_guidance_scale": number(self.clip_guidance_scale),
            "autoguidance_scale": number(self.autoguidance_scale),
        }
        low, high = self.low or 0.0, self.high or NO_LIMIT
        acts_everywhere = not self.low and not self.high
        values["guidance_interval"] = None if acts_everywhere else (number(low), number(high))
        on = {name: values[name] for name in SCALES.values()}
        return _changed(values, defaults) | _changed(on, Settings())


@dataclass(frozen=True)
class Call:
    """One call of a pipeline.

    Attributes:
        method: its name; "": the pipeline itself.
        prompts: positional arguments after the image, if there is one.
        arguments: keyword arguments; `image` comes first for `variations`.
    """

    method: str
    prompts: tuple[str, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def run(self, pipe: Pipeline, preview: Preview | None = None) -> Images:
        """Make the images; `preview` is called after each network evaluation.

        The images are those of `python()` and `command()` to the byte.
        """
        function = getattr(pipe, self.method or "__call__")
        # The bar makes the inversion of a variation, too, run row by row: with another program, the
        # noise would differ by rounding.
        progress = self.method == "variations"
        named = self._named_prompts() | dict(self.arguments)
        return function(**named, progress=progress, preview=preview, preview_every=1)

    def python(self, loading: Mapping[str, Any], out: Path) -> str:
        """Return the Python code that makes the same images.

        Args:
            loading: arguments of `glide_jax.load`; see `loading_arguments`.
            out: the folder for the images.
        """
        load = self._used(loading)
        weights = load.pop("weights", SampleModelOptions.weights)
        made = ", ".join([repr(weights), *(f"{name}={v!r}" for name, v in load.items())])
        arguments = [repr(prompt) for prompt in self.prompts]
        named = dict(self.arguments)
        if self.method == "variations":
            arguments.insert(0, repr(named.pop("image")))
        arguments += [f"{name}={value!r}" for name, value in named.items()]
        function = "pipe" + (f".{self.method}" if self.method else "")
        call = f"images = {function}({', '.join(arguments)})"
        if len(call) > 80:
            call = f"images = {function}(\n    " + ",\n    ".join(arguments) + ",\n)"
        return (
            f"import glide_jax as glide\n\npipe = glide.load({made})\n{call}\n"
            f"images.save({str(out)!r})\n"
        )

    def command(self, loading: Mapping[str, Any], out: Path) -> str:
        """Return the command line that makes the same images; arguments as for `python`."""
        words = ["glide-jax", "sample"]
        arguments = dict(self.arguments)
        # The weights of an upsampler and its settings have the same name.
        settings = arguments.pop("upsampler", {})
        arguments |= {f"upsampler_{setting}": value for setting, value in settings.items()}
        if str(out) != "samples":
            arguments["out"] = str(out)
        for name, value in [*self._used(loading).items(), *arguments.items()]:
            words += _option(name, value)
        if self.method == "interpolate":
            words.append("--interpolate")
        # Prompts after two dashes: they may begin with one themselves.
        return shlex.join([*words, "--", *self.prompts])

    def _used(self, loading: Mapping[str, Any]) -> dict[str, Any]:
        """Return what this call needs of the arguments of `glide_jax.load`."""
        return {
            name: value
            for name, value in loading.items()
            if name not in SCALES or value == NONE or SCALES[name] in self.arguments
        }

    def _named_prompts(self) -> dict[str, Any]:
        names = {"interpolate": ("start", "end"), "variations": ("prompt",)}
        return dict(zip(names.get(self.method, ("prompts",)), self.prompts, strict=True))


def _option(name: str, value: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if name == "lora":
        return [word for item in value for word in (option, item)]
    if isinstance(value, tuple):
        return [option, *map(str, value)]
    return [f"{option}={value}"] if str(value).startswith("-") else [option, str(value)]


def generate(controls: Controls, defaults: Settings, **more: Any) -> Call:
    """Return the call for text to image.

    Args:
        defaults: settings of the pipeline; only what differs is written down.
        more: further arguments of the pipeline, such as `batch_size`.
    """
    return Call("", (single_line(controls.prompt),), _call_settings(controls, defaults, more))


def edit(
    controls: Controls,
    defaults: Settings,
    mode: str,
    image: str | None,
    mask: str | None,
    amount: float,
    **more: Any,
) -> Call:
    """Return the call that edits an image.

    Args:
        mode: "Fill" fills the mask; "Img2img" is img2img with `amount` as the strength, under the
            mask if there is one; "Vary" makes variations, without guidance.
        image, mask: files, or None.

    Raises:
        UsageError: there is no image, or no mask to fill.
    """
    if image is None:
        raise UsageError("there is no image to edit: load one, or use a result as input")
    prompts, where = (single_line(controls.prompt),), {"image": image}
    if mode == VARY:
        run = {"num": controls.num, "seed": controls.seed, **more}
        settings = controls.sampling(defaults)
        return Call("variations", prompts, where | {"variation": number(amount)} | run | settings)
    if mask is not None:
        where["mask"] = mask
    elif mode == FILL:
        raise UsageError("no region is painted: paint over what is to be filled")
    changed = {"strength": number(amount)} if mode == IMG2IMG else {}
    return Call("", prompts, where | changed | _call_settings(controls, defaults, more))


def interpolation(controls: Controls, defaults: Settings, end: str, **more: Any) -> Call:
    """Return the call for the interpolation from the prompt to another one."""
    prompts = (single_line(controls.prompt), single_line(end))
    return Call("interpolate", prompts, _call_settings(controls, defaults, more))


def loading_arguments(options: SampleModelOptions) -> dict[str, Any]:
    """Return the arguments of `glide_jax.load` that differ from their defaults."""
    usual = SampleModelOptions().load_arguments()
    return {name: value for name, value in options.load_arguments().items() if value != usual[name]}


def caption_of(metadata: Mapping[str, Any]) -> str:
    """Return a caption of an image; of an interpolation, that of the nearer end."""
    if ends := metadata.get("interpolation"):
        return ends["prompts"][ends["share"] >= 0.5]
    return metadata["prompt"]


def read_steps(text: int | float | str, defaults: Settings) -> int | str:
    """Return steps as a number where they are one; empty text stands for the default."""
    text = str(text).strip()
    if not text:
        return defaults.steps
    try:
        return int(float(text))
    except ValueError:
        return text


def single_line(text: str | None) -> str:
    """Return text on one line, without spaces around it."""
    return " ".join((text or "").split())


def number(value: float) -> float:
    """Return a slider's value without the noise of its arithmetic, 2.3000000000000003."""
    return round(float(value), 6)


def _call_settings(
    controls: Controls, defaults: Settings, more: Mapping[str, Any]
) -> dict[str, Any]:
    run = {"num": controls.num, "seed": controls.seed, **more}
    return run | controls.sampling(defaults) | controls.guidance(defaults)


def _changed(values: dict[str, Any], defaults: Settings) -> dict[str, Any]:
    return {
        name: NONE if v is None else v for name, v in values.items() if v != getattr(defaults, name)
    }
