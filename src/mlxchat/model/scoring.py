"""Scores of tokens: the one forward pass of evaluations, of references and of rounding checks.

Rows are sorted by length, padded on the right and computed several at a time. Only the positions that are scored pass
through our models' head, a chunk of logits at a time; their scores are all that leaves the device.

Shapes: B rows, W padded length, N scored tokens of a pass, n of a row, K kinds of scores.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxchat.data.packing import Ints
from mlxchat.distributed.team import Team, name_of
from mlxchat.model.checkpoint import model_on, sync_model
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import computing_in, flatten_parameters, set_parameters
from mlxchat.ops.device import round_tokens
from mlxchat.ops.loss import ScoreKind, scores_of_logits, token_scores

Floats = np.ndarray[Any, np.dtype[np.float32]]


class ScoredRow(NamedTuple):
    """Ids (T,), and tokens `targets` (n,) to score as what follows the positions `places` (n,) of ids."""

    ids: Ints
    places: np.ndarray[Any, np.dtype[np.integer[Any]]]
    targets: Ints


def row_of(ids: Ints, targets: Ints) -> ScoredRow:
    """Return a row of ids (T,) that scores targets (T,); negative ones are ignored."""
    places = np.flatnonzero(targets >= 0)
    return ScoredRow(ids[: places[-1] + 1 if len(places) else 0], places, targets[places])


def continuation(tokens: Sequence[int], start: int) -> ScoredRow:
    """Return a row that scores the tokens of a sequence from position `start` ≥ 1 on."""
    ids = np.asarray(tokens, np.int32)
    return ScoredRow(ids[:-1], np.arange(start - 1, len(ids) - 1), ids[start:])


def score_rows(
    model: Any, rows: Sequence[ScoredRow], kinds: Sequence[ScoreKind] = ("losses",), *, batch_tokens: int,
    dtype: mx.Dtype | None = None, team: Team | None = None, role: str = "model",
) -> list[Floats]:  # fmt: skip
    """Return the scores (K, n) of each row; losses and entropies are in nats.

    The model is ours, or one of mlx-lm, which maps ids to logits. A forward pass has at most `batch_tokens`, padding
    included; a longer row is a pass of its own. For ours, `dtype` is that of the pass (None: of the parameters), and a
    team's ranks share the rows; they keep the model under its `role`.
    """
    found: list[Floats] = [np.zeros((len(kinds), 0), np.float32)] * len(rows)
    scored = [number for number, row in enumerate(rows) if len(row.targets)]
    order = sorted(scored, key=lambda number: -len(rows[number].ids))
    chosen = [rows[number] for number in order]
    if team is None or team.size == 1 or not chosen:
        scores = _score(model, chosen, tuple(kinds), batch_tokens, dtype)
    else:
        sync_model(team, model, role)
        request = {
            "rows": [[each.tolist() for each in row] for row in chosen], "kinds": list(kinds), "role": role,
            "batch_tokens": batch_tokens, "dtype": None if dtype is None else name_of(dtype),
        }  # fmt: skip
        scores = team.call(_score_on_ranks, request)
    for number, values in zip(order, scores, strict=True):
        found[number] = values
    return found


def _score_on_ranks(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> list[Floats]:
    """Score every size-th row, which sorted rows make about equal work; return the scores of all rows."""
    rows = [ScoredRow(*(np.array(each, np.int32) for each in row)) for row in request["rows"]]
    own = rows[team.group.rank :: team.size]
    model, dtype = model_on(team, request["role"]), request["dtype"] and getattr(mx, request["dtype"])
    scores = _score(model, own, tuple(request["kinds"]), request["batch_tokens"], dtype)
    every = team.group.gather_json([each.tolist() for each in scores])
    return [np.array(every[place % team.size][place // team.size], np.float32) for place in range(len(rows))]


def _score(
    model: Any, rows: list[ScoredRow], kinds: tuple[ScoreKind, ...], batch_tokens: int, dtype: mx.Dtype | None
) -> list[Floats]:
    """Return the scores of rows, the longest of which comes first, in this process."""
    found: list[Floats] = []
    start = 0
    with nullcontext() if dtype is None else computing_in(model, dtype):
        forward = _forward(model, kinds)
        while start < len(rows):
            width = round_tokens(len(rows[start].ids))
            most = max(1, batch_tokens // width)
            batch = rows[start : start + most]
            start += most
            values = score_batch(forward, batch, width, most)
            ends = np.cumsum([len(row.targets) for row in batch])
            whole = np.stack([np.asarray(each, np.float32) for each in values])
            found += np.split(whole[:, : ends[-1]], ends[:-1], axis=1)
    return found


def score_batch(forward: Callable[..., list[mx.array]], rows: list[ScoredRow], width: int, most: int) -> list[mx.array]:
    """Return the scores of rows, an array (N,) for each kind, perhaps with padding at its end."""
    # Few heights, because cuDNN takes long to plan a new shape.
    height = min(most, 1 << (len(rows) - 1).bit_length())
    values = forward(*arrays_of(rows, (height, width)))
    mx.eval(values)
    return values


def arrays_of(rows: list[ScoredRow], shape: tuple[int, int], *, padded: bool = True) -> list[mx.array]:
    """Return padded ids (B, W), and the places of scored tokens among B · W and their ids (N,), perhaps padded."""
    ids = np.zeros(shape, np.int32)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = row.ids
    places = np.concatenate([shape[1] * place + row.places for place, row in enumerate(rows)])
    targets = np.concatenate([row.targets for row in rows])
    padding = (0, round_tokens(len(places)) - len(places) if padded else 0)
    return [mx.array(ids), mx.array(np.pad(places, padding)), mx.array(np.pad(targets, padding))]


def _forward(model: Any, kinds: tuple[ScoreKind, ...]) -> Callable[..., list[mx.array]]:
    """Return ids (B, W), places (N,), targets (N,) → scores (N,), compiled once; it reads the current weights."""

    def of_mlx_lm(ids: mx.array, places: mx.array, targets: mx.array) -> list[mx.array]:
        logits = model(ids)
        return scores_of_logits(logits.reshape(-1, logits.shape[-1])[places].astype(mx.float32), targets, kinds)

    def of_ours(weights: dict[str, mx.array], ids: mx.array, places: mx.array, targets: mx.array) -> list[mx.array]:
        own = flatten_parameters(model)
        set_parameters(model, weights)
        hidden = model.hidden(ids).reshape(-1, model.sizes.width)[places]
        scores = token_scores(hidden, model.head_weight, targets, kinds)
        set_parameters(model, own)
        return scores

    if not isinstance(model, GPT):
        return of_mlx_lm
    # Kept on the model so that both have the same lifetime; plain attributes are not parameters.
    kept: dict[tuple[ScoreKind, ...], Callable[..., list[mx.array]]] = vars(model).setdefault("_compiled_scores", {})
    return partial(kept.setdefault(kinds, mx.compile(of_ours)), flatten_parameters(model))
