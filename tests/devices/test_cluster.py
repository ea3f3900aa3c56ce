"""Which environments name several processes, and which of them this process is."""

import pytest

from glide_jax.devices.cluster import (
    PORTS,
    detect,
    first_host,
    note_if_alone,
    own_gpus,
)
from glide_jax.errors import GlideError

GPU = {"CUDA_VISIBLE_DEVICES": "0", "HOME": "/root"}
COLAB = {"COLAB_RELEASE_TAG": "release-colab", "COLAB_GPU": "0", "TPU_NAME": "local"}
KAGGLE = {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "TPU_WORKER_HOSTNAMES": "localhost"}
TPU = {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_ID": "0"}
SLICE = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "t0.svc,t1.svc,t2.svc,t3.svc",
    "TPU_WORKER_ID": "2",
}
TWO_SLICES = SLICE | {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "first.svc:8080",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
ONE_TASK = SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
# A batch script before srun.
BATCH = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
# Open MPI 5: no address of the launcher.
MPI5 = {name: value for name, value in MPI.items() if "orte" not in name} | {
    "PMIX_NAMESPACE": "prterun-head-1@1"
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
NAMED_POD = POD | {"JAX_COORDINATOR_ADDRESS": "job-0.jax:1234", "JAX_NUM_PROCESSES": "2"}
XPK = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "JAX_COORDINATOR_ADDRESS": "set-slice-job-0-0.set",
    "JAX_COORDINATOR_PORT": "6002",
    "NNODES": "8",
    "NODE_RANK": "5",
}
KUBEFLOW = {
    "COORDINATOR_ADDRESS": "job-worker-0",
    "COORDINATOR_PORT": "6666",
    "NUM_PROCESSES": "3",
    "PROCESS_ID": "2",
}


def nobody(attribute):
    raise AssertionError(f"asked for {attribute}")


@pytest.mark.parametrize(
    "environ",
    {
        "laptop": {"HOME": "/root"},
        "single GPU": GPU,
        "Colab": COLAB,
        "Colab with a TPU": COLAB | {"COLAB_TPU_1VM": "1"},
        "Kaggle": KAGGLE,
        "TPU machine with one host": TPU | {"TPU_WORKER_HOSTNAMES": "localhost"},
        "TPU machine that asks for no metadata": TPU | {"TPU_SKIP_MDS_QUERY": "1"},
        "one process with chips of its own": SLICE | {"TPU_PROCESS_BOUNDS": "1,1,1"},
        "jax on the CPU": {"JAX_PLATFORMS": "cpu"},
        "Slurm with one task": ONE_TASK,
        "Slurm, a step of one task in a job of four": ONE_TASK | {"SLURM_NTASKS": "4"},
        "Slurm's batch script": BATCH,
        "Slurm on a login node": {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4"},
        "Open MPI with one process": MPI5 | {"OMPI_COMM_WORLD_SIZE": "1"},
        "Open MPI with one process in Slurm": SLURM | MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        "Kubernetes": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        "Kubernetes, one node": XPK | {"NNODES": "1", "NODE_RANK": "0"},
        "indexed job of unknown size": POD,
        "told so, on a slice": SLICE | {"JAX_NUM_PROCESSES": "1"},
        "told so, under Slurm": SLURM | {"JAX_NUM_PROCESSES": "1"},
        "empty variables": dict.fromkeys((*SLURM, *MPI, *SLICE), ""),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_process_alone_asks_nobody(environ):
    name, variables = environ
    # A machine with a TPU has metadata; it is asked only if its variables say nothing.
    has_tpu = any("TPU" in key or key == "JAX_PLATFORMS" for key in variables) and any(
        variables.values()
    )
    assert detect(variables, metadata=nobody if has_tpu else None) is None, name


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (SLICE, ("TPU slice", "t0.svc:8482", 4, 2, (0, 1))),
        (TWO_SLICES, ("TPU slice", "first.svc:8482", 8, 6, (0, 1))),
        (
            TWO_SLICES | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
            ("TPU slice", "first.svc:8482", 2, 1, (0, 1)),
        ),
        (
            SLICE | {"TPU_PROCESS_ADDRESSES": "a:8471,b:8471,c:8471"},
            ("TPU slice", "a:8482", 3, 2, (0, 1)),
        ),
        (SLICE | {"JAX_COORDINATOR_PORT": "99"}, ("TPU slice", "t0.svc:99", 4, 2, (0, 1))),
        (
            SLURM | {"JAX_COORDINATOR_PORT": "99"},
            ("Slurm", "node07:99", 4, 3, (1, 2)),
        ),
        (
            SLURM | {"JAX_COORDINATOR_ADDRESS": "other:5"},
            ("Slurm", "other:5", 4, 3, (1, 2)),
        ),
        # The number of the step, not that of the job.
        (
            SLURM | {"SLURM_NTASKS": "16", "JAX_COORDINATOR_PORT": "99"},
            ("Slurm", "node07:99", 4, 3, (1, 2)),
        ),
        (MPI | {"JAX_COORDINATOR_PORT": "99"}, ("Open MPI", "10.96.0.1:99", 4, 1, (1, 2))),
        (
            MPI5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "JAX_COORDINATOR_PORT": "99"},
            ("Open MPI", "localhost:99", 4, 1, (1, 4)),
        ),
        (
            MPI5 | {"JAX_COORDINATOR_ADDRESS": "node0:5"},
            ("Open MPI", "node0:5", 4, 1, (1, 2)),
        ),
        # mpirun in a Slurm job: Slurm counts the daemons of mpirun.
        (
            SLURM | MPI5 | {"SLURM_NTASKS": "2", "JAX_COORDINATOR_PORT": "99"},
            ("Open MPI", "node07:99", 4, 1, (1, 2)),
        ),
        (ONE_TASK | SLICE, ("TPU slice", "t0.svc:8482", 4, 2, (0, 1))),
        (NAMED_POD, ("Kubernetes", "job-0.jax:1234", 2, 1, (0, 1))),
        (XPK, ("its variables", "set-slice-job-0-0.set:6002", 8, 5, (0, 1))),
        (KUBEFLOW, ("its variables", "job-worker-0:6666", 3, 2, (0, 1))),
    ],
)
def test_several_processes_are_found(environ, expected):
    found = detect(environ, metadata=nobody)
    assert found is not None
    assert (found.name, *found[2:]) == expected


def test_processes_of_a_job_agree_on_a_port():
    ranks = [detect(SLURM | {"SLURM_PROCID": str(i)}) for i in range(4)]
    assert len({rank and rank.coordinator for rank in ranks}) == 1
    assert [rank and rank.process_id for rank in ranks] == [0, 1, 2, 3]
    ports = set()
    for step in range(20):
        found = detect(SLURM | {"SLURM_STEP_ID": str(step)})
        assert found is not None and found.coordinator is not None
        ports.add(int(found.coordinator.split(":")[1]))
    assert len(ports) > 15 and ports <= set(PORTS)


def test_kubernetes_is_asked_where_its_package_is():
    found = detect(POD, kubernetes=True)
    assert found is not None and found[:3] == ("Kubernetes", "JOB_COMPLETION_INDEX=1", None)
    assert detect(POD | TPU | {"TPU_WORKER_HOSTNAMES": "a"}, kubernetes=False) is None


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, None),
        ({"worker-network-endpoints": "unknown:unknown:10.0.0.2"}, None),
        ({"worker-network-endpoints": "10.0.0.2", "tpu-env": "WORKER_ID: '0'\n"}, None),
        (
            {"worker-network-endpoints": "u:u:10.0.0.2,u:u:10.0.0.3", "agent-worker-number": "1"},
            ("10.0.0.2:8482", 2, 1),
        ),
        (
            {
                "worker-network-endpoints": "10.0.0.2,10.0.0.3",
                "agent-worker-number": "1",
                "tpu-env": "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
                "MEGASCALE_COORDINATOR_ADDRESS: '10.0.9.9:8080'",
            },
            ("10.0.9.9:8482", 4, 3),
        ),
    ],
)
def test_the_metadata_of_a_tpu_machine(attributes, expected):
    found = detect(TPU, metadata=attributes.get)
    assert (found and found[2:5]) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (SLURM | {"SLURM_PROCID": "4"}, "SLURM_PROCID=4 does not fit SLURM_STEP_NUM_TASKS=4"),
        (SLURM | {"SLURM_PROCID": ""}, "one of several, but SLURM_PROCID is not set"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4x"}, "SLURM_STEP_NUM_TASKS is '4x', not a number"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST, which names their machines"),
        (MPI5, "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT"),
        (SLICE | {"TPU_WORKER_ID": ""}, "TPU_WORKER_ID is not set"),
        (SLICE | {"TPU_WORKER_ID": "4"}, "TPU_WORKER_ID=4 does not fit TPU_WORKER_HOSTNAMES"),
        (SLICE | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "0"}, "is not set"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "but not JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        (NAMED_POD | {"JOB_COMPLETION_INDEX": "2"}, "does not fit JAX_NUM_PROCESSES=2"),
    ],
)
def test_contradictions_are_one_error_with_the_way_out(environ, message):
    with pytest.raises(GlideError) as error:
        detect(environ)
    assert message in str(error.value) and "--coordinator none" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_job_that_forgot_srun_is_told():
    assert "start it by srun" in note_if_alone(BATCH)
    assert "JAX_NUM_PROCESSES" in note_if_alone(POD)
    for environ in (GPU, COLAB, ONE_TASK, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}):
        assert note_if_alone(environ) == ""


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[001-003,007],gpu1", "node001"),
        ("node[7,9]", "node7"),
        ("rack[1-2]node[03-04]", "rack1node03"),
        ("n[1-2]-ib,x", "n1-ib"),
    ],
)
def test_the_first_machine_of_slurms_lists(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("local", "gpus", "expected"),
    [
        ((0, 1), 8, None),  # one process a machine: all
        ((1, 2), 8, [4, 5, 6, 7]),
        ((3, 4), 4, [3]),
        ((1, 4), 1, None),  # the launcher gave each its own
        ((1, 2), 0, None),  # no GPU
    ],
)
def test_processes_of_a_machine_share_its_gpus(local, gpus, expected):
    assert own_gpus(local, gpus) == expected
