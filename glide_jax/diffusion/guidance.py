"""Guidance: functions from a noise prediction to a noise prediction.

A guidance is a pure function `Predict -> Predict` with a small host-side record around it
that says which branches the network must evaluate, which numbers it takes, and at which noise
levels it acts. Applied left to right, innermost first: linear guidance, then maps of `x_0`
(clipping, known pixels), then scores.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce, update_wrapper
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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
        """`x_0 = (x_t - sigma eps) / alpha`  (DDPM, eq. 15)."""
        return self._replace(eps=eps, x_0=(x - point.sigma * eps) / point.alpha)

    def with_x_0(self, x_0: jax.Array, x: jax.Array, point: Point) -> "Prediction":
        """`eps = (x_t - alpha x_0) / sigma`."""
        return self._replace(x_0=x_0, eps=(x - point.alpha * x_0) / point.sigma)


Predict = Callable[[jax.Array, Point], Prediction]


class Branch(NamedTuple):
    """One evaluation of a network.

    Attributes:
        name: under which its eps and its conditioning are found.
        network: which network evaluates it.
        prompt: its caption; None: whatever the caller gives under that name.
    """

    name: str
    network: str = "main"
    prompt: str | None = None


CONDITIONAL = Branch("cond")


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
    meta_fields=["fn", "needs", "remembers", "span"],
)
@dataclass(frozen=True)
class Guidance:
    """A function `(predict, x, point, **args) -> Prediction`, and what it asks for.

    Attributes:
        fn: the function.
        args: its numbers, scalars or one value an image; traced, so that a change costs nothing.
        needs: branches beside "cond" that it reads.
        remembers: names of images that it carries from step to step.
        span: `(low, high)`; it acts where `low < sigma / alpha <= high`.
    """

    fn: Callable[..., Prediction]
    args: dict[str, Any] = field(default_factory=dict)
    needs: tuple[Branch, ...] = ()
    remembers: tuple[str, ...] = ()
    span: tuple[float, float] | None = (0.0, float("inf"))

    def within(self, low: float, high: float) -> "Guidance":
        """The same guidance, acting only where `low < sigma / alpha <= high`."""
        if not 0 <= low < high:
            raise UsageError(f"a span needs 0 <= low < high, not ({low}, {high})")
        return replace(self, span=(float(low), float(high)))

    def acts_at(self, level: float) -> bool:
        """Whether it acts at this noise level `sigma / alpha`."""
        low, high = self.span
        return low < level <= high

    def __call__(self, predict: Predict) -> Predict:
        return partial(self.fn, predict, **self.args)


def guidance(
    *needs: Branch, remembers: tuple[str, ...] = ()
) -> Callable[[Callable[..., Prediction]], Callable[..., Guidance]]:
    """Makes of `fn(predict, x, point, *, numbers)` a constructor `fn(numbers) -> Guidance`."""

    def decorate(fn: Callable[..., Prediction]) -> Callable[..., Guidance]:
        signature = inspect.signature(fn)
        numbers = [p for p in signature.parameters.values() if p.kind == p.KEYWORD_ONLY]

        def construct(**given: Any) -> Guidance:
            names = [p.name for p in numbers]
            if unknown := sorted(set(given) - set(names)):
                raise UsageError(f"{fn.__name__} takes {', '.join(names)}, not {unknown[0]}")
            args = {p.name: p.default for p in numbers if p.default is not p.empty} | given
            if missing := [name for name in names if name not in args]:
                raise UsageError(f"{fn.__name__} needs a value for {missing[0]}")
            return Guidance(fn, args, needs, remembers)

        update_wrapper(construct, fn)
        construct.__signature__ = signature.replace(parameters=numbers, return_annotation=Guidance)
        return construct

    return decorate


def per_image(value: jax.Array | float) -> jax.Array:
    """A scalar as it is, `(B,)` as `(B, 1, 1, 1)`: one value an image."""
    value = jnp.asarray(value)
    return value if value.ndim == 0 else value[:, None, None, None]


@guidance(Branch("null", prompt=""))
def classifier_free(predict: Predict, x: jax.Array, point: Point, *, scale) -> Prediction:
    """`eps(null) + s (eps(c) - eps(null))`  (2207.12598; GLIDE, sec. 2.3); 1 is no guidance."""
    p = predict(x, point)
    push = p.branches["cond"] - p.branches["null"]
    # Written on top of eps, so that guidance adds up, and scale 1 changes no bit.
    return p.with_eps(p.eps + (per_image(scale) - 1) * push, x, point)


@guidance()
def clip(predict: Predict, x: jax.Array, point: Point, *, low=-1.0, high=1.0) -> Prediction:
    """`x_0` clipped to the range of pictures  (DDPM's and GLIDE's `clip_denoised`)."""
    p = predict(x, point)
    return p.with_x_0(jnp.clip(p.x_0, per_image(low), per_image(high)), x, point)


@guidance()
def known_pixels(predict: Predict, x: jax.Array, point: Point, *, image, mask) -> Prediction:
    """`x_0 (1 - m) + image m`: where the mask is 1 the picture is known  (GLIDE, sec. 4.3).

    Args:
        image: `(B, H, W, 3)` in [-1, 1]; mask: `(B, H, W, 1)`.
    """
    p = predict(x, point)
    return p.with_x_0(p.x_0 * (1 - mask) + image * mask, x, point)


@guidance()
def gradient(
    predict: Predict, x: jax.Array, point: Point, *, log_prob: Network, cond, scale
) -> Prediction:
    """`score + s grad log p(y | x_t)`  (ADM, 2105.05233, sec. 4); after all that maps `x_0`.

    Args:
        log_prob: a network whose output is `(B,)`, the log-probability up to a constant; for
            noised CLIP `100 f(x_t, t) . g(c)`  (GLIDE, sec. 2.4).
        cond: its conditioning, arrays batch first.
    """
    p = predict(x, point)
    t = jnp.full((x.shape[0],), point.t)
    slope = jax.grad(lambda x: log_prob(x, t, cond).sum())(x)
    return p._replace(score=p.score + per_image(scale) * slope)


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


def branches_of(guidances: Sequence[Guidance]) -> list[Branch]:
    """ "cond" and all that the guidances need, each once.

    Raises:
        UsageError: two guidances mean different things by one name.
    """
    found = {CONDITIONAL.name: CONDITIONAL}
    for branch in (b for g in guidances for b in g.needs):
        if found.setdefault(branch.name, branch) != branch:
            raise UsageError(f"two different branches are both called {branch.name!r}")
    return list(found.values())


def noise_predictor(
    networks: Mapping[str, Network], conds: Mapping[str, Any], active: Sequence[Guidance]
) -> Predict:
    """The innermost `Predict`: all branches that `active` needs, one forward pass a network.

    Args:
        networks: by name.
        conds: conditioning of each branch by its name, arrays batch first.
    """
    branches = branches_of(active)

    def predict(x: jax.Array, point: Point) -> Prediction:
        batch, channels = x.shape[0], x.shape[-1]
        outputs = {}
        for name in dict.fromkeys(b.network for b in branches):
            mine = [b for b in branches if b.network == name]
            output = networks[name](
                interleave([x] * len(mine)),
                jnp.full((batch * len(mine),), point.t),
                interleave([conds[b.name] for b in mine]),
            )
            output = output.reshape(batch, len(mine), *output.shape[1:])
            outputs |= {b.name: output[:, i] for i, b in enumerate(mine)}
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
        v = outputs["cond"][..., channels:]
        frac = (v + 1) / 2 if v.shape[-1] else jnp.zeros_like(x)
        p = Prediction(x, x, frac, jnp.zeros_like(x), eps, point.memory)
        return p.with_eps(eps["cond"], x, point)

    return predict


def compose(predict: Predict, active: Sequence[Guidance]) -> Predict:
    """`active[-1](... active[0](predict))`."""
    return reduce(lambda inner, g: g(inner), active, predict)
