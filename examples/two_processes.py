"""Train over two processes on this machine: what a cluster does with one command on each host.

Both processes get all arguments of the script.

python examples/two_processes.py --config cfg64:toy --data.source images --steps 20
"""

import socket
import subprocess
import sys


def free_port() -> int:
    """Return a port on which process 0 can wait for the other."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def train(arguments: list[str]) -> int:
    """Run `glide-jax train` in two processes and return the larger exit code.

    Each process has its own devices; together they share every batch. Both write to one folder.
    """
    coordinator = f"localhost:{free_port()}"
    command = [sys.executable, "-m", "glide_jax", "train", *arguments]
    command += ["--coordinator", coordinator, "--num-processes", "2", "--process-id"]
    peers = [subprocess.Popen([*command, str(index)]) for index in range(2)]
    return max(peer.wait() for peer in peers)


if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
