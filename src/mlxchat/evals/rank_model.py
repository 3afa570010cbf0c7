"""Our model for evaluations, computed by all ranks of a team.

Batches are those of one process. Each rank pads and computes its part of a batch, so results equal those of one process
within float32 rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.data.packing import trim_rows
from mlxchat.distributed.group import deal_padded
from mlxchat.distributed.team import Team
from mlxchat.evals.bpb import own_losses
from mlxchat.evals.branching import Row
from mlxchat.evals.language_model import Floats, Ints, OwnModel
from mlxchat.model.gpt import GPT
from mlxchat.model.replicas import model_on, sync_model


def language_model(team: Team | None, model: GPT, *, padding: int) -> OwnModel | RankModel:
    """Return a `LanguageModel` that computes in this process, or on all ranks if there are several."""
    if team is None or team.size == 1:
        return OwnModel(model, padding=padding)
    return RankModel(team, model, padding=padding)


def text_model(team: Team | None, model: GPT) -> GPT | RankModel:
    """Return the model for `text_loss` and `mean_loss`: itself, or on all ranks if there are several."""
    return model if team is None or team.size == 1 else RankModel(team, model)


class RankModel:
    """A `LanguageModel` on rank 0 that all ranks compute; results are in the rows' order."""

    def __init__(self, team: Team, model: GPT, *, padding: int = 0) -> None:
        """Keep a team and a model; weights that changed are sent with the next request."""
        self.team, self.model, self._padding = team, model, padding

    @property
    def context_tokens(self) -> int:
        """Row length in training."""
        return self.model.sizes.context_tokens

    @property
    def extends(self) -> bool:
        """See `OwnModel.extends`."""
        return True

    def losses(self, rows: Sequence[Row]) -> list[list[Floats]]:
        """See `LanguageModel.losses`."""
        found = self._ask(_of_targets, {"rows": [asdict(row) for row in rows], "predict": False})
        return [[np.array(part, np.float32) for part in parts] for parts in found]

    def predictions(self, rows: Sequence[Row]) -> list[list[Ints]]:
        """See `LanguageModel.predictions`."""
        found = self._ask(_of_targets, {"rows": [asdict(row) for row in rows], "predict": True})
        return [[np.array(part, np.int32) for part in parts] for parts in found]

    def token_losses(self, ids: Ints, targets: Ints) -> Floats:
        """See `LanguageModel.token_losses`."""
        found: Floats = self._ask(_of_tokens, {}, {"ids": ids, "targets": targets})
        return found

    def logits_of(self, prompts: Sequence[list[int]], choices: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `OwnModel.logits_of`."""
        found: list[list[float]] = self._ask(_of_choices, {"prompts": prompts, "choices": choices})
        return found

    def _ask(self, function: Any, request: dict[str, Any], arrays: dict[str, Ints] | None = None) -> Any:
        sync_model(self.team, self.model)
        return self.team.call(function, {**request, "padding": self._padding}, arrays)


def _of_targets(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> list[list[Any]]:
    """Return losses or predicted ids of each row's targets."""
    del arrays
    rows = [Row(**row) for row in request["rows"]]
    own = rows[_own_part(team, [row.num_tokens for row in rows])]
    model = OwnModel(model_on(team), padding=request["padding"])
    found = (model.predictions if request["predict"] else model.losses)(own) if own else []
    return _together(team, [[part.tolist() for part in parts] for parts in found])


def _of_choices(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> list[Any]:
    """Return the logits of each prompt's choices."""
    del arrays
    own = _own_part(team, [len(prompt) for prompt in request["prompts"]])
    prompts, model = request["prompts"][own], OwnModel(model_on(team), padding=request["padding"])
    return _together(team, model.logits_of(prompts, request["choices"][own]) if prompts else [])


def _of_tokens(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> Floats:
    """Return the loss of every target (B, T)."""
    del request
    ids, targets = np.asarray(arrays["ids"]), np.asarray(arrays["targets"])
    used = [int(np.flatnonzero(row >= 0).max(initial=-1)) + 1 for row in targets]
    own = _own_part(team, used)
    losses = np.zeros(targets.shape, dtype=np.float32)
    if own.start < own.stop:
        part = trim_rows(ids[own], targets[own])
        losses[own, : part[1].shape[1]] = own_losses(model_on(team), *part).reshape(part[1].shape)
    return np.asarray(team.group.sum({"losses": mx.array(losses)})["losses"])


def _own_part(team: Team, lengths: Sequence[int]) -> slice:
    return deal_padded(lengths, team.size)[team.group.rank]


def _together(team: Team, found: list[Any]) -> list[Any]:
    """Return the concatenated results of all ranks."""
    return [each for part in team.group.gather_json(found) for each in part]
