"""How a picture is sampled: one object for notebooks, command lines and metadata."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from inspect import signature
from typing import Any

import jax
import numpy as np

from glide_jax.diffusion.grids import make_grid
from glide_jax.diffusion.guidance import (
    NULL,
    Guidance,
    Network,
    all_of,
    apg,
    autoguidance,
    cfg_plus_plus,
    classifier_free,
    clip,
    compose,
    dynamic_threshold,
    rescale,
)
from glide_jax.diffusion.restart import repaint, restart
from glide_jax.diffusion.sampling import Plan, plan
from glide_jax.diffusion.schedule import Schedule
from glide_jax.diffusion.solvers import SOLVERS, Solver
from glide_jax.errors import UsageError, nearest
from glide_jax.prompts import Prompt

# Jump and times, for 25 steps where the paper's ten and ten are for 250. Measured on the embedded
# model: over the edge of the hole pixels change by 23 levels without, 16 with it, 15 in whole
# pictures.
REPAINT = (5, 4)
METHODS = {"cfg": classifier_free, "cfg++": cfg_plus_plus, "apg": apg}
WITH_ETA = tuple(n for n, solver in SOLVERS.items() if "eta" in signature(solver).parameters)
# What a list of guidances takes the place of.
GUIDING = ("guidance_scale", "guidance_method", "guidance_span", "guidance_rescale")
GUIDING += ("negative_prompt", "autoguidance_scale", "threshold")


@dataclass(frozen=True)
class Settings:
    """How a picture is sampled.

    With the prompt, the seed and the number of the picture, it is what makes it again.

    Attributes:
        steps: Levels of noise to visit, or a respacing of the release: 100, ddim50, fast27.
        sampler: dpm++2m, dpm++3m, dpm++2s, unipc2, unipc3, heun, deis, lms, ipndm, plms, prk, ddim;
            with noise ddpm (the paper's), ddpm-small, ddpm-large, dpm++2m-sde, sa.
        spacing: Of the levels: logsnr, uniform (the release's), rho, trailing, or optimised.
        eta: Noise at each step, from 0 to 1, of ddim, dpm++2m-sde and sa.
        temperature: Scale of the noise that a picture begins with.
        restart: Low, high, times: go back up from noise level low to high so often.
        guidance_scale: How closely to follow the prompt; 1: no guidance. From 0 to 1 for cfg++.
        guidance_method: cfg (classifier-free), cfg++, or apg, which saturates less at high scales.
        guidance_span: Low, high: guide only at noise levels sigma / alpha between them.
        guidance_rescale: Take so much of the contrast back that guidance added, from 0 to 1.
        negative_prompt: What to lead away from, rather than from the empty prompt.
        autoguidance_scale: Lead away from a worse network (the guide) by so much; 1: not at all.
        clip_scale: Guidance by a noised CLIP, beside guidance_scale; 0: none. The release takes 3,
            with guidance_scale 1 and ddpm.
        threshold: Quantile of dynamic thresholding, say 0.995; without it pixels are clipped.
        strength: How much of the image is redrawn, from 0 to 1: the share of the steps to take. An
            upsampler redraws the small picture, enlarged.
        repaint: Jump, times: to fill a hole, do every so many steps so often. Used by itself where
            the network has not learned to fill holes.
        guidance: What acts on the prediction, in Python: in the place of classifier-free guidance
            and clipping, and of all settings that shape them.
    """

    steps: int | str = 25
    sampler: str = "dpm++2m"
    spacing: str = "logsnr"
    eta: float | None = None
    temperature: float = 1.0
    restart: tuple[float, float, int] | None = None
    guidance_scale: float = 3.0
    guidance_method: str = "cfg"
    guidance_span: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    negative_prompt: str = ""
    autoguidance_scale: float = 1.0
    clip_scale: float = 0.0
    threshold: float | None = None
    strength: float | None = None
    repaint: tuple[int, int] | None = None
    guidance: tuple[Guidance, ...] | None = None

    def changed(self, **values: Any) -> "Settings":
        """These settings with some replaced; None leaves a value as it is.

        Raises:
            UsageError: there is no such setting, or one that a list of guidances replaces is given
                beside it.
        """
        names = [f.name for f in fields(self)]
        for name in values:
            if name not in names:
                raise UsageError(f"there is no setting {name!r}{nearest(name, names)}")
        values = {name: value for name, value in values.items() if value is not None}
        if "guidance" in values:
            if beside := set(GUIDING) & set(values):
                raise UsageError(f"guidance=[...] takes the place of {min(beside)}: give one")
            # What weights bring along does not act unseen beside a list of one's own.
            values = {"clip_scale": 0.0} | values
        return replace(self, **values)

    def solver(self) -> Solver:
        """The solver that `sampler` names.

        Raises:
            UsageError: there is none of that name, or it has no eta.
        """
        if self.sampler not in SOLVERS:
            raise UsageError(
                f"unknown sampler {self.sampler!r}{nearest(self.sampler, SOLVERS)}: "
                f"choose one of {', '.join(SOLVERS)}"
            )
        solver = SOLVERS[self.sampler]
        if self.eta is None:
            return solver
        if self.sampler not in WITH_ETA:
            raise UsageError(f"eta belongs to {', '.join(WITH_ETA)}, not to {self.sampler}")
        if not 0 <= self.eta <= 1:
            raise UsageError(f"eta lies between 0 and 1, not at {self.eta}")
        return partial(solver, eta=self.eta)

    def grid(self, schedule: Schedule) -> np.ndarray:
        """The levels to visit: the last of them, as many as `strength` leaves.

        Raises:
            UsageError: see `make_grid`; or the strength is none.
        """
        grid = make_grid(schedule, self.steps, self.spacing, solver=self.solver())
        if self.strength is None:
            return grid
        if not 0 < self.strength <= 1:
            raise UsageError(f"strength lies above 0 and up to 1, not at {self.strength}")
        return grid[-max(1, round(self.strength * len(grid))) :]

    def resampled(self, schedule: Schedule) -> "Settings":
        """With `repaint` of at most all steps, unless it or `restart` is set."""
        jump = min(REPAINT[0], len(self.grid(schedule)) - 1)
        if not jump or self.repaint or self.restart:
            return self
        return replace(self, repaint=(jump, REPAINT[1]))

    def guidances(self, prompts: Sequence[Prompt], *maps: Guidance) -> tuple[Guidance, ...]:
        """What acts on the prediction, innermost first.

        Args:
            prompts: one a picture, all of as many parts.
            maps: of x_0, to act before it is clipped (known pixels).

        Raises:
            UsageError: the settings contradict each other, or a number is out of its range.
        """
        if self.guidance is not None:
            if len(prompts[0].parts) > 1:
                raise UsageError("AND and NOT are guidance: with guidance=[...], give all_of there")
            return (*self.guidance, *maps)
        pushes = self._pushes(prompts)
        if self.guidance_rescale:
            pushes.append(rescale(amount=self.guidance_rescale))
        if self.guidance_span is not None:
            pushes = [compose(*pushes).within(*self.guidance_span)]
        if self.threshold is not None:
            return (*pushes, dynamic_threshold(quantile=self.threshold), *maps)
        return (*pushes, *maps, clip())

    def _pushes(self, prompts: Sequence[Prompt]) -> list[Guidance]:
        """Guidance that is linear in the branches."""
        scale, method = self.guidance_scale, self.guidance_method
        if method not in METHODS:
            raise UsageError(f"unknown guidance_method {method!r}: choose {', '.join(METHODS)}")
        if method == "cfg++" and not 0 <= scale <= 1:
            raise UsageError(f"cfg++ takes a guidance_scale from 0 to 1, not {scale:g}")
        columns = list(zip(*(prompt.parts for prompt in prompts), strict=True))
        if len(columns) > 1:
            if method != "cfg":
                raise UsageError(f"AND and NOT need the guidance_method cfg, not {method}")
            weights = [scale * np.array([part.weight for part in c], np.float32) for c in columns]
            pushes = [all_of(prompts=[None, *columns[1:]], weights=weights)]
        elif scale == 1 and method != "cfg++":
            pushes = []
        else:
            pushes = [METHODS[method](scale=scale)]
        if self.negative_prompt:
            if not pushes:
                raise UsageError("a negative_prompt needs a guidance_scale other than 1")
            # In the place of the empty prompt, whatever the method.
            negative = NULL._replace(prompt=self.negative_prompt)
            needs = tuple(negative if branch == NULL else branch for branch in pushes[0].needs)
            pushes = [replace(pushes[0], needs=needs)]
        if self.autoguidance_scale != 1:
            pushes.append(autoguidance(scale=self.autoguidance_scale))
        return pushes

    def plan(
        self, schedule: Schedule, guidances: Sequence[Guidance], solver: Solver | None = None
    ) -> Plan:
        """The plan of these settings on a noise schedule.

        Args:
            solver: in the place of `sampler`.
        """
        solver = solver or self.solver()
        if self.restart and self.repaint:
            raise UsageError("restart and repaint both go back: choose one")
        if self.restart:
            solver = restart(solver, [self.restart])
        if self.repaint:
            solver = repaint(solver, *self.repaint)
        return plan(schedule, self.grid(schedule), solver, guidances)


def describe(settings: Settings) -> dict[str, Any]:
    """Settings as plain values, for a picture's metadata."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    guidance = values.pop("guidance")
    if guidance is not None:
        values = {name: value for name, value in values.items() if name not in GUIDING}
        values["guidance"] = [
            {"name": part.name, "span": [_plain(level) for level in part.span]}
            | {name: _plain(value) for name, value in part.args.items()}
            for g in guidance
            for part in g.parts()
        ]
    return values


def _plain(value: Any) -> Any:
    """Numbers as JSON has them; of anything larger, what it is."""

    def plain(leaf: Any) -> Any:
        if isinstance(leaf, Network):
            return str(leaf.fn)
        if not np.issubdtype(np.result_type(leaf), np.number) or np.ndim(leaf) > 1:
            return f"{type(leaf).__name__} {np.shape(leaf)}"
        # JSON has no infinity.
        return np.asarray(leaf, float).tolist() if np.isfinite(leaf).all() else str(leaf)

    return jax.tree.map(plain, value, is_leaf=lambda leaf: isinstance(leaf, Network))
