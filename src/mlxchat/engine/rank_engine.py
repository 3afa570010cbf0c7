"""An engine whose answers all ranks of a team give: each generates some of the rows.

What a row draws depends on its own seed, and its sums on no other row (`decode.py`), so the answers are those of one
process. Every rank has the model's weights, its own arrangement of them and the tokenizer, which the calculator needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.distributed.team import Given, Team
from mlxchat.engine.generate import Completion, Engine, row_seeds
from mlxchat.model.gpt import GPT
from mlxchat.model.replicas import model_on, sync_model

_TOKENIZER, _ENGINES = "tokenizer", "engines"


def make_engine(team: Team | None, model: GPT, tokenizer: Tokenizer, **options: Any) -> Engine:
    """Return an engine of this process, or of all ranks where there are several; `options` are `Engine`'s."""
    if team is None or team.size == 1:
        return Engine(model, tokenizer, **options)
    return RankEngine(team, model, tokenizer, **options)


def clear_caches(team: Team | None) -> None:
    """Give back the memory that every rank keeps for arrays of shapes that it had."""
    (team or Team()).call(_clear_cache)


def _clear_cache(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    mx.clear_cache()


class RankEngine(Engine):
    """An engine on rank 0 that has all ranks complete prompts; what streams or is scheduled by hand stays here."""

    def __init__(self, team: Team, model: GPT, tokenizer: Tokenizer, **options: Any) -> None:
        """Take a team, and a model with its tokenizer; `options` are `Engine`'s, for every rank."""
        super().__init__(model, tokenizer, **options)
        self.team = team

    def complete(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int | Sequence[int] = 0,
        log_probabilities: bool = False,
    ) -> list[Completion]:
        """Return one completion per prompt, as `Engine.complete` does.

        Raises:
            PeerLost: another rank is gone.
        """
        team = self.team
        assert team is not None
        how: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k,
            "log_probabilities": log_probabilities,
        }  # fmt: skip
        if not all(prompts) or not prompts:  # nothing to do, or refused: here, while no rank waits for another
            return super().complete(prompts, seed=seed, **how)
        sync_model(team, self.model)
        _share_tokenizer(team, self.tokenizer)
        dtype = None if self.dtype is None else str(self.dtype).rpartition(".")[2]
        options = {"bits": self.bits, "kv_bits": self.kv_bits, "trained": self.trained, "dtype": dtype}
        options["max_rows"] = self.max_rows
        _engines(team)[str(options)] = self
        request = {"seeds": row_seeds(seed, len(prompts)), "how": how, "options": options}
        # Thousands of prompts are more than an order may be long.
        arrays: Given = {
            "ids": np.concatenate([np.array(prompt, dtype=np.int32) for prompt in prompts]),
            "lengths": np.array([len(prompt) for prompt in prompts], dtype=np.int32),
        }
        found: list[Completion] = team.call(_complete, request, arrays)
        return found


def _complete(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> list[Completion]:
    """Return the completions of all prompts, each made by one rank."""
    given = _parts(np.asarray(arrays["ids"]).tolist(), arrays["lengths"])
    # Every rank gets some samples of each question, and some of the long prompts: so all take about as long.
    own = slice(team.group.rank, None, team.size)
    engine, seeds = _engine_here(team, request["options"]), request["seeds"][own]
    rows = Engine.complete(engine, given[own], seed=seeds, **request["how"])
    completions = [Completion() for _ in given]
    for rank, found in enumerate(team.group.gather_json([asdict(row) for row in rows])):
        completions[rank :: team.size] = [Completion(**row) for row in found]
    return completions


def _engine_here(team: Team, options: dict[str, Any]) -> Engine:
    """Return this rank's engine: the one that asks, or one that is kept for such questions."""
    kept, model, tokenizer = _engines(team), model_on(team), team.kept[_TOKENIZER]
    engine = kept.get(str(options))
    if engine is None or engine.model is not model or engine.tokenizer is not tokenizer:
        engine = kept[str(options)] = Engine(
            model, tokenizer, **{**options, "dtype": options["dtype"] and getattr(mx, options["dtype"])}
        )
    return engine


def _engines(team: Team) -> dict[str, Engine]:
    found: dict[str, Engine] = team.kept.setdefault(_ENGINES, {})
    return found


def _share_tokenizer(team: Team, tokenizer: Tokenizer) -> None:
    """Give every rank the tokenizer, unless they have one that encodes the same."""
    known = team.kept.get(_TOKENIZER)
    team.kept[_TOKENIZER] = tokenizer
    if known is not None and known.digest == tokenizer.digest:
        return
    tokens = sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
    arrays: Given = {
        "bytes": np.frombuffer(b"".join(tokens), dtype=np.uint8),
        "lengths": np.array([len(token) for token in tokens], dtype=np.int32),
    }
    team.call(_take_tokenizer, {"pattern": tokenizer.pattern}, arrays)


def _take_tokenizer(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    if team.group.leads:
        return
    tokens = _parts(bytes(np.asarray(arrays["bytes"])), arrays["lengths"])
    team.kept[_TOKENIZER] = Tokenizer({token: rank for rank, token in enumerate(tokens)}, request["pattern"])


def _parts(joined: Any, lengths: mx.array) -> list[Any]:
    """Return the parts of these lengths that something is joined of."""
    ends = np.cumsum(np.asarray(lengths)).tolist()
    return [joined[start:stop] for start, stop in pairwise([0, *ends])]
