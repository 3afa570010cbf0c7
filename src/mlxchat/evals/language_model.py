"""The interface of models for evaluations, and its implementation for ours; `third_party.py` has mlx-lm's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlxchat.evals.branching import Branches, Row
from mlxchat.model.gpt import GPT
from mlxchat.ops.device import make_lanes
from mlxchat.ops.loss import token_losses

Floats = np.ndarray[Any, np.dtype[np.float32]]
Ints = np.ndarray[Any, np.dtype[np.int32]]
Judge = Callable[[mx.array, mx.array], mx.array]
"""States (N, C) and targets (N,) → values (N,)."""
# Logits per lane at a time; least states per product with the head.
_MOST_LOGITS, _LEAST_STATES = 1 << 24, 256


class LanguageModel(Protocol):
    """A model that predicts tokens."""

    @property
    def context_tokens(self) -> int:
        """Row length in training, or longest input."""

    @property
    def extends(self) -> bool:
        """True if it computes inputs longer than the context."""

    def losses(self, rows: Sequence[Row]) -> list[list[Floats]]:
        """Return the loss in nats of every target, by row and sequence."""

    def predictions(self, rows: Sequence[Row]) -> list[list[Ints]]:
        """Return the most likely id in place of every target, by row and sequence."""

    def token_losses(self, ids: Ints, targets: Ints) -> Floats:
        """Return the loss in nats of every target (B, T) after ids (B, T); 0 where a target is negative."""


class OwnModel:
    """Our GPT as a `LanguageModel`. Rows of a batch are divided among CPU cores."""

    def __init__(self, model: GPT, *, padding: int = 0) -> None:
        """Keep a model; `padding` is the padding id."""
        self.model, self._padding, self._lanes = model, padding, make_lanes()

    @property
    def context_tokens(self) -> int:
        """Row length in training."""
        return self.model.sizes.context_tokens

    @property
    def extends(self) -> bool:
        """True: rotary positions are unlimited."""
        return True

    def losses(self, rows: Sequence[Row]) -> list[list[Floats]]:
        """See `LanguageModel.losses`."""
        return [
            [np.asarray(part, np.float32) for part in parts]
            for parts in self._of_targets(rows, lambda hidden, targets: token_losses(hidden, self._head, targets))
        ]

    def predictions(self, rows: Sequence[Row]) -> list[list[Ints]]:
        """See `LanguageModel.predictions`."""
        return [[np.asarray(part, np.int32) for part in parts] for parts in self._of_targets(rows, self._likeliest)]

    def token_losses(self, ids: Ints, targets: Ints) -> Floats:
        """See `LanguageModel.token_losses`."""
        hidden = self.model.hidden(mx.array(ids)).reshape(-1, self.model.sizes.width)
        return np.asarray(token_losses(hidden, self._head, mx.array(targets.reshape(-1)))).reshape(targets.shape)

    def logits_of(self, prompts: Sequence[list[int]], choices: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return for each prompt the logits of its choices, token ids, as what follows it."""
        return [
            [float(row[token]) for token in own] for row, own in zip(self.next_logits(prompts), choices, strict=True)
        ]

    def next_logits(self, prompts: Sequence[list[int]]) -> Floats:
        """Return the logits (B, V) of what follows each prompt."""
        longest = max(map(len, prompts))
        # Padded on the right: a causal model's state at the last prompt token does not depend on what follows.
        ids = mx.array([prompt + [self._padding] * (longest - len(prompt)) for prompt in prompts])
        last = mx.array([len(prompt) - 1 for prompt in prompts])
        # Only the last position passes through the head.
        return np.asarray(self.model.logits(self.model.hidden(ids)[mx.arange(len(prompts)), last]).astype(mx.float32))

    @property
    def _head(self) -> mx.array:
        return self.model.head_weight

    def _likeliest(self, hidden: mx.array, targets: mx.array) -> mx.array:
        return self.model.logits(hidden).argmax(-1)

    def _of_targets(self, rows: Sequence[Row], judge: Judge) -> list[list[Any]]:
        """Return `judge` of the states before the targets, by row and sequence."""
        deals = self._lanes.deal(len(rows))
        with self._lanes.sharing(len(deals)):
            dealt = self._lanes.run([partial(self._states, rows[deal]) for deal in deals])
            mx.eval(dealt)
            values: list[list[mx.array]] = [[] for _ in deals]
            # A few logits at a time bound the memory.
            step = max(_LEAST_STATES, _MOST_LOGITS // len(self._head))
            for start in range(0, max(len(targets) for _, targets in dealt), step):
                places = [place for place, (_, targets) in enumerate(dealt) if start < len(targets)]
                parts = self._lanes.run(
                    [partial(judge, *(each[start : start + step] for each in dealt[place])) for place in places]
                )
                mx.eval(parts)
                for place, part in zip(places, parts, strict=True):
                    values[place].append(part)
        found = []
        for deal, kept in zip(deals, values, strict=True):
            flat, end = np.concatenate([np.asarray(part) for part in kept]) if kept else np.zeros(0), 0
            for row in rows[deal]:
                found.append([flat[end : (end := end + len(targets))] for targets in row.targets])
        return found

    def _states(self, rows: Sequence[Row]) -> tuple[mx.array, mx.array]:
        """Return the states (N, C) before the rows' targets, and the targets (N,)."""
        branches = Branches(rows, self.model.sizes, self._padding)
        hidden = self.model.hidden(branches.ids, branches)
        columns = [np.concatenate(row.columns()) for row in rows]
        place = np.repeat(np.arange(len(rows)), [len(each) for each in columns])
        targets = np.concatenate([np.asarray(each, np.int32) for row in rows for each in row.targets])
        return hidden[mx.array(place), mx.array(np.concatenate(columns))], mx.array(targets)
