"""A byte-level n-gram model of order 2: a baseline for language models on the same text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mlxchat.data.packing import Row
    from mlxchat.data.tokenizer import Tokenizer

_MOST_TRAINING_BYTES = 20_000_000
_SEPARATOR = b"\x00"


def ngram_bits_per_byte(training: Iterable[str], held_out: Iterable[str]) -> float:
    """Return the bits per byte of held-out documents under byte trigram counts of the training documents.

    Each order is interpolated with the one below by Witten-Bell smoothing (weights n / (n + distinct successors)),
    down to uniform bytes. At most 20 MB of training text are counted.
    """
    train, test = _to_bytes(training), _to_bytes(held_out)
    order0 = _smooth(np.bincount(train, minlength=256)[None, :].astype(np.float64), np.full((1, 256), 1 / 256))
    pairs = train[:-1].astype(np.int64) * 256 + train[1:]
    order1 = _smooth(np.bincount(pairs, minlength=1 << 16).reshape(256, 256).astype(np.float64), order0)
    triples = pairs[:-1] * 256 + train[2:]
    counts = np.bincount(triples, minlength=1 << 24).reshape(256, 256, 256)
    context_totals = counts.sum(-1)
    context_kinds = (counts > 0).sum(-1)
    a, b, c = test[:-2].astype(np.int64), test[1:-1].astype(np.int64), test[2:].astype(np.int64)
    total, kinds = context_totals[a, b], context_kinds[a, b]
    seen = total > 0
    weight = np.where(seen, total / np.maximum(1, total + kinds), 0.0)
    probability = weight * counts[a, b, c] / np.maximum(1, total) + (1 - weight) * order1[b, c]
    counted = test[2:] != _SEPARATOR[0]
    return float(-np.log2(probability[counted]).mean())


def texts_of_rows(rows: Iterable[Row], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text of each document's part in the rows, so that a baseline is measured on the model's text."""
    for ids, targets in rows:
        tokens = np.append(ids[:1], targets[targets >= 0])
        for part in np.split(tokens, np.flatnonzero(tokens == tokenizer.bos)):
            yield tokenizer.decode(part[part != tokenizer.bos].tolist())


def _to_bytes(documents: Iterable[str]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    parts, size = [], 0
    for document in documents:
        parts.append(document.encode())
        size += len(parts[-1])
        if size > _MOST_TRAINING_BYTES:
            break
    return np.frombuffer(_SEPARATOR * 2 + _SEPARATOR.join(parts), dtype=np.uint8)


def _smooth(
    counts: np.ndarray[Any, np.dtype[np.float64]], lower: np.ndarray[Any, np.dtype[np.float64]]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return probabilities (contexts, 256): counts interpolated with the lower order."""
    total = counts.sum(-1, keepdims=True)
    kinds = (counts > 0).sum(-1, keepdims=True)
    smoothed: np.ndarray[Any, np.dtype[np.float64]] = np.where(
        total > 0, (counts + kinds * lower) / np.maximum(1, total + kinds), lower
    )
    return smoothed
