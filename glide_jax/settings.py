"""How a picture is sampled: one object for notebooks, command lines and metadata."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from glide_jax.diffusion.grids import make_grid
from glide_jax.diffusion.guidance import Guidance, classifier_free, clip
from glide_jax.diffusion.sampling import Plan, plan
from glide_jax.diffusion.schedule import Schedule
from glide_jax.diffusion.solvers import SOLVERS, Solver
from glide_jax.errors import UsageError, nearest


@dataclass(frozen=True)
class Settings:
    """How a picture is sampled; with the prompt, the seed and its number, what makes it again.

    Attributes:
        steps: network evaluations, or a respacing string of the release ("100", "ddim50",
            "fast27", "10,10,3,2,2").
        sampler: "dpm++2m" (few steps), "ddim", or "ddpm" (the paper's ancestral sampling).
        guidance_scale: of classifier-free guidance; 1 is none, 3 the paper's choice.
        clip_scale: of CLIP guidance, where the pipeline has a noised CLIP; 0 is none, 3 what the
            release shows with guidance_scale 1 and sampler "ddpm".
        spacing: "logsnr" (even in log signal-to-noise) or "uniform" (even in time).
        eta: noise of "ddim", from 0 (deterministic) to 1 (as much as "ddpm").
        temperature: scale of the noise that a picture begins with; the release upsamples at 0.997.
        guidance: what acts on the prediction, instead of classifier-free guidance at
            `guidance_scale` and clipping of the picture to its range.
    """

    steps: int | str = 25
    sampler: str = "dpm++2m"
    guidance_scale: float = 3.0
    clip_scale: float = 0.0
    spacing: str = "logsnr"
    eta: float = 0.0
    temperature: float = 1.0
    guidance: tuple[Guidance, ...] | None = None

    def changed(self, **values: Any) -> "Settings":
        """These settings with some replaced; None leaves a value as it is.

        Raises:
            UsageError: there is no such setting.
        """
        names = [f.name for f in fields(self)]
        for name in values:
            if name not in names:
                raise UsageError(f"there is no setting {name!r}{nearest(name, names)}")
        return replace(self, **{k: v for k, v in values.items() if v is not None})

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
        if self.eta and self.sampler != "ddim":
            raise UsageError(f"eta belongs to the sampler ddim, not to {self.sampler}")
        solver = SOLVERS[self.sampler]
        return partial(solver, eta=self.eta) if self.sampler == "ddim" else solver

    def guidances(self, *maps: Guidance) -> tuple[Guidance, ...]:
        """What acts on the prediction, innermost first.

        Args:
            maps: of x_0, to act before it is clipped (known pixels).
        """
        if self.guidance is not None:
            return (*self.guidance, *maps)
        free = () if self.guidance_scale == 1 else (classifier_free(scale=self.guidance_scale),)
        return (*free, *maps, clip())

    def plan(self, schedule: Schedule, guidances: Sequence[Guidance]) -> Plan:
        """The plan of these settings on a noise schedule."""
        grid = make_grid(schedule, self.steps, self.spacing)
        return plan(schedule, grid, self.solver(), guidances)


def describe(settings: Settings) -> dict[str, Any]:
    """Settings as plain values, for a picture's metadata."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    guidance = values.pop("guidance")
    if guidance is not None:
        values["guidance"] = [
            {"name": g.fn.__name__, "span": g.span} | {k: str(v) for k, v in g.args.items()}
            for g in guidance
        ]
    return values
