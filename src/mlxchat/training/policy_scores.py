"""Log-probabilities of sampled tokens and the policy's entropy, by the forward pass of training."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.data.packing import Ints
from mlxchat.model.gpt import GPT
from mlxchat.model.weights import flatten_parameters, set_parameters
from mlxchat.ops.cross_entropy import token_scores
from mlxchat.ops.lanes import Lanes
from mlxchat.optim.groups import Flat

Floats = np.ndarray[Any, np.dtype[np.float64]]

_ROWS_STEP = 16


class PolicyScores:
    """Scores rows in the lanes and the precision of training; compiled once for each shape."""

    def __init__(self, model: GPT, *, micro_tokens: int, dtype: mx.Dtype) -> None:
        """Compile lazily, since cores and device are chosen when training begins.

        Args:
            model: float32 master weights; whatever they are when rows are scored.
            micro_tokens: tokens per pass, at most; at least one row.
            dtype: what to compute in.
        """
        self.model, self.micro_tokens, self.dtype = model, micro_tokens, dtype
        self._lanes: Lanes | None = None
        self._scores = mx.compile(self._losses_and_entropies)

    def __call__(self, ids: Ints, targets: Ints, parameters: Flat | None = None) -> tuple[Floats, Floats]:
        """Return log-probabilities and entropies in nats (B, T), 0 where the target is negative.

        Args:
            ids: (B, T).
            targets: (B, T) token ids; negative ones are ignored.
            parameters: other weights than the model's, such as those of a frozen reference.
        """
        lanes = self._lanes = self._lanes or Lanes()
        parameters = flatten_parameters(self.model) if parameters is None else parameters
        width = ids.shape[1]
        rows = max(1, self.micro_tokens // width)
        found = np.zeros((2, *ids.shape))
        for start in range(0, len(ids), rows):
            part = slice(start, min(start + rows, len(ids)))
            count = part.stop - start
            height = min(rows, -(-count // _ROWS_STEP) * _ROWS_STEP)  # few shapes
            padded = [_padded(array[part], height, value) for array, value in ((ids, 0), (targets, -1))]
            dealt = lanes.deal(height)
            with lanes.sharing(len(dealt)):
                parts = lanes.run(
                    [partial(self._scores, parameters, *(mx.array(array[lane]) for array in padded)) for lane in dealt]
                )
                mx.eval(parts)
            for index in range(2):
                whole = np.concatenate([np.asarray(scores[index]) for scores in parts])
                found[index, part] = whole.reshape(height, width)[:count]
        return -found[0], found[1]

    def _losses_and_entropies(self, parameters: Flat, ids: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        masters = flatten_parameters(self.model)
        set_parameters(self.model, {name: value.astype(self.dtype) for name, value in parameters.items()})
        hidden = self.model.hidden(ids)
        scores = token_scores(hidden.reshape(-1, self.model.sizes.width), self.model.head_weight, targets.reshape(-1))
        set_parameters(self.model, masters)
        return scores


def _padded(array: Ints, height: int, value: int) -> Ints:
    if len(array) == height:
        return array
    rest = np.full((height - len(array), array.shape[1]), value, dtype=array.dtype)
    return np.concatenate([array, rest])
