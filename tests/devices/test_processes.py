"""The user's own command under a launcher: no option, and the run of one process."""

import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from glide_jax.devices.processes import Membership, join, visible_gpus
from glide_jax.errors import GlideError
from glide_jax.training.runs import restore_run
from tests.devices.test_parallel import free_port
from tests.support.commands import RECIPE, ROOT, environment, make_images, one_line, run

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_NTASKS": "2",
    "SLURM_NODEID": "0",
}
# What every process of four says once all have met: all, itself, and the word of the last.
MEET = """
from glide_jax.devices.processes import join, shared_text
join()
import jax
index = jax.process_index()
print(jax.process_count(), index, shared_text("I am 3" if index == 3 else ""))
"""


def start(*arguments, **variables):
    """Start `python <arguments>` with these variables."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes):
    """Return the lines that each process printed; all end well."""
    ended = [process.communicate(timeout=600) for process in processes]
    for process, (out, err) in zip(processes, ended, strict=True):
        assert process.returncode == 0, out + err
    return [[line for line in out.splitlines() if "Gloo" not in line] for out, _ in ended]


def test_two_tasks_of_slurm_train_without_an_option_as_one_process_does(tmp_path):
    images = make_images(tmp_path / "images")
    command = ["train.py", "--config", RECIPE, "--data.source", images, "--steps", 2]
    command += ["--sample-every", 0, "--out"]
    port = str(free_port())
    alone = start(*command, tmp_path / "one")
    tasks = [
        start(
            *(*command, tmp_path / "two"),
            **SLURM | {"SLURM_PROCID": i, "SLURM_LOCALID": i, "JAX_COORDINATOR_PORT": port},
        )
        for i in "01"
    ]
    one, first, second = finish([alone, *tasks])
    assert first[0] == (
        "2 processes found each other by Slurm (SLURM_STEP_NUM_TASKS=2), the first at "
        f"localhost:{port}"
    )
    assert "8 a step on 2 cpu" in first[1] and "8 a step on 1 cpu" in one[0]
    assert first[-1] == f"2 of 2 steps done: {tmp_path / 'two'}" and second == []
    states = [restore_run(tmp_path / name)[1] for name in ("one", "two")]
    assert states[0].step == states[1].step == 2
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        *(state.params for state in states),
    )


def test_four_processes_of_open_mpi_find_each_other():
    variables = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    variables |= {"JAX_COORDINATOR_PORT": str(free_port())}
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    ranks = [start("-c", MEET, **variables, **dict.fromkeys(names, str(i))) for i in range(4)]
    lines = finish(ranks)
    assert [line[-1] for line in lines] == [f"4 {i} I am 3" for i in range(4)]
    assert lines[0][0].startswith("4 processes found each other by Open MPI")


def test_a_launcher_that_contradicts_itself_is_one_line(monkeypatch):
    for name, value in (SLURM | {"SLURM_PROCID": "2"}).items():
        monkeypatch.setenv(name, value)
    error = one_line(run("train.py", "--config", RECIPE), 1)
    assert "SLURM_PROCID=2 does not fit SLURM_STEP_NUM_TASKS=2" in error
    # A process that is told to be alone, and a dry run, ask neither.
    for options in (["--coordinator", "none"], ["--dry-run", "nothing"]):
        assert "SLURM" not in one_line(run("train.py", "--config", RECIPE, *options), 2)


def test_peers_that_do_not_come_are_one_error(monkeypatch):
    monkeypatch.setattr("glide_jax.devices.processes._started", lambda: False)
    for name, value in (SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", str(free_port()))
    with pytest.raises(GlideError) as error:
        join(seconds=0.2)
    assert str(error.value) == (
        "cannot join the other processes (process 1 of 2 did not come in 0.2 s; Slurm: "
        "SLURM_STEP_NUM_TASKS=2): name the peers with --coordinator HOST:PORT --num-processes N "
        "--process-id I, or say --coordinator none for a process alone"
    )
    join(Membership("none"))


def test_a_process_alone_says_nothing_and_opens_no_connection(monkeypatch, capsys):
    for name in [name for name in os.environ if name.startswith(("SLURM", "OMPI", "TPU"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("socket.socket.connect", None)
    join()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("value", "count"), [("0,1,2", 3), ("GPU-1a", 1), ("", 0)])
def test_gpus_are_counted_without_starting_them(monkeypatch, value, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible_gpus() == count


def test_a_process_whose_peer_is_killed_ends_with_one_line(tmp_path):
    images, out = make_images(tmp_path / "images"), tmp_path / "run"
    command = ["train.py", "--config", RECIPE, "--data.source", images, "--steps", 1_000_000]
    command += ["--save-every", 5, "--sample-every", 0, "--data.workers", 1, "--out", out]
    command += ["--coordinator", f"localhost:{free_port()}", "--num-processes", 2, "--process-id"]
    both = [start(*command, i) for i in range(2)]
    deadline = time.monotonic() + 300
    while not (out / "checkpoints" / "5").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    both[1].kill()
    _, text = both[0].communicate(timeout=50)  # jax's own end would take a minute
    both[1].communicate()
    assert both[0].returncode == 1, text
    # Without the progress bar.
    lines = [line for line in text.replace("\r", "\n").splitlines() if "/1000000 [" not in line]
    (line,) = filter(str.strip, lines)
    assert line.startswith(("error: another process has ended", "error: process 1 has"))
    assert line.endswith("start all processes again, with the same command")
