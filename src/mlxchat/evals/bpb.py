"""Bits per byte: a loss that does not depend on the tokenizer. Counterpart of nanochat/loss_eval.py.

Also the perplexity per token, which is comparable only between models with the same vocabulary, and a byte-level n-gram
model as a baseline.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mlxchat.data.packing import Ints, Row
from mlxchat.data.sources import read_texts
from mlxchat.distributed.team import Team
from mlxchat.engine.generate import Engine
from mlxchat.engine.third_party import AnyTokenizer
from mlxchat.errors import DataError
from mlxchat.model.scoring import Floats, ScoredRow, row_of, score_rows
from mlxchat.runner.context import Context

_LARGEST_EXPONENT = 700
# Rows of a text that are sorted by length before batching; a stop waits for them.
_WINDOW_ROWS = 256
_MOST_TRAINING_BYTES = 20_000_000
_SEPARATOR = b"\x00"


@dataclass(frozen=True)
class TextLoss:
    """Sums of a model's loss over the targets that stand for bytes; special tokens are left out."""

    nats: float  # total cross-entropy
    num_bytes: int
    num_tokens: int

    @property
    def bits_per_byte(self) -> float:
        """Infinite without bytes."""
        return self.nats / (math.log(2) * self.num_bytes) if self.num_bytes else math.inf

    @property
    def perplexity(self) -> float:
        """Per token: e to the mean cross-entropy in nats; infinite without tokens or on overflow."""
        mean = self.nats / self.num_tokens if self.num_tokens else math.inf
        return math.exp(mean) if mean < _LARGEST_EXPONENT else math.inf


def text_loss(
    model: Any, rows: Sequence[Row], token_bytes: Ints, *, micro_tokens: int, team: Team | None = None
) -> TextLoss:
    """Return the loss on the targets (T,) that are not −1 and have bytes by `token_bytes` (V,): not special tokens."""
    scored = [row_of(*row) for row in rows]
    sums = _sums(scored, score_rows(model, scored, batch_tokens=micro_tokens, team=team), token_bytes).sum(0)
    return TextLoss(float(sums[0]), int(sums[1]), int(sums[2]))


def mean_loss(model: Any, rows: Sequence[Row], *, micro_tokens: int, team: Team | None = None) -> float:
    """Return the mean cross-entropy in nats over the rows' targets that are not ignored."""
    losses = score_rows(model, [row_of(*row) for row in rows], batch_tokens=micro_tokens, team=team)
    return sum(float(each.sum(dtype=np.float64)) for each in losses) / max(1, sum(each.size for each in losses))


def uniform_bits_per_byte(rows: Sequence[Row], token_bytes: Ints) -> float:
    """Return the bits per byte of the uniform distribution over tokens."""
    weight = np.concatenate([token_bytes[targets[targets >= 0]] for _, targets in rows])
    return float((weight > 0).sum() * math.log2(len(token_bytes)) / weight.sum())


def _sums(rows: Sequence[ScoredRow], losses: Sequence[Floats], token_bytes: Ints) -> np.ndarray[Any, Any]:
    """Return nats, bytes and tokens of each row (rows, 3), of targets that stand for bytes."""
    sums = np.zeros((len(rows), 3))
    for number, (row, values) in enumerate(zip(rows, losses, strict=True)):
        weight = token_bytes[row.targets]
        sums[number] = (values[0] * (weight > 0)).sum(dtype=np.float64), weight.sum(), (weight > 0).sum()
    return sums


# Any text; every token of every document counts once


def measure_text(ctx: Context, engine: Engine) -> dict[str, Any]:
    """Return a model's loss on `eval.text` as data of scores.json; bits per byte and perplexity become metrics.

    Documents longer than the model's context are cut into rows of that length as in lm-evaluation-harness: the only
    context of a row is the token before it. Standard errors are over documents; over rows if there is only one.
    Raises DataError if the text cannot be read or is empty.
    """
    config, token_bytes = ctx.config.eval, engine.tokenizer.token_bytes
    documents = partial(read_texts, Path(config.text or ""), config.text_column)
    total = sum(1 for _ in documents())

    def cut() -> Iterator[tuple[int, ScoredRow]]:
        # Each row begins with the last token of the one before.
        for number, text in enumerate(documents()):
            ids = engine.tokenizer.encode_documents([text])[0].astype(np.int32)
            for start in range(0, len(ids) - 1, engine.context_tokens):
                piece = ids[start : start + engine.context_tokens + 1]
                yield number, row_of(piece[:-1], piece[1:])

    pieces = cut()
    owners, parts = list[int](), list[np.ndarray[Any, Any]]()
    with ctx.progress(total, "documents") as progress:
        while window := list(islice(pieces, _WINDOW_ROWS)):
            rows = [row for _, row in window]
            owners += [number for number, _ in window]
            parts.append(_sums(rows, engine.score(rows), token_bytes))
            progress.update(owners[-1] + 1)
            if ctx.should_stop():
                raise ctx.stop(f"document {owners[-1] + 1} of {total}")
    nats, num_bytes, tokens = np.concatenate(parts).T if parts else np.zeros((3, 0))
    if total > 1:
        nats, num_bytes, tokens = (np.bincount(owners, each) for each in (nats, num_bytes, tokens))
    if not num_bytes.sum():
        raise DataError(f"{config.text} holds no text")
    found = TextLoss(float(nats.sum()), int(num_bytes.sum()), int(tokens.sum()))
    error, loss_error = ratio_error(nats, num_bytes), ratio_error(nats, tokens)
    ctx.metrics |= {"text_bpb": found.bits_per_byte, "text_perplexity": found.perplexity}
    return {
        "bpb": found.bits_per_byte, "stderr": error and error / math.log(2), "perplexity": found.perplexity,
        "perplexity_stderr": loss_error and loss_error * found.perplexity, "tokens": found.num_tokens,
        "bytes": found.num_bytes, "documents": total,
    }  # fmt: skip


def ratio_error(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float | None:
    """Return the standard error of sum(x) / sum(y) over independent pairs (n,), linearised; None if n < 2."""
    if len(x) < 2:
        return None
    residuals = x - x.sum() / y.sum() * y
    return float(math.sqrt(len(x) / (len(x) - 1) * (residuals**2).sum()) / y.sum())


# A baseline


def ngram_bits_per_byte(training: Iterable[str], held_out: Iterable[str]) -> float:
    """Return the bits per byte of held-out documents under byte trigram counts of the training documents.

    Each order is interpolated with the one below by Witten-Bell smoothing (weights n / (n + distinct successors)),
    down to uniform bytes.
    """
    train, test = _to_bytes(training), _to_bytes(held_out)
    probability = np.full(len(test) - 2, 1 / 256)
    seen = np.zeros(len(train), np.int64)  # the last `order` bytes before each byte as a number
    asked = np.zeros(len(test) - 2, np.int64)
    for order in range(3):
        if order:
            seen[order:] += train[:-order].astype(np.int64) * 256 ** (order - 1)
            asked += test[2 - order : len(test) - order].astype(np.int64) * 256 ** (order - 1)
        counts = np.bincount(seen[order:] * 256 + train[order:], minlength=256 ** (order + 1)).reshape(-1, 256)
        totals, kinds = counts.sum(-1)[asked], (counts > 0).sum(-1)[asked]
        found = counts[asked, test[2:]] + kinds * probability
        probability = np.where(totals > 0, found / np.maximum(1, totals + kinds), probability)
    return float(-np.log2(probability[test[2:] != _SEPARATOR[0]]).mean())


def texts_of_rows(rows: Iterable[Row], tokenizer: AnyTokenizer) -> Iterator[str]:
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
