"""Completes batches of prompts with our models.

A row ends with <|assistant_end|> or <|bos|>. When the model closes a call with <|python_end|>, the calculator's answer
is forced into the row; forced tokens have mask 0 and are never trained on. The loop is in `batch.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.data.conversation import render_for_completion
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.distributed.team import Team, name_of
from mlxchat.engine.batch import Generator, Request
from mlxchat.engine.decode import Decoder
from mlxchat.engine.quantise import packed_copy
from mlxchat.engine.sample import Sampling
from mlxchat.engine.scheduler import Scheduler
from mlxchat.engine.tools import PythonTool
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import computing_in
from mlxchat.model.replicas import model_on, sync_model
from mlxchat.ops.machine import DECODED_ROWS


@dataclass
class Completion:
    """The generated tokens of a row."""

    ids: list[int] = field(default_factory=list)
    """Generated ids, including the final <|assistant_end|>."""
    mask: list[int] = field(default_factory=list)
    """1 where the id was sampled, 0 where it was forced."""
    log_probabilities: list[float] = field(default_factory=list)
    """If requested: of each sampled id, in nats; 0 where it was forced."""
    finished: bool = False
    """Whether the row ended with an end token."""

    def text(self, tokenizer: Any) -> str:
        """Return the answer's text, without the end token."""
        return str(tokenizer.decode(self.ids[:-1] if self.finished else self.ids))


class Engine:
    """One of our models with its tokenizer: answers and continues text."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, *, bits: int | None = None,
        dtype: mx.Dtype | None = None, max_rows: int = DECODED_ROWS, team: Team | None = None,
    ) -> None:  # fmt: skip
        """Create an engine.

        Args:
            model: its weights may change between calls.
            tokenizer: the model's.
            bits: 8 or 4: quantise weights (`packed_copy`), for prompts, too.
            dtype: of computations; None: that of the model's parameters.
            max_rows: rows decoded at a time; answers do not depend on it.
            team: the ranks that share `complete`, which rank 0 calls; None: this process. Schedulers always run in
                this process.
        """
        self.model, self.tokenizer = model, tokenizer
        self.team = team if team is not None and team.size > 1 else None
        self.bits, self.dtype, self.max_rows = bits, dtype, max_rows
        self.decoder: Decoder | None = None
        """Of its schedulers, one of which runs at a time; made by the first."""

    @property
    def context_tokens(self) -> int:
        """Length of the model's training rows."""
        return self.model.sizes.context_tokens

    def render(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Return the prompt of the assistant's next message; raises DataError for an invalid conversation."""
        return render_for_completion(self.tokenizer, {"messages": list(messages)})

    def scheduler(self, *, python: PythonTool | None = None, **options: Any) -> Scheduler:
        """Return a scheduler without requests; `options` are `Generator`'s, and `python` is `Scheduler`'s."""
        model = self.model if self.bits is None else packed_copy(self.model, self.bits)
        if self.decoder is None:
            self.decoder = Decoder(model)
        else:
            self.decoder.model = model
        self.decoder.resize([], 0, 1)
        generator = Generator(self.decoder, **{"max_rows": self.max_rows, **options})
        return Scheduler(generator, self.tokenizer, python=python)

    def complete(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float = 0.0, top_k: int | None = None,
        seed: int | Sequence[int] = 0, log_probabilities: bool = False,
    ) -> list[Completion]:  # fmt: skip
        """Return one completion per prompt. At most `max_rows` rows are decoded at a time (continuous batching).

        Args:
            prompts: token ids, of any lengths.
            max_new_tokens: per row, including forced ones.
            temperature: 0 is greedy.
            top_k: draw among the k most likely; None: all.
            seed: of the batch, or one for each prompt, whose draws then do not depend on other prompts.
            log_probabilities: whether completions have log-probabilities.

        Raises:
            ConfigError: a prompt is empty, or a setting is impossible.
        """
        how: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k,
            "log_probabilities": log_probabilities,
        }  # fmt: skip
        seeds = row_seeds(seed, len(prompts))
        if self.team is None or not prompts or not all(prompts):  # refuses an empty prompt before other ranks take part
            return self._complete_here(prompts, seeds, how)
        sync_model(self.team, self.model)
        self.team.kept["engine"] = self
        request = {"prompts": prompts, "seeds": seeds, "how": how, "engine": self._as_json()}
        found: list[Completion] = self.team.call(_complete, request)
        return found

    def _complete_here(self, prompts: list[list[int]], seeds: Sequence[int], how: dict[str, Any]) -> list[Completion]:
        if how["max_new_tokens"] < 1 or not prompts:
            return [Completion() for _ in prompts]
        with nullcontext() if self.dtype is None else computing_in(self.model, self.dtype):
            completions = complete_all(self.scheduler(), prompts, seeds, **how)
        if self.decoder is not None:
            self.decoder.model = self.model  # frees quantised weights
        return completions

    def _as_json(self) -> dict[str, Any]:
        """Return what other ranks need to create this engine, except its model."""
        ranks = self.tokenizer.ranks
        return {
            "tokens": [token.hex() for token in sorted(ranks, key=ranks.__getitem__)],
            "pattern": self.tokenizer.pattern,
            "dtype": None if self.dtype is None else name_of(self.dtype),
            "options": {"bits": self.bits, "max_rows": self.max_rows},
        }


def complete_all(
    scheduler: Scheduler, prompts: list[list[int]], seeds: Sequence[int], *, max_new_tokens: int,
    temperature: float = 0.0, top_k: int | None = None, log_probabilities: bool = False,
) -> list[Completion]:  # fmt: skip
    """Return the completions of prompts, computed by a scheduler; see `Engine.complete`."""
    by_id = {}
    for prompt, seed in zip(prompts, seeds, strict=True):
        request = Request(
            prompt=prompt, max_new_tokens=max_new_tokens, text=False, logprobs=0 if log_probabilities else None,
            sampling=Sampling(temperature=temperature, top_k=top_k, seed=seed),
        )  # fmt: skip
        by_id[scheduler.submit(request)] = Completion()
    while not scheduler.idle:
        for event in scheduler.step():
            row = by_id[event.id]
            assert event.token is not None, "nothing is cancelled"
            row.ids.append(event.token)
            row.mask.append(int(event.sampled))
            if log_probabilities:
                row.log_probabilities.append(event.logprob or 0.0)
            row.finished = event.finish_reason == "stop"
    return list(by_id.values())


def row_seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    """Return the seed of each row of a batch: as given, or derived from one seed and the row's number."""
    if not isinstance(seed, int):
        return list(seed)
    return [int(np.random.SeedSequence([seed, row]).generate_state(1)[0]) for row in range(rows)]


def _complete(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> list[Completion]:
    """Return the completions of all prompts, each computed by one rank.

    A row's draws depend only on its seed, its sums on no other row, so the answers equal one process's.
    """
    engine, wanted = team.kept.get("engine"), request["engine"]
    if not team.group.leads and (engine is None or engine.model is not model_on(team) or engine._as_json() != wanted):
        ranks = {bytes.fromhex(token): rank for rank, token in enumerate(wanted["tokens"])}
        tokenizer = Tokenizer(ranks, wanted["pattern"])
        dtype = wanted["dtype"] and getattr(mx, wanted["dtype"])
        engine = team.kept["engine"] = Engine(model_on(team), tokenizer, dtype=dtype, **wanted["options"])
    assert engine is not None
    # Strided, so that samples of a question and long prompts are spread evenly over the ranks.
    own = slice(team.group.rank, None, team.size)
    rows = engine._complete_here(request["prompts"][own], request["seeds"][own], request["how"])
    completions = [Completion() for _ in request["prompts"]]
    for rank, found in enumerate(team.group.gather_json([asdict(row) for row in rows])):
        completions[rank :: team.size] = [Completion(**row) for row in found]
    return completions


def clear_caches(team: Team | None) -> None:
    """Free MLX's memory cache on every rank."""
    (team or Team()).call(_clear_cache)


def _clear_cache(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    mx.clear_cache()
