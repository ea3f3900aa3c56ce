"""The frame that guidance acts in: what is known of a noised image, what is asked of the networks,
and the record around a function from one prediction to another."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce, update_wrapper
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.diffusion.schedule import to_eps
from glide_jax.errors import UsageError


class Point(NamedTuple):
    """Where one step stands; scalars float32, traced.

    Attributes:
        t: timestep of the original chain, which may be fractional.
        alpha, sigma: `x_t = alpha x_0 + sigma eps`.
        next_alpha, next_sigma: of the level that the step goes to.
        memory: what stateful guidance remembers from the last step, by name.
    """

    t: jax.Array
    alpha: jax.Array
    sigma: jax.Array
    next_alpha: jax.Array
    next_sigma: jax.Array
    memory: dict[str, jax.Array]

    def to_x_0(self, eps: jax.Array, x: jax.Array) -> jax.Array:
        """`x_0 = (x_t - sigma eps) / alpha`  (DDPM, eq. 15)."""
        return (x - self.sigma * eps) / self.alpha


class Prediction(NamedTuple):
    """What is known about a noised image; every array `(B, H, W, C)` float32.

    Attributes:
        eps, x_0: noise and clean image, always in agreement.
        frac: learned variance as a fraction, on a log scale, between `beta_tilde` and `beta`; of
            branch "cond".
        score: gradient of a log-probability that gradient guidance adds; else zero.
        branches: eps of each branch that was evaluated, by name.
        memory: see `Point`.
    """

    eps: jax.Array
    x_0: jax.Array
    frac: jax.Array
    score: jax.Array
    branches: dict[str, jax.Array]
    memory: dict[str, jax.Array]

    def with_eps(self, eps: jax.Array, x: jax.Array, point: Point) -> "Prediction":
        """Another noise, and the clean image that follows: see `Point.to_x_0`."""
        return self._replace(eps=eps, x_0=point.to_x_0(eps, x))

    def with_x_0(self, x_0: jax.Array, x: jax.Array, point: Point) -> "Prediction":
        """`eps = (x_t - alpha x_0) / sigma`."""
        return self._replace(x_0=x_0, eps=(x - point.alpha * x_0) / point.sigma)


# A number that a guidance takes: a scalar, or one value an image.
Number = float | Sequence[float] | np.ndarray | jax.Array

Predict = Callable[[jax.Array, Point], Prediction]


class Branch(NamedTuple):
    """One evaluation of a network.

    Attributes:
        name: under which its eps and its conditioning are found; guidances that name the same
            branch share its evaluation.
        network: which network evaluates it.
        prompt: its caption; None: whatever the caller gives under that name, which for the
            pipeline is the caption of the picture.
    """

    name: str
    network: str = "main"
    prompt: str | None = None


CONDITIONAL = Branch("cond")
NULL = Branch("null", prompt="")


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["fn", "prediction"])
@dataclass(frozen=True)
class Network:
    """A network with its weights: an argument of the sampler, never closed over.

    Attributes:
        fn: `(params, x, t, cond) -> (B, H, W, C or 2C)`, noise and (learned variance) its output in
            [-1, 1]; hashable, since it is part of the compiled program's identity.
        params: its weights.
        prediction: what its first half is, "eps" or "v".
    """

    fn: Callable[[Any, jax.Array, jax.Array, Any], jax.Array]
    params: Any
    prediction: str = "eps"

    def __call__(self, x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        return self.fn(self.params, x, t, cond)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["args"],
    meta_fields=["fn", "needs", "remembers", "looks_ahead", "span"],
)
@dataclass(frozen=True)
class Guidance:
    """A function `(predict, x, point, **args) -> Prediction`, and what it asks for.

    Attributes:
        fn: the function.
        args: its numbers, scalars or one value an image; traced, so that a change costs nothing.
        needs: branches beside "cond" that it reads.
        remembers: names of images that it carries from step to step.
        looks_ahead: whether it reads `point.next_*`, which takes a sampler of one evaluation a
            step, each towards a cleaner level.
        span: `(low, high)`; it acts where `low < sigma / alpha <= high`.
    """

    fn: Callable[..., Prediction]
    args: dict[str, Any] = field(default_factory=dict)
    needs: tuple[Branch, ...] = ()
    remembers: tuple[str, ...] = ()
    looks_ahead: bool = False
    span: tuple[float, float] | None = (0.0, float("inf"))

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.fn.__name__.strip("_")

    def within(self, low: float, high: float) -> "Guidance":
        """The same guidance, acting only where `low < sigma / alpha <= high`  (2404.07724)."""
        if not 0 <= low < high:
            raise UsageError(f"a span needs 0 <= low < high, not ({low}, {high})")
        return replace(self, span=(float(low), float(high)))

    def acts_at(self, level: float) -> bool:
        """Whether it acts at this noise level `sigma / alpha`."""
        low, high = self.span
        return low < level <= high

    def parts(self) -> tuple["Guidance", ...]:
        """What it is composed of, each in its own span and this one's; itself, if of nothing."""
        if self.fn is not _compose:
            return (self,)
        low, high = self.span
        parts = [part for member in self.args["members"] for part in member.parts()]
        return tuple(
            replace(part, span=(max(low, part.span[0]), min(high, part.span[1]))) for part in parts
        )

    def __call__(self, predict: Predict) -> Predict:
        return partial(self.fn, predict, **self.args)


def guidance(
    *needs: Branch,
    remembers: tuple[str, ...] = (),
    looks_ahead: bool = False,
    **ranges: tuple[float, float],
) -> Callable[[Callable[..., Prediction]], Callable[..., Guidance]]:
    """Makes of `fn(predict, x, point, *, numbers)` a constructor `fn(numbers) -> Guidance`.

    Args:
        needs, remembers, looks_ahead: see `Guidance`.
        ranges: `(low, high)` that a number must lie in, by its name.
    """

    def decorate(fn: Callable[..., Prediction]) -> Callable[..., Guidance]:
        signature = inspect.signature(fn)
        numbers = [p for p in signature.parameters.values() if p.kind == p.KEYWORD_ONLY]

        def construct(**given: Any) -> Guidance:
            names = [p.name for p in numbers]
            made = Guidance(
                fn,
                {p.name: p.default for p in numbers if p.default is not p.empty} | given,
                needs,
                remembers,
                looks_ahead,
            )
            if unknown := sorted(set(given) - set(names)):
                raise UsageError(f"{made.name} takes {', '.join(names)}, not {unknown[0]}")
            if missing := [name for name in names if name not in made.args]:
                raise UsageError(f"{made.name} needs a value for {missing[0]}")
            for name, (low, high) in ranges.items():
                value = np.asarray(made.args[name])
                if not ((low <= value) & (value <= high)).all():
                    raise UsageError(f"{made.name} needs {low} <= {name} <= {high}, not {value}")
            return made

        update_wrapper(construct, fn)
        construct.__signature__ = signature.replace(parameters=numbers, return_annotation=Guidance)
        return construct

    return decorate


def branches_of(guidances: Sequence[Guidance]) -> list[Branch]:
    """ "cond" and all that the guidances need, each once.

    Raises:
        UsageError: two guidances mean different things by one name.
    """
    found = {CONDITIONAL.name: CONDITIONAL}
    for branch in (b for g in guidances for b in g.needs):
        if found.setdefault(branch.name, branch) != branch:
            raise UsageError(
                f"two different branches are both called {branch.name!r}: keep one, or rename one"
            )
    return list(found.values())


def apply(predict: Predict, guidances: Sequence[Guidance]) -> Predict:
    """`guidances[-1](... guidances[0](predict))`, whatever their spans."""
    return reduce(lambda inner, g: g(inner), guidances, predict)


def _compose(
    predict: Predict, x: jax.Array, point: Point, *, members: Sequence[Guidance]
) -> Prediction:
    return apply(predict, members)(x, point)


def compose(*guidances: Guidance) -> Guidance:
    """One guidance of several: `g_n(... g_1(predict))`, the first innermost.

    Each keeps its span; `compose(...).within(low, high)` narrows all of them.

    Raises:
        UsageError: two of them mean different things by one name.
    """
    needs = tuple(b for b in branches_of(guidances) if b != CONDITIONAL)
    remembers = tuple(name for g in guidances for name in g.remembers)
    looks_ahead = any(g.looks_ahead for g in guidances)
    return Guidance(_compose, {"members": guidances}, needs, remembers, looks_ahead)


def per_image(value: Number) -> jax.Array:
    """A scalar as it is, `(B,)` as `(B, 1, 1, 1)`: one value an image."""
    value = jnp.asarray(value)
    return value if value.ndim == 0 else value[:, None, None, None]


def interleave(trees: Sequence[Any]) -> Any:
    """K trees of `(B, ...)` as one of `(B * K, ...)`, image by image.

    Concatenating branch by branch would move a batch that is sharded over devices;
    this moves nothing.
    """
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(
        lambda *leaves: jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:]), *trees
    )


def noise_predictor(
    networks: Mapping[str, Network], conds: Mapping[str, Any], branches: Sequence[Branch]
) -> Predict:
    """The innermost `Predict`: one batched forward pass a network, of all its branches.

    Args:
        networks: by name.
        conds: conditioning of each branch by its name, arrays batch first.
        branches: what to evaluate, "cond" among it.

    Raises:
        UsageError: a branch lacks its network or its conditioning.
    """
    for branch in branches:
        if branch.network not in networks:
            raise UsageError(f"branch {branch.name!r} needs a network {branch.network!r}: give one")
        if branch.name not in conds:
            raise UsageError(f"branch {branch.name!r} has no conditioning: give some in conds")

    def predict(x: jax.Array, point: Point) -> Prediction:
        batch, channels = x.shape[0], x.shape[-1]
        outputs = {}
        for name in dict.fromkeys(b.network for b in branches):
            mine = [b.name for b in branches if b.network == name]
            output = networks[name](
                interleave([x] * len(mine)),
                jnp.full((batch * len(mine),), point.t),
                interleave([conds[branch] for branch in mine]),
            )
            output = output.reshape(batch, len(mine), *output.shape[1:])
            outputs |= {branch: output[:, i] for i, branch in enumerate(mine)}
        eps = {
            b.name: to_eps(
                networks[b.network].prediction,
                outputs[b.name][..., :channels],
                x,
                point.alpha,
                point.sigma,
            )
            for b in branches
        }
        v = outputs[CONDITIONAL.name][..., channels:]
        frac = (v + 1) / 2 if v.shape[-1] else jnp.zeros_like(x)
        p = Prediction(x, x, frac, jnp.zeros_like(x), eps, point.memory)
        return p.with_eps(eps[CONDITIONAL.name], x, point)

    return predict
