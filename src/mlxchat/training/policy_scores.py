"""Log-probabilities of sampled tokens and the policy's entropy, by the forward pass of training."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.data.packing import Ints
from mlxchat.distributed.team import Team
from mlxchat.model.gpt import GPT, cast_parameters, flatten_parameters, set_parameters
from mlxchat.model.replicas import model_on, sync_model
from mlxchat.ops.cross_entropy import token_scores
from mlxchat.ops.lanes import Lanes, make_lanes
from mlxchat.optim.groups import Flat

Floats = np.ndarray[Any, np.dtype[np.float64]]

_ROWS_STEP = 16
_SCORES, _REFERENCE = "scores", "reference"


def policy_scores(team: Team | None, model: GPT, *, micro_tokens: int, dtype: mx.Dtype) -> PolicyScores:
    """Return the scores of this process, or of all ranks where there are several; arguments as `PolicyScores`."""
    if team is None or team.size == 1:
        return PolicyScores(model, micro_tokens=micro_tokens, dtype=dtype)
    return RankScores(team, model, micro_tokens=micro_tokens, dtype=dtype)


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
            parameters: other weights than the model's, such as those of a frozen reference; all, or some of them.
        """
        lanes = self._lanes = self._lanes or make_lanes()
        parameters = {**flatten_parameters(self.model), **(parameters or {})}
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
        set_parameters(self.model, cast_parameters(parameters, self.dtype))
        hidden = self.model.hidden(ids)
        scores = token_scores(hidden.reshape(-1, self.model.sizes.width), self.model.head_weight, targets.reshape(-1))
        set_parameters(self.model, masters)
        return scores


class RankScores(PolicyScores):
    """Scores on rank 0 whose rows are dealt to all ranks; a frozen reference travels once."""

    def __init__(self, team: Team, model: GPT, *, micro_tokens: int, dtype: mx.Dtype) -> None:
        """Take a team besides what `PolicyScores` takes."""
        super().__init__(model, micro_tokens=micro_tokens, dtype=dtype)
        self.team = team

    def __call__(self, ids: Ints, targets: Ints, parameters: Flat | None = None) -> tuple[Floats, Floats]:
        """See `PolicyScores.__call__`.

        Raises:
            PeerLost: another rank is gone.
        """
        team = self.team
        sync_model(team, self.model)
        if parameters is not None:
            _share_reference(team, parameters)
        team.kept[_SCORES] = self
        request = {
            "reference": parameters is not None, "micro_tokens": self.micro_tokens,
            "dtype": str(self.dtype).rpartition(".")[2],
        }  # fmt: skip
        found: tuple[Floats, Floats] = team.call(_score, request, {"ids": ids, "targets": targets})
        return found


def _share_reference(team: Team, parameters: Flat) -> None:
    """Give every rank these weights, unless they have them."""
    known = team.kept.get(_REFERENCE, {})
    if known.keys() == parameters.keys() and all(known[name] is value for name, value in parameters.items()):
        return
    team.call(_take_reference, {}, parameters)
    team.kept[_REFERENCE] = dict(parameters)


def _take_reference(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    team.kept[_REFERENCE] = arrays


def _score(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> tuple[Floats, Floats]:
    """Return the scores of all rows, each made by one rank."""
    ids, targets = np.asarray(arrays["ids"]), np.asarray(arrays["targets"])
    own = team.group.part(len(ids))  # all as wide
    found = np.zeros((2, *ids.shape), dtype=np.float32)
    if own.start < own.stop:
        parameters = team.kept[_REFERENCE] if request["reference"] else None
        found[:, own] = PolicyScores.__call__(_scores_here(team, request), ids[own], targets[own], parameters)
    both = np.asarray(team.group.sum({"scores": mx.array(found)})["scores"]).astype(np.float64)
    return both[0], both[1]


def _scores_here(team: Team, request: dict[str, Any]) -> PolicyScores:
    """Return this rank's scores: those that ask, or those that are kept for such questions."""
    scores: PolicyScores | None = team.kept.get(_SCORES)
    if team.group.leads:
        assert scores is not None
        return scores
    micro_tokens, dtype = request["micro_tokens"], getattr(mx, request["dtype"])
    if (
        scores is None or scores.model is not model_on(team)
        or (scores.micro_tokens, scores.dtype) != (micro_tokens, dtype)
    ):  # fmt: skip
        scores = team.kept[_SCORES] = PolicyScores(model_on(team), micro_tokens=micro_tokens, dtype=dtype)
    return scores


def _padded(array: Ints, height: int, value: int) -> Ints:
    if len(array) == height:
        return array
    rest = np.full((height - len(array), array.shape[1]), value, dtype=array.dtype)
    return np.concatenate([array, rest])
