"""Bits per byte of any text; every token of every document counts once.

Documents (`data.sources.read_texts`) longer than the model's context are cut into rows of that length as in
lm-evaluation-harness: the only context of a row is the token before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mlxchat.data.packing import Ints, Row
from mlxchat.data.sources import read_texts
from mlxchat.data.tokens import DocumentTokenizer
from mlxchat.errors import DataError
from mlxchat.evals.bpb import losses_of
from mlxchat.evals.language_model import LanguageModel
from mlxchat.model.gpt import GPT
from mlxchat.runner.context import Context

# Documents whose rows are sorted by length before batching.
_WINDOW_DOCUMENTS = 512


def measure_text(
    ctx: Context, model: GPT | LanguageModel, tokenizer: DocumentTokenizer, token_bytes: Ints, *, context_tokens: int,
    micro_tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """Return a model's loss on `eval.text` as data of scores.json; bits per byte and perplexity become metrics.

    Standard errors are over documents; over rows if there is only one document.

    Args:
        ctx: of a stage that declares `eval`.
        model: to evaluate.
        tokenizer: the model's.
        token_bytes: (V,) bytes of each id, 0 for special tokens, which do not count.
        context_tokens: longest row.
        micro_tokens: tokens per forward pass, at most.

    Raises:
        DataError: the text cannot be read or is empty.
        Interrupted: the run was asked to stop.
    """
    config = ctx.config.eval
    documents = partial(read_texts, Path(config.text or ""), config.text_column)
    total, done = sum(1 for _ in documents()), 0
    sums: list[np.ndarray[Any, Any]] = []
    """(document, nats, bytes, tokens) of each row."""
    texts = documents()
    with ctx.progress(total, "documents") as progress:
        while part := list(islice(texts, _WINDOW_DOCUMENTS)):
            rows = [
                (done + number, row)
                for number, ids in enumerate(tokenizer.encode_documents(part))
                for row in _rows(np.asarray(ids, np.int32), context_tokens)
            ]
            for batch in _batches(rows, micro_tokens):
                sums.append(_sums(model, batch, token_bytes))
                if ctx.should_stop():
                    raise ctx.stop(f"document {done + 1} of {total}")
            progress.update(done := done + len(part))
    owner, *measured = np.concatenate(sums).T if sums else np.zeros((4, 0))
    nats, num_bytes, tokens = (np.bincount(owner.astype(int), each) for each in measured) if total > 1 else measured
    if not num_bytes.sum():
        raise DataError(f"{config.text} holds no text")
    bits, loss = num_bytes.sum() * math.log(2), nats.sum() / tokens.sum()
    error, loss_error = ratio_error(nats, num_bytes), ratio_error(nats, tokens)
    found = {
        "bpb": nats.sum() / bits, "stderr": error and error / math.log(2), "perplexity": math.exp(min(loss, 700)),
        "perplexity_stderr": loss_error and loss_error * math.exp(min(loss, 700)), "tokens": int(tokens.sum()),
        "bytes": int(num_bytes.sum()), "documents": total,
    }  # fmt: skip
    ctx.metrics |= {"text_bpb": found["bpb"], "text_perplexity": found["perplexity"]}
    return found


def ratio_error(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float | None:
    """Return the standard error of sum(x) / sum(y) over independent pairs (n,), linearised; None if n < 2."""
    if len(x) < 2:
        return None
    residuals = x - x.sum() / y.sum() * y
    return float(math.sqrt(len(x) / (len(x) - 1) * (residuals**2).sum()) / y.sum())


def _rows(ids: Ints, context_tokens: int) -> Iterator[Row]:
    """Yield inputs and targets (≤ context_tokens,) of a document; its first id is not predicted."""
    for start in range(0, len(ids) - 1, context_tokens):
        piece = ids[start : start + context_tokens + 1]
        yield piece[:-1], piece[1:]


def _batches(rows: list[tuple[int, Row]], micro_tokens: int) -> Iterator[list[tuple[int, Row]]]:
    """Yield batches of at most `micro_tokens` of the rows with their documents' numbers, longest first."""
    rows = sorted(rows, key=lambda row: -len(row[1][0]))
    while rows:
        count = max(1, micro_tokens // len(rows[0][1][0]))
        yield rows[:count]
        rows = rows[count:]


def _sums(model: GPT | LanguageModel, batch: Sequence[tuple[int, Row]], token_bytes: Ints) -> np.ndarray[Any, Any]:
    """Return (rows, 4): number of the document, nats, bytes and tokens."""
    width = max(len(ids) for _, (ids, _) in batch)
    ids, targets = np.zeros((len(batch), width), np.int32), np.full((len(batch), width), -1, np.int32)
    for place, (_, row) in enumerate(batch):
        ids[place, : len(row[0])], targets[place, : len(row[1])] = row
    weight = np.where(targets >= 0, token_bytes[np.maximum(targets, 0)], 0)
    nats = (losses_of(model, ids, targets) * (weight > 0)).sum(1, dtype=np.float64)
    return np.stack([[number for number, _ in batch], nats, weight.sum(1), (weight > 0).sum(1)], axis=1)
