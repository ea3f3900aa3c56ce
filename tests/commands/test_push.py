"""`glide-jax weights push`: the commit on a server of this machine, and what it refuses."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from glide_jax.training.runs import load_run
from glide_jax.weights.store import CONFIG, MODEL, flatten, load_weights
from tests.support.commands import RECIPE, make_images, make_weights
from tests.support.model_hub import TOKEN, Client, hub

pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture
def client(tmp_path):
    with hub() as server:
        yield Client(server, tmp_path)


def head(client, name, ref="main"):
    repo = client.server.repos[name]
    return repo.commits[repo.refs[ref]]


def refused(result, code):
    assert result.returncode == code, result.stdout + result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.stderr
    return line


def test_a_pushed_folder_comes_back_to_the_bit_and_makes_the_same_image(client, folder):
    words = ("--license", "mit", "--message", "the first", "--private")
    result = client.glide("weights", "push", folder, "hf://user/tiny", *words, HF_TOKEN=TOKEN)
    assert result.returncode == 0, result.stderr
    repo = client.server.repos["user/tiny"]
    commit = repo.refs["main"]
    assert result.stdout.splitlines()[-1] == f"this commit: hf://user/tiny@{commit}"
    assert repo.private and repo.messages[-1] == "the first"
    files = head(client, "user/tiny")
    assert set(files) == {".gitattributes", "README.md", CONFIG, MODEL}
    assert all(files[name] == (folder / name).read_bytes() for name in (CONFIG, MODEL))
    assert b'license: "mit"' in files["README.md"]
    (command,) = re.findall(r"\nglide-jax (sample .*)\n", files["README.md"].decode())
    words = command.split()
    assert words == ["sample", "red", "--weights", "hf://user/tiny"]
    for weights, out in ((words[-1], "a"), (folder, "b")):
        few = ("--weights", weights, "--steps", "1", "--out", out)
        result = client.glide("sample", "red", *few, HF_TOKEN=TOKEN)
        assert result.returncode == 0, result.stderr
    ours, theirs = (Image.open(client.home / out / "00000_red.png") for out in "ab")
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert json.loads(ours.info["glide_jax"])["weights"] == f"hf://user/tiny@{commit}"


def test_a_run_its_card_and_a_run_that_begins_with_it(client):
    make_images(client.home / "images" / "train")
    make_images(client.home / "images" / "validation", count=8)
    common = ("--data.source", "images", "--sample-every", 0, "--log-every", 1)
    train = ("train", "--config", RECIPE, *common)
    result = client.glide(*train, "--validate-every", 2, "--steps", 2, "--out", "first")
    assert result.returncode == 0, result.stderr
    result = client.glide("weights", "push", "first", "hf://user/first", HF_TOKEN=TOKEN)
    assert result.returncode == 0, result.stderr
    card = head(client, "user/first")["README.md"].decode()
    for line in (
        "| recipe | `tiny` |",
        "| steps | 2 |",
        "| data | `images` |",
        "| began with | random weights |",
        "| guidance_scale | `3.0` |",
    ):
        assert line in card
    assert re.search(r"\| held-out loss \| [\d.]+ \(step 2, `validation`\) \|", card)
    assert re.search(r"\| time by the log \| \d+\.\d minutes, with compilation \|", card)
    assert "base_model" not in card and str(client.home) not in card
    ((path, _),) = client.download("hf://user/first")
    _, arrays, _ = load_weights(path)
    trained = flatten(load_run(client.home / "first").params)
    name = "unet/down_0/kernel"
    assert np.array_equal(arrays[name], np.asarray(trained[name]).astype(arrays[name].dtype))

    begin = ("--init-from", "hf://user/first", "--steps", 1, "--out", "second")
    result = client.glide(*train, *begin)
    assert result.returncode == 0, result.stderr
    words = ("push", "second", "hf://user/second/sub", "--branch", "side")
    result = client.glide("weights", *words, HF_TOKEN=TOKEN)
    assert result.returncode == 0, result.stderr
    assert set(head(client, "user/second")) == {".gitattributes"}
    card = head(client, "user/second", "side")["sub/README.md"].decode()
    assert 'base_model: "user/first"' in card
    assert "| began with | `hf://user/first` |" in card
    assert "--weights hf://user/second@side/sub\n" in card


def test_a_dry_run_writes_the_folder_and_asks_nobody(client, folder):
    result = client.glide("weights", "push", folder, "hf://user/tiny", "--dry-run")
    assert result.returncode == 0, result.stderr
    written = client.home / "tiny_hub"
    assert {p.name for p in written.iterdir()} == {"README.md", CONFIG, MODEL}
    assert client.server.asked == []
    (written / "README.md").write_text("mine")
    line = refused(client.glide("weights", "push", folder, "hf://user/tiny", "--dry-run"), 2)
    assert line == "error: tiny_hub exists: remove it, or choose another with --out"
    words = ("weights", "push", "tiny_hub", "hf://user/tiny")
    line = refused(client.glide(*words, "--license", "mit", HF_TOKEN=TOKEN), 2)
    assert line.endswith("README.md is uploaded as it is: change the license in it")
    (written / "README.md").write_text("---\ntags: [a]\n---\nmine")
    assert refused(client.glide(*words, HF_TOKEN=TOKEN), 1) == (
        f'error: hf://user/tiny: {client.server.url} refuses README.md: - "license" is required'
    )
    (written / "README.md").write_text("mine")
    result = client.glide(*words, HF_TOKEN=TOKEN)
    assert result.returncode == 0, result.stderr
    assert head(client, "user/tiny")["README.md"] == b"mine"


def test_what_it_refuses(client, folder):
    push = ("weights", "push", folder)
    url, log_in = client.server.url, "log in with `hf auth login`, or set HF_TOKEN"
    for to, token in (
        ("hf://user/tiny", {}),
        ("hf://other/tiny", {"HF_TOKEN": TOKEN}),
        ("hf://user/tiny", {"HF_TOKEN": "hf_of_reader"}),
    ):
        owner = to[5:].partition("/")[0]
        assert refused(client.glide(*push, to, **token), 1) == (
            f"error: no permission to push to {to[5:]} at {url}: {log_in}, with a token that may "
            f"write to {owner}"
        )
    client.server.add("user/open", {"README.md": b""})
    line = refused(client.glide(*push, "hf://user/open", "--private", HF_TOKEN=TOKEN), 2)
    assert line.startswith("error: user/open exists and is public: make it private")
    assert set(head(client, "user/open")) == {"README.md"}
    line = refused(client.glide(*push, "hf://user/tiny", HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1"), 1)
    assert line.startswith("error: hf://user/tiny: nothing can be pushed, and HF_HUB_OFFLINE is")
    (client.home / "empty").mkdir()
    line = refused(client.glide("weights", "push", "empty", "hf://user/tiny"), 1)
    assert "empty/config.json is missing" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("user/tiny",), "'user/tiny' does not name a repository of the Hub"),
        (("hf://user/tiny/a.pt",), "hf://user/tiny/a.pt names a file: a push writes a folder"),
        (("hf://user/tiny@a", "--branch", "b"), "--revision b are two branches: name one"),
        (("hf://user/tiny", "--revision", "a b"), "has no revision after the @"),
        (("hf://user/tiny", "--license", "a b"), "--license takes an identifier such as mit"),
        (("hf://user/tiny", "--out", "x"), "--out is for --dry-run"),
        ((f"hf://user/tiny@{'0' * 40}",), "is a commit, which cannot change: push to a branch"),
    ],
)
def test_wrong_words_are_one_line(words, message, folder, capsys):
    from glide_jax.commands.convert import main

    with pytest.raises(SystemExit) as stop:
        main(["push", str(folder), *words])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
