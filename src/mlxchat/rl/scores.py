"""Log-probabilities of sampled tokens and the policy's entropy, computed with the forward pass of training."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.data.packing import IGNORED, Ints
from mlxchat.distributed.team import Team, name_of
from mlxchat.model.gpt import GPT, cast_parameters, flatten_parameters, set_parameters
from mlxchat.model.replicas import model_on, sync_model
from mlxchat.ops.device import Lanes, make_lanes
from mlxchat.ops.loss import token_scores
from mlxchat.optim.optimizer import Flat
from mlxchat.rl.loss import Floats

ROWS_STEP = 16
"""Heights of batches and passes are multiples of it, so that few shapes are compiled."""
_SCORES, _REFERENCE = "scores", "reference"


class PolicyScores:
    """Scores rows under the model's present weights or under others; compiled once per shape."""

    def __init__(self, model: GPT, *, micro_tokens: int, dtype: mx.Dtype, team: Team | None = None) -> None:
        """Compile and choose streams at the first call, because training sets device and threads after this.

        Args:
            model: float32 master weights, read at each call.
            micro_tokens: upper bound of a pass's tokens; a pass has at least one row.
            dtype: of the forward pass.
            team: ranks that share the rows; None: this process alone.
        """
        self.model, self.micro_tokens, self.dtype = model, micro_tokens, dtype
        self._team = team if team is not None and team.size > 1 else None
        self._lanes: Lanes | None = None
        self._forward = mx.compile(self._losses_and_entropies)

    def __call__(self, ids: Ints, targets: Ints, weights: Flat | None = None) -> tuple[Floats, Floats]:
        """Return log-probabilities and entropies in nats (B, T), 0 where the target is negative.

        Args:
            ids: (B, T).
            targets: (B, T) token ids; negative ones are ignored.
            weights: parameters that replace the model's by name, such as those of the frozen reference.

        Raises:
            PeerLost: another rank is gone.
        """
        team = self._team
        if team is None:
            return self.score_here(ids, targets, weights)
        sync_model(team, self.model)
        if weights is not None:
            _share_reference(team, weights)
        team.kept[_SCORES] = self
        request = {"reference": weights is not None, "micro_tokens": self.micro_tokens, "dtype": name_of(self.dtype)}
        found: tuple[Floats, Floats] = team.call(_score, request, {"ids": ids, "targets": targets})
        return found

    def score_here(self, ids: Ints, targets: Ints, weights: Flat | None = None) -> tuple[Floats, Floats]:
        """Compute `__call__` in this process."""
        lanes = self._lanes = self._lanes or make_lanes()
        parameters = {**flatten_parameters(self.model), **(weights or {})}
        width = ids.shape[1]
        rows = max(1, self.micro_tokens // width)
        losses, entropies = np.zeros(ids.shape), np.zeros(ids.shape)
        for start in range(0, len(ids), rows):
            part = slice(start, min(start + rows, len(ids)))
            count = part.stop - start
            height = min(rows, round_up(count, ROWS_STEP))
            padding = ((0, height - count), (0, 0))
            padded = [
                np.pad(array[part], padding, constant_values=value) for array, value in ((ids, 0), (targets, IGNORED))
            ]
            dealt = lanes.deal(height)
            with lanes.sharing(len(dealt)):
                parts = lanes.run(
                    [partial(self._forward, parameters, *(mx.array(array[lane]) for array in padded)) for lane in dealt]
                )
                mx.eval(parts)
            for whole, index in ((losses, 0), (entropies, 1)):
                found = np.concatenate([np.asarray(each[index]) for each in parts])
                whole[part] = found.reshape(height, width)[:count]
        return -losses, entropies

    def _losses_and_entropies(self, parameters: Flat, ids: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        masters = flatten_parameters(self.model)
        set_parameters(self.model, cast_parameters(parameters, self.dtype))
        hidden = self.model.hidden(ids)
        scores = token_scores(hidden.reshape(-1, self.model.sizes.width), self.model.head_weight, targets.reshape(-1))
        set_parameters(self.model, masters)
        return scores


def round_up(count: int, step: int) -> int:
    """Return the next multiple of `step`."""
    return -(-int(count) // step) * step


# On every rank of a team


def _share_reference(team: Team, weights: Flat) -> None:
    """Send the reference to all ranks, unless they have it."""
    known = team.kept.get(_REFERENCE, {})
    if known.keys() == weights.keys() and all(known[name] is value for name, value in weights.items()):
        return
    team.call(_keep_reference, {}, weights)
    team.kept[_REFERENCE] = dict(weights)


def _keep_reference(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    team.kept[_REFERENCE] = arrays


def _score(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> tuple[Floats, Floats]:
    """Score this rank's rows; return the scores of all rows."""
    ids, targets = np.asarray(arrays["ids"]), np.asarray(arrays["targets"])
    own = team.group.part(len(ids))
    found = np.zeros((2, *ids.shape), dtype=np.float32)
    if own.start < own.stop:
        weights = team.kept[_REFERENCE] if request["reference"] else None
        found[:, own] = _scores_of(team, request).score_here(ids[own], targets[own], weights)
    log_probs, entropies = np.asarray(team.group.sum({"scores": mx.array(found)})["scores"]).astype(np.float64)
    return log_probs, entropies


def _scores_of(team: Team, request: dict[str, Any]) -> PolicyScores:
    """Return the caller's scores on rank 0; elsewhere those kept on this rank, if model and settings are the same."""
    scores: PolicyScores | None = team.kept.get(_SCORES)
    if team.group.leads:
        assert scores is not None
        return scores
    model, micro_tokens, dtype = model_on(team), request["micro_tokens"], getattr(mx, request["dtype"])
    if scores is None or scores.model is not model or (scores.micro_tokens, scores.dtype) != (micro_tokens, dtype):
        scores = team.kept[_SCORES] = PolicyScores(model, micro_tokens=micro_tokens, dtype=dtype)
    return scores
