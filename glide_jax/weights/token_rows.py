"""Token tables that ship only the rows that training has seen.

A small model has seen a few hundred of 50,257 tokens; the rest of its table is as it was drawn at
the beginning, means nothing, and would be most of the file.
"""

from collections.abc import Mapping

import numpy as np

TABLE = "text/token_embedding"
ROWS = "text/token_rows"


def compact(flat: Mapping[str, np.ndarray], seen: np.ndarray) -> dict[str, np.ndarray]:
    """Keeps the rows of the token table that `seen` `(n_vocab,)` marks, and one for all others.

    The shared row is the mean of those seen: a word that the model does not know is an average one.

    Returns:
        The same flat tree, its table `(K + 1, W)` and beside it the ids `(K,)` int32 of its rows.
    """
    table = np.asarray(flat[TABLE], np.float32)
    rows = np.flatnonzero(seen).astype(np.int32)
    kept = table[rows]
    return dict(flat) | {TABLE: np.concatenate([kept, kept.mean(axis=0)[None]]), ROWS: rows}


def expand(flat: Mapping[str, np.ndarray], n_vocab: int) -> dict[str, np.ndarray]:
    """The opposite of `compact`; a tree with a whole table is returned as it is."""
    if ROWS not in flat:
        return dict(flat)
    whole = dict(flat)
    rows, kept = whole.pop(ROWS), np.asarray(whole[TABLE])
    table = np.broadcast_to(kept[-1], (n_vocab, kept.shape[1])).copy()
    table[rows] = kept[:-1]
    whole[TABLE] = table
    return whole
