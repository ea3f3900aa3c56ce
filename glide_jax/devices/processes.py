"""Several processes as one machine: finding each other, and agreeing."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from glide_jax.devices.cluster import (
    REMEDY,
    Cluster,
    detect,
    note_if_alone,
    own_gpus,
)
from glide_jax.devices.links import Links
from glide_jax.devices.roll_call import roll_call
from glide_jax.devices.tpu_metadata import tpu_metadata
from glide_jax.errors import GlideError, UsageError, one_line

# Size of a message from one process to the others.
TEXT_BYTES = 1024
# How long processes wait for each other.
JOIN_SECONDS = 300
# Signs in jax's errors that another process is gone: of its transports, and of its coordinator.
SIGNS_OF_LOSS = ("Gloo", "NCCL", "heartbeat", "UNAVAILABLE", "reset by peer", "closed by peer")


class Membership(NamedTuple):
    """The place of a process among several, and how it finds the others.

    Attributes:
        coordinator: `host:port` of process 0; "auto" to ask the cluster; "none" for a process
            alone.
        num_processes: number of processes; None to ask the cluster.
        process_id: index of this process; None to ask the cluster.
    """

    coordinator: str
    num_processes: int | None = None
    process_id: int | None = None


def join(membership: Membership | None = None, seconds: float = JOIN_SECONDS) -> Links:
    """Connect this process to the others; call it before anything else of jax.

    Args:
        membership: the place of this process among the others; None: as the environment says, or
            alone.
        seconds: how long to wait for the others.

    Returns:
        connections that notice the end of another process. A process alone has no connections, and
        neither have processes that jax itself finds.

    Raises:
        GlideError: the others cannot be reached.
    """
    if membership is not None and membership.coordinator == "none":
        return Links({})
    if membership is not None and membership.coordinator != "auto":
        by_hand = Cluster("--coordinator", "", *membership)
        return _connect(by_hand, seconds, cluster_detection_method="deactivate")
    has_kubernetes = find_spec("kubernetes") is not None
    cluster = detect(os.environ, metadata=tpu_metadata(), kubernetes=has_kubernetes)
    if cluster is None and membership is None:
        if note := note_if_alone(os.environ):
            print(f"note: {note}", file=sys.stderr)
        return Links({})
    if cluster is None or cluster.coordinator is None:
        return _connect(cluster or Cluster("--coordinator auto", ""), seconds)
    ids = None
    if "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        ids = own_gpus(cluster.local, visible_gpus())
    links = _connect(cluster, seconds, cluster_detection_method="deactivate", local_device_ids=ids)
    if cluster.process_id == 0:
        print(
            f"{cluster.num_processes} processes found each other by {cluster.name} "
            f"({cluster.why}), the first at {cluster.coordinator}"
        )
    return links


def own_process(process: int | None = None, processes: int | None = None) -> tuple[int, int]:
    """Return the index of this process and the number of processes, without connecting them.

    Call it before anything else of jax. If several processes share a machine, this one then sees
    only its own GPUs.

    Args:
        process, processes: index and number; None: those that the environment names, or (0, 1).

    Raises:
        UsageError: one of the two is missing, or they contradict each other.
        GlideError: the variables of the environment contradict each other.
    """
    if processes is not None or process is not None:
        if processes is None or process is None or not 0 <= process < processes:
            raise UsageError("give --num-processes N and --process-id I, with I from 0 to N - 1")
        return process, processes
    cluster = detect(os.environ, metadata=tpu_metadata())
    if cluster is None or cluster.process_id is None or cluster.num_processes is None:
        return 0, 1
    ids = own_gpus(cluster.local, visible_gpus())
    if ids is not None and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(name, ",".join(map(str, ids)))
    return cluster.process_id, cluster.num_processes


def _connect(cluster: Cluster, seconds: float, **options: Any) -> Links:
    """Wait for all processes, and start jax over them."""
    coordinator, processes, process = cluster.coordinator, cluster.num_processes, cluster.process_id
    peers = {}
    try:
        if coordinator is not None and processes is not None and process is not None:
            if _started():
                raise RuntimeError("jax has started in this process")
            peers = roll_call(coordinator, processes, process, seconds)
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=int(seconds), **options
        )
    # The package kubernetes has errors of its own.
    except Exception as error:
        why = one_line(str(error).strip().splitlines()[0] if str(error).strip() else repr(error))
        detected = f"; {cluster.name}: {cluster.why}" if cluster.why else ""
        raise GlideError(
            f"cannot join the other processes ({why.rstrip('.')}{detected}): {REMEDY}"
        ) from None
    return Links(peers)


@contextmanager
def ending_with_peers(links: Links, remedy: str) -> Iterator[None]:
    """End this process with one line and exit code 1 when another one is gone.

    It ends within seconds, also while it waits in a save or in a step. By itself jax would wait for
    the heartbeat of the process that is gone, and then abort with a stack trace.

    Args:
        links: the connections to the others, from `join`.
        remedy: what to do, as the line says it.
    """
    links.watch(remedy)
    done = False
    try:
        yield
        done = True
    except jax.errors.JaxRuntimeError as error:
        why = one_line(error)
        if jax.process_count() == 1 or not any(sign in why for sign in SIGNS_OF_LOSS):
            raise
        # jax names its own call once for each device.
        why = why.rpartition("dispatching computation: ")[2][:200]
        links.end(f"another process has ended or cannot be reached ({why}): {remedy}")
        raise  # another thread ends this process
    finally:
        links.close(done)


def visible_gpus() -> int:
    """Return how many NVIDIA or AMD GPUs this process may use, without starting them."""
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if name in os.environ:
            return len([part for part in os.environ[name].split(",") if part.strip()])
    nodes = Path("/sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")
    amd = sum(node.read_text().strip() != "0" for node in nodes)
    return len([*Path("/dev").glob("nvidia[0-9]*")]) or amd


def _started() -> bool:
    """Whether jax has opened its devices, after which no process can join others."""
    from jax._src import xla_bridge

    return bool(getattr(xla_bridge, "_backends", None))


def shared_text(text: str) -> str:
    """Return the first non-empty text of all processes, cut to 1024 bytes; "" if all are empty."""
    if jax.process_count() == 1:
        return text
    message = np.zeros(TEXT_BYTES, np.uint8)
    data = text.encode()[:TEXT_BYTES]
    message[: len(data)] = np.frombuffer(data, np.uint8)
    every = np.asarray(multihost_utils.process_allgather(message))
    texts = (row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in every)
    return next(filter(None, texts), "")


def on_first_process(do: Callable[[], Any]) -> None:
    """Call a function in process 0 alone, while the others wait.

    Raises:
        GlideError: the function raised an error. Every process raises it, so that no process waits;
            process 0 raises the error itself.
    """
    failed: Exception | None = None
    if jax.process_index() == 0:
        try:
            do()
        except Exception as error:
            failed = error
    if message := shared_text(f"{type(failed).__name__}: {one_line(failed)}" if failed else ""):
        kind, _, text = message.partition(": ")
        raise failed or (UsageError if kind == UsageError.__name__ else GlideError)(text)
