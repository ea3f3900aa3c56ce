"""Prompts: one caption, or several joined by AND and NOT.

    a red apple AND a tulip :0.5 NOT a rose

Only these two words, in capitals and between spaces, have a meaning; the networks read lower case,
so a caption can always write them in lower case. A weight after a space and a colon belongs to the
caption before it: the guidance towards it, or away from it (1 if not given). Another number there,
such as ":-1", ":1e3" or "dog:2", is refused. A prompt without the two words is one caption. So is a
prompt that is all capitals and has no weight, "DO NOT ENTER": one line on stderr says so. White
space and byte-order marks around a prompt change nothing.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from glide_jax.errors import UsageError

_JOINTS = re.compile(r"(?:^|\s+)((?:AND\s+)?NOT|AND)(?=\s|$)")
_WEIGHT = re.compile(r"\s:(\d+\.?\d*|\.\d+)$")
# What is meant as a weight at the end of a caption, whether it can be read or not: a signed number,
# one with an exponent, a comma or %, one after ": ", or one without the space before the colon.
_MEANT_AS_WEIGHT = re.compile(
    r"(?:\s|(?<=[^\W\d])):\s*[-+\u2212]?(?:[\d.,]*\d[\d.,]*(?:e[-+]?\d+)?%?|inf|nan)$", re.I
)
# Invisible around a text, and no white space to Python: byte-order mark, zero-width space, joiner.
_INVISIBLE = "\ufeff\u200b\u2060"


class Part(NamedTuple):
    """A caption of a prompt.

    Attributes:
        text: the caption.
        weight: weight of the guidance towards the caption, in units of the guidance scale; a
            negative weight guides away from it.
        end, share: interpolation: the features of the caption are `(1 - share) f(text) + share
            f(end)`; without an end, those of `text`.
    """

    text: str
    weight: float = 1.0
    end: str | None = None
    share: float = 0.0

    @property
    def ends(self) -> tuple[str, str]:
        """The texts `text` and `end`; without an end, `text` twice."""
        return self.text, self.text if self.end is None else self.end


@dataclass(frozen=True)
class Prompt:
    """A parsed prompt; make one with `read_prompt`.

    Attributes:
        text: the prompt as written.
        parts: the captions of the prompt; the first conditions branch "caption".
    """

    text: str
    parts: tuple[Part, ...]

    def padded(self, count: int) -> "Prompt":
        """Return the prompt with `count` parts; added parts have weight 0."""
        return replace(self, parts=self.parts + (Part("", 0.0),) * (count - len(self.parts)))

    def joined(self) -> "Prompt":
        """Join all captions of positive weight into one, "a red apple and a leaf".

        An upsampler reads this: the image exists already, and each part would cost a prediction.
        """
        wanted = [part for part in self.parts if part.weight > 0]
        text, end = (
            " and ".join(part.ends[i] for part in wanted if part.ends[i]) for i in range(2)
        )
        return replace(self, parts=(Part(text, 1.0, end, self.parts[0].share),))


def clean(text: str) -> str:
    """Return a text without the white space and the byte-order marks around it."""
    while (shorter := text.strip().strip(_INVISIBLE)) != text:
        text = shorter
    return text


def is_all_capitals(prompt: str) -> bool:
    """Whether a prompt is all capitals without weights, so that AND and NOT are plain words.

    A weight that cannot be read counts as one.
    """
    captions = _JOINTS.split(clean(prompt))[::2]
    letters = [c for caption in captions for c in caption if c.upper() != c.lower()]
    weighted = any(_MEANT_AS_WEIGHT.search(f" {caption.strip()}") for caption in captions)
    return len(captions) > 1 and bool(letters) and not weighted and all(map(str.isupper, letters))


def read_prompt(prompt: str | Prompt) -> Prompt:
    """Parse a prompt.

    Raises:
        UsageError: the prompt is not a string, AND or NOT lacks a caption on one side, or a weight
            is not a number of at least 0 after a space and a colon.
    """
    if isinstance(prompt, Prompt):
        return prompt
    if not isinstance(prompt, str):
        raise UsageError(f"a prompt must be a string, not {type(prompt).__name__}: {prompt!r:.60}")
    prompt = clean(prompt)
    first, *joints_and_captions = _JOINTS.split(prompt)
    if not joints_and_captions or is_all_capitals(prompt):
        return Prompt(prompt, (Part(prompt),))
    parts = []
    for joint, caption in zip(
        ["AND", *joints_and_captions[::2]], [first, *joints_and_captions[1::2]], strict=True
    ):
        caption = caption.strip()
        weight = 1.0
        if match := _WEIGHT.search(f" {caption}"):
            weight, caption = float(match[1]), f" {caption}"[: match.start()].strip()
        if not np.isfinite(weight) or _MEANT_AS_WEIGHT.search(f" {caption}"):
            raise UsageError(
                f"cannot read the weight of {caption!r:.60}: write a number after a space and a "
                "colon, such as :0.5, and NOT to guide away"
            )
        if not caption:
            raise UsageError(f"AND and NOT stand between two captions: {prompt!r} lacks one")
        parts.append(Part(caption, weight if joint == "AND" else -weight))
    return Prompt(prompt, tuple(parts))


def read_prompts(prompts: str | Prompt | Sequence[str | Prompt], num: int = 1) -> list[Prompt]:
    """Parse prompts; return each of them `num` times, all padded to the same number of parts.

    One line on stderr names a prompt in which AND and NOT are words, since it is all capitals.

    Raises:
        UsageError: there is no prompt; or see `read_prompt`.
    """
    prompts = [prompts] if isinstance(prompts, str | Prompt) else list(prompts)
    if not prompts or num < 1:
        raise UsageError("give at least one prompt, and a num of at least 1")
    parsed = [read_prompt(prompt) for prompt in prompts]
    if capital_prompts := [
        prompt for prompt in prompts if isinstance(prompt, str) and is_all_capitals(prompt)
    ]:
        more = f" and in {len(capital_prompts) - 1} more" if capital_prompts[1:] else ""
        print(
            f"note: AND and NOT are words in {clean(capital_prompts[0])!r:.80}{more}, which is all "
            "capitals: write the captions in lower case to join them",
            file=sys.stderr,
        )
    count = max(len(prompt.parts) for prompt in parsed)
    return [prompt.padded(count) for prompt in parsed for _ in range(num)]


def interpolated(start: Prompt, end: Prompt, share: float) -> Prompt:
    """Interpolate between two prompts with the same number of parts.

    share is 0 at the start, 1 at the end.
    """
    parts = (
        Part(a.text, (1 - share) * a.weight + share * b.weight, b.text, share)
        for a, b in zip(start.parts, end.parts, strict=True)
    )
    text = start.text if start == end else f"{start.text} -> {end.text}"
    return Prompt(text, tuple(parts))


def encode_parts(encode: Callable[[list[str]], Any], parts: Sequence[Part]) -> Any:
    """Return the features of captions, `(1 - share) f(text) + share f(end)`, leaves `(B, ...)`.

    Args:
        encode: texts -> a tree of their features; called once, with the distinct texts.
    """
    distinct = list(dict.fromkeys(text for part in parts for text in part.ends))
    features = jax.tree.map(np.asarray, encode(distinct))
    text_index, end_index = (
        np.array([distinct.index(part.ends[i]) for part in parts]) for i in range(2)
    )
    share = np.array([part.share for part in parts], np.float32)
    if (text_index == end_index).all():
        return jax.tree.map(lambda leaf: leaf[text_index], features)

    def mix(leaf: Any) -> Any:
        weight = share.reshape(-1, *[1] * (leaf.ndim - 1))
        return ((1 - weight) * leaf[text_index] + weight * leaf[end_index]).astype(leaf.dtype)

    return jax.tree.map(mix, features)
