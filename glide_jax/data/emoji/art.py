"""What is in the archives of `emoji_sources`: drawings, and the words for them.

`records` walks through one archive in a fixed order and gives every drawing its caption.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from glide_jax.data.emoji.packages import NAMES, PACKAGES, read_json, read_members

# Clip art above this size is a scan or a collage of hundreds of objects (eight files).
MAX_SVG_BYTES = 1_000_000


class Vendor(NamedTuple):
    """A set of drawings. `family` groups sets of one hand: they share held-out cells."""

    style: str
    family: str
    license: str


# In the order of the records in the file.
VENDORS = {
    "noto": Vendor("Google Noto style", "noto", "Apache-2.0"),
    "noto-v1": Vendor("Google blob style", "noto", "Apache-2.0"),
    "twemoji": Vendor("Twitter flat style", "twemoji", "CC-BY-4.0"),
    "fluent-emoji-flat": Vendor("Fluent flat style", "fluent", "MIT"),
    "fluent-emoji-high-contrast": Vendor("black and white style", "fluent", "MIT"),
    # The package says Apache-2.0, but the project licenses only its code so, its art CC-BY-4.0.
    "fxemoji": Vendor("Firefox style", "fxemoji", "CC-BY-4.0"),
    "emojione": Vendor("EmojiOne style", "emojione", "CC-BY-4.0"),
    "flat-color-icons": Vendor("flat color icon", "flat-color-icons", "MIT"),
    "fluent-emoji-3d": Vendor("Fluent 3D style", "fluent", "MIT"),
    "openclipart": Vendor("clip art", "openclipart", "public-domain"),
    "tango": Vendor("Tango icon style", "tango", "public-domain"),
}


class Name(NamedTuple):
    """What a drawing shows. `tone` is 0 without, 1 (light) to 5 (dark); 15: a couple, 1 and 5."""

    caption: str
    concept: str
    keywords: str = ""
    group: str = ""
    subgroup: str = ""
    tone: int = 0
    codepoint: str = ""


class Record(NamedTuple):
    """One drawing before it is rendered: SVG text or the bytes of a picture file."""

    vendor: str
    name: str
    what: Name
    art: str | bytes


def words(label: str) -> str:
    """'flag: Japan' -> 'flag of Japan', 'waving hand: dark skin tone' -> '..., dark ...'."""
    if label.startswith("flag: "):
        return "flag of " + label.removeprefix("flag: ")
    return label.replace(": ", ", ")


def slug(label: str) -> str:
    """The way the icon packages spell a name: lower-case ASCII words joined by hyphens."""
    label = unicodedata.normalize("NFKD", label.lower().replace("’", "").replace("'", ""))
    label = "".join(c for c in label if not unicodedata.combining(c))
    return re.sub(r"[^a-z0-9]+", "-", label).strip("-")


class UnicodeNames:
    """The names of the Unicode emoji: `by_code["1f44b-1f3fd"]`, `by_slug["waving-hand"]`.

    Code points are hexadecimal, joined by hyphens, without the variation selector fe0f, which
    the vendors put in or leave out as they please.
    """

    def __init__(self, sources: Path):
        archive = sources / NAMES.file
        messages = read_json(archive, "en/messages.json")
        groups = {g["order"]: g["key"] for g in messages["groups"]}
        subgroups = {g["order"]: g["key"] for g in messages["subgroups"]}
        self.by_code: dict[str, Name] = {}
        self.by_slug: dict[str, Name] = {}
        for emoji in read_json(archive, "en/data.json"):
            for variant in (emoji, *emoji.get("skins", ())):
                tone = variant.get("tone", 0)
                name = Name(
                    caption=words(variant["label"]),
                    concept=emoji["label"],
                    keywords=", ".join(emoji.get("tags", ())),
                    group=groups.get(emoji.get("group"), ""),
                    subgroup=subgroups.get(emoji.get("subgroup"), ""),
                    tone=tone if isinstance(tone, int) else 10 * tone[0] + tone[1],
                    codepoint=bare(variant["hexcode"]),
                )
                self.by_code[name.codepoint] = name
                self.by_slug[slug(variant["label"])] = name
        self.by_squashed = {s.replace("-", ""): name for s, name in self.by_slug.items()}


def bare(code: str) -> str:
    return code.lower().replace("-fe0f", "")


def records(sources: Path, vendor: str, names: UnicodeNames) -> Iterator[Record]:
    """The drawings of one vendor in the order of their names."""
    archive = sources / PACKAGES[vendor].file
    if vendor == "openclipart":
        yield from _clip_art(archive)
    elif vendor == "tango":
        yield from _tango(archive)
    elif vendor == "fluent-emoji-3d":
        yield from _webp(archive, names)
    else:
        yield from _icons(archive, vendor, names)


def _icons(archive: Path, vendor: str, names: UnicodeNames) -> Iterator[Record]:
    """A package of the Iconify project: icons.json holds the drawings, chars.json code points."""
    icons = read_json(archive, "icons.json")
    codes = {name: bare(code) for code, name in read_json(archive, "chars.json").items()}
    for name, icon in sorted(icons["icons"].items()):
        plain = name.replace("-", " ")
        what = Name(plain, plain)
        if name in codes:
            what = names.by_code.get(codes[name], what._replace(codepoint=codes[name]))
        elif codes:
            continue  # not an emoji: digits without a keycap, bare hair styles
        elif vendor == "fxemoji":
            what = names.by_slug.get(name) or names.by_squashed.get(name, what)
        elif vendor != "flat-color-icons":
            what = names.by_slug.get(name.replace("flag-for-flag-", "flag-"), what)
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">'
            f"{icon['body']}</svg>"
        )
        yield Record(vendor, name, what, svg)


def _webp(archive: Path, names: UnicodeNames) -> Iterator[Record]:
    """Fluent 3D: one picture a file, 256x256 with an alpha channel, named by code point."""
    files = dict(read_members(archive, lambda n: n.endswith(".webp")))
    for path, data in sorted(files.items()):
        code = bare(Path(path).stem)
        if code in names.by_code:
            yield Record("fluent-emoji-3d", code, names.by_code[code], data)


def _tango(archive: Path) -> Iterator[Record]:
    folder = "usr/share/icons/Tango/scalable/"
    files = read_members(archive, lambda n: n.startswith(folder) and n.endswith(".svg"))
    for path, data in sorted(files):
        name = Path(path).stem.replace("-", " ")
        what = Name(f"{name} icon", name, group=Path(path).parent.name)
        yield Record("tango", name, what, data.decode())


# Icon themes that redraw one another, and what is no picture of a thing.
_NOT_CLIP_ART = (
    "computer/icons/flat-theme/", "computer/icons/lemon-theme/", "logos/", "shapes/callouts/",
    "special/",
)  # fmt: skip
_NOT_KEYWORDS = ("hash", "image", "svg", "unsorted")
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_DC = "{http://purl.org/dc/elements/1.1/}"


def _clip_art(archive: Path) -> Iterator[Record]:
    """Open Clip Art: only files whose own RDF metadata dedicates them to the public domain."""
    folder = "usr/share/openclipart/svg/"
    files = read_members(archive, lambda n: n.startswith(folder) and n.endswith(".svg"))
    for path, data in sorted(files):
        name = path.removeprefix(folder)
        if name.startswith(_NOT_CLIP_ART) or len(data) > MAX_SVG_BYTES:
            continue
        try:
            tree = ElementTree.fromstring(data)
        except ElementTree.ParseError:
            continue
        licenses = [e.get(_RDF + "resource", "") for e in tree.iter() if _tag(e) == "license"]
        if not any("publicdomain" in text.lower() for text in licenses):
            continue
        concept = _clip_art_title(tree, name)
        keywords = [
            (li.text or "").strip().replace("_", " ")
            for subject in list(tree.iter(_DC + "subject"))[:1]
            for li in subject.iter()
            if _tag(li) == "li"
        ]
        what = Name(
            caption=words(concept),
            concept=concept,
            keywords=", ".join(k for k in keywords if k and k not in _NOT_KEYWORDS),
            group=name.split("/")[0],
            subgroup=name.rpartition("/")[0],
        )
        yield Record("openclipart", name, what, data.decode())


def _tag(element: ElementTree.Element) -> str:
    # Some files use another URL for the namespace of Creative Commons.
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _clip_art_title(tree: ElementTree.Element, name: str) -> str:
    """'red-eye_frog 01' -> 'red eye frog'; where the title names a collection, the file's name."""
    title = next((e.text or "" for e in tree.iter(_DC + "title")), "")
    if not title.strip() or re.search(r"^Clipart by|theme|collection", title, re.IGNORECASE):
        title = re.sub(r"[_-]+", " ", Path(name).name)
    title = re.sub(r"[_-]", " ", title.replace(".svg", "")).strip()
    return re.sub(r"\s+\d+\w?$", "", title).strip()  # the number in a series
