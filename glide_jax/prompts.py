"""What a prompt says: one caption, or several joined by AND and NOT.

    a red apple AND a leaf :0.5 NOT a worm

Only these two words mean anything, in capitals and between spaces; the networks read small letters,
so that a caption loses nothing by writing them small. A weight, after space and colon, is of the
guidance towards the caption before it, or away from it (1 where there is none). A prompt without
the two words is one caption, whatever else stands in it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from glide_jax.errors import UsageError

_JOINTS = re.compile(r"(?:^|\s+)((?:AND\s+)?NOT|AND)(?=\s|$)")
_WEIGHT = re.compile(r"\s:(\d+\.?\d*|\.\d+)$")


class Part(NamedTuple):
    """A caption of a prompt.

    Attributes:
        text: the caption.
        weight: of its guidance, in units of the guidance scale; below zero away from it.
        end, share: its features lie between those of `text` and of `end`, so far on the way, from 0
            to 1; no end: `text` itself.
    """

    text: str
    weight: float = 1.0
    end: str | None = None
    share: float = 0.0

    @property
    def ends(self) -> tuple[str, str]:
        """`text` and `end`."""
        return self.text, self.text if self.end is None else self.end


@dataclass(frozen=True)
class Prompt:
    """A prompt, read; make one with `read_prompt`.

    Attributes:
        text: as it was written.
        parts: its captions, the first of them what branch "cond" is given.
    """

    text: str
    parts: tuple[Part, ...]

    def padded(self, count: int) -> "Prompt":
        """The same with `count` parts, those added of weight 0."""
        return replace(self, parts=self.parts + (Part("", 0.0),) * (count - len(self.parts)))

    def joined(self) -> "Prompt":
        """One caption of all that is wanted, "a red apple and a leaf", for an upsampler: its
        picture is drawn already, and each further part would cost an evaluation more."""
        wanted = [part for part in self.parts if part.weight > 0]
        text, end = (
            " and ".join(part.ends[i] for part in wanted if part.ends[i]) for i in range(2)
        )
        return replace(self, parts=(Part(text, 1.0, end, self.parts[0].share),))


def read_prompt(prompt: str | Prompt) -> Prompt:
    """Reads a prompt.

    Raises:
        UsageError: it is no string, or AND or NOT stands without a caption on each side.
    """
    if isinstance(prompt, Prompt):
        return prompt
    if not isinstance(prompt, str):
        raise UsageError(f"a prompt must be a string, not {type(prompt).__name__}: {prompt!r:.60}")
    first, *rest = _JOINTS.split(prompt)
    if not rest:
        return Prompt(prompt, (Part(prompt),))
    parts = []
    for joint, caption in zip(["AND", *rest[::2]], [first, *rest[1::2]], strict=True):
        caption = caption.strip()
        weight = 1.0
        if found := _WEIGHT.search(f" {caption}"):
            weight, caption = float(found[1]), f" {caption}"[: found.start()].strip()
        if not caption:
            raise UsageError(f"AND and NOT stand between two captions: {prompt!r} lacks one")
        parts.append(Part(caption, weight if joint == "AND" else -weight))
    return Prompt(prompt, tuple(parts))


def read_prompts(prompts: str | Prompt | Sequence[str | Prompt], num: int = 1) -> list[Prompt]:
    """`num` times each prompt, all padded to as many parts.

    Raises:
        UsageError: there is none; or see `read_prompt`.
    """
    prompts = [prompts] if isinstance(prompts, str | Prompt) else list(prompts)
    if not prompts or num < 1:
        raise UsageError("give at least one prompt, and a num of at least 1")
    found = [read_prompt(prompt) for prompt in prompts]
    count = max(len(prompt.parts) for prompt in found)
    return [prompt.padded(count) for prompt in found for _ in range(num)]


def mixed(start: Prompt, end: Prompt, share: float) -> Prompt:
    """A prompt so far on the way from one to another, from 0 to 1, of as many parts."""
    parts = (
        Part(a.text, (1 - share) * a.weight + share * b.weight, b.text, share)
        for a, b in zip(start.parts, end.parts, strict=True)
    )
    text = start.text if start == end else f"{start.text} -> {end.text}"
    return Prompt(text, tuple(parts))


def encode_parts(encode: Callable[[list[str]], Any], parts: Sequence[Part]) -> Any:
    """Features of captions, `(1 - share) f(text) + share f(end)`, leaves `(B, ...)`.

    Args:
        encode: texts -> a tree of their features; given each distinct text once.
    """
    distinct = list(dict.fromkeys(text for part in parts for text in part.ends))
    features = encode(distinct)
    text, end = (np.array([distinct.index(part.ends[i]) for part in parts]) for i in range(2))
    share = np.array([part.share for part in parts], np.float32)
    if (text == end).all():
        return jax.tree.map(lambda leaf: leaf[text], features)

    def mix(leaf: jax.Array) -> jax.Array:
        weight = share.reshape(-1, *[1] * (leaf.ndim - 1))
        return ((1 - weight) * leaf[text] + weight * leaf[end]).astype(leaf.dtype)

    return jax.tree.map(mix, features)
