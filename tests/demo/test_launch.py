"""`glide-jax demo`: options, and one line where it cannot serve."""

import importlib.util
import signal
import socket
import subprocess
import sys

import pytest

from glide_jax.demo.launch import open_studio, read_demo_options, serve
from glide_jax.errors import GlideError, UsageError
from tests.support.commands import environment, one_line, run

HAS_GRADIO = importlib.util.find_spec("gradio") is not None


def test_only_this_machine_unless_it_is_asked():
    options = read_demo_options([])
    assert (options.host, options.share, str(options.out)) == ("127.0.0.1", False, "samples")
    asked = read_demo_options(["--host", "0.0.0.0", "--share", "--weights", "runs/a"])
    assert (asked.host, asked.share, asked.model.weights) == ("0.0.0.0", True, "runs/a")


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"the page needs gradio: pip install '\.\[demo\]'"):
        serve(read_demo_options([]))


def test_weights_that_cannot_be_the_page_are_named(tmp_path):
    out = ("--out", str(tmp_path / "out"))
    with pytest.raises(UsageError, match="emoji_upsample256 is an upsampler: give the weights of"):
        open_studio(read_demo_options(["--weights", "emoji_upsample256", *out]))
    with pytest.raises(UsageError, match="there are no weights 'emoji65'"):
        open_studio(read_demo_options(["--weights", "emoji65", *out]))
    (tmp_path / "file").write_text("")
    with pytest.raises(GlideError, match="cannot write to"):
        open_studio(read_demo_options(["--out", str(tmp_path / "file")]))


def test_the_package_does_not_need_gradio_for_anything_else():
    code = "import sys, glide_jax.demo.launch; print('gradio' in sys.modules)"
    assert run("-c", code).stdout.strip() == "False"


@pytest.mark.skipif(not HAS_GRADIO, reason="the page needs gradio")
def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("-m", "glide_jax", "demo", "--port", port, cwd=tmp_path)
    assert f"cannot serve the page on 127.0.0.1, port {port}" in one_line(result, 1)


@pytest.mark.skipif(HAS_GRADIO, reason="gradio is installed")
def test_the_command_ends_with_one_line_without_gradio(tmp_path):
    result = run("-m", "glide_jax.demo", cwd=tmp_path)
    assert one_line(result, 2) == "error: the page needs gradio: pip install '.[demo]'"


@pytest.mark.skipif(not HAS_GRADIO, reason="the page needs gradio")
def test_an_interrupt_ends_it_quietly_while_it_compiles(tmp_path):
    command = [sys.executable, "-m", "glide_jax.demo"]
    variables = environment() | {"GLIDE_JAX_CACHE": str(tmp_path / "cache")}
    server = subprocess.Popen(
        command, cwd=tmp_path, env=variables, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert server.stdout is not None
    assert server.stdout.readline().startswith("open http://127.0.0.1:")
    server.send_signal(signal.SIGINT)
    _, errors = server.communicate(timeout=120)
    assert (server.returncode, errors) == (0, "")
