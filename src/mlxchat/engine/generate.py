"""Completes batches of prompts. Counterpart of nanochat/engine.py.

`ChatBackend` is the interface of the terminal, the server and evaluations to a model: `Engine` for ours,
`third_party.ThirdPartyEngine` for others.

A row ends with <|assistant_end|> or <|bos|>. When the model closes a call with <|python_end|>, the calculator's answer
is forced into the row; forced tokens have mask 0 and are never trained on. See also `scheduler.py`, `cache.py`,
`decode.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlxchat.data.conversation import render_for_completion
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.distributed.team import Team, name_of
from mlxchat.engine.cache import Slots
from mlxchat.engine.decode import Decoder, make_decoder
from mlxchat.engine.quantise import packed_copy
from mlxchat.engine.sample import Sampling
from mlxchat.engine.scheduler import Request, Scheduler, TextTokenizer
from mlxchat.model.gpt import GPT, computing_in
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

    def text(self, tokenizer: TextTokenizer) -> str:
        """Return the answer's text, without the end token."""
        return tokenizer.decode(self.ids[:-1] if self.finished else self.ids)


class ChatBackend(Protocol):
    """A loaded model that answers or continues text."""

    @property
    def tokenizer(self) -> TextTokenizer:
        """The model's tokenizer."""

    @property
    def context_tokens(self) -> int:
        """Maximum tokens of a prompt and its answer."""

    @property
    def team(self) -> Team | None:
        """The ranks that share `complete`; None: this process alone."""

    def render(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Return the prompt of the assistant's next message; raises DataError for an invalid conversation."""

    def scheduler(self, **options: Any) -> Scheduler:
        """Return a scheduler without requests; `options` are `Scheduler`'s."""

    def complete(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float = 0.0, top_k: int | None = None,
        seed: int | Sequence[int] = 0,
    ) -> list[Completion]:  # fmt: skip
        """Return one completion per prompt; see `Engine.complete`."""


class Engine:
    """The `ChatBackend` of our models."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, *, bits: int | None = None, kv_bits: int | None = None,
        trained: bool = False, dtype: mx.Dtype | None = None, max_rows: int = DECODED_ROWS, team: Team | None = None,
    ) -> None:  # fmt: skip
        """Create an engine.

        Args:
            model: its weights must not change, unless it is `trained`.
            tokenizer: the model's.
            bits: 8 or 4: quantise weights (`packed_copy`), for prompts, too.
            kv_bits: 8 or 4: quantise keys and values, which saves memory and takes more time.
            trained: the model is trained between calls: each call reads its weights again and keeps no copy.
                Quantised weights stay packed only where that is faster, which it is not on a CPU.
            dtype: of computations with a trained model; None: that of its parameters.
            max_rows: rows decoded at a time; answers do not depend on it.
            team: the ranks that share `complete`, which rank 0 calls; None: this process. Schedulers always run in
                this process.
        """
        self.model, self.tokenizer, self.trained = model, tokenizer, trained
        self.team = team if team is not None and team.size > 1 else None
        self.bits, self.kv_bits, self.dtype, self.max_rows = bits, kv_bits, dtype, max_rows
        self._decoder: Decoder | None = None

    @property
    def context_tokens(self) -> int:
        """Length of the model's training rows."""
        return self.model.sizes.context_tokens

    def render(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Return the prompt of the assistant's next message; raises DataError for an invalid conversation."""
        return render_for_completion(self.tokenizer, {"messages": list(messages)})

    def forward(self) -> Slots:
        """Return an empty batch."""
        if self._decoder is None:
            self._decoder = make_decoder(self._answering(), packed=not self.trained, kv_bits=self.kv_bits)
        elif self._decoder.model is None:
            self._decoder.arrange(self._answering())
        return Slots(self._decoder)

    def _answering(self) -> GPT:
        return self.model if self.bits is None else packed_copy(self.model, self.bits)

    def release(self) -> None:
        """Free the decoder's weights; the next call reads the model's current ones."""
        if self._decoder is not None:
            self._decoder.release()

    def scheduler(self, **options: Any) -> Scheduler:
        """Return a scheduler without requests; `options` are `Scheduler`'s."""
        return Scheduler(self.forward(), self.tokenizer, **{"max_rows": self.max_rows, **options})

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
        """
        how: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k,
            "log_probabilities": log_probabilities,
        }  # fmt: skip
        seeds = row_seeds(seed, len(prompts))
        if self.team is None or not prompts or not all(prompts):  # refuses an empty prompt before other ranks take part
            return self.complete_here(prompts, seeds, **how)
        return _complete_on_ranks(self.team, self, prompts, seeds, how)

    def complete_here(
        self, prompts: list[list[int]], seeds: Sequence[int], *, max_new_tokens: int, temperature: float,
        top_k: int | None, log_probabilities: bool,
    ) -> list[Completion]:  # fmt: skip
        """Compute `complete` in this process."""
        rows = [Completion() for _ in prompts]
        if max_new_tokens < 1 or not prompts:
            return rows
        with self._computing():
            scheduler, by_id = self.scheduler(), {}
            for prompt, row, of_row in zip(prompts, rows, seeds, strict=True):
                sampling = Sampling(temperature=temperature, top_k=top_k, seed=of_row)
                request = Request(
                    prompt=prompt, max_new_tokens=max_new_tokens, sampling=sampling, text=False,
                    logprobs=0 if log_probabilities else None,
                )  # fmt: skip
                by_id[scheduler.submit(request)] = row
            while not scheduler.idle:
                for event in scheduler.step():
                    row = by_id[event.id]
                    assert event.token is not None, "nothing is cancelled"
                    row.ids.append(event.token)
                    row.mask.append(int(event.sampled))
                    if log_probabilities:
                        row.log_probabilities.append(event.logprob or 0.0)
                    row.finished = event.finish_reason == "stop"
        return rows

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Compute in the engine's dtype; release the weights of a trained model afterwards."""
        with nullcontext() if self.dtype is None else computing_in(self.model, self.dtype):
            try:
                yield
            finally:
                if self.trained:
                    self.release()


def row_seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    """Return the seed of each row of a batch: as given, or derived from one seed and the row's number."""
    if not isinstance(seed, int):
        return list(seed)
    return [int(np.random.SeedSequence([seed, row]).generate_state(1)[0]) for row in range(rows)]


# Several ranks: a row's draws depend only on its seed, its sums on no other row, so the answers equal one process's.


def _complete_on_ranks(
    team: Team, engine: Engine, prompts: list[list[int]], seeds: list[int], how: dict[str, Any]
) -> list[Completion]:
    sync_model(team, engine.model)
    _share_tokenizer(team, engine.tokenizer)
    options = {
        "bits": engine.bits, "kv_bits": engine.kv_bits, "trained": engine.trained, "max_rows": engine.max_rows,
        "dtype": None if engine.dtype is None else name_of(engine.dtype),
    }  # fmt: skip
    team.kept[f"engine {options}"] = engine
    found: list[Completion] = team.call(_complete, {"prompts": prompts, "seeds": seeds, "how": how, "options": options})
    return found


def _complete(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> list[Completion]:
    """Return the completions of all prompts, each computed by one rank."""
    # Strided, so that samples of a question and long prompts are spread evenly over the ranks.
    own = slice(team.group.rank, None, team.size)
    prompts, seeds = request["prompts"][own], request["seeds"][own]
    engine = _engine_here(team, request["options"])
    rows = engine.complete_here(prompts, seeds, **request["how"])
    if not team.group.leads:
        engine.release()  # the weights may change before the next call
    completions = [Completion() for _ in request["prompts"]]
    for rank, found in enumerate(team.group.gather_json([asdict(row) for row in rows])):
        completions[rank :: team.size] = [Completion(**row) for row in found]
    return completions


def _engine_here(team: Team, options: dict[str, Any]) -> Engine:
    """Return this rank's engine with these options, recreated if the model or the tokenizer changed."""
    model, tokenizer, name = model_on(team), team.kept["tokenizer"], f"engine {options}"
    engine: Engine | None = team.kept.get(name)
    if engine is None or engine.model is not model or engine.tokenizer is not tokenizer:
        dtype = options["dtype"] and getattr(mx, options["dtype"])
        engine = team.kept[name] = Engine(model, tokenizer, **{**options, "dtype": dtype})
    return engine


def _share_tokenizer(team: Team, tokenizer: Tokenizer) -> None:
    """Send the tokenizer, which the calculator needs, to every rank, unless it has an equal one."""
    known = team.kept.get("tokenizer")
    team.kept["tokenizer"] = tokenizer
    if known is None or known.digest != tokenizer.digest:
        tokens = [token.hex() for token in sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)]
        team.call(_take_tokenizer, {"tokens": tokens, "pattern": tokenizer.pattern})


def _take_tokenizer(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    if not team.group.leads:
        ranks = {bytes.fromhex(token): rank for rank, token in enumerate(request["tokens"])}
        team.kept["tokenizer"] = Tokenizer(ranks, request["pattern"])


def clear_caches(team: Team | None) -> None:
    """Free MLX's memory cache on every rank."""
    (team or Team()).call(_clear_cache)


def _clear_cache(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    mx.clear_cache()
