"""Whether a process is one of several, by the variables that launchers and clusters set."""

import re
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from glide_jax.errors import GlideError

Environ = Mapping[str, str]
# Returns an attribute of a Cloud TPU machine, None if there is none of that name.
Metadata = Callable[[str], str | None]

# jax's own port on TPU slices, and its range of ports under Slurm and Open MPI.
TPU_PORT = 8482
PORTS = range(65536 - 4096, 65536)

# Launchers that name address, number and index: jax's words, Kubeflow's, and those of XPK on GPUs.
ADDRESSES = ("JAX_COORDINATOR_ADDRESS", "COORDINATOR_ADDRESS")
NUMBERS = (
    ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    ("JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX"),
    ("NUM_PROCESSES", "PROCESS_ID"),
    ("NNODES", "NODE_RANK"),
)
# Hosted notebooks: one machine, and no metadata that answer.
NOTEBOOKS = ("COLAB_RELEASE_TAG", "COLAB_GPU", "COLAB_TPU_1VM", "KAGGLE_KERNEL_RUN_TYPE")

REMEDY = (
    "name the peers with --coordinator HOST:PORT --num-processes N --process-id I, or say "
    "--coordinator none for a process alone"
)


class Cluster(NamedTuple):
    """Several processes, of which this is one.

    Attributes:
        name: of the launcher or cluster.
        why: the variable that says so, with its value.
        coordinator: `host:port` of process 0; None if jax must ask the cluster.
        num_processes: number of processes; None if jax must ask.
        process_id: index of this process; None if jax must ask.
        local: index of this process among those of its machine, and their number.
    """

    name: str
    why: str
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local: tuple[int, int] = (0, 1)


def detect(
    environ: Environ, *, metadata: Metadata | None = None, kubernetes: bool = False
) -> Cluster | None:
    """Return the processes to which this one belongs, or None if it is alone.

    The variables decide. `metadata` is asked last, and only where no variable speaks of a TPU.

    Args:
        environ: the variables of the process.
        metadata: asks a Cloud TPU machine; None where it is not to be asked.
        kubernetes: whether the package `kubernetes` is there, with which jax asks the cluster.

    Raises:
        GlideError: the variables say that there are several, and contradict each other.
    """
    environ = {name: value.strip() for name, value in environ.items() if value.strip()}
    if environ.get("JAX_NUM_PROCESSES") == "1":
        return None
    cluster = _named(environ)
    if cluster is None and "OMPI_COMM_WORLD_SIZE" in environ:
        # Inside a Slurm job Slurm's variables are those of Open MPI's own daemons.
        cluster = _open_mpi(environ)
    elif cluster is None:
        cluster = _slurm(environ)
    cluster = cluster or _tpu_variables(environ)
    if cluster is None and metadata is not None and _may_ask(environ):
        cluster = _tpu_metadata(environ, metadata)
    if cluster is None and kubernetes and _in_job(environ):
        index = environ["JOB_COMPLETION_INDEX"]
        cluster = Cluster("Kubernetes", f"JOB_COMPLETION_INDEX={index}")
    if cluster is None:
        _check_complete(environ)
    return None if cluster is None or cluster.num_processes == 1 else cluster


def note_if_alone(environ: Environ) -> str:
    """Return a note if a job has several tasks and this process was not started as one of them."""
    tasks = environ.get("SLURM_NTASKS", "")
    if "SLURM_JOB_ID" in environ and tasks.isdigit() and int(tasks) > 1 and not _in_step(environ):
        return f"Slurm gave this job {tasks} tasks, and this process trains alone: start it by srun"
    if _in_job(environ) and "TPU_WORKER_HOSTNAMES" not in environ:
        return (
            "this pod of an indexed job trains alone: set JAX_COORDINATOR_ADDRESS and "
            "JAX_NUM_PROCESSES if the pods train together, JAX_NUM_PROCESSES=1 if not"
        )
    return ""


def own_gpus(local: tuple[int, int], gpus: int) -> list[int] | None:
    """Return the GPUs that a process takes of those it sees; None: all.

    Args:
        local: index of the process among those of its machine, and their number.
        gpus: how many it sees. A launcher that gave each process its own shows fewer GPUs than
            processes.
    """
    index, count = local
    share = gpus // count
    if count == 1 or share == 0:
        return None
    return list(range(index * share, (index + 1) * share))


def _named(environ: Environ) -> Cluster | None:
    """Variables that name address, number and index: jax's words, and those of two launchers."""
    address = next((name for name in ADDRESSES if name in environ), None)
    pair = next((pair for pair in NUMBERS if environ.keys() >= set(pair)), None)
    if address is None or pair is None:
        return None
    count, index = pair
    processes, process = _number(environ, count), _index(environ, index, count)
    coordinator = _coordinator(environ, environ[address], TPU_PORT)
    name = "Kubernetes" if _in_job(environ) else "its variables"
    return Cluster(name, f"{count}={processes}", coordinator, processes, process)


def _open_mpi(environ: Environ) -> Cluster | None:
    size, rank = "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"
    if (processes := _number(environ, size)) == 1:
        return None
    process = _index(environ, rank, size)
    local = (
        _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK", 0),
        _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", 1),
    )
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    launcher = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
    if local[1] == processes:
        host = "localhost"
    elif launcher:
        host = launcher[1] or f"[{launcher[2]}]"
    elif nodes := _nodes(environ):
        host = first_host(nodes)
    else:
        host = ""
    if not host and "JAX_COORDINATOR_ADDRESS" not in environ:
        raise GlideError(
            f"Open MPI started {processes} processes on several machines and does not say where "
            "the first is: mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT, HOST that of process 0; "
            f"or {REMEDY}"
        )
    job = environ.get("PMIX_NAMESPACE") or uri.partition(".")[0]
    coordinator = _coordinator(environ, host, _port(job))
    return Cluster("Open MPI", f"{size}={processes}", coordinator, processes, process, local)


def _slurm(environ: Environ) -> Cluster | None:
    if "SLURM_JOB_ID" not in environ or not _in_step(environ):
        return None
    # SLURM_NTASKS may be that of the whole job where a step is smaller.
    size = next((n for n in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if n in environ), None)
    if size is None or (processes := _number(environ, size)) == 1:
        return None
    process = _index(environ, "SLURM_PROCID", size)
    nodes = _nodes(environ)
    if not nodes and "JAX_COORDINATOR_ADDRESS" not in environ:
        raise GlideError(
            f"Slurm started {processes} tasks ({size}) and SLURM_STEP_NODELIST, which names their "
            f"machines, is not set: {REMEDY}"
        )
    port = _port(f"{environ['SLURM_JOB_ID']}.{environ.get('SLURM_STEP_ID', '')}")
    return Cluster(
        "Slurm",
        f"{size}={processes}",
        _coordinator(environ, first_host(nodes), port),
        processes,
        process,
        (_number(environ, "SLURM_LOCALID", 0), _tasks_of_node(environ, processes)),
    )


def _tpu_variables(environ: Environ) -> Cluster | None:
    """Variables of libtpu, as GKE sets them."""
    name = next((n for n in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES") if n in environ), "")
    hosts = [host.strip() for host in environ.get(name, "").split(",") if host.strip()]
    bounds = environ.get("TPU_PROCESS_BOUNDS") or environ.get("TPU_HOST_BOUNDS")
    if bounds and set(bounds.split(",")) == {"1"}:
        # One process was told to use its own chips alone.
        hosts = hosts[:1] or ["localhost"]
    if not hosts:
        return None
    return _slice(environ, environ, hosts, f"{name or 'TPU_HOST_BOUNDS'} with {len(hosts)} hosts")


def _tpu_metadata(environ: Environ, metadata: Metadata) -> Cluster | None:
    """Attributes of a TPU machine of Compute Engine."""
    endpoints = metadata("worker-network-endpoints")
    if not endpoints:
        return None
    # A host is its address, or name:index:address.
    hosts = [endpoint.split(":")[-1].strip() for endpoint in endpoints.split(",")]
    lines = (line.partition(":") for line in (metadata("tpu-env") or "").splitlines())
    values = {name.strip(): value.strip().strip("'") for name, _, value in lines}
    values = {name: value for name, value in values.items() if name.startswith("MEGASCALE_")}
    values |= {name: environ[name] for name in environ if name.startswith("MEGASCALE_")}
    if len(hosts) > 1:
        values["TPU_WORKER_ID"] = metadata("agent-worker-number") or ""
    return _slice(environ, values, hosts, f"the machine's metadata name {len(hosts)} hosts")


def _slice(environ: Environ, values: Environ, hosts: list[str], why: str) -> Cluster | None:
    """Return the processes of TPU slices: one a host; None if there is one."""
    slices = _number(values, "MEGASCALE_NUM_SLICES", 1)
    processes = slices * len(hosts)
    if processes == 1:
        return None
    worker = _index(values, "TPU_WORKER_ID", why, len(hosts)) if len(hosts) > 1 else 0
    process = worker
    first_host_name = hosts[0]
    if slices > 1:
        why += f", MEGASCALE_NUM_SLICES={slices}"
        process += len(hosts) * _index(values, "MEGASCALE_SLICE_ID", "MEGASCALE_NUM_SLICES")
        first_host_name = values.get("MEGASCALE_COORDINATOR_ADDRESS", "")
        if not first_host_name:
            raise GlideError(f"{why}, and MEGASCALE_COORDINATOR_ADDRESS is not set: {REMEDY}")
    # The port that these variables name is that of the TPU's own network.
    coordinator = _coordinator(environ, first_host_name.partition(":")[0], TPU_PORT)
    return Cluster("TPU slice", why, coordinator, processes, process)


def first_host(nodes: str) -> str:
    """Return the first machine of a Slurm list: `rack1` of `rack[1-3,7],node2`."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", match[0] if match else "")


def _tasks_of_node(environ: Environ, tasks: int) -> int:
    """Return how many tasks of a Slurm step run on this machine."""
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    counts = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node)
        for _ in range(int(times or 1))
    ]
    node = _number(environ, "SLURM_NODEID", 0)
    if node < len(counts) and sum(counts) == tasks:
        return counts[node]
    machines = _number(environ, "SLURM_STEP_NUM_NODES", _number(environ, "SLURM_NNODES", 1))
    return max(1, -(-tasks // max(1, machines)))


def _in_step(environ: Environ) -> bool:
    """Whether srun started this process; in a batch script before srun there is one process."""
    marks = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")
    return any(environ.get(name) for name in marks) or environ.get("SLURM_PROCID", "0") != "0"


def _nodes(environ: Environ) -> str:
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    return next((environ[name] for name in names if name in environ), "")


def _in_job(environ: Environ) -> bool:
    return "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ


def _may_ask(environ: Environ) -> bool:
    """Whether the metadata of a TPU machine are worth a request."""
    platforms = environ.get("JAX_PLATFORMS", "tpu").lower()
    named = ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", *NOTEBOOKS)
    bounds = ("TPU_PROCESS_BOUNDS", "TPU_HOST_BOUNDS")
    return "tpu" in platforms and not any(name in environ for name in (*named, *bounds))


def _check_complete(environ: Environ) -> None:
    """Refuse a part of jax's variables where nothing else says what is missing."""
    needed = {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES"}
    if present := sorted(needed & environ.keys()):
        missing = sorted((needed | {"JAX_PROCESS_ID"}) - environ.keys())
        raise GlideError(f"{present[0]} is set, but not {' and '.join(missing)}: {REMEDY}")


def _coordinator(environ: Environ, host: str, port: int) -> str:
    """Return `host:port`; jax's variables for both come first."""
    address = environ.get("JAX_COORDINATOR_ADDRESS", host)
    name, colon, given = address.rpartition(":")
    if colon and given.isdigit() and (":" not in name or name.endswith("]")):
        return address
    if "COORDINATOR_PORT" in environ and "COORDINATOR_ADDRESS" in environ:
        port = _number(environ, "COORDINATOR_PORT")
    return f"{address}:{_number(environ, 'JAX_COORDINATOR_PORT', port)}"


def _port(job: str) -> int:
    """Return a port for a job, the same in each of its processes."""
    return PORTS[zlib.crc32(job.encode()) % len(PORTS)]


def _index(environ: Environ, name: str, of: str, count: int | None = None) -> int:
    index = _number(environ, name)
    count = _number(environ, of) if count is None else count
    if index >= count:
        says = of if of not in environ else f"{of}={environ[of]}"
        raise GlideError(f"{name}={index} does not fit {says}: {REMEDY}")
    return index


def _number(environ: Environ, name: str, default: int | None = None) -> int:
    value = environ.get(name, "")
    if not value and default is not None:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", value):
        what = f"is {value!r}, not a number" if value else "is not set"
        raise GlideError(f"this process seems to be one of several, but {name} {what}: {REMEDY}")
    return int(value)
