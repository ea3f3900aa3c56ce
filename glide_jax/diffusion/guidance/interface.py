"""The record `Guidance`: a function from one prediction to another, and what it needs.

`@guidance` turns a function into a constructor of `Guidance`; `compose` joins several.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce, update_wrapper
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.diffusion.guidance.predictor import (
    CAPTION,
    NULL,
    Branch,
    Number,
    Point,
    Predict,
    Prediction,
)
from glide_jax.errors import UsageError, check_finite


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["args"],
    meta_fields=["fn", "needs", "remembers", "looks_ahead", "interval"],
)
@dataclass(frozen=True, eq=False)
class Guidance:
    """A function `(predict, x, point, **args) -> Prediction`, and what it needs.

    Attributes:
        fn: the function, hashable and defined at module level. A lambda or a closure is a new
            function each time, so the sampler compiles again.
        args: parameters of the function, scalars or one value per image; traced, so a change
            compiles nothing.
        needs: branches that the function reads besides "caption".
        remembers: names of the images that the function carries from step to step.
        looks_ahead: whether the function reads `point.next_*`, which needs a sampler with one
            network evaluation per step, each towards less noise.
        interval: `(low, high)`; the guidance acts where `low < sigma / alpha <= high`.
    """

    fn: Callable[..., Prediction]
    args: dict[str, Any] = field(default_factory=dict)
    needs: tuple[Branch, ...] = ()
    remembers: tuple[str, ...] = ()
    looks_ahead: bool = False
    interval: tuple[float, float] = (0.0, float("inf"))

    @property
    def name(self) -> str:
        """The name used in messages."""
        return self.fn.__name__.strip("_")

    def within(self, low: float, high: float) -> "Guidance":
        """Restrict the guidance to noise levels `low < sigma / alpha <= high`  (2404.07724).

        A previous interval still applies: the result is the intersection.

        Raises:
            UsageError: not `0 <= low < high`; or the guidance or a member of it would act nowhere.
        """
        if not 0 <= low < high:
            raise UsageError(f"an interval needs 0 <= low < high, not ({low}, {high})")
        interval = max(float(low), self.interval[0]), min(float(high), self.interval[1])
        result = replace(self, interval=interval)
        for member in result.members():
            if not member.interval[0] < member.interval[1]:
                raise UsageError(
                    f"{member.name} would act nowhere within ({low}, {high}): "
                    "an earlier interval has no level in common with it"
                )
        return result

    def with_negative_prompt(self, prompt: str) -> "Guidance":
        """Guide away from this prompt in place of the empty one: a negative prompt.

        Needs no extra prediction: branch "null" is predicted for this caption.

        Raises:
            UsageError: this guidance does not use the empty prompt.
        """
        if NULL not in self.needs:
            raise UsageError(f"{self.name} has no empty prompt that {prompt!r} could replace")
        negative = NULL._replace(prompt=prompt)
        needs = tuple(negative if branch == NULL else branch for branch in self.needs)
        args = self.args
        if self.fn is _compose:
            members = (
                g.with_negative_prompt(prompt) if NULL in g.needs else g for g in args["members"]
            )
            args = {"members": tuple(members)}
        return replace(self, args=args, needs=needs)

    def acts_at(self, noise_level: float) -> bool:
        """Whether the guidance acts at this noise level `sigma / alpha`."""
        low, high = self.interval
        return low < noise_level <= high

    def members(self) -> tuple["Guidance", ...]:
        """Return the members, each within its own interval and the outer one; or this guidance."""
        if self.fn is not _compose:
            return (self,)
        low, high = self.interval
        members = [inner for member in self.args["members"] for inner in member.members()]
        return tuple(
            replace(member, interval=(max(low, member.interval[0]), min(high, member.interval[1])))
            for member in members
        )

    def __call__(self, predict: Predict) -> Predict:
        """Return the guided `Predict`; the interval is ignored."""
        return partial(self.fn, predict, **self.args)


def guidance(
    *needs: Branch,
    remembers: tuple[str, ...] = (),
    looks_ahead: bool = False,
    **ranges: tuple[float, float | str],
) -> Callable[[Callable[..., Prediction]], Callable[..., Guidance]]:
    """Turn `fn(predict, x, point, *, parameters)` into a constructor `fn(parameters) -> Guidance`.

    The constructor takes the parameters by position or by name.

    Args:
        needs, remembers, looks_ahead: see `Guidance`.
        ranges: for a parameter of this name, its smallest and its largest value; the largest may
            be the name of another parameter. A parameter whose default is None may be None.
    """

    def decorate(fn: Callable[..., Prediction]) -> Callable[..., Guidance]:
        signature = inspect.signature(fn)
        parameters = [
            p.replace(kind=p.POSITIONAL_OR_KEYWORD)
            for p in signature.parameters.values()
            if p.kind == p.KEYWORD_ONLY
        ]
        names = [p.name for p in parameters]
        if unknown := sorted(set(ranges) - set(names)):
            raise UsageError(f"{fn.__name__} has no parameter {unknown[0]} for a range")

        def construct(*values: Any, **named: Any) -> Guidance:
            made = Guidance(
                fn,
                {p.name: p.default for p in parameters if p.default is not p.empty}
                | dict(zip(names, values, strict=False))
                | named,
                needs,
                remembers,
                looks_ahead,
            )
            takes = f"{made.name} takes {', '.join(names) or 'no parameters'}"
            if len(values) > len(names):
                raise UsageError(f"too many values: {takes}")
            if unknown := sorted(set(named) - set(names)):
                raise UsageError(f"{takes}, not {unknown[0]}")
            if twice := sorted(set(names[: len(values)]) & set(named)):
                raise UsageError(f"{made.name} got {twice[0]} twice: by position and by name")
            if missing := [name for name in names if name not in made.args]:
                raise UsageError(f"{made.name} needs a value for {missing[0]}")
            endless = [name for name, bounds in ranges.items() if float("inf") in bounds]
            check_finite(
                {f"{name} of {made.name}": value for name, value in made.args.items()},
                unbounded=[f"{name} of {made.name}" for name in endless],
            )
            optional = [p.name for p in parameters if p.default is None]
            _check_ranges(made, ranges, optional)
            return made

        update_wrapper(construct, fn)
        construct.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=parameters, return_annotation=Guidance
        )
        return construct

    return decorate


def _check_ranges(
    made: Guidance, ranges: Mapping[str, tuple[float, float | str]], optional: Sequence[str]
) -> None:
    """Check parameters against their ranges; those that are traced have no values yet and pass."""
    for parameter, (low, high) in ranges.items():
        value = made.args[parameter]
        if value is None and parameter in optional:
            continue
        try:
            numbers = _numbers(made, parameter)
            bound = _numbers(made, high) if isinstance(high, str) else high
        except jax.errors.TracerArrayConversionError:
            continue
        if not ((low <= numbers) & (numbers <= bound)).all():
            least = "" if low == -float("inf") else f"{low} <= "
            raise UsageError(f"{made.name} needs {least}{parameter} <= {high}, not {value}")


def _numbers(made: Guidance, parameter: str) -> np.ndarray:
    """Return a parameter as an array; text and None, which numpy would compare, are refused."""
    value = made.args[parameter]
    try:
        numbers = np.asarray(value)
        if numbers.dtype.kind in "OSU":
            raise ValueError
    except ValueError:
        raise UsageError(
            f"{parameter} of {made.name} is a number, or one per image, not {value!r}"
        ) from None
    return numbers


def branches_of(guidances: Sequence[Guidance]) -> list[Branch]:
    """Return "caption" and every branch that the guidances need, each once.

    Raises:
        UsageError: two guidances use one name for different branches.
    """
    branches = {CAPTION.name: CAPTION}
    for branch in (b for g in guidances for b in g.needs):
        if branches.setdefault(branch.name, branch) != branch:
            raise UsageError(
                f"two different branches are both called {branch.name!r}: keep one, or rename one"
            )
    return list(branches.values())


def apply_guidances(predict: Predict, guidances: Sequence[Guidance]) -> Predict:
    """Return `guidances[-1](... guidances[0](predict))`; intervals are ignored."""
    return reduce(lambda inner, g: g(inner), guidances, predict)


def _compose(
    predict: Predict, x: jax.Array, point: Point, *, members: Sequence[Guidance]
) -> Prediction:
    return apply_guidances(predict, members)(x, point)


def compose(*guidances: Guidance) -> Guidance:
    """Join guidances into one: `g_n(... g_1(predict))`, the first innermost.

    Each guidance keeps its interval; `compose(...).within(low, high)` narrows all of them.

    Raises:
        UsageError: two guidances use one name for different branches.
    """
    needs = tuple(b for b in branches_of(guidances) if b != CAPTION)
    remembers = tuple(name for g in guidances for name in g.remembers)
    looks_ahead = any(g.looks_ahead for g in guidances)
    return Guidance(_compose, {"members": guidances}, needs, remembers, looks_ahead)


def per_image(value: Number) -> jax.Array:
    """Return a scalar as it is, and `(B,)`, one value per image, as `(B, 1, 1, 1)`."""
    value = jnp.asarray(value)
    return value if value.ndim == 0 else value[:, None, None, None]
