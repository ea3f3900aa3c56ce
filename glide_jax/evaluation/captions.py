"""Records and captions for an evaluation: concept-style pairs, and wrong captions to choose from.

A caption is `"{caption}, {style}"`, one of the forms that the recipe trains with. With the style in
it, exactly one caption is right for an image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glide_jax.data.emoji.npz import load_npz, read_fields
from glide_jax.errors import UsageError
from glide_jax.training.config import RunConfig

HELD_OUT = "test_style"
# The captions for a held-out pair contain at least this many other concepts in the pair's style.
CONCEPTS_IN_STYLE = 20


def prompt_of(record: Mapping[str, Any]) -> str:
    """Return the prompt of a record: `"red heart, Google Noto style"`."""
    return f"{record['caption']}, {record['style']}"


def npz_of(config: RunConfig) -> str:
    """Return the .npz file of a recipe; only its records have concepts and styles.

    Raises:
        UsageError: the recipe names other data.
    """
    if not config.data.source.endswith(".npz"):
        raise UsageError("name the data as an .npz file: --data emoji64.npz")
    return config.data.source


def training_pairs(config: RunConfig) -> list[dict[str, Any]]:
    """Return the records that a recipe trains on, one per concept-style pair.

    Raises:
        UsageError, GlideError: see `load_npz`.
    """
    return _pairs(config, config.data.split.split("+"))


def held_out_pairs(config: RunConfig) -> list[dict[str, Any]]:
    """Return the records of `test_style` with the recipe's concepts and styles.

    The recipe trains on none of these concept-style pairs.

    Raises:
        UsageError: there are none; or see `load_npz`.
    """
    return _pairs(config, [HELD_OUT])


def _pairs(config: RunConfig, splits: Sequence[str]) -> list[dict[str, Any]]:
    data = config.data
    source = load_npz(npz_of(config), splits, data.concepts or None, data.styles or None)
    return [source[i] for i in range(len(source))]


@dataclass(frozen=True)
class Vocabulary:
    """The concepts and styles of a recipe, the source of wrong captions.

    Attributes:
        captions: one caption per concept.
        styles: all styles.
    """

    captions: dict[str, str]
    styles: tuple[str, ...]

    def concept_choices(
        self, record: Mapping[str, Any], count: int, rng: np.random.Generator
    ) -> list[str]:
        """Return captions that test the concept: the record's own first, then others in its style.

        If there are too few concepts, other concepts in other styles follow.

        Raises:
            UsageError: there are fewer than `count` captions.
        """
        others, style = self._shuffled_concepts(record, rng), record["style"]
        first_pairs = [(concept, style) for concept in others]
        return self._captions(record, first_pairs, others, count)

    def pair_choices(
        self, record: Mapping[str, Any], count: int, rng: np.random.Generator
    ) -> list[str]:
        """Return captions that test concept and style: the record's own first.

        Next come its concept in every other style and 20 other concepts in its style, then these
        concepts in every other style, then further concepts in all styles.

        Raises:
            UsageError: there are fewer than `count` captions, or `count` is too small for these.
        """
        others, style = self._shuffled_concepts(record, rng), record["style"]
        first_pairs = [(record["concept"], other) for other in self.styles if other != style]
        first_pairs += [(concept, style) for concept in others[:CONCEPTS_IN_STYLE]]
        least = len(self.styles) + CONCEPTS_IN_STYLE
        if len(others) < CONCEPTS_IN_STYLE or count < least:
            raise UsageError(
                f"{count} captions of {len(others) + 1} concepts cannot hold every style of one "
                f"and {CONCEPTS_IN_STYLE} others in its style"
            )
        return self._captions(record, first_pairs, others, count)

    def _shuffled_concepts(self, record: Mapping[str, Any], rng: np.random.Generator) -> list[str]:
        others = [concept for concept in self.captions if concept != record["concept"]]
        return [others[i] for i in rng.permutation(len(others))]

    def _captions(
        self,
        record: Mapping[str, Any],
        first_pairs: list[tuple[str, str]],
        others: list[str],
        count: int,
    ) -> list[str]:
        if count < 2:
            raise UsageError(f"{count} captions leave nothing to choose: ask for at least two")
        pairs = first_pairs + [(concept, style) for concept in others for style in self.styles]
        choices = [
            prompt_of({"caption": self.captions[concept], "style": style})
            for concept, style in pairs
        ]
        # A concept may have several captions: the right one is the prompt of the record.
        choices = list(dict.fromkeys([prompt_of(record), *choices]))[:count]
        if len(choices) < count:
            raise UsageError(
                f"{len(self.captions)} concepts in {len(self.styles)} styles make {len(choices)} "
                f"captions to choose from, not {count}: ask for fewer with --captions"
            )
        return choices


def vocabulary(config: RunConfig) -> Vocabulary:
    """Return all concepts and styles of a recipe, in every split.

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
    """Choose random concepts, and one random record of each.

    Raises:
        UsageError: there are fewer than `count` concepts.
    """
    by_concept: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_concept.setdefault(record["concept"], []).append(record)
    _check_count(count, len(by_concept), "concepts")
    names = list(by_concept)
    chosen = [by_concept[names[i]] for i in rng.choice(len(names), count, replace=False)]
    return [same_concept[rng.integers(len(same_concept))] for same_concept in chosen]


def random_records(
    records: Sequence[dict[str, Any]], count: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Choose different records at random.

    Raises:
        UsageError: there are fewer than `count` records.
    """
    _check_count(count, len(records), "records")
    return [records[i] for i in rng.choice(len(records), count, replace=False)]


def sample_in_passes(
    records: Sequence[dict[str, Any]], count: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Return `count` records in random order; none repeats before all have occurred."""
    passes = -(-count // len(records))
    order = np.concatenate([rng.permutation(len(records)) for _ in range(passes)])
    return [records[i] for i in order[:count]]


def _check_count(count: int, available: int, what: str) -> None:
    if not 1 <= count <= available:
        raise UsageError(f"there are {available} {what} to choose from: cannot take {count}")
