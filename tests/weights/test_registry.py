"""OpenAI's files: download, recognition of the model, and its default sampling settings."""

import base64
import hashlib
import http.server
import threading
import urllib.request
from dataclasses import replace

import numpy as np
import pytest

from glide_jax.diffusion.schedule import make_schedule
from glide_jax.errors import GlideError, UsageError
from glide_jax.models.presets import PRESETS, ModelConfig
from glide_jax.pipeline.clip_guide import load_clip
from glide_jax.pipeline.settings import Settings
from glide_jax.weights import from_released, write_torch_file
from glide_jax.weights.registry import FORMAT, Model, load_model, load_torch, save_torch
from glide_jax.weights.released_files import (
    FILES,
    PRESET_OF,
    fetch,
    recognise,
    released_defaults,
)
from glide_jax.weights.store import save_weights
from tests.support import golden
from tests.support.commands import ROOT

SUPERRES = ROOT / "tests" / "fixtures" / "golden" / "weights_superres.pt"


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert message.isprintable() and len(message) < 1500
    return message


# ---------------------------------------------------------------- default settings


@pytest.mark.parametrize(
    ("preset", "rows", "sampler", "scale", "temperature", "schedule"),
    [
        ("base64", 100, "ddpm", 3.0, 1.0, "cosine"),
        ("inpaint64", 100, "ddpm", 5.0, 1.0, "cosine"),
        ("upsample256", 27, "ddim", 1.0, 0.997, "linear"),
        ("inpaint256", 27, "ddpm", 1.0, 0.997, "linear"),
    ],
)
def test_the_default_settings_are_those_of_openais_notebooks(
    preset, rows, sampler, scale, temperature, schedule, tmp_path
):
    variant = PRESETS[preset]().variant
    write_torch_file(tmp_path / "a.pt", golden.state_dict(variant))
    model = load_torch(tmp_path / "a.pt", "a", golden.config(variant))
    assert released_defaults(PRESETS[preset]()) == model.defaults
    assert model.noise_schedule == schedule and model.diffusion_steps == 1000
    settings = Settings().changed(**model.defaults)
    assert (settings.sampler, settings.guidance_scale) == (sampler, scale)
    assert (settings.temperature, settings.clip_guidance_scale) == (
        temperature,
        0,
    ) and not settings.eta
    assert len(settings.plan(make_schedule(schedule), [])) == rows


def test_every_released_name_has_a_file_and_a_preset():
    assert set(PRESET_OF) | {"openai/clip-image", "openai/clip-text"} == set(FILES)
    assert set(PRESET_OF.values()) <= set(PRESETS)


# ---------------------------------------------------------------- recognition


def first_arrays(config: ModelConfig) -> dict[str, np.ndarray]:
    """Return the arrays by which a preset is recognised, without memory."""
    shapes = {
        "input_blocks.0.0.weight": (
            config.model_channels,
            config.in_channels * config.patch**2,
            3,
            3,
        ),
        "token_embedding.weight": (config.n_vocab, config.xf_width),
        "positional_embedding": (config.text_ctx, config.xf_width),
    }
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_recognised(name):
    config = PRESETS[name]()
    assert recognise(first_arrays(config)) == config
    with pytest.raises(GlideError, match="these 3 arrays fit none of the known sizes"):
        recognise(first_arrays(replace(config, xf_width=24)))


def test_a_file_of_a_known_size_is_loaded_and_the_faults_of_another_are_named(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(PRESETS, "small", lambda: golden.config("superres"))
    model = load_model(SUPERRES)
    assert model.config == golden.config("superres")
    head = model.params["unet"]["head"]["kernel"]
    weights = dict(golden.state_dict("superres"))
    assert head.dtype == np.float32 and not head.flags.owndata  # It is mapped.
    assert np.array_equal(head, weights["out.2.weight"].transpose(2, 3, 1, 0))

    del weights["final_ln.bias"]
    weights["out.2.weight"] = np.zeros((3, 32, 3, 3), np.float32)
    weights["out.0.bias"] = np.zeros(32, np.int64)
    weights["extra\n\x1b[31m"] = np.zeros(1, np.float32)
    write_torch_file(tmp_path / "b.pt", weights)
    with pytest.raises(GlideError) as caught:
        load_model(tmp_path / "b.pt")
    assert one_line(caught) == (
        "these weights do not fit the model: 1 missing (final_ln.bias); "
        r"1 unexpected (extra\n\x1b[31m); "
        "1 of the wrong shape (out.2.weight (3, 32, 3, 3), not (6, 32, 3, 3)); "
        "1 of the wrong dtype (out.0.bias int64, not float32)"
    )


def test_the_error_for_other_arrays_names_the_reason(tmp_path):
    write_torch_file(tmp_path / "image.pt", golden.load("weights_clip_image"))
    with pytest.raises(GlideError, match="noised CLIP's image encoder: a CLIP is two files") as one:
        load_model(tmp_path / "image.pt")
    one_line(one)
    with pytest.raises(GlideError, match="these 181 arrays fit none of the known sizes") as two:
        load_model(SUPERRES)
    one_line(two)
    with pytest.raises(UsageError, match="there are no weights 'openai/bse'.*'openai/base'"):
        load_model("openai/bse")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prediction_type": "v"}, "it predicts v"),
        ({"low_res_timestep": True}, "takes the noise level"),
        ({"guidance_scale_input": True}, "takes the scale of guidance"),
    ],
)
def test_a_model_that_the_original_code_cannot_use_is_not_written_for_it(changes, reason, tmp_path):
    config = golden.config("superres")
    params = from_released(config, golden.state_dict("superres"))
    inputs = ("low_res_timestep", "guidance_scale_input")
    config = replace(config, **{name: changes.pop(name, False) for name in inputs})
    with pytest.raises(GlideError, match=f"cannot use mine: .*{reason}") as caught:
        save_torch(Model("mine", config, params, **changes), tmp_path / "mine.pt")
    one_line(caught)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "nearest"),
    [("low_res_level", "low_res_timestep"), ("guidance_input", "guidance_scale_input")],
)
def test_a_folder_with_a_field_of_another_version_names_the_nearest_field(field, nearest, tmp_path):
    config = {"format": FORMAT, "model": {field: False}}
    save_weights(tmp_path, config, {"a": np.zeros(1, np.float32)})
    with pytest.raises(GlideError) as caught:
        load_model(tmp_path)
    assert one_line(caught) == (
        f"{tmp_path / 'config.json'} does not describe a model: "
        f"unknown field {field!r}, did you mean {nearest!r}?"
    )


# ---------------------------------------------------------------- download


class Server(http.server.BaseHTTPRequestHandler):
    """A server that answers with `body`, and states the length and the MD5 of `stated`."""

    body = b"released weights" * 1000
    stated = body
    status = 200

    def do_GET(self):
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.stated)))
        md5 = hashlib.md5(self.stated, usedforsecurity=False).digest()
        self.send_header("Content-MD5", base64.b64encode(md5).decode())
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_):
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no proxy for the local server."""
    monkeypatch.setenv("GLIDE_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(urllib.request, "_opener", None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "released"


@pytest.fixture
def serve():
    """A function `serve(**changes)` that starts a changed `Server` and returns its address."""
    servers = []

    def start(**changes):
        handler = type("Changed", (Server,), changes)
        servers.append(http.server.HTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_file_is_downloaded_once_and_checked_when_it_is_used_again(cache, serve):
    path = fetch("openai/base", serve())
    assert path == cache / "base.pt" and path.read_bytes() == Server.body
    assert fetch("openai/base", "http://127.0.0.1:9") == path
    assert sorted(p.name for p in cache.iterdir()) == ["base.json", "base.pt"]
    record = (cache / "base.json").read_text()
    for data, note in ((b"other", record), (Server.body, "{"), (Server.body, "{}")):
        path.write_bytes(data)
        (cache / "base.json").write_text(note)
        with pytest.raises(GlideError, match=r"base\.pt was changed since its download: delete it"):
            fetch("openai/base")
    path.unlink()
    assert fetch("openai/base", serve(body=b"new", stated=b"new")).read_bytes() == b"new"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"body": Server.body[:-1]}, "it arrived incomplete"),
        ({"body": b"x" * len(Server.body)}, "it arrived incomplete"),
        ({"status": 404}, "Not Found"),
    ],
)
def test_a_download_that_fails_leaves_nothing(changes, reason, cache, serve):
    with pytest.raises(GlideError) as caught:
        fetch("openai/upsample", serve(**changes))
    assert f"upsample.pt ({reason}" in one_line(caught)
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("load", "name", "files"),
    [
        (load_model, "openai/base", "base.pt"),
        (load_clip, "openai/clip", "clip_image_enc.pt clip_text_enc.pt"),
    ],
)
def test_without_a_network_the_error_says_what_else_to_do(load, name, files, cache, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(GlideError) as caught:
        load(name)
    message = one_line(caught)
    assert message.startswith("cannot download https://") and "refused" in message
    assert f"`glide-jax weights convert {files} FOLDER`" in message
    assert not list(cache.iterdir())


def test_a_full_disk_is_not_taken_for_a_broken_network(cache, serve):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    address = serve()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(GlideError, match=r"cannot save to .*File too large") as caught:
            fetch("openai/base", address)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one_line(caught)
    assert not list(cache.iterdir())


def test_an_unknown_file_of_openai():
    with pytest.raises(GlideError, match=r"OpenAI released no file 'openai/bases', did you mean"):
        fetch("openai/bases")
