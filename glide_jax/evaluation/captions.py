"""What is asked for in an evaluation: cells of concept and style, and captions to choose from.

A caption is `"{caption}, {style}"`, one of the forms that the recipe trains with: with the style in
it, one caption is right of a picture and no other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glide_jax.data.emoji.npz import load_npz, read_fields
from glide_jax.errors import UsageError
from glide_jax.training.config import RunConfig

HELD_OUT = "test_style"
# Of them a held-out cell's captions hold at least so many in its own style.
CONCEPTS_IN_STYLE = 20


def prompt_of(record: Mapping[str, Any]) -> str:
    """`"red heart, Google Noto style"`."""
    return f"{record['caption']}, {record['style']}"


def npz_of(config: RunConfig) -> str:
    """The .npz file of a recipe, whose records have concepts and styles.

    Raises:
        UsageError: it names other data.
    """
    if not config.data.source.endswith(".npz"):
        raise UsageError("name the data as an .npz file: --data emoji64.npz")
    return config.data.source


def training_cells(config: RunConfig) -> list[dict[str, Any]]:
    """The records that a recipe trains on.

    Raises:
        UsageError, GlideError: see `load_npz`.
    """
    return _cells(config, config.data.split.split("+"))


def held_out(config: RunConfig) -> list[dict[str, Any]]:
    """Records of `test_style` among the recipe's concepts and styles: cells not trained on.

    Raises:
        UsageError: there are none; or see `load_npz`.
    """
    return _cells(config, [HELD_OUT])


def _cells(config: RunConfig, splits: Sequence[str]) -> list[dict[str, Any]]:
    data = config.data
    source = load_npz(npz_of(config), splits, data.concepts or None, data.styles or None)
    return [source[i] for i in range(len(source))]


@dataclass(frozen=True)
class Vocabulary:
    """The concepts and styles of a recipe, from which wrong captions are taken.

    Attributes:
        captions: one of each concept.
        styles: all of them.
    """

    captions: dict[str, str]
    styles: tuple[str, ...]

    def concept_choices(
        self, record: Mapping[str, Any], count: int, rng: np.random.Generator
    ) -> list[str]:
        """Captions for "which concept?": the record's own first, then other concepts in its style.

        Where there are too few concepts, other concepts in other styles fill up.

        Raises:
            UsageError: there are not `count` captions.
        """
        others, style = self._others(record, rng), record["style"]
        first = [(concept, style) for concept in others]
        return self._captions(record, first, others, count)

    def cell_choices(
        self, record: Mapping[str, Any], count: int, rng: np.random.Generator
    ) -> list[str]:
        """Captions for "which concept in which style?", the record's own first.

        Beside it they hold its concept in every other style and 20 other concepts in its style;
        then those in every other style, and further concepts in all styles.

        Raises:
            UsageError: there are not `count` captions, or they do not hold these.
        """
        others, style = self._others(record, rng), record["style"]
        first = [(record["concept"], other) for other in self.styles if other != style]
        first += [(concept, style) for concept in others[:CONCEPTS_IN_STYLE]]
        least = len(self.styles) + CONCEPTS_IN_STYLE
        if len(others) < CONCEPTS_IN_STYLE or count < least:
            raise UsageError(
                f"{count} captions of {len(others) + 1} concepts cannot hold every style of one "
                f"and {CONCEPTS_IN_STYLE} others in its style"
            )
        return self._captions(record, first, others, count)

    def _others(self, record: Mapping[str, Any], rng: np.random.Generator) -> list[str]:
        others = [concept for concept in self.captions if concept != record["concept"]]
        return [others[i] for i in rng.permutation(len(others))]

    def _captions(
        self,
        record: Mapping[str, Any],
        first: list[tuple[str, str]],
        others: list[str],
        count: int,
    ) -> list[str]:
        if count < 2:
            raise UsageError(f"{count} captions leave nothing to choose: ask for two at least")
        cells = first + [(concept, style) for concept in others for style in self.styles]
        found = [
            prompt_of({"caption": self.captions[concept], "style": style})
            for concept, style in cells
        ]
        # A concept may have several captions: the right one is what is drawn.
        found = list(dict.fromkeys([prompt_of(record), *found]))[:count]
        if len(found) < count:
            raise UsageError(
                f"{len(self.captions)} concepts in {len(self.styles)} styles make {len(found)} "
                f"captions to choose from, not {count}: ask for fewer with --captions"
            )
        return found


def vocabulary(config: RunConfig) -> Vocabulary:
    """All concepts and styles of a recipe, whatever the split.

    Raises:
        UsageError, GlideError: see `read_fields`.
    """
    fields = read_fields(npz_of(config), ("concept", "caption", "style"))
    keep = np.ones(len(fields["concept"]), bool)
    for name, wanted in (("concept", config.data.concepts), ("style", config.data.styles)):
        if wanted:
            keep &= np.isin(fields[name], wanted)
    captions: dict[str, str] = {}
    for concept, caption in zip(fields["concept"][keep], fields["caption"][keep], strict=True):
        captions.setdefault(str(concept), str(caption))
    styles = config.data.styles or tuple(sorted(set(fields["style"][keep].tolist())))
    return Vocabulary(captions, styles)


def one_of_each_concept(
    records: Sequence[dict[str, Any]], count: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Records of different concepts: concepts drawn at random, then one record of each.

    Raises:
        UsageError: there are not as many concepts.
    """
    by_concept: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_concept.setdefault(record["concept"], []).append(record)
    _enough(count, len(by_concept), "concepts")
    names = list(by_concept)
    chosen = [by_concept[names[i]] for i in rng.choice(len(names), count, replace=False)]
    return [cells[rng.integers(len(cells))] for cells in chosen]


def some(
    records: Sequence[dict[str, Any]], count: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """So many records drawn at random, each once.

    Raises:
        UsageError: there are not as many.
    """
    _enough(count, len(records), "records")
    return [records[i] for i in rng.choice(len(records), count, replace=False)]


def in_passes(
    records: Sequence[dict[str, Any]], count: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """So many records in random order, none a further time before all have been there."""
    passes = -(-count // len(records))
    order = np.concatenate([rng.permutation(len(records)) for _ in range(passes)])
    return [records[i] for i in order[:count]]


def _enough(count: int, there: int, what: str) -> None:
    if not 1 <= count <= there:
        raise UsageError(f"there are {there} {what} to choose from: cannot take {count}")
