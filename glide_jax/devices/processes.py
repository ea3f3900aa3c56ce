"""Several processes as one machine: finding each other, and agreeing."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from glide_jax.errors import GlideError, UsageError

# Size of a message from one process to the others.
TEXT_BYTES = 1024


class Peers(NamedTuple):
    """How a process finds the others.

    Attributes:
        coordinator: `host:port` of process 0, or "auto" to ask the cluster.
        processes: number of processes; None to ask the cluster.
        process: index of this process; None to ask the cluster.
    """

    coordinator: str
    processes: int | None = None
    process: int | None = None


def join(peers: Peers) -> None:
    """Connect this process to the others; call it before anything else of jax.

    "auto" works on TPU slices and under Slurm, Open MPI and Kubernetes.

    Raises:
        GlideError: the others cannot be reached.
    """
    by_hand = peers.coordinator != "auto"
    try:
        jax.distributed.initialize(
            peers.coordinator if by_hand else None,
            peers.processes,
            peers.process,
            cluster_detection_method="deactivate" if by_hand else None,
        )
    except (RuntimeError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise GlideError(
            f"cannot join the other processes ({why}): name them with "
            "--coordinator HOST:PORT --processes N --process I"
        ) from None


def shared_text(text: str) -> str:
    """Return the first text that is not empty among those of all processes; "" if all are empty."""
    if jax.process_count() == 1:
        return text
    own = np.zeros(TEXT_BYTES, np.uint8)
    data = text.encode()[:TEXT_BYTES]
    own[: len(data)] = np.frombuffer(data, np.uint8)
    every = np.asarray(multihost_utils.process_allgather(own))
    texts = (row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in every)
    return next(filter(None, texts), "")


def on_first(do: Callable[[], Any]) -> None:
    """Call a function in process 0 alone, while the others wait.

    Raises:
        GlideError: the function raised one; it is raised in every process, so that none waits.
    """
    failed: GlideError | None = None
    if jax.process_index() == 0:
        try:
            do()
        except GlideError as error:
            failed = error
    if message := shared_text(f"{type(failed).__name__}: {failed}" if failed else ""):
        kind, _, text = message.partition(": ")
        raise failed or (UsageError if kind == UsageError.__name__ else GlideError)(text)
