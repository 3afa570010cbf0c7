"""Bits per byte of an export before and after quantisation."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxchat.data.packing import Row
from mlxchat.data.sources import Corpus
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.evals.bpb import text_loss
from mlxchat.interop.exporting import Checkpoint, rounded
from mlxchat.model.gpt import GPT, set_parameters
from mlxchat.store.catalog import by_rid, read_catalog
from mlxchat.store.store import Store

_SAMPLES = Path(__file__).with_name("texts")
_MICRO_TOKENS = 2048


def held_out_rows(
    store: Store, place: Path, tokenizer: Tokenizer, context_tokens: int, num_tokens: int
) -> tuple[list[Row], str]:
    """Return rows of text that a checkpoint was not trained on, and a description of the text.

    Args:
        store: has the checkpoint's lineage; the text is the validation split of its corpus.
        place: the checkpoint artifact.
        tokenizer: the model's.
        context_tokens: longest row.
        num_tokens: total, approximately.
    """
    corpus = _corpus_of(store, place)
    if corpus is None:
        documents = [path.read_text(encoding="utf-8") for path in sorted(_SAMPLES.glob("*.txt"))]
    else:
        documents = list(Corpus.open(corpus).documents("validation"))
    ids: list[int] = []
    for document in documents:
        ids += [tokenizer.bos, *tokenizer.encode(document)]
        if len(ids) > num_tokens:
            break
    width = min(context_tokens, len(ids) - 1)
    flat = np.asarray(ids, dtype=np.int32)
    starts = range(0, min(len(ids) - 1, num_tokens) // width * width, width)
    rows = [(flat[start : start + width], flat[start + 1 : start + 1 + width]) for start in starts]
    return rows, "sample text" if corpus is None else "its corpus's validation text"


def bits_per_byte_of_both(checkpoint: Checkpoint, rows: list[Row], bits: int, dtype: str | None) -> tuple[float, float]:
    """Return a checkpoint's bits per byte of rows, with its own weights and with those of an export of `bits`."""
    model = GPT(checkpoint.sizes)
    results = []
    for quantised in (False, True):
        weights = {
            name: rounded(checkpoint.weights(name), name, bits, dtype) if quantised
            else mx.array(checkpoint.weights(name))
            for name in checkpoint.weights.shapes
        }  # fmt: skip
        set_parameters(model, weights)
        loss = text_loss(model, rows, checkpoint.tokenizer.token_bytes, micro_tokens=_MICRO_TOKENS)
        results.append(loss.bits_per_byte)
    return results[0], results[1]


def _corpus_of(store: Store, place: Path) -> Path | None:
    """Return the corpus in an artifact's lineage, if the store still has it."""
    known = by_rid(read_catalog(store))
    waiting, seen = [rid for rid, summary in known.items() if summary["folder"] == place.name], set[str]()
    while waiting:
        rid = waiting.pop(0)
        if rid in seen or rid not in known:
            continue
        seen.add(rid)
        if known[rid]["kind"] == "corpus":
            return store.find(rid)
        waiting += [made["rid"] for made in known[rid]["inputs"].values()]
    return None
