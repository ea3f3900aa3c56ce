"""Token tables that keep only the rows of tokens that occurred in training.

A small model has seen a few hundred of 50,257 tokens. The other rows of its table still have their
random initial values, and would be most of the file.
"""

from collections.abc import Mapping

import numpy as np

TABLE = "text/token_embedding"
ROWS = "text/token_rows"


def compact(flat: Mapping[str, np.ndarray], seen: np.ndarray) -> dict[str, np.ndarray]:
    """Keep the rows of the token table that `seen` marks, and one row for all other tokens.

    The shared row is the mean of the rows that are kept: an unknown word becomes an average word.

    Args:
        flat: a flat parameter tree.
        seen: `(n_vocab,)` bool.

    Returns:
        The same flat tree with a table `(K + 1, W)`, and the ids `(K,)` int32 of its rows.
    """
    table = np.asarray(flat[TABLE], np.float32)
    rows = np.flatnonzero(seen).astype(np.int32)
    kept = table[rows]
    return dict(flat) | {TABLE: np.concatenate([kept, kept.mean(axis=0)[None]]), ROWS: rows}


def expand(flat: Mapping[str, np.ndarray], n_vocab: int) -> dict[str, np.ndarray]:
    """Restore the whole token table: the inverse of `compact`. A whole table stays as it is."""
    if ROWS not in flat:
        return dict(flat)
    expanded = dict(flat)
    rows, kept = expanded.pop(ROWS), np.asarray(expanded[TABLE])
    table = np.broadcast_to(kept[-1], (n_vocab, kept.shape[1])).copy()
    table[rows] = kept[:-1]
    expanded[TABLE] = table
    return expanded
