"""Hook of mkdocs: `<!-- public names -->` becomes tables of `glide_jax.__all__`, by area."""

from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parents[2]
MARK = "<!-- public names -->"
AREAS = ("pipeline", "diffusion", "models", "weights", "errors")


def on_page_markdown(markdown: str, *, page, config, files) -> str | None:
    return markdown.replace(MARK, tables()) if MARK in markdown else None


def tables() -> str:
    package = griffe.load("glide_jax", search_paths=[ROOT])
    areas = {area: [] for area in AREAS}
    for name in map(str, package.exports):
        target = package[name]
        target = target.final_target if target.is_alias else target
        doc = first_sentence(target)
        if target.is_module:
            link = f"[`{name}`]({name}.md)"
        else:
            link = f"[`{name}`][{target.path}]" if doc else f"`{name}`"
        areas[target.path.split(".")[1]].append(f"| {link} | {doc} |")
    return "\n".join(
        f"## {area.capitalize()}\n\n| name | |\n|---|---|\n" + "\n".join(sorted(rows)) + "\n"
        for area, rows in areas.items()
    )


def first_sentence(target: griffe.Object) -> str:
    """The first paragraph of the docstring, as a cell of a table."""
    if not target.docstring:
        return ""
    text = target.docstring.value.split("\n\n")[0].replace("\n", " ")
    # Markdown reads a bar inside code as it is.
    parts = enumerate(text.split("`"))
    return "`".join(part if i % 2 else part.replace("|", r"\|") for i, part in parts)
