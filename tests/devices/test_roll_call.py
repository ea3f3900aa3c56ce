"""All processes come together, or each says who is missing."""

import socket
import threading

import pytest

from glide_jax.devices import roll_call as roll_call_module
from glide_jax.devices.roll_call import roll_call
from glide_jax.errors import GlideError
from tests.devices.test_parallel import free_port


def call(processes, counts=None, seconds=20.0):
    """Run the roll call of these processes at once, and return the errors by process."""
    port, errors = free_port(), {}
    counts = counts or {}

    def one(process):
        try:
            roll_call(f"localhost:{port}", counts.get(process, 3), process, seconds)
        except GlideError as error:
            errors[process] = str(error)

    threads = [threading.Thread(target=one, args=(process,)) for process in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_all_go_on_together():
    assert call([2, 1, 0]) == {}


def test_all_learn_who_is_missing():
    missing = "process 2 of 3 did not come in 2 s"
    assert call([0, 1], seconds=2) == {0: missing, 1: missing}


def test_all_learn_that_they_count_differently():
    errors = call([0, 1], counts={1: 2})
    assert set(errors.values()) == {"process 1 expects 2 processes, process 0 3"}


def test_all_learn_that_two_have_one_index():
    errors = call([0, 1, 1], seconds=5)
    assert set(errors.values()) == {"process 1 of 3 came twice, or is out of range"}


@pytest.mark.parametrize("words", ["1 a b", "1 of b", "² of 2", "GET / HTTP/1.1"])
def test_only_the_whole_greeting_counts(words):
    assert not roll_call_module.GREETING_PATTERN.fullmatch(words)
    assert roll_call_module.GREETING_PATTERN.fullmatch("glide-jax process 1 of 2").groups() == (
        "1",
        "2",
    )


def test_a_missing_first_process_is_named():
    assert call([1], seconds=1)[1].startswith("process 0 was not reached in 1 s: ")


def test_a_host_that_is_unknown_is_named():
    with pytest.raises(GlideError, match="process 0 was not reached in 1 s"):
        roll_call("no-such-host.invalid:1", 2, 1, 1)


def test_strangers_are_not_counted():
    port = free_port()
    errors = []

    def first():
        try:
            roll_call(f"localhost:{port}", 2, 0, 3)
        except GlideError as error:
            errors.append(str(error))

    thread = threading.Thread(target=first)
    thread.start()
    for _ in range(50):
        try:
            with socket.create_connection(("localhost", port), timeout=1) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\n")
                break
        except OSError:
            thread.join(0.05)
    thread.join()
    assert errors == ["process 1 of 2 did not come in 3 s"]


def test_a_port_in_use_names_the_way_out():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(GlideError, match=f"its port {port}, .*JAX_COORDINATOR_PORT"):
            roll_call(f"localhost:{port}", 2, 0, 1)
