"""Weights of the Hub: downloads from a server on this machine, and every error as one line."""

import json
import pickle
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

from glide_jax.errors import UsageError
from glide_jax.weights.hub import download
from glide_jax.weights.registry import ASSETS
from glide_jax.weights.store import CONFIG, MODEL, load_weights
from tests.support.commands import ROOT, make_weights
from tests.support.model_hub import TOKEN, Client, hub

pytest.importorskip("huggingface_hub")
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
SUPERRES = ROOT / "tests" / "fixtures" / "golden" / "weights_superres.pt"


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (CONFIG, MODEL)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The files of two models of random weights."""
    folder = tmp_path_factory.mktemp("weights")
    return [files_of(make_weights(folder / str(seed), seed=seed)) for seed in (0, 1)]


@pytest.fixture
def client(tmp_path):
    with hub() as server:
        yield Client(server, tmp_path)


def test_revisions_folders_and_files(client, weights):
    old = client.server.add("user/tiny", weights[0])
    new = client.server.add(
        "user/tiny", weights[1] | {"old/" + k: v for k, v in weights[0].items()}
    )
    client.server.repos["user/tiny"].refs |= {"v1": old, "a/b": old}
    client.server.add("user/file", {"base.pt": SUPERRES.read_bytes(), "run.py": b"raise"})
    names = [
        "hf://user/tiny",
        f"hf://user/tiny@{old}",
        "hf://user/tiny@v1",
        "hf://user/tiny@a%2Fb",
        "hf://user/tiny/old",
    ]
    *found, only, named = client.download(*names, "hf://user/file", "hf://user/file/base.pt")
    pinned = f"hf://user/tiny@{old}"
    assert [name for _, name in found] == [
        f"hf://user/tiny@{new}", pinned, pinned, pinned, f"hf://user/tiny@{new}/old",
    ]  # fmt: skip
    for (path, _), expected in zip(found, [1, 0, 0, 0, 0], strict=True):
        assert files_of(Path(path)) == weights[expected]
    assert Path(only[0]).read_bytes() == Path(named[0]).read_bytes() == SUPERRES.read_bytes()
    assert not [asked for asked in client.server.asked if asked.endswith(".py")]


def test_every_place_that_takes_weights(client, weights):
    client.server.add("user/tiny", weights[0])
    client.server.add("user/clip", files_of(ASSETS / "emoji_clip64"))
    client.server.add("user/up", files_of(ASSETS / "emoji_upsample256"))
    code = """
import json, numpy as np, glide_jax as glide
from pathlib import Path
from glide_jax.weights.store import flatten
from glide_jax.training.runs import sampling_defaults
names = {"upsampler": "hf://user/up", "weak_model": "hf://user/tiny", "clip_model": "hf://user/clip"}
pipe = glide.load(Path("hf://user/tiny"), **names)
clip = glide.load_clip("hf://user/clip")
up = pipe.upsampler.model
np.savez("arrays.npz", **flatten(pipe.model.params))
print(json.dumps([pipe.model.name, pipe.weak_stage.model.name, pipe.clip.name, clip.name, up.name,
                  up.config.variant, sampling_defaults("hf://user/tiny")]))
"""
    result = client.run("-c", code)
    assert result.returncode == 0, result.stderr
    head = {name: repo.refs["main"] for name, repo in client.server.repos.items()}
    tiny, clip = f"hf://user/tiny@{head['user/tiny']}", f"hf://user/clip@{head['user/clip']}"
    up = f"hf://user/up@{head['user/up']}"
    assert json.loads(result.stdout) == [tiny, tiny, clip, clip, up, "superres", {"steps": 4}]
    folder = client.home / "expected"
    folder.mkdir()
    for name, data in weights[0].items():
        (folder / name).write_bytes(data)
    _, expected, _ = load_weights(folder)
    with np.load(client.home / "arrays.npz") as found:
        assert set(found) == set(expected)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_errors_are_one_line(client, weights):
    server = client.server
    main = server.add("user/tiny", weights[0])
    server.add("user/secret", weights[0], private=True)
    server.add("user/gated", weights[0], gated=True)
    server.add("user/half", {CONFIG: weights[0][CONFIG]})
    server.add("user/other", {"config.json": b'{"model_type": "bert"}', MODEL: b"x", "x.py": b""})
    server.add("user/empty", {"README.md": b"soon"})
    server.add("user/many", {f"{i}.pt": b"" for i in range(8)})
    missing = "or it is private: check the name; for a private one " + LOG_IN
    expected = {
        "hf://user/nobody": (1, f"there is no repository user/nobody at {server.url}, {missing}"),
        "hf://user/secret": (1, f"there is no repository user/secret at {server.url}, {missing}"),
        "hf://user/gated": (1, f"gated: accept its terms at {server.url}/user/gated, and {LOG_IN}"),
        "hf://user/tiny@v9": (1, "has no revision 'v9': name a branch, a tag or a commit"),
        f"hf://user/tiny@{main[::-1]}": (1, f"user/tiny has no revision '{main[::-1]}'"),
        "hf://user/tiny/none": (1, "is no folder or file: user/tiny holds config.json, model.saf"),
        "hf://user/half": (1, "hf://user/half has config.json but no model.safetensors"),
        "hf://user/other": (
            1,
            "hf://user/other holds no weights of glide-jax (config.json is of another program): it "
            "holds config.json, model.safetensors, x.py",
        ),
        "hf://user/empty": (1, "hf://user/empty holds no weights of glide-jax: it holds README.md"),
        "hf://user/many": (
            2,
            "hf://user/many holds several files of weights, 0.pt, 1.pt, 2.pt, 3.pt, 4.pt, 5.pt and "
            "2 more: name one, for example hf://user/many/0.pt",
        ),
        "hf://user": (2, "'hf://user' does not name a repository of the Hub"),
    }  # fmt: skip
    found = client.download(*expected)
    for (name, (code, message)), (exit_code, line) in zip(expected.items(), found, strict=True):
        assert exit_code == code, name
        assert message in line and line.isprintable()
    assert not [a for a in server.asked if a.endswith((".py", "other/resolve/main/" + MODEL))]


def test_tokens(client, weights):
    client.server.add("user/secret", weights[0], private=True)
    commit = client.server.repos["user/secret"].refs["main"]
    ((code, line),) = client.download("hf://user/secret", HF_TOKEN="hf_wrong")
    assert code == 1
    assert (
        line
        == f"hf://user/secret: {client.server.url} refuses the token: {LOG_IN}, with a valid one"
    )
    ((path, name),) = client.download("hf://user/secret", HF_TOKEN=TOKEN)
    assert name == f"hf://user/secret@{commit}" and files_of(Path(path)) == weights[0]


def test_offline_and_without_a_network(client, weights):
    client.server.add("user/tiny", weights[0])
    client.server.add("user/file", {"base.pt": SUPERRES.read_bytes()})
    online = client.download("hf://user/tiny", "hf://user/file")
    asked = len(client.server.asked)
    names = ("hf://user/tiny", online[0][1], "hf://user/file", "hf://user/new")
    *found, (code, line) = client.download(*names, HF_HUB_OFFLINE="1")
    assert found == [online[0], online[0], online[1]] and len(client.server.asked) == asked
    assert (code, line) == (
        1,
        "hf://user/new: it is not in the cache of downloads, and HF_HUB_OFFLINE is set: unset it, "
        "or run once with a network",
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        *found, (code, line) = client.download(*names, HF_ENDPOINT=address)
    assert found == [online[0], online[0], online[1]]
    assert code == 1 and line.startswith(f"hf://user/new: cannot reach {address} (")
    client.server.broken = 503
    ((code, line),) = client.download("hf://user/new")
    assert code == 1 and "answered with the error 503" in line


def test_a_hostile_file_runs_nothing(client):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (client.home / "it ran",)

    client.server.add("user/bad", {"base.pt": pickle.dumps(Hostile(), 2), "hubconf.py": b"1 / 0"})
    result = client.glide("sample", "red", "--weights", "hf://user/bad")
    assert result.returncode == 1 and result.stderr.startswith("error: ")
    assert not (client.home / "it ran").exists()


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError) as error:
        download("hf://user/tiny")
    assert str(error.value) == (
        "weights of the Hub (hf://) need huggingface_hub: pip install '.[hub]'"
    )


def test_conversion_from_the_hub_and_not_to_it(client, weights):
    client.server.add("user/tiny", weights[0])
    result = client.glide("weights", "convert", "hf://user/tiny", "here")
    assert result.returncode == 0, result.stderr
    assert files_of(client.home / "here")[MODEL] == weights[0][MODEL]
    shutil.rmtree(client.home / "here")
    result = client.glide("weights", "convert", "emoji64", "hf://user/tiny")
    assert result.returncode == 2
    assert result.stderr == ("error: to upload, use glide-jax weights push FOLDER hf://user/tiny\n")
