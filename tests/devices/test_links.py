"""A process notices at once that another one is gone, however it went."""

import socket
import subprocess
import sys
import time

import pytest

from glide_jax.devices import links
from tests.devices.test_parallel import free_port
from tests.support.commands import ROOT, environment

# Three processes without jax: the last one goes in a way of its own, while the others sleep.
SCRIPT = """
import os, sys, time
from glide_jax.devices import links
from glide_jax.devices.roll_call import roll_call
links.GRACE_SECONDS = 0.1
port, index, way = sys.argv[1:]
own = links.Links(roll_call(f"localhost:{port}", 3, int(index), 60))
own.watch("start again")
if index == "2":
    time.sleep(0.5)
    if way == "kill":
        os.kill(os.getpid(), 9)
    own.close(way == "done")
    sys.exit()
time.sleep(3 if way == "done" else 60)
own.close(True)
"""


def ends(way):
    """Return exit code and stderr of processes 0 and 1 after process 2 went this way."""
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(port), str(index), way],
            cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True,
        )
        for index in range(3)
    ]  # fmt: skip
    errors = [process.communicate(timeout=50)[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, errors, strict=True)][:2]


@pytest.mark.parametrize("way", ["kill", "failed"])
def test_all_end_with_one_line_when_one_is_gone(way):
    line = "\nerror: {} has ended or cannot be reached: start again\n"
    assert ends(way) == [(1, line.format("process 2")), (1, line.format("another process"))]


def test_the_others_go_on_when_one_is_done():
    assert ends("done") == [(0, ""), (0, "")]


def test_a_process_that_closes_its_links_is_not_ended_afterwards(monkeypatch):
    monkeypatch.setattr(links, "GRACE_SECONDS", 0)
    monkeypatch.setattr("os._exit", None)
    own, other = socket.socketpair()
    watched = links.Links({1: own})
    watched.watch("")
    watched.close(False)
    assert other.recv(1) == links.FAILED
    other.close()
    time.sleep(0.2)  # the thread sees it, and is held


@pytest.mark.parametrize("closed", ["a pipe", "a file"])
def test_a_closed_stderr_does_not_stop_the_end(closed, monkeypatch):
    class Closed:
        def write(self, _):
            raise BrokenPipeError if closed == "a pipe" else ValueError

        flush = write

    class Ended(BaseException):
        pass

    def leave(code):
        raise Ended(code)

    own, other = socket.socketpair()
    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr("sys.stderr", Closed())
    with pytest.raises(Ended) as ended:
        links.Links({1: own}).end("process 1 has ended")
    assert ended.value.args == (1,)
    assert other.recv(1) == links.LOST_ANOTHER
    own.close()
    other.close()
