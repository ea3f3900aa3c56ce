"""emoji64 from its sources: fetching and rendering them, their captions and credits."""

import base64
import hashlib
import io
import json
import tarfile

import numpy as np
import pytest

from glide_jax.data.emoji import art, packages
from glide_jax.data.emoji.npz import load_npz, read_fields
from glide_jax.errors import GlideError, UsageError
from tests.support.commands import ROOT

RED_SQUARE = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8" width="8" height="8">'
    '<path fill="#f00" d="M2 2h4v4H2z"/></svg>'
)


def tgz(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo("package/" + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    return "sha512-" + digest


@pytest.fixture
def tiny_sources(tmp_path, monkeypatch):
    """Folder of one archive of five icons and one of names, pinned instead of the real ones."""
    body = '<path fill="#{}" d="M2 2h4v4H2z"/>'
    icons = {
        "red-apple": {"body": body.format("f00")},
        "thumbs-up-dark-skin-tone": {"body": body.format("530")},
        "blank": {"body": body.format("fff")},
        "again": {"body": body.format("f00")},
        "wide-icon": {"body": body.format("00f"), "width": 16},
    }
    chars = {"1f34e": "red-apple", "1f44d-1f3ff": "thumbs-up-dark-skin-tone", "1f000": "wide-icon"}
    chars |= {"1f001": "blank", "1f002": "again"}
    names = [
        {"label": "red apple", "hexcode": "1F34E", "tags": ["fruit", "red"], "group": 4},
        {
            "label": "thumbs up",
            "hexcode": "1F44D",
            "skins": [{"label": "thumbs up: dark skin tone", "hexcode": "1F44D-1F3FF", "tone": 5}],
        },
    ]
    messages = {"groups": [{"order": 4, "key": "food-drink"}], "subgroups": []}
    folder = tmp_path / "sources"
    folder.mkdir()
    noto, eb = packages.PACKAGES["noto"], packages.NAMES
    icons = {"width": 8, "height": 8, "icons": icons}
    members = {"icons.json": json.dumps(icons).encode(), "chars.json": json.dumps(chars).encode()}
    noto = noto._replace(checksum=tgz(folder / noto.file, members))
    members = {
        "en/data.json": json.dumps(names).encode(),
        "en/messages.json": json.dumps(messages).encode(),
    }
    eb = eb._replace(checksum=tgz(folder / eb.file, members))
    monkeypatch.setitem(packages.PACKAGES, "noto", noto)
    monkeypatch.setattr(packages, "NAMES", eb)
    return folder


@pytest.mark.parametrize("size", [64, 256])
def test_rasterise_tiny_artwork(tiny_sources, tmp_path, size):
    pytest.importorskip("resvg_py")
    from glide_jax.data.emoji.rasteriser import rasterise

    out = tmp_path / "tiny.npz"
    assert rasterise(tiny_sources, out, size, 1, ["noto"], progress=False) == 3
    fields = read_fields(out)
    assert fields["name"].tolist() == ["again", "thumbs-up-dark-skin-tone", "wide-icon"]
    assert fields["caption"].tolist() == ["again", "thumbs up, dark skin tone", "wide icon"]
    assert fields["tone"].tolist() == [0, 5, 0] and fields["tone"].dtype == np.uint8
    source = load_npz(out)
    assert source.images.shape == (3, size, size, 3)
    red = np.full((size, size, 3), 255, np.uint8)
    red[size // 4 : size - size // 4, size // 4 : size - size // 4] = (255, 0, 0)
    assert np.array_equal(source.images[0], red)
    # 16 wide and 8 high: rendered at half the scale, white above and below.
    ink = (source.images[2] != 255).any(-1)
    assert ink.sum() == (size // 4) ** 2 and ink[size * 3 // 8 : size * 5 // 8].sum() == ink.sum()
    before = out.read_bytes()
    rasterise(tiny_sources, out, size, 1, ["noto"], progress=False)
    assert out.read_bytes() == before


def test_artwork_that_is_not_svg_is_left_out():
    pytest.importorskip("resvg_py")
    from glide_jax.data.emoji.rasteriser import render

    description = art.Description("red square", "red square")
    square = art.Record("noto", "red-square", description, RED_SQUARE)
    assert len(render(square, 64)) == 64 * 64 * 3
    assert render(square._replace(art="<svg"), 64) is None


def test_a_failing_run_of_rasterise_leaves_no_file(tiny_sources, tmp_path, monkeypatch):
    from glide_jax.data.emoji import rasteriser

    monkeypatch.setattr(rasteriser, "render", lambda record, size: np.eye(64).tobytes())
    monkeypatch.setattr(rasteriser, "_fields", lambda kept: {"caption": np.array([None])})
    with pytest.raises(ValueError):
        rasteriser.rasterise(tiny_sources, tmp_path / "out.npz", 64, 1, ["noto"], progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["sources"]


def test_fetch_uses_present_archives_and_refuses_broken_ones(tiny_sources, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")  # neither npm nor apt-get
    paths = packages.fetch_sources(tiny_sources, ["noto"])
    assert [p.suffix for p in paths] == [".tgz", ".tgz"]
    with pytest.raises(GlideError, match=r"tango-icon-theme=.*apt-get is not installed"):
        packages.fetch_sources(tiny_sources, ["tango"])
    with pytest.raises(GlideError, match=r"lacks .*iconify-json-fxemoji.*fetch --to"):
        packages.check_sources(tiny_sources, ["fxemoji"])
    with pytest.raises(UsageError, match="no vendor 'notto'"):
        packages.fetch_sources(tiny_sources, ["notto"])
    paths[1].write_bytes(paths[1].read_bytes()[:-9])
    for function in (packages.fetch_sources, packages.check_sources):
        with pytest.raises(GlideError, match="truncated, or another version"):
            function(tiny_sources, ["noto"])
    assert not list(tiny_sources.glob(".partial-*"))


@pytest.mark.parametrize(
    "label, caption",
    [
        ("flag: Japan", "flag of Japan"),
        ("waving hand: dark skin tone", "waving hand, dark skin tone"),
        ("red apple", "red apple"),
    ],
)
def test_captions(label, caption):
    assert art.caption_of(label) == caption


def test_every_source_is_credited():
    text = (ROOT / "glide_jax" / "data" / "emoji" / "ATTRIBUTION.md").read_text()
    for vendor, package in packages.PACKAGES.items():
        assert f"`{vendor}`" in text
        assert f"`{package.name}` {package.version}" in text
        line = next(x for x in text.splitlines() if f"`{vendor}`" in x)
        assert art.VENDORS[vendor].license.replace("-domain", " domain") in line
    assert list(packages.PACKAGES) == list(art.VENDORS)
