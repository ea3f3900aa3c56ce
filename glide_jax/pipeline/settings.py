"""How images are sampled: one object for notebooks, command lines and metadata."""

import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, TypedDict, TypeVar, get_type_hints

import numpy as np

from glide_jax.diffusion.guidance import (
    Guidance,
    apg,
    autoguidance,
    cfg_plus_plus,
    clamp_x_0,
    classifier_free,
    combine_prompts,
    compose,
    dynamic_threshold,
    guidance_rescale,
)
from glide_jax.diffusion.sampling import Plan, make_plan
from glide_jax.diffusion.schedule import Schedule
from glide_jax.diffusion.solvers import (
    SOLVERS,
    Solver,
    repaint,
    restart,
    solver_of,
    traits_of,
)
from glide_jax.diffusion.timesteps import make_timesteps
from glide_jax.errors import UsageError, check_finite, did_you_mean
from glide_jax.pipeline.prompts import Prompt, clean
from glide_jax.pipeline.setting_types import checked_values, json_value
from glide_jax.weights.registry import NONE

# Jump length and resamplings for 25 steps, where the paper has ten and ten for 250. Measured on an
# embedded model without mask input (November 2026): across the edge of the mask pixels change by 23
# levels without it, 16 with it, and 15 in real images.
DEFAULT_REPAINT = (5, 4)
GUIDANCE_METHODS = {"cfg": classifier_free, "cfg++": cfg_plus_plus, "apg": apg}
# The settings that can be text.
TEXT_SETTINGS = ("steps", "sampler", "spacing", "guidance_method", "negative_prompt")
# What `guidance=[...]` replaces.
REPLACED_BY_GUIDANCE = (
    "guidance_scale",
    "guidance_method",
    "guidance_interval",
    "guidance_rescale",
    "negative_prompt",
    "autoguidance_scale",
    "dynamic_threshold",
)


@dataclass(frozen=True)
class Settings:
    """How images are sampled. With prompt, seed and index, it reproduces an image.

    Weights may store defaults for some of these; otherwise the defaults below apply. In a call,
    None leaves a setting as the weights have it, and "none" turns it off if it can be None here.

    Attributes:
        steps: number of noise levels N (more is slower and more accurate), up to the number of
            timesteps; or a respacing string of OpenAI's code: "ddim50", "fast27", "10,10,3,2,2". N
            levels need N network evaluations; heun and dpm++2s need 2N - 1, plms N + 7 (if N is 5
            or more), and prk 4(N - 2). RePaint and Restart sampling add evaluations.
        sampler: name of the sampler. Deterministic: dpm++2m, dpm++3m, dpm++2s, unipc2, unipc3,
            heun, deis, lms, ipndm, plms, prk, ddim. Stochastic: ddpm (the paper's ancestral
            sampling, learned variance), ddpm-small and ddpm-large (fixed variance), dpm++2m-sde,
            and sa (adds noise only at the steps where t/T is from 0.2 to 0.8). For
            few-step students: consistency.
        spacing: spacing of the noise levels: logsnr (even in log(alpha/sigma)), uniform (even in
            time, as in OpenAI's code), karras (EDM), trailing (even in time, the last step as long
            as the others), trailing-capped (as trailing, without the very noisiest
            timesteps: for few steps), or optimised (for the sampler and the number of steps).
        eta: amount of noise that the samplers ddim, dpm++2m-sde and sa add: 0 is none; 1 is for
            ddim as much as in ancestral sampling, for the others as in the reverse SDE. Default:
            0 for ddim, 1 for dpm++2m-sde and sa. No other sampler takes it.
        temperature: factor on the initial noise; below 1 gives smoother, less varied images.
        restart: Restart sampling by three numbers, LOW HIGH REPEATS, for example 0.3 2 3. When the
            noise level (sigma/alpha) has fallen to LOW, new noise raises it to HIGH, and the steps
            from HIGH to LOW are run again. This happens REPEATS times.
        guidance_scale: classifier-free guidance scale, in Python also one per image; 1 is off,
            larger follows the prompt more closely with less variety. For the method cfg++ it is
            from 0 to 1. A model with distilled guidance takes it as an input, and makes no
            prediction for the empty prompt.
        guidance_method: method of guidance: cfg (classifier-free), cfg++, or apg, which saturates
            less at high scales.
        guidance_interval: two noise levels sigma/alpha, LOW HIGH, for example 0.3 5:
            classifier-free guidance, autoguidance and CFG rescale act only between them; if
            not set, at all levels. CLIP guidance, thresholding and clipping always act at all
            noise levels.
        guidance_rescale: CFG rescale factor from 0 (off) to 1; larger removes more of the contrast
            that guidance adds.
        negative_prompt: prompt to guide away from, instead of the empty one.
        autoguidance_scale: scale of guidance away from the weak model; 1 is off, larger is
            stronger.
        clip_guidance_scale: scale of CLIP guidance by the noised CLIP, added to classifier-free
            guidance; 0 is off, larger follows the prompt more closely. OpenAI's notebook uses 3,
            with guidance scale 1 and the sampler ddpm. With samplers other than ddpm, ddpm-small
            and ddpm-large, the change of x_0 in each step is limited.
        dynamic_threshold: quantile of dynamic thresholding, such as 0.995. Without it x_0 is
            clipped to [-1, 1].
        strength: strength of img2img (SDEdit): share of the steps that are run, above 0 and up
            to 1; larger changes the image more. With 25 steps, strength 0.6 runs the last 15. An
            upsampler with a strength starts from the enlarged small image.
        repaint: RePaint by two numbers, JUMP RESAMPLINGS, for example 5 4. Groups of JUMP steps are
            run RESAMPLINGS times each. Default: 5 4 for inpainting with a base model that was not
            trained to inpaint, unless there is Restart sampling; otherwise off. With few steps the
            default JUMP is smaller.
        guidance: Python only: a list of guidance functions; replaces classifier-free guidance,
            autoguidance, rescaling, thresholding and clipping, and a CLIP guidance that the weights
            have by default.
    """

    steps: int | str = 25
    sampler: str = "dpm++2m"
    spacing: str = "logsnr"
    eta: float | None = None
    temperature: float = 1.0
    restart: tuple[float, float, int] | None = None
    guidance_scale: float | Sequence[float] = 3.0
    guidance_method: str = "cfg"
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    negative_prompt: str = ""
    autoguidance_scale: float = 1.0
    clip_guidance_scale: float = 0.0
    dynamic_threshold: float | None = None
    strength: float | None = None
    repaint: tuple[int, int] | None = None
    guidance: Sequence[Guidance] | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, str) and name not in TEXT_SETTINGS:
                raise UsageError(f"{name} cannot be {value!r}, which is text")
        check_finite(vars(self), unbounded=("guidance_interval",))
        for name, value in checked_values(Settings, vars(self)).items():
            object.__setattr__(self, name, value)

    def changed(self, **values: Any) -> "Settings":
        """Return these settings with some replaced; None leaves a value, "none" makes it None.

        Raises:
            UsageError: an unknown setting, a value of another type or length, or a setting that
                `guidance` replaces is given beside it.
        """
        names = [f.name for f in fields(self)]
        for name in values:
            if name not in names:
                raise UsageError(f"there is no setting {name!r}{did_you_mean(name, names)}")
        values = {name: value for name, value in values.items() if value is not None}
        if isinstance(negative := values.get("negative_prompt"), str):
            values["negative_prompt"] = clean(negative)
        if not is_off(values.get("guidance", NONE)):
            if beside := set(REPLACED_BY_GUIDANCE) & set(values):
                raise UsageError(f"guidance=[...] replaces {min(beside)}: give one of them")
            if self.clip_guidance_scale and "clip_guidance_scale" not in values:
                warnings.warn(
                    f"guidance=[...] replaces the CLIP guidance of these weights: give "
                    f"clip_guidance_scale={self.clip_guidance_scale:g} to keep it, or 0",
                    stacklevel=3,
                )
            values = {"clip_guidance_scale": 0.0} | values
        turned_off = [
            f.name for f in fields(self) if f.default is None and is_off(values.get(f.name))
        ]
        return replace(self, **values | dict.fromkeys(turned_off))

    def solver(self) -> Solver:
        """Return the solver of `sampler`.

        Raises:
            UsageError: there is no such sampler, or it takes no eta.
        """
        solver = solver_of(self.sampler)
        if self.eta is None:
            return solver
        if not traits_of(self.sampler).takes_eta:
            with_eta = ", ".join(name for name in SOLVERS if traits_of(name).takes_eta)
            raise UsageError(f"eta is for {with_eta}, not for {self.sampler}")
        if not 0 <= self.eta <= 1:
            raise UsageError(f"eta must be between 0 and 1, not {self.eta}")
        eta_solver: Any = solver  # its traits say that it takes eta
        return partial(eta_solver, eta=self.eta)

    def timesteps(self, schedule: Schedule) -> np.ndarray:
        """Return the timesteps to visit; with a strength, the last share of them.

        Raises:
            UsageError: see `make_timesteps`; or the strength is out of its range.
        """
        timesteps = make_timesteps(schedule, self.steps, self.spacing, solver=self.solver())
        if self.strength is None:
            return timesteps
        if not 0 < self.strength <= 1:
            raise UsageError(f"strength must be above 0 and at most 1, not {self.strength}")
        return timesteps[-max(1, round(self.strength * len(timesteps))) :]

    def with_repaint(self, schedule: Schedule) -> "Settings":
        """Return the settings, with the default RePaint if neither `repaint` nor `restart` is set.

        A run of a single step has nothing to repeat, and stays as it is.
        """
        jump = min(DEFAULT_REPAINT[0], len(self.timesteps(schedule)) - 1)
        if not jump or self.repaint or self.restart:
            return self
        return replace(self, repaint=(jump, DEFAULT_REPAINT[1]))

    def guidances(self, prompts: Sequence[Prompt], *maps: Guidance) -> tuple[Guidance, ...]:
        """Return what acts on the prediction, innermost first.

        Args:
            prompts: one per image, all with the same number of parts.
            maps: maps of x_0 (known pixels). They act before clipping, but last with a dynamic
                threshold or with `guidance`.

        Raises:
            UsageError: the settings contradict each other, or a number is out of its range.
        """
        if self.guidance is not None:
            if len(prompts[0].parts) > 1:
                raise UsageError(
                    "AND and NOT are guidance: with guidance=[...], give combine_prompts there"
                )
            return (*self.guidance, *maps)
        linear = self._linear(prompts)
        if self.guidance_rescale:
            linear.append(guidance_rescale(self.guidance_rescale))
        if self.guidance_interval is not None:
            linear = [compose(*linear).within(*self.guidance_interval)]
        if self.dynamic_threshold is not None:
            return (*linear, dynamic_threshold(self.dynamic_threshold), *maps)
        return (*linear, *maps, clamp_x_0())

    def scale_can_be_input(self, prompts: Sequence[Prompt]) -> bool:
        """Whether guidance is classifier-free and its scale alone can be an input of a network.

        Otherwise guidance is computed from branches of the network, each without guidance.
        """
        return (
            self.guidance is None
            and self.guidance_method == "cfg"
            and self.guidance_interval is None
            and not self.guidance_rescale
            and not self.negative_prompt
            and len(prompts[0].parts) == 1
        )

    def _linear(self, prompts: Sequence[Prompt]) -> list[Guidance]:
        """Return the guidance that is linear in the branches."""
        guidances = self._towards_prompts(prompts)
        if self.negative_prompt:
            if not guidances:
                raise UsageError("a negative_prompt needs a guidance_scale other than 1")
            guidances = [g.with_negative_prompt(self.negative_prompt) for g in guidances]
        if self.autoguidance_scale != 1:
            guidances.append(autoguidance(self.autoguidance_scale))
        return guidances

    def _towards_prompts(self, prompts: Sequence[Prompt]) -> list[Guidance]:
        scale, method = self.guidance_scale, self.guidance_method
        if method not in GUIDANCE_METHODS:
            raise UsageError(
                f"unknown guidance_method {method!r}: choose {', '.join(GUIDANCE_METHODS)}"
            )
        scales = np.atleast_1d(scale)
        if method == "cfg++" and not ((scales >= 0) & (scales <= 1)).all():
            outlier = scales[(scales < 0) | (scales > 1)][0]
            raise UsageError(f"cfg++ takes a guidance_scale from 0 to 1, not {outlier:g}")
        columns = list(zip(*(prompt.parts for prompt in prompts), strict=True))
        if len(columns) > 1:
            if method != "cfg":
                raise UsageError(f"AND and NOT need the guidance_method cfg, not {method}")
            weights = [
                np.asarray(scale) * np.array([part.weight for part in c], np.float32)
                for c in columns
            ]
            return [combine_prompts([None, *columns[1:]], weights)]
        # A list of scales is a guidance even if all are 1. Otherwise it would depend on the batch
        # whether a call fails.
        if np.ndim(scale) == 0 and scale == 1 and method != "cfg++":
            return []
        return [GUIDANCE_METHODS[method](scale)]

    def plan(
        self, schedule: Schedule, guidances: Sequence[Guidance], solver: Solver | None = None
    ) -> Plan:
        """Return the plan of these settings on a noise schedule.

        Args:
            solver: used in place of `sampler`.

        Raises:
            UsageError: the settings contradict each other; or see `make_plan`.
        """
        solver = solver or self.solver()
        if self.restart and self.repaint:
            raise UsageError("restart and repaint both go back to higher noise: choose one")
        if self.restart:
            low, high, repeats = self.restart
            solver = restart(solver, [(low, high, int(repeats))])
        if self.repaint:
            solver = repaint(solver, *map(int, self.repaint))
        return make_plan(schedule, self.timesteps(schedule), solver, guidances)


Off = Literal["none"]


def is_off(value: Any) -> bool:
    """Whether a value is the word that turns a setting off."""
    return isinstance(value, str) and value == NONE


class SettingsArguments(TypedDict, total=False):
    """The fields of `Settings` as keyword arguments; None leaves the value of the weights.

    "none" turns off a default of the weights, for example `guidance_interval="none"`.
    """

    steps: int | str | None
    sampler: str | None
    spacing: str | None
    eta: float | Off | None
    temperature: float | None
    restart: tuple[float, float, int] | Off | None
    guidance_scale: float | Sequence[float] | None
    guidance_method: str | None
    guidance_interval: tuple[float, float] | Off | None
    guidance_rescale: float | None
    negative_prompt: str | None
    autoguidance_scale: float | None
    clip_guidance_scale: float | None
    dynamic_threshold: float | Off | None
    strength: float | Off | None
    repaint: tuple[int, int] | Off | None
    guidance: Sequence[Guidance] | None


def setting_texts() -> dict[str, str]:
    """Return the text on each setting, from the docstring of `Settings`."""
    listed = inspect.cleandoc(Settings.__doc__ or "").partition("Attributes:\n")[2]
    _, *parts = re.split(r"^    (\w+): ", listed, flags=re.MULTILINE)
    return {
        name: " ".join(text.split()) for name, text in zip(parts[::2], parts[1::2], strict=True)
    }


F = TypeVar("F", bound=Callable[..., Any])


def lists_settings(method: F) -> F:
    """Show each setting in a method's signature, for `help()` and for completion in notebooks.

    Type checkers read the same from `**settings: Unpack[SettingsArguments]`; at run time Python
    shows only `**settings`.
    """
    signature = inspect.signature(method)
    named = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
    settings = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in get_type_hints(SettingsArguments).items()
    ]
    method.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*named, *settings]
    )
    return method


def describe(settings: Settings) -> dict[str, Any]:
    """Return settings as plain values, for an image's metadata.

    As the arguments of a call they make the same settings, for weights with any defaults; but a
    list `guidance` is only described.
    """
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    guidance = values.pop("guidance")
    values = {name: NONE if value is None else value for name, value in values.items()}
    values["guidance_scale"] = json_value(settings.guidance_scale)
    if guidance is not None:
        values = {name: value for name, value in values.items() if name not in REPLACED_BY_GUIDANCE}
        values["guidance"] = [
            {"name": member.name, "interval": [json_value(level) for level in member.interval]}
            | {name: json_value(value) for name, value in member.args.items()}
            for g in guidance
            for member in g.members()
        ]
    return values
