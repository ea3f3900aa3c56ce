"""The sampling loop: one row, one `lax.scan`, and two drivers over it.

`make_plan` turns a schedule, timesteps, a solver and guidances into a `Plan` on the host;
`run_plan` runs it in one compiled call, `stream_plan` a few rows at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from glide_jax.diffusion.guidance.interface import Guidance, apply_guidances, branches_of
from glide_jax.diffusion.guidance.predictor import (
    CAPTION,
    Network,
    Point,
    Predict,
    is_network,
    noise_predictor,
)
from glide_jax.diffusion.noise import check_noise, is_keys, noise_at
from glide_jax.diffusion.schedule import Schedule
from glide_jax.diffusion.solvers.table import HISTORY, Solver, Table, levels
from glide_jax.errors import UsageError

# The interval of all noise levels.
ALWAYS = (0.0, float("inf"))
NO_VARIANCE = (
    "sampler ddpm needs a network with learned variance, and this one predicts none: "
    "choose ddpm-small or ddpm-large"
)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["table", "guidances"],
    meta_fields=["guidance_sets"],
)
@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that a sampling run needs besides networks, conditioning and noise.

    Attributes:
        table: one row per network evaluation, float32. It stays on the host, so that selecting a
            row needs no operation on the device.
        guidances: the guidances without their intervals, which the table holds, and without their
            prompts, so that another prompt compiles nothing.
        guidance_sets: the sets of guidances that act together, as indices into `guidances`;
            `table.guidance_set` selects one for each row.
    """

    table: Table
    guidances: tuple[Guidance, ...]
    guidance_sets: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        """The number of rows, that is of network evaluations."""
        return len(self.table.t)

    @property
    def needs_learned_variance(self) -> bool:
        """Whether a row adds noise of the variance that the network predicts."""
        return bool(self.table.s_learned.any())


class State(NamedTuple):
    """What a run carries from row to row; images are `(B, H, W, C)` float32.

    Attributes:
        x: the noised image; after the last row, the generated image.
        y: the anchor: x at the start of the step, for solvers that correct it or start from it
            again.
        history: `(4, B, H, W, C)`, earlier predictions, newest first.
        memory: what stateful guidance remembers, by name.
        x_0: the latest estimate of the clean image.
    """

    x: jax.Array
    y: jax.Array
    history: jax.Array
    memory: dict[str, jax.Array]
    x_0: jax.Array


def make_plan(
    schedule: Schedule, timesteps: np.ndarray, solver: Solver, guidances: Sequence[Guidance] = ()
) -> Plan:
    """Build the `Plan` of a run, on the host.

    At each step where other guidances act than at the step before, the solver's history and the
    memory of guidance are reset. The step after a reset is of first order, with an error of second
    order. With predictions of two sets of guidances in the history, the error would be of first
    order.

    Args:
        timesteps: `(N,)`, those that the sampler visits, strictly falling.
        guidances: applied left to right; see `glide_jax.diffusion.guidance` for the order.

    Raises:
        UsageError: there are no timesteps, or they are not `(N,)`, leave the diffusion process or
            do not fall; the guidances contradict each other, or do not suit the solver.
    """
    timesteps = np.asarray(timesteps, np.float64)
    if timesteps.ndim != 1:
        raise UsageError(f"timesteps are a list of numbers, not of shape {timesteps.shape}")
    if not len(timesteps):
        raise UsageError("sampling needs at least one timestep")
    if not (timesteps.min() >= 0 and timesteps.max() <= len(schedule) - 1):
        raise UsageError(f"timesteps must be between 0 and {len(schedule) - 1}")
    if (np.diff(timesteps) >= 0).any():
        raise UsageError("timesteps must fall strictly: two of them are equal or rise")

    guidances = [member for g in guidances for member in g.members()]
    # Called for its error (one name, two prompts): below, the prompts are removed.
    branches_of(guidances)
    alpha, sigma, _ = levels(schedule, timesteps)
    acting = [
        tuple(i for i, g in enumerate(guidances) if g.acts_at(noise_level))
        for noise_level in sigma[:-1] / alpha[:-1]
    ]
    breaks = np.array([i > 0 and acting[i] != acting[i - 1] for i in range(len(timesteps))])

    table = solver(schedule, timesteps, breaks)
    # Only the sets of steps that have rows: plms and prk leave out levels. They are sorted, so that
    # the compiled program does not depend on their order in time.
    guidance_sets = tuple(sorted({acting[step] for step in table.step}))
    _check_guidance_sets(guidances, guidance_sets, table)
    guidance_set = np.array([guidance_sets.index(acting[step]) for step in table.step], np.int32)
    switched = np.append(False, guidance_set[1:] != guidance_set[:-1])
    table = table._replace(guidance_set=guidance_set, keep=np.where(switched, 0.0, table.keep))
    return Plan(
        table=Table(*map(_to_device_dtype, table)),
        guidances=tuple(
            replace(
                g,
                args=_as_arrays(g.args),
                needs=tuple(branch._replace(prompt=None) for branch in g.needs),
                interval=ALWAYS,
            )
            for g in guidances
        ),
        guidance_sets=guidance_sets,
    )


def _check_guidance_sets(
    guidances: Sequence[Guidance], guidance_sets: Sequence[Sequence[int]], table: Table
) -> None:
    for guidance_set in guidance_sets:
        names = [name for i in guidance_set for name in guidances[i].remembers]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UsageError(f"two guidances remember {min(twice)!r}: let one act at a time")
    # A row that continues the step of the row before it, rather than restarting it.
    continues = (np.diff(table.step) == 0) & (table.keep[1:] != 0)
    noisier = table.next_sigma * table.alpha >= table.sigma * table.next_alpha
    for g in guidances:
        if g.looks_ahead and (continues.any() or noisier.any()):
            raise UsageError(
                f"{g.name} needs a sampler with one evaluation per step, each to a cleaner level"
            )


def _to_device_dtype(column: np.ndarray) -> np.ndarray:
    return column.astype(np.int32 if np.issubdtype(column.dtype, np.integer) else np.float32)


def _as_arrays(args: dict[str, Any]) -> dict[str, Any]:
    # Numbers become float32 arrays: a Python float, an int and an array would each compile again.
    # Networks keep their weights.
    def convert(value: Any) -> Any:
        exact = hasattr(value, "dtype") and not jnp.issubdtype(value.dtype, jnp.floating)
        unchanged = exact or is_network(value)
        return value if unchanged else jnp.asarray(value, jnp.float32)

    return jax.tree.map(convert, args, is_leaf=is_network)


def start_state(plan: Plan, x: jax.Array) -> State:
    """Return the state before the first row; `x (B, H, W, C)` is noise at the first level."""
    return _start(x, tuple(name for g in plan.guidances for name in g.remembers))


@partial(jax.jit, static_argnums=1)
def _start(x: jax.Array, names: tuple[str, ...]) -> State:
    memory = {name: jnp.zeros_like(x) for name in names}
    # The last x is a stand-in of the right shape: the first row replaces it by its x_0.
    return State(x, jnp.zeros_like(x), jnp.zeros((HISTORY, *x.shape), x.dtype), memory, x)


@jax.tree_util.register_pytree_node_class
class Flattened:
    """A tree of hundreds of arrays that is taken apart once, not in each call of a program."""

    def __init__(self, leaves: Sequence[Any], structure: Any):
        self._leaves, self._structure = leaves, structure

    @classmethod
    def of(cls, tree: Any) -> "Flattened":
        """Take a tree apart."""
        return cls(*jax.tree.flatten(tree))

    def tree(self) -> Any:
        """Return the tree itself."""
        return jax.tree.unflatten(self._structure, self._leaves)

    def tree_flatten(self) -> tuple[Sequence[Any], Any]:
        """Return the arrays, and the structure; for jax."""
        return self._leaves, self._structure

    @classmethod
    def tree_unflatten(cls, structure: Any, leaves: Sequence[Any]) -> "Flattened":
        """Return the inverse of `tree_flatten`; for jax."""
        return cls(leaves, structure)


@jax.jit
def run_rows(
    networks: Mapping[str, Network] | Flattened,
    conds: Mapping[str, Any],
    plan: Plan,
    state: State,
    noise: jax.Array,
) -> State:
    """Run the rows of a plan from a state: the one compiled function of the sampler.

    Each row evaluates the guided prediction and applies the recursion that every solver shares
    (`glide_jax.diffusion.solvers.table`).

    Args:
        networks: by name; "main" is the one that is guided.
        conds: conditioning of each branch by its name, arrays batch first.
        noise: `(N, B, H, W, C)`, the noise of each row, or `(B,)` keys.
    """
    networks_by_name = networks.tree() if isinstance(networks, Flattened) else networks
    acting_guidances = [[plan.guidances[i] for i in indices] for indices in plan.guidance_sets]
    predictors = [
        solver_view(
            apply_guidances(
                noise_predictor(networks_by_name, conds, branches_of(guidances)), guidances
            )
        )
        for guidances in acting_guidances
    ]

    def run_row(
        state: State, inputs: tuple[Table[jax.Array], jax.Array | None]
    ) -> tuple[State, None]:
        row, z = inputs
        x, y, history, memory, _ = state
        memory = jax.tree.map(lambda m: m * row.keep, memory)
        point = Point(row.t, row.alpha, row.sigma, row.next_alpha, row.next_sigma, memory)
        if len(predictors) == 1:
            x_0, variance_fraction, gradient, memory = predictors[0](x, point)
        else:
            x_0, variance_fraction, gradient, memory = lax.switch(
                row.guidance_set, predictors, x, point
            )

        # The learned variance (2102.09672, eq. 15). Every solver computes it, so that all share one
        # compiled program; where s_learned and mean_per_gradient are zero, it has no effect.
        variance = jnp.exp(
            variance_fraction * row.log_beta + (1 - variance_fraction) * row.log_beta_tilde
        )
        if z is None:
            z = lax.cond(
                (row.s != 0) | (row.s_learned != 0),
                lambda: noise_at(noise, row.index, x.shape),
                lambda: jnp.zeros_like(x),
            )

        entry = row.u * x + row.v * (x_0 + row.x_0_per_gradient * gradient)
        history = weighted(row.S, jnp.concatenate([entry[None], history]))
        y = row.Py * y + row.Px * x + weighted(row.B, history)
        x = (
            row.Qy * y
            + row.Qx * x
            + weighted(row.E, history)
            + row.mean_per_gradient * variance * gradient
            + (row.s + row.s_learned * jnp.sqrt(variance)) * z
        )
        return State(x, y, history, memory, x_0), None

    row_noise = None if is_keys(noise) else noise
    return lax.scan(run_row, state, (plan.table, row_noise))[0]


def solver_view(predict: Predict) -> Callable[[jax.Array, Point], tuple[Any, ...]]:
    """Reduce a prediction to what the solver reads: x_0, variance fraction, gradient, memory.

    All guidance sets then return the same tree, whatever branches they evaluate.
    """

    def view(x: jax.Array, point: Point) -> tuple[Any, ...]:
        p = predict(x, point)
        return p.x_0, p.variance_fraction, p.guidance_gradient, p.memory

    return view


def weighted(weights: jax.Array, images: jax.Array) -> jax.Array:
    """Sum `(K, B, H, W, C)` images by `(..., K)` weights, at full precision on every device."""
    return jnp.tensordot(weights, images, axes=1, precision=lax.Precision.HIGHEST)


def check_variance(
    networks: Mapping[str, Network], conds: Mapping[str, Any], plan: Plan, x: jax.Array
) -> None:
    """Check that the network predicts the variance, if the sampler uses a learned one.

    Raises:
        UsageError: it does not.
    """
    name, traced = CAPTION.network, not isinstance(plan.table.s_learned, np.ndarray)
    # A caller's own compiled function hides the table; `noise_predictor` names what is missing.
    if traced or name not in networks or CAPTION.name not in conds:
        return
    if plan.needs_learned_variance:
        channels = getattr(networks[name].fn, "out_channels", None)
        if channels is None:
            t = jax.ShapeDtypeStruct(x.shape[:1], jnp.float32)
            output = _evaluate.eval_shape(networks[name], x, t, conds[CAPTION.name])
            channels = output.shape[-1]
        if channels == x.shape[-1]:
            raise UsageError(NO_VARIANCE)


@jax.jit
def _evaluate(network: Network, x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
    return network(x, t, cond)


def run_plan(
    networks: Mapping[str, Network],
    conds: Mapping[str, Any],
    plan: Plan,
    x: jax.Array,
    noise: jax.Array,
) -> State:
    """Run a plan in one compiled call.

    Args:
        x: `(B, H, W, C)` float32, noise at the first level.
        noise: `(N, B, H, W, C)` or `(B,)` keys; see `run_rows`.

    Returns:
        The last state; its `x` is the image, nominally in [-1, 1].

    Raises:
        UsageError: see `check_variance` and `check_noise`.
    """
    check_variance(networks, conds, plan, x)
    check_noise(noise, len(plan), np.shape(x))
    return run_rows(Flattened.of(networks), conds, plan, start_state(plan, x), noise)


def stream_plan(
    networks: Mapping[str, Network],
    conds: Mapping[str, Any],
    plan: Plan,
    x: jax.Array,
    noise: jax.Array,
    rows: int = 1,
) -> Iterator[tuple[int, State]]:
    """Run a plan a few rows at a time, for progress bars and previews.

    With one row per call, one compiled program serves every number of steps.

    Args:
        x, noise: see `run_plan`.
        rows: rows per call, at least 1.

    Yields:
        The number of rows done, and the state after them.

    Raises:
        UsageError: `rows` is below 1; or see `check_variance` and `check_noise`.
    """
    if rows < 1:
        raise UsageError(f"stream_plan runs at least one row per call, not {rows}")
    check_variance(networks, conds, plan, x)
    check_noise(noise, len(plan), np.shape(x))
    state, flattened = start_state(plan, x), Flattened.of(networks)
    for first in range(0, len(plan), rows):
        span = slice(first, first + rows)
        block = replace(plan, table=plan.table.rows(span))
        state = run_rows(flattened, conds, block, state, noise if is_keys(noise) else noise[span])
        yield min(first + rows, len(plan)), state
