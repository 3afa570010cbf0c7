"""An engine whose answers all ranks of a team give: each generates some of the rows.

What a row draws depends on its own seed, and its sums on no other row, so the answers are those of one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import mlx.core as mx

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.distributed.team import Team, name_of
from mlxchat.engine.generate import Completion, Engine, row_seeds
from mlxchat.model.gpt import GPT
from mlxchat.model.replicas import model_on, sync_model


def make_engine(team: Team | None, model: GPT, tokenizer: Tokenizer, **options: Any) -> Engine:
    """Return an engine of this process, or of all ranks where there are several; `options` are `Engine`'s."""
    if team is None or team.size == 1:
        return Engine(model, tokenizer, **options)
    return RankEngine(team, model, tokenizer, **options)


def clear_caches(team: Team | None) -> None:
    """Free the memory that MLX's cache holds on every rank."""
    (team or Team()).call(_clear_cache)


def _clear_cache(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    mx.clear_cache()


class RankEngine(Engine):
    """An engine on rank 0 whose `complete` is shared by all ranks; streams and schedulers stay on rank 0."""

    def __init__(self, team: Team, model: GPT, tokenizer: Tokenizer, **options: Any) -> None:
        """Take a team, and a model with its tokenizer; `options` are `Engine`'s, for every rank."""
        super().__init__(model, tokenizer, **options)
        self.team = team

    def complete(self, prompts: list[list[int]], *, seed: int | Sequence[int] = 0, **how: Any) -> list[Completion]:
        """Return one completion per prompt, as `Engine.complete` does."""
        team = self.team
        assert team is not None
        if not all(prompts) or not prompts:  # nothing to do, or refused: before another rank takes part
            return super().complete(prompts, seed=seed, **how)
        sync_model(team, self.model)
        _share_tokenizer(team, self.tokenizer)
        options = {
            "bits": self.bits, "kv_bits": self.kv_bits, "trained": self.trained, "max_rows": self.max_rows,
            "dtype": None if self.dtype is None else name_of(self.dtype),
        }  # fmt: skip
        team.kept[f"engine {options}"] = self
        request = {"prompts": prompts, "seeds": row_seeds(seed, len(prompts)), "how": how, "options": options}
        found: list[Completion] = team.call(_complete, request)
        return found


def _complete(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> list[Completion]:
    """Return the completions of all prompts, each made by one rank."""
    # Every rank gets some samples of each question, and some of the long prompts, so that all take about as long.
    own = slice(team.group.rank, None, team.size)
    prompts, seeds = request["prompts"][own], request["seeds"][own]
    engine = _engine_here(team, request["options"])
    rows = Engine.complete(engine, prompts, seed=seeds, **request["how"])
    if not team.group.leads:
        engine.release()  # the model may have got other weights by the next call
    completions = [Completion() for _ in request["prompts"]]
    for rank, found in enumerate(team.group.gather_json([asdict(row) for row in rows])):
        completions[rank :: team.size] = [Completion(**row) for row in found]
    return completions


def _engine_here(team: Team, options: dict[str, Any]) -> Engine:
    """Return this rank's engine with these options, made again if the model or the tokenizer is another one."""
    model, tokenizer, name = model_on(team), team.kept["tokenizer"], f"engine {options}"
    engine: Engine | None = team.kept.get(name)
    if engine is None or engine.model is not model or engine.tokenizer is not tokenizer:
        dtype = options["dtype"] and getattr(mx, options["dtype"])
        engine = team.kept[name] = Engine(model, tokenizer, **{**options, "dtype": dtype})
    return engine


def _share_tokenizer(team: Team, tokenizer: Tokenizer) -> None:
    """Give every rank the tokenizer, which the calculator needs, unless they have one that encodes the same."""
    known = team.kept.get("tokenizer")
    team.kept["tokenizer"] = tokenizer
    if known is None or known.digest != tokenizer.digest:
        tokens = [token.hex() for token in sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)]
        team.call(_take_tokenizer, {"tokens": tokens, "pattern": tokenizer.pattern})


def _take_tokenizer(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    if not team.group.leads:
        ranks = {bytes.fromhex(token): rank for rank, token in enumerate(request["tokens"])}
        team.kept["tokenizer"] = Tokenizer(ranks, request["pattern"])
