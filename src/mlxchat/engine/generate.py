"""The engine: prompts in, answers out, for callers that have all prompts at once.

Counterpart of nanochat/engine.py. A row ends with <|assistant_end|> or <|bos|>. When the model closes a call with
<|python_end|>, the calculator's answer is forced into the row; forced tokens have mask 0 and are never trained on.
What decodes is `scheduler.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.distributed.team import Team
from mlxchat.engine.decode import Decoder, make_decoder
from mlxchat.engine.sample import Sampling
from mlxchat.engine.scheduler import Event, Forward, Request, Scheduler
from mlxchat.engine.slots import Slots
from mlxchat.model.gpt import GPT, computing_in, flatten_parameters
from mlxchat.ops.machine import DECODED_ROWS, PREFILL_TOKENS


@dataclass
class Completion:
    """What one row generated."""

    ids: list[int] = field(default_factory=list)
    """Generated ids, the final <|assistant_end|> included."""
    mask: list[int] = field(default_factory=list)
    """1 where the id was sampled, 0 where it was forced."""
    log_probabilities: list[float] = field(default_factory=list)
    """Where they were asked for: of each id when it was sampled, in nats; 0 where it was forced."""
    finished: bool = False
    """Whether the row ended by itself."""

    def text(self, tokenizer: Tokenizer) -> str:
        """Return what was said: the token that ended it is no part of the answer that tasks judge."""
        return tokenizer.decode(self.ids[:-1] if self.finished else self.ids)


class Engine:
    """A model that answers."""

    team: Team | None = None
    """The ranks that share its answers (`rank_engine.py`); None: this process alone."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        bits: int | None = None,
        kv_bits: int | None = None,
        trained: bool = False,
        dtype: mx.Dtype | None = None,
        max_rows: int = DECODED_ROWS,
    ) -> None:
        """Take a model with its tokenizer.

        Args:
            model: is read whenever answers begin, so they follow its training.
            tokenizer: the model's.
            bits: 8 or 4 decodes with quantised weights.
            kv_bits: 8 or 4 keeps keys and values of the past packed, which takes less memory and more time.
            trained: whether the model is trained between answers: then nothing of it is kept in between, and quantised
                weights are for their speed alone, so that on a CPU, where they have none, they are not packed.
            dtype: in which a trained model answers, that of its training; None: its parameters'.
            max_rows: decoded at a time; answers do not depend on it.
        """
        self.model, self.tokenizer, self.trained = model, tokenizer, trained
        self.bits, self.kv_bits, self.dtype, self.max_rows = bits, kv_bits, dtype, max_rows
        self._decoder: Decoder | None = None
        # Without keeping alive what a training has moved on from.
        self._arranged: list[weakref.ref[mx.array]] = []

    def forward(self) -> Forward:
        """Return the model as a scheduler needs it, with the weights that it has now."""
        weights = list(flatten_parameters(self.model).values())
        if self._decoder is None:
            self._decoder = make_decoder(self.model, bits=self.bits, packed=not self.trained, kv_bits=self.kv_bits)
        elif len(weights) != len(self._arranged) or any(
            kept() is not weight for kept, weight in zip(self._arranged, weights, strict=True)
        ):
            self._decoder.arrange(self.model)
        self._arranged = [weakref.ref(weight) for weight in weights]
        return Slots(self.model, self._decoder)

    def release(self) -> None:
        """Give back the memory of the arranged weights, as large as the model; `forward` arranges them anew.

        No scheduler made before may go on.
        """
        if self._decoder is not None:
            self._decoder.release()
            self._arranged = []

    def scheduler(
        self,
        *,
        max_rows: int | None = None,
        max_cached_tokens: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        kept_tokens: int = 8192,
    ) -> Scheduler:
        """Return a scheduler without requests; the arguments are `Scheduler`'s."""
        return Scheduler(
            self.forward(), self.tokenizer, max_rows=max_rows or self.max_rows, max_cached_tokens=max_cached_tokens,
            prefill_tokens=prefill_tokens, kept_tokens=kept_tokens,
        )  # fmt: skip

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
        """Return one completion per prompt, on request with log-probabilities; the other arguments are `stream`'s."""
        rows: list[Completion] = [Completion() for _ in prompts]
        for column in self._columns(
            prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed,
            logprobs=0 if log_probabilities else None,
        ):  # fmt: skip
            for index, event in column:
                rows[index].ids.append(event.token or 0)
                rows[index].mask.append(int(event.sampled))
                if log_probabilities:
                    rows[index].log_probabilities.append(event.logprob or 0.0)
        for row in rows:
            row.finished = bool(row.ids) and row.ids[-1] in (self.tokenizer.assistant_end, self.tokenizer.bos)
        return rows

    def stream(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Iterator[list[tuple[int, int, int]]]:
        """Yield columns of (row, id, mask): a token of every row that is being decoded.

        Up to `max_rows` rows go on side by side; where one ends, the next prompt begins.

        Args:
            prompts: token ids, of any lengths.
            max_new_tokens: per row, forced ones included.
            temperature: 0 is greedy.
            top_k: draw among the k most likely; None: all.
            seed: of the draws; or one for each prompt, whose draws then depend on no other prompt.
        """
        for column in self._columns(
            prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
        ):
            yield [(index, event.token or 0, int(event.sampled)) for index, event in column]

    def _columns(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        seed: int | Sequence[int],
        logprobs: int | None = None,
    ) -> Iterator[list[tuple[int, Event]]]:
        """Yield an event of every row that is being decoded, with the number of its prompt."""
        if max_new_tokens < 1 or not prompts:
            return
        with computing_in(self.model, self.dtype) if self.dtype is not None else nullcontext():
            seeds = row_seeds(seed, len(prompts))
            scheduler = self.scheduler()
            places = {}
            for index, prompt in enumerate(prompts):
                sampling = Sampling(temperature=temperature, top_k=top_k, seed=seeds[index])
                request = Request(
                    prompt=prompt, max_new_tokens=max_new_tokens, sampling=sampling, text=False, logprobs=logprobs
                )
                places[scheduler.submit(request)] = index
            while not scheduler.idle:
                events = [event for event in scheduler.step() if event.token is not None]
                yield sorted(((places[event.id], event) for event in events), key=lambda pair: pair[0])
            if self.trained:
                self.release()


def row_seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    """Return the seed of each row of a batch: as given, or made of one seed and the row's number."""
    if not isinstance(seed, int):
        return list(seed)
    return [int(np.random.SeedSequence([seed, row]).generate_state(1)[0]) for row in range(rows)]
