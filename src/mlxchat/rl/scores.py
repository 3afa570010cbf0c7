"""Log-probabilities of sampled tokens and the policy's entropy, computed with the forward pass of training."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.data.packing import Ints
from mlxchat.distributed.team import Team
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters, set_parameters
from mlxchat.model.scoring import row_of, score_rows
from mlxchat.optim.optimizer import Flat
from mlxchat.rl.loss import Floats

ROWS_STEP = 16
"""Heights of batches are multiples of it, so that few shapes are compiled."""


class PolicyScores:
    """Scores rows under the model's present weights or under others."""

    def __init__(self, model: GPT, *, micro_tokens: int, dtype: mx.Dtype, team: Team | None = None) -> None:
        """Take a float32 model, tokens of a forward pass, its dtype, and the ranks that share the rows."""
        self.model, self.micro_tokens, self.dtype, self.team = model, micro_tokens, dtype, team

    def __call__(self, ids: Ints, targets: Ints, weights: Flat | None = None) -> tuple[Floats, Floats]:
        """Return log-probabilities and entropies in nats (B, T), 0 where the target is negative.

        Args:
            ids: (B, T).
            targets: (B, T) token ids; negative ones are ignored.
            weights: parameters that replace the model's by name, such as those of the frozen reference.
        """
        own, role = flatten_parameters(self.model), "model" if weights is None else "reference"
        set_parameters(self.model, weights or {})
        rows = [row_of(*row) for row in zip(ids, targets, strict=True)]
        options: dict[str, Any] = {"batch_tokens": self.micro_tokens, "dtype": self.dtype, "team": self.team}
        found = score_rows(self.model, rows, ("losses", "entropies"), role=role, **options)
        set_parameters(self.model, own)
        losses, entropies = np.zeros(ids.shape), np.zeros(ids.shape)
        losses[targets >= 0], entropies[targets >= 0] = np.concatenate(found, axis=1)
        return -losses, entropies
