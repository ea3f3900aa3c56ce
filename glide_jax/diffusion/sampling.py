"""One step, one `lax.scan`; a compiled and a streaming driver over the same step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.diffusion.prediction import (
    Guidance,
    Network,
    Point,
    apply,
    branches_of,
    noise_predictor,
)
from glide_jax.diffusion.schedule import Schedule
from glide_jax.diffusion.table import HISTORY, Solver, Table, levels
from glide_jax.errors import UsageError


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["table", "guidance"],
    meta_fields=["programs"],
)
@dataclass(frozen=True)
class Plan:
    """All that a run of the sampler is, but for networks, conditioning and noise.

    Attributes:
        table: one row a network evaluation, float32.
        guidance: every guidance, without what would make a compiled program of its own: spans, and
            the prompts of branches.
        programs: sets of them that act together, as indices; `table.program` chooses one a row.
    """

    table: Table
    guidance: tuple[Guidance, ...]
    programs: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        """Rows, that is network evaluations."""
        return len(self.table.t)


class State(NamedTuple):
    """What a run carries from row to row; images `(B, H, W, C)` float32.

    Attributes:
        x: the noised picture; at the end, the picture.
        y: anchor of solvers that take several evaluations a step.
        history: `(4, B, H, W, C)`, newest first.
        memory: what stateful guidance remembers, by name.
        x_0: the last estimate of the clean picture.
    """

    x: jax.Array
    y: jax.Array
    history: jax.Array
    memory: dict[str, jax.Array]
    x_0: jax.Array


def plan(
    schedule: Schedule, grid: np.ndarray, solver: Solver, guidance: Sequence[Guidance] = ()
) -> Plan:
    """Turns settings into a `Plan`, on the host.

    Where the set of guidances that act changes from one step to the next, the
    solver's history and what guidance remembers begin anew: a multistep solver that went on
    over the jump would fall to first order.

    Args:
        grid: `(N,)` timesteps, strictly falling.
        guidance: applied left to right; see `glide_jax.diffusion.guidance` for the order.

    Raises:
        UsageError: the grid is empty, leaves the chain, or does not fall; the guidances contradict
            each other, or do not go with the solver.
    """
    grid = np.asarray(grid, np.float64)
    if grid.ndim != 1 or not len(grid):
        raise UsageError("sampling needs at least one timestep")
    if not (grid.min() >= 0 and grid.max() <= len(schedule) - 1):
        raise UsageError(f"timesteps must lie between 0 and {len(schedule) - 1}")
    if (np.diff(grid) >= 0).any():
        raise UsageError("timesteps must fall strictly: two of them are equal or rise")

    guidance = [part for g in guidance for part in g.parts()]
    branches_of(guidance)  # Refuses one name for two prompts, while prompts are known.
    alpha, sigma, _ = levels(schedule, grid)
    acting = [
        tuple(i for i, g in enumerate(guidance) if g.acts_at(level))
        for level in sigma[:-1] / alpha[:-1]
    ]
    # Sorted, so that the compiled program depends on the set of programs alone.
    programs = tuple(sorted(set(acting)))
    breaks = np.array([i > 0 and acting[i] != acting[i - 1] for i in range(len(grid))])

    table = solver(schedule, grid, breaks)
    _refuse_what_cannot_be(guidance, programs, table)
    program = np.array([programs.index(acting[step]) for step in table.step], np.int32)
    switched = np.append(False, program[1:] != program[:-1])
    table = table._replace(program=program, keep=np.where(switched, 0.0, table.keep))
    return Plan(
        table=Table(*map(_to_device_dtype, table)),
        guidance=tuple(
            replace(
                g,
                args=_as_arrays(g.args),
                needs=tuple(branch._replace(prompt=None) for branch in g.needs),
                span=None,
            )
            for g in guidance
        ),
        programs=programs,
    )


def _refuse_what_cannot_be(
    guidance: Sequence[Guidance], programs: Sequence[Sequence[int]], table: Table
) -> None:
    for program in programs:
        names = [name for i in program for name in guidance[i].remembers]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UsageError(f"two guidances remember {min(twice)!r}: let one act at a time")
    # A row that goes on with the step of the row before, rather than being sent back to it.
    goes_on = (np.diff(table.step) == 0) & (table.keep[1:] != 0)
    noisier = table.next_sigma * table.alpha >= table.sigma * table.next_alpha
    for g in guidance:
        if g.looks_ahead and (goes_on.any() or noisier.any()):
            raise UsageError(
                f"{g.name} needs a sampler of one evaluation a step, each to a cleaner level"
            )


def _to_device_dtype(column: np.ndarray) -> np.ndarray:
    return column.astype(np.int32 if np.issubdtype(column.dtype, np.integer) else np.float32)


def _as_arrays(args: dict[str, Any]) -> dict[str, Any]:
    # Numbers as float32 arrays: a Python float, an int and an array would each compile anew.
    # Networks keep their weights as they are.
    def convert(value: Any) -> Any:
        exact = hasattr(value, "dtype") and not jnp.issubdtype(value.dtype, jnp.floating)
        kept = exact or isinstance(value, Network)
        return value if kept else jnp.asarray(value, jnp.float32)

    return jax.tree.map(convert, args, is_leaf=lambda value: isinstance(value, Network))


def start(plan: Plan, x: jax.Array) -> State:
    """The state before the first row; `x (B, H, W, C)` is noise at the first level."""
    names = [name for g in plan.guidance for name in g.remembers]
    memory = {name: jnp.zeros_like(x) for name in names}
    # Buffers of their own: the scan may reuse each of them.
    return State(x, jnp.zeros_like(x), jnp.zeros((HISTORY, *x.shape), x.dtype), memory, x)


def noise_at(noise: jax.Array, index: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Row `index`'s noise `(B, H, W, C)`: drawn from keys `(B,)`, so that a picture can be
    made again alone."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape[1:]))(noise)


def is_keys(noise: jax.Array) -> bool:
    """Whether noise is given as one key an image, rather than as a tape."""
    return jnp.issubdtype(noise.dtype, jax.dtypes.prng_key)


@jax.jit
def run_rows(
    networks: Mapping[str, Network],
    conds: Mapping[str, Any],
    plan: Plan,
    state: State,
    noise: jax.Array,
) -> State:
    """Runs the rows of a plan from a state: the one compiled function of the sampler.

    Args:
        networks: by name; "main" is the one that is guided.
        conds: conditioning of each branch by its name, arrays batch first.
        noise: `(N, B, H, W, C)`, a row's noise each, or `(B,)` keys.
    """
    active = [[plan.guidance[i] for i in program] for program in plan.programs]
    predicts = [apply(noise_predictor(networks, conds, branches_of(a)), a) for a in active]

    def solver_view(predict):
        # What the solver reads; the same tree whatever branches were evaluated.
        def view(x, point):
            p = predict(x, point)
            return p.x_0, p.frac, p.score, p.memory

        return view

    views = [solver_view(predict) for predict in predicts]

    def step(state: State, inputs: tuple[Table, jax.Array | None]) -> tuple[State, None]:
        row, z = inputs
        x, y, history, memory, _ = state
        memory = jax.tree.map(lambda m: m * row.keep, memory)
        point = Point(row.t, row.alpha, row.sigma, row.next_alpha, row.next_sigma, memory)
        x_0, frac, score, memory = (
            views[0](x, point) if len(views) == 1 else jax.lax.switch(row.program, views, x, point)
        )
        variance = jnp.exp(frac * row.log_beta + (1 - frac) * row.log_beta_tilde)
        if z is None:
            z = noise_at(noise, row.index, x.shape)
        entry = row.u * x + row.v * (x_0 + row.score_x_0 * score)
        history = weighted(row.S, jnp.concatenate([entry[None], history]))
        y = row.Py * y + row.Px * x + weighted(row.B, history)
        x = (
            row.Qy * y
            + row.Qx * x
            + weighted(row.E, history)
            + row.score_mean * variance * score
            + (row.s + row.s_learned * jnp.sqrt(variance)) * z
        )
        return State(x, y, history, memory, x_0), None

    tape = None if is_keys(noise) else noise
    return jax.lax.scan(step, state, (plan.table, tape))[0]


def weighted(weights: jax.Array, images: jax.Array) -> jax.Array:
    """`(..., K)` weights on `(K, B, H, W, C)` images, at full precision whatever the device."""
    return jnp.tensordot(weights, images, axes=1, precision=jax.lax.Precision.HIGHEST)


def sample(
    networks: Mapping[str, Network],
    conds: Mapping[str, Any],
    plan: Plan,
    x: jax.Array,
    noise: jax.Array,
) -> State:
    """The compiled driver: the whole run in one call.

    Args:
        x: `(B, H, W, C)` float32, noise at the first level.
        noise: `(N, B, H, W, C)` or `(B,)` keys; see `run_rows`.

    Returns:
        The last state; its `x` is the picture, in [-1, 1] nominally.
    """
    return run_rows(networks, conds, plan, start(plan, x), noise)


def stream(
    networks: Mapping[str, Network],
    conds: Mapping[str, Any],
    plan: Plan,
    x: jax.Array,
    noise: jax.Array,
    rows: int = 1,
) -> Iterator[tuple[int, State]]:
    """The streaming driver: the same run, `rows` rows a call, for progress and previews.

    One row a call also makes one compiled program serve every number of steps.

    Yields:
        The number of rows done, and the state after them.
    """
    state = start(plan, x)
    for first in range(0, len(plan), rows):
        some = slice(first, first + rows)
        part = replace(plan, table=Table(*(column[some] for column in plan.table)))
        state = run_rows(networks, conds, part, state, noise if is_keys(noise) else noise[some])
        yield min(first + rows, len(plan)), state
