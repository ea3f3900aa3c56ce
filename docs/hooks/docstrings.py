"""Extension of griffe, which reads the docstrings.

An entry for several names becomes one for each: `low, high: the noise levels`. A package shows what
its modules define, and not once more what it imports from them.
"""

import re

import griffe

SECTION = re.compile(r"^(Args|Arguments|Attributes|Parameters):\s*$")
GROUP = re.compile(r"^(    )(\*{0,2}\w+(?:, \*{0,2}\w+)+): ")


def split_groups(text: str) -> str:
    lines, inside = [], False
    rest = text.split("\n")
    while rest:
        line = rest.pop(0)
        if line and not line[0].isspace():
            inside = bool(SECTION.match(line))
        match = inside and GROUP.match(line)
        if not match:
            lines.append(line)
            continue
        more = []
        while rest and rest[0].startswith("     "):
            more.append(rest.pop(0))
        for name in match[2].split(", "):
            lines += [f"    {name}: {line[match.end() :]}", *more]
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = split_groups(obj.docstring.value)

    def on_module(self, *, mod: griffe.Module, **_) -> None:
        if mod.is_init_module and mod.name != "glide_jax":
            mod.exports = None
