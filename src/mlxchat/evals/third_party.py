"""mlx-lm's models as a `LanguageModel` for evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlxchat.evals.branching import Row

Floats = np.ndarray[Any, np.dtype[np.float32]]
Ints = np.ndarray[Any, np.dtype[np.int32]]
# nanochat's context.
MOST_CONTEXT_TOKENS = 2048
# Logits and cached tokens held at a time.
_MOST_LOGITS = 1 << 26
_MOST_CACHED_TOKENS = 8192


class ThirdPartyModel:
    """mlx-lm's model as a `LanguageModel`. A common prefix of rows is computed once, with mlx-lm's cache."""

    def __init__(self, model: Any, context_tokens: int) -> None:
        """Keep the model and its longest input."""
        self.model, self._context = model, context_tokens

    @property
    def context_tokens(self) -> int:
        """Longest input."""
        return self._context

    @property
    def extends(self) -> bool:
        """False: third-party models keep their own limits."""
        return False

    def __call__(self, ids: mx.array) -> mx.array:
        """Return logits (B, T, V) in float32 of ids (B, T)."""
        logits: mx.array = self.model(ids)
        return logits.astype(mx.float32)

    def losses(self, rows: Sequence[Row]) -> list[list[Floats]]:
        """See `LanguageModel.losses`."""
        return self._of_targets(rows, _losses)

    def predictions(self, rows: Sequence[Row]) -> list[list[Ints]]:
        """See `LanguageModel.predictions`."""
        return self._of_targets(rows, lambda logits, targets: logits.argmax(-1).astype(mx.int32))

    def token_losses(self, ids: Ints, targets: Ints) -> Floats:
        """See `LanguageModel.token_losses`."""
        losses = _losses(self(mx.array(ids)), mx.array(np.maximum(targets, 0)))
        return np.asarray(mx.where(mx.array(targets) >= 0, losses, 0.0))

    def logits_of(self, prompts: Sequence[list[int]], choices: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `OwnModel.logits_of`."""
        logits = self.next_logits(prompts)
        return [[float(row[id_]) for id_ in ids] for row, ids in zip(logits, choices, strict=True)]

    def next_logits(self, prompts: Sequence[list[int]]) -> Floats:
        """Return the logits (B, V) after each prompt."""
        return np.concatenate([np.asarray(part) for _, part in self._wanted(prompts, [len(p) for p in prompts])])

    def _of_targets(self, rows: Sequence[Row], judge: Any) -> list[list[Any]]:
        sequences = [row.trunk + branch for row in rows for branch in row.branches]
        starts = [start for row in rows for start in row.starts]
        targets = [each for row in rows for each in row.targets]
        found: list[Any] = []
        for part, logits in self._wanted(sequences, starts, [len(each) for each in targets]):
            wanted = [token for each in targets[part] for token in each]
            values = np.asarray(judge(logits, mx.array(np.asarray(wanted, np.int32))))
            end = 0
            for each in targets[part]:
                found.append(values[end : (end := end + len(each))])
        flat = iter(found)
        return [[next(flat) for _ in row.branches] for row in rows]

    def _wanted(
        self, sequences: Sequence[list[int]], starts: Sequence[int], counts: Sequence[int] | None = None
    ) -> Iterator[tuple[slice, mx.array]]:
        """Yield parts of the sequences and the logits (N, V) before positions start … start + count − 1 of each.

        Tokens before the earliest start are computed into a cache without logits, equal prefixes once; the rest is
        padded at the right and computed with logits.
        """
        counts = counts if counts is not None else [1] * len(sequences)
        border = max(0, min(start for start in starts) - 1)
        cache, places = self._beginnings(sequences, border)
        for part in self._parts(sequences, border):
            rest = [sequence[border:] for sequence in sequences[part]]
            longest = max(map(len, rest))
            ids = mx.array([tokens + [tokens[-1]] * (longest - len(tokens)) for tokens in rest])
            past = None if cache is None else _rows_of(cache, mx.array(places[part]))
            logits = self.model(ids, cache=past)
            row = np.repeat(np.arange(len(rest)), counts[part])
            column = [np.arange(start - 1 - border, start - 1 - border + count)
                      for start, count in zip(starts[part], counts[part], strict=True)]  # fmt: skip
            chosen = logits[mx.array(row), mx.array(np.concatenate(column))].astype(mx.float32)
            mx.eval(chosen)
            yield part, chosen

    def _beginnings(self, sequences: Sequence[list[int]], border: int) -> tuple[list[Any] | None, list[int]]:
        """Return the cache after the first `border` tokens, and each sequence's row in it."""
        if not border:
            return None, [0] * len(sequences)
        from mlx_lm.models.cache import make_prompt_cache

        known: dict[tuple[int, ...], int] = {}
        places = [known.setdefault(tuple(sequence[:border]), len(known)) for sequence in sequences]
        cache: list[Any] = make_prompt_cache(self.model)
        self.model(mx.array([list(tokens) for tokens in known]), cache=cache)
        # The logits are not evaluated, so the head is not computed.
        mx.eval([each.state for each in cache])
        return cache, places

    def _parts(self, sequences: Sequence[list[int]], border: int) -> Iterator[slice]:
        start = 0
        while start < len(sequences):
            longest, stop = len(sequences[start]), start
            while stop < len(sequences):
                longest = max(longest, len(sequences[stop]))
                count = stop + 1 - start
                logits = count * (longest - border) * self._vocab_size
                if count > 1 and (count * longest > _MOST_CACHED_TOKENS or logits > _MOST_LOGITS):
                    break
                stop += 1
            yield slice(start, stop)
            start = stop

    @cached_property
    def _vocab_size(self) -> int:
        return int(self.model(mx.array([[0]])).shape[-1])


def _losses(logits: mx.array, targets: mx.array) -> mx.array:
    """Return the cross-entropy in nats of targets (…,) under logits (…, V)."""
    return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _rows_of(cache: Sequence[Any], rows: mx.array) -> list[Any]:
    """Return a copy of a cache with these of its rows."""
    return [
        type(each).from_state(tree_map(lambda leaf: leaf[rows] if isinstance(leaf, mx.array) else leaf, each.state))
        for each in cache
    ]
