"""The files of one split, among the files of a data set as the Hugging Face Hub has them.

`data/train-00000-of-00004.parquet`, `en/train/0000.parquet` and `test.parquet` name their splits;
`save_to_disk` writes a folder with `state.json` for each split.
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence

from glide_jax.data import storage
from glide_jax.data.faults import Fault
from glide_jax.data.row_groups import is_table_name
from glide_jax.errors import UsageError

_SAME = {
    **dict.fromkeys(("training",), "train"),
    **dict.fromkeys(("valid", "val", "dev"), "validation"),
    **dict.fromkeys(("testing", "eval", "evaluation"), "test"),
}
_KEYWORDS = {*_SAME, *_SAME.values()}
_SHARD = re.compile(r"(.+?)-(\d{5,})-of-(\d{5,})(-[0-9a-f]+)?\.(parquet|arrow)", re.IGNORECASE)


def split_of(name: str) -> str:
    """Return the split that a path names, such as "train"; empty if it names none."""
    folders, _, file = name.rpartition("/")
    if shard := _SHARD.fullmatch(file):
        words = shard.group(1)
        split = _keyword(words)
        return split or ("" if words.casefold() in ("data", "part") else words)
    stem = file.rpartition(".")[0]
    if split := _keyword(stem):
        return split
    return next((f for f in map(_keyword, reversed(folders.split("/"))) if f), "")


def _keyword(text: str) -> str:
    """Return the usual split that is a word of a text."""
    words = re.split(r"[^a-z]+", text.casefold())
    return next((_SAME.get(word, word) for word in words if word in _KEYWORDS), "")


def choose_split(
    where: str, names: Sequence[str], wanted: str, default: str
) -> tuple[list[str], list[Fault]]:
    """Return the files of the wanted split, and the files that belong to no split.

    Args:
        where: the folder or pattern, for messages.
        names: parquet or arrow files.
        wanted: a split, or several, `train+test`.
        default: the split that files without any are.

    Raises:
        UsageError: there is no such split, or there are several configurations.
    """
    splits = {name: split_of(name) for name in names}
    known = sorted({split for split in splits.values() if split})
    if not known:
        if wanted != default:
            raise UsageError(f"{where} has no split {wanted!r}: no file name has one")
        return list(names), []
    asked = [_SAME.get(split, split) for split in wanted.split("+")]
    if missing := [split for split in asked if split not in known]:
        listed = f"the split{'s' * (len(known) > 1)} {', '.join(known)}"
        raise UsageError(f"{where} has {listed}, and no {missing[0]!r}: choose with --data.split")
    chosen = [name for name in names if splits[name] in asked]
    _check_configurations(where, chosen)
    _note_missing(where, chosen)
    return chosen, [Fault(n, "no split in its name") for n in names if not splits[n]]


def _check_configurations(where: str, names: Iterable[str]) -> None:
    """Raise `UsageError` if the same shard is in several folders."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        if not _SHARD.fullmatch(file):
            last = folder.rpartition("/")[2]
            folder, file = (folder.rpartition("/")[0], f"{last}/{file}") if last else (folder, file)
            if not _keyword(last):
                continue
        folders.setdefault(file, []).append(folder)
    several = next((places for places in folders.values() if len(places) > 1), None)
    if several:
        raise UsageError(
            f"{where} has the configurations {', '.join(sorted(several))}: name one, "
            f"--data.source {storage.join(where, sorted(several)[0])}"
        )


def _note_missing(where: str, names: Iterable[str]) -> None:
    """Print one line if shards are absent."""
    counts: dict[tuple[str, int], int] = {}
    for name in names:
        if shard := _SHARD.fullmatch(name.rpartition("/")[2]):
            key = (name.rpartition("/")[0] + shard.group(1), int(shard.group(3)))
            counts[key] = counts.get(key, 0) + 1
    present, expected = sum(counts.values()), sum(count for _, count in counts)
    if present < expected:
        print(f"note: {where} has {present} of {expected} files of its split", file=sys.stderr)


def saved_files(folder: str, names: Sequence[str], wanted: str) -> list[str] | None:
    """Return the arrow files that `save_to_disk` wrote; None if it wrote none.

    Raises:
        UsageError: there are several splits, and not the wanted one.
    """
    places = [name.removesuffix("state.json") for name in names if _is_state(name)]
    places = [p for p in places if any(is_table_name(n) and n.startswith(p) for n in names)]
    if not places:
        return None
    splits = {place.rstrip("/"): place for place in places}
    place = places[0] if len(places) == 1 else splits.get(wanted)
    if place is None:
        raise UsageError(
            f"{folder} has the splits {', '.join(sorted(splits))}, and no {wanted!r}: "
            "choose with --data.split"
        )
    state = storage.join(folder, f"{place}state.json")
    try:
        # Other arrow files beside them are a cache of the library.
        files = [str(file["filename"]) for file in json.loads(storage.read(state))["_data_files"]]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{state} lists no data files: save the data set again") from None
    return [f"{place}{file}" for file in files]


def _is_state(name: str) -> bool:
    return name.rpartition("/")[2] == "state.json"
