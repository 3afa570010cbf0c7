"""bpb_*.json: bits per byte and mean loss of the tiny models of both snapshots."""

import math
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from comparison import Comparison, Quantity, largest, scaled_distance
from parity_file import ParityFile

from mlxchat.data.packing import Row
from mlxchat.evals.bpb import mean_loss, text_loss
from mlxchat.model.gpt import GPT
from mlxchat.ops.loss import token_scores

BITS = 1e-6
LOSS = 1e-5
VARIANTS = ("oct2025", "jul2026")


def bits(file: ParityFile) -> Iterator[Comparison]:
    """Compare the bits per byte of every case, with both ways to count the bytes of a token."""
    for variant in VARIANTS:
        model, errors = file.core_model(variant), {}
        for number, case in enumerate(file.json["cases"]):
            rows = [row for name in case["batches"][: case["steps"]] for row in _rows(file, name)]
            got = text_loss(model, rows, _token_bytes(file, case["token_bytes"]), micro_tokens=1000).bits_per_byte
            expected = case[variant]["bpb"] if variant in case else None
            expected = math.inf if case["infinite"] or expected is None else expected
            name = f"{number}: {' '.join(case['batches']) or 'no batch'}, {case['token_bytes']}"
            errors[name] = 0.0 if got == expected else scaled_distance(got, expected)
        yield largest(f"bits per byte, {variant}", errors, BITS)


def counted_bytes(file: ParityFile) -> Iterator[Comparison]:
    """Compare the number of bytes of the targets that count."""
    errors = {}
    for number, case in enumerate(file.json["cases"]):
        table = _token_bytes(file, case["token_bytes"])
        rows = [row for name in case["batches"][: case["steps"]] for row in _rows(file, name)]
        got = sum(int(table[targets[targets >= 0]].sum()) for _, targets in rows)
        errors[f"case {number}"] = float(abs(got - case["total_bytes"]))
    yield largest("counted bytes", errors, 0)


def losses(file: ParityFile) -> Iterator[Comparison]:
    """Compare the mean loss of whole batches, and the loss of each token of one row."""
    for variant in VARIANTS:
        model = file.core_model(variant)
        errors = {
            name: scaled_distance(mean_loss(model, _rows(file, name), micro_tokens=1000), expected)
            for name, expected in file.json["mean_loss"][variant].items()
        }
        yield largest(f"mean loss, {variant}", errors, LOSS)
    for key, values in file.json.items():
        if key.startswith("loss_per_token_"):
            batch, _, row = key.removeprefix("loss_per_token_").rpartition("_row")
            for variant, expected in values.items():
                got = _row_losses(file.core_model(variant), _rows(file, batch)[int(row)])
                yield Comparison(f"loss of each token, {variant}", scaled_distance(got, expected), LOSS)


QUANTITIES: tuple[Quantity, ...] = (counted_bytes, bits, losses)


def _rows(file: ParityFile, name: str) -> list[Row]:
    batch = file.json["batches"][name]
    return [
        (np.array(ids, np.int32), np.array(targets, np.int32))
        for ids, targets in zip(batch["ids"], batch["targets"], strict=True)
    ]


def _token_bytes(file: ParityFile, rule: str) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return the bytes of each token: its raw bytes as ours, or those of the decoded string as in oct2025."""
    tokenizer = file.tokenizer()
    if rule == "raw_bytes":
        return tokenizer.token_bytes
    decoded = [len(tokenizer.decode([id_]).encode()) if count else 0 for id_, count in enumerate(tokenizer.token_bytes)]
    return np.array(decoded, np.int32)


def _row_losses(model: GPT, row: Row) -> np.ndarray[Any, Any]:
    hidden = model.hidden(mx.array(row[0][None])).reshape(-1, model.sizes.width)
    return np.asarray(token_scores(hidden, model.head_weight, mx.array(row[1]), ["losses"])[0])
