"""Artwork in the archives of `packages`, and its captions.

`records` yields the artwork of one archive in a fixed order, each with its caption.
"""

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
    """A set of artwork. `family` groups sets of the same artists: they share held-out pairs."""

    style: str
    family: str
    license: str


# The order is that of the records in the file.
VENDORS = {
    "noto": Vendor("Google Noto style", "noto", "Apache-2.0"),
    "noto-v1": Vendor("Google blob style", "noto", "Apache-2.0"),
    "twemoji": Vendor("Twitter flat style", "twemoji", "CC-BY-4.0"),
    "fluent-emoji-flat": Vendor("Fluent flat style", "fluent", "MIT"),
    "fluent-emoji-high-contrast": Vendor("black and white style", "fluent", "MIT"),
    # The package states Apache-2.0, but that is the project's licence for code; art is CC-BY-4.0.
    "fxemoji": Vendor("Firefox style", "fxemoji", "CC-BY-4.0"),
    "emojione": Vendor("EmojiOne style", "emojione", "CC-BY-4.0"),
    "flat-color-icons": Vendor("flat color icon", "flat-color-icons", "MIT"),
    "fluent-emoji-3d": Vendor("Fluent 3D style", "fluent", "MIT"),
    "openclipart": Vendor("clip art", "openclipart", "public-domain"),
    "tango": Vendor("Tango icon style", "tango", "public-domain"),
}


class Description(NamedTuple):
    """Description of an artwork.

    `tone` is the skin tone: 0 for none, 1 (light) to 5 (dark); 15 is a couple with 1 and 5.
    """

    caption: str
    concept: str
    keywords: str = ""
    group: str = ""
    subgroup: str = ""
    tone: int = 0
    codepoint: str = ""


class Record(NamedTuple):
    """One artwork before it is rendered: SVG text or the bytes of an image file."""

    vendor: str
    name: str
    description: Description
    art: str | bytes


def caption_of(label: str) -> str:
    """Return a label as a caption: 'flag: Japan' -> 'flag of Japan', 'a: b' -> 'a, b'."""
    if label.startswith("flag: "):
        return "flag of " + label.removeprefix("flag: ")
    return label.replace(": ", ", ")


def slug(label: str) -> str:
    """Return a label as the icon packages write names: lower-case ASCII words with hyphens."""
    label = unicodedata.normalize("NFKD", label.lower().replace("’", "").replace("'", ""))
    label = "".join(c for c in label if not unicodedata.combining(c))
    return re.sub(r"[^a-z0-9]+", "-", label).strip("-")


class UnicodeNames:
    """Descriptions of the Unicode emoji: `by_code["1f44b-1f3fd"]`, `by_slug["waving-hand"]`.

    Code points are hexadecimal, joined by hyphens, without the variation selector fe0f: vendors
    differ in where they use it.
    """

    def __init__(self, sources: Path):
        archive = sources / NAMES.file
        messages = read_json(archive, "en/messages.json")
        groups = {g["order"]: g["key"] for g in messages["groups"]}
        subgroups = {g["order"]: g["key"] for g in messages["subgroups"]}
        self.by_code: dict[str, Description] = {}
        self.by_slug: dict[str, Description] = {}
        for emoji in read_json(archive, "en/data.json"):
            for variant in (emoji, *emoji.get("skins", ())):
                tone = variant.get("tone", 0)
                description = Description(
                    caption=caption_of(variant["label"]),
                    concept=emoji["label"],
                    keywords=", ".join(emoji.get("tags", ())),
                    group=groups.get(emoji.get("group"), ""),
                    subgroup=subgroups.get(emoji.get("subgroup"), ""),
                    tone=tone if isinstance(tone, int) else 10 * tone[0] + tone[1],
                    codepoint=bare_codepoint(variant["hexcode"]),
                )
                self.by_code[description.codepoint] = description
                self.by_slug[slug(variant["label"])] = description
        self.by_joined = {
            s.replace("-", ""): description for s, description in self.by_slug.items()
        }


def bare_codepoint(code: str) -> str:
    """Return a code point without the variation selector."""
    return code.lower().replace("-fe0f", "")


def records(sources: Path, vendor: str, names: UnicodeNames) -> Iterator[Record]:
    """Yield the artwork of one vendor in the order of its names."""
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
    """Yield the artwork of an Iconify package: SVG in icons.json, code points in chars.json."""
    icons = read_json(archive, "icons.json")
    codes = {name: bare_codepoint(code) for code, name in read_json(archive, "chars.json").items()}
    for name, icon in sorted(icons["icons"].items()):
        plain = name.replace("-", " ")
        description = Description(plain, plain)
        if name in codes:
            description = names.by_code.get(
                codes[name], description._replace(codepoint=codes[name])
            )
        elif codes:
            continue  # not an emoji: digits without a keycap, bare hair styles
        elif vendor == "fxemoji":
            description = names.by_slug.get(name) or names.by_joined.get(name, description)
        elif vendor != "flat-color-icons":
            description = names.by_slug.get(name.replace("flag-for-flag-", "flag-"), description)
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">'
            f"{icon['body']}</svg>"
        )
        yield Record(vendor, name, description, svg)


def _webp(archive: Path, names: UnicodeNames) -> Iterator[Record]:
    """Yield Fluent 3D: one image per file, 256x256 with an alpha channel, named by code point."""
    files = dict(read_members(archive, lambda n: n.endswith(".webp")))
    for path, data in sorted(files.items()):
        code = bare_codepoint(Path(path).stem)
        if code in names.by_code:
            yield Record("fluent-emoji-3d", code, names.by_code[code], data)


def _tango(archive: Path) -> Iterator[Record]:
    folder = "usr/share/icons/Tango/scalable/"
    files = read_members(archive, lambda n: n.startswith(folder) and n.endswith(".svg"))
    for path, data in sorted(files):
        name = Path(path).stem.replace("-", " ")
        description = Description(f"{name} icon", name, group=Path(path).parent.name)
        yield Record("tango", name, description, data.decode())


# Icon themes that copy one another, and files that show no object.
_NOT_CLIP_ART = (
    "computer/icons/flat-theme/", "computer/icons/lemon-theme/", "logos/", "shapes/callouts/",
    "special/",
)  # fmt: skip
_NOT_KEYWORDS = ("hash", "image", "svg", "unsorted")
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_DC = "{http://purl.org/dc/elements/1.1/}"


def _clip_art(archive: Path) -> Iterator[Record]:
    """Yield Open Clip Art: files whose own RDF metadata dedicates them to the public domain."""
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
        description = Description(
            caption=caption_of(concept),
            concept=concept,
            keywords=", ".join(k for k in keywords if k and k not in _NOT_KEYWORDS),
            group=name.split("/")[0],
            subgroup=name.rpartition("/")[0],
        )
        yield Record("openclipart", name, description, data.decode())


def _tag(element: ElementTree.Element) -> str:
    # Some files use another URL for the namespace of Creative Commons.
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _clip_art_title(tree: ElementTree.Element, name: str) -> str:
    """Return the title as a concept: 'red-eye_frog 01' -> 'red eye frog'.

    If the title names a collection, the name of the file is used.
    """
    title = next((e.text or "" for e in tree.iter(_DC + "title")), "")
    if not title.strip() or re.search(r"^Clipart by|theme|collection", title, re.IGNORECASE):
        title = re.sub(r"[_-]+", " ", Path(name).name)
    title = re.sub(r"[_-]", " ", title.replace(".svg", "")).strip()
    return re.sub(r"\s+\d+\w?$", "", title).strip()  # the number in a series
