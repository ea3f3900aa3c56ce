"""The command `glide-jax`: its scripts and commands, from any folder, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from glide_jax.__main__ import COMMANDS
from glide_jax.errors import one_line_errors
from tests.support.commands import ROOT, environment, make_weights, one_line, run


def command(*arguments, **options):
    return run("-m", "glide_jax", *arguments, **options)


def test_without_a_command_it_lists_them():
    for arguments in ((), ("--help",)):
        result = command(*arguments)
        assert result.returncode == 0
        assert all(f"\n  {name} " in result.stdout for name in COMMANDS)


def test_an_unknown_command_is_one_line_with_the_nearest():
    assert "did you mean 'sample'" in one_line(command("sampel", "a cat"), 2)


def test_env_says_what_a_bug_report_needs():
    result = command("env")
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["jax"] == jax.__version__
    assert lines["devices"] == "1 (cpu: cpu)" and lines["weights"].startswith("emoji64")
    assert {"glide-jax", "Python", "flax", "cache", "JAX_PLATFORMS"} <= set(lines)
    assert "takes no options" in one_line(command("env", "--all"), 2)


def test_env_names_a_wrong_dtype_beside_the_devices(monkeypatch):
    monkeypatch.setenv("GLIDE_JAX_DTYPE", "half")
    lines = command("env").stdout.splitlines()
    found = {line[:20].strip(): line[21:] for line in lines}
    assert found["devices"] == "1 (cpu: cpu)" and found["GLIDE_JAX_DTYPE"] == "half"
    wanted = "none: GLIDE_JAX_DTYPE=half: choose auto, float32, bfloat16, float16"
    assert found["trunk dtype"] == wanted


def test_the_help_of_env_is_help():
    for option in ("-h", "--help"):
        result = command("env", option)
        assert result.returncode == 0
        assert result.stdout.startswith("usage: glide-jax env [-h]\n")
        assert "\ndevices  " not in result.stdout


def test_sample_runs_in_any_folder(tmp_path):
    weights = make_weights(tmp_path / "tiny")
    result = command("sample", "red", "--weights", weights, "--steps", 1, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "samples" / "00000_red.png").is_file()


@pytest.mark.parametrize(
    ("name", "shows"),
    [
        ("sample", "--guidance-scale"),
        ("train", "--config"),
        ("evaluate", "ranking"),
        ("weights", "convert"),
        ("data", "rasterise"),
    ],
)
def test_every_command_has_a_help(name, shows, tmp_path):
    result = command(name, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert shows in result.stdout and f"glide-jax {name}" in result.stdout


@pytest.mark.parametrize("arguments", [("env",), ("--help",), ("sample", "--help")])
def test_a_closed_pipe_is_quiet(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "glide_jax", *arguments],
        cwd=ROOT, env=environment(), stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


def test_a_full_output_is_one_line():
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "glide_jax", "--help"],
            cwd=ROOT, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True,
            check=False,
        )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr == "error: No space left on device: the disk\n"


def test_a_terminal_that_cannot_print_a_character_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii:strict")
    weights = make_weights(tmp_path / "tiny")
    result = command("sample", "un café 🍎", "--weights", weights, "--steps", 1, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "samples" / "00000_un-café.png").is_file()
    assert r"00000_un-caf\xe9.png  un caf\xe9 \U0001f34e" in result.stdout
    assert command("sample", "--help").returncode == 0


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory\nmore", "; use a smaller --batch-size"),
        ("INTERNAL: failed", ""),
    ],
)
def test_an_error_of_a_device_is_one_line(message, line, capsys):
    with pytest.raises(SystemExit) as error, one_line_errors():
        raise jax.errors.JaxRuntimeError(message)
    assert error.value.code == 1
    assert capsys.readouterr().err == f"error: {message.splitlines()[0]}{line}\n"
