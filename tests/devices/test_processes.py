"""The user's own command under a launcher: no option, and the run of one process."""

import json
import os
import subprocess
import sys

import pytest

from glide_jax.devices.cluster import PORTS
from glide_jax.devices.processes import Peers, join, visible_gpus
from glide_jax.errors import GlideError
from tests.devices.test_parallel import free_port
from tests.support.commands import RECIPE, ROOT, environment, make_images, run


def command(images, out):
    """Return the user's command: the tiny recipe for two steps, without `--coordinator`."""
    options = ["--data.source", images, "--out", out, "--steps", 2, "--log-every", 1]
    options += ["--sample-every", 0, "--name", "run"]
    return list(map(str, ["train.py", "--config", RECIPE, *options]))


def losses(out):
    """Return the logged losses by step."""
    (path,) = out.rglob("metrics.jsonl")
    rows = map(json.loads, path.read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}
