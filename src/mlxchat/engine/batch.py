"""The generation loop. Counterpart of nanochat/engine.py.

`Generator.next` queues the next token of every row before it reads the last one, so the device never waits for the
host: it forwards the tokens sampled before, samples the following ones, starts that, and then returns the tokens whose
values are ready by now. What the host finds in them (an end, a tool's answer, a stop string) takes effect in the next
call, and a token sampled in vain is dropped. Rows join and leave at any time (continuous batching).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import mlx.core as mx
import numpy as np

from mlxchat.engine.decode import Decoder, Past, tokens_of
from mlxchat.engine.sample import Constraint, Sampler, Sampling, Scores, adjusted, make_draws, score_tokens
from mlxchat.ops.machine import BATCH_ROWS, DECODED_ROWS, KEPT_TOKENS, PREFILL_TOKENS

if TYPE_CHECKING:
    from mlxchat.engine.generate import ShownText

Kind = Literal["text", "python", "python_output"]  # what a part of an answer's text belongs to

# Looking up shorter prefixes costs more than reading them.
_LEAST_KEPT_TOKENS = 16
# Prompts are read together up to this many chunks, padding included.
_BATCH_PARTS = 4


@dataclass(kw_only=True)
class Request:
    """A prompt and how to continue it."""

    prompt: list[int]  # at least one token
    max_new_tokens: int  # including forced ones
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()  # stop strings; the text ends before them
    tools: bool = True  # whether the calculator answers calls
    logprobs: int | None = None  # alternatives with each token's log-probability; None: no log-probabilities
    reuse: bool = False  # whether to continue the past of an earlier request that begins alike and allowed it, too
    skip_blank: bool = False  # whether to drop a blank at the beginning of the text
    constraint: Constraint | None = None  # grammar of the answer, not shared with other requests

    @property
    def in_step(self) -> bool:
        """Whether the next distribution depends on the latest token's value."""
        return self.constraint is not None or self.sampling.adjusts

    def restrict(self, logits: mx.array, row: int, answer: Sequence[int]) -> mx.array:
        """Return logits (B, V) with one row's changed by bias, penalties and grammar, which follow its answer."""
        own = logits[row : row + 1]
        if self.sampling.adjusts:
            own = adjusted(own, self.sampling, self.prompt, answer)
        if self.constraint is not None:
            own = mx.where(mx.array(self.constraint.allowed(answer, logits.shape[-1])), own, -mx.inf)
        return mx.concatenate([logits[:row], own, logits[row + 1 :]])


@dataclass(eq=False)
class Row:
    """A request while it is computed."""

    id: int
    request: Request
    ids: list[int]  # prompt and reported answer
    draws: np.random.Generator
    past: Past | None = None  # what was read or found of the prompt, until the row has a place
    begun: bool = False  # whether the prompt's last token, which is not reported, was forwarded
    given: deque[int] = field(default_factory=deque)  # tokens that follow instead of sampled ones
    shown: ShownText | None = None
    kind: Kind = "text"
    call: list[int] | None = None  # tokens of a call that has begun

    @property
    def unread(self) -> list[int]:
        """The prompt's tokens without keys and values; the last one is the first that is decoded."""
        return self.request.prompt[tokens_of(self.past) : -1]

    @property
    def num_answered(self) -> int:
        """Reported tokens."""
        return len(self.ids) - len(self.request.prompt)


@dataclass(kw_only=True)
class Event:
    """A token of a request; without a token, the end of one that was cancelled."""

    id: int
    token: int | None
    sampled: bool = False  # False if a tool forced the token
    text: str = ""  # text that can be shown now
    kind: Kind = "text"  # of the text and the token; the tokens around a call belong to what stands before them
    logprob: float | None = None  # by the model's distribution, if requested and the token was sampled
    top_logprobs: list[tuple[int, float]] | None = None
    finish_reason: str | None = None  # 'stop' (an end token or a stop string), 'length', 'cancelled'; None: goes on


class Generator:
    """Continues rows with one of our models."""

    def __init__(
        self, decoder: Decoder, *, max_rows: int = DECODED_ROWS, prefill_tokens: int = PREFILL_TOKENS,
        kept_tokens: int = KEPT_TOKENS,
    ) -> None:  # fmt: skip
        """Start without rows, of which `max_rows` are decoded at a time.

        At most about `prefill_tokens` of prompts are read between two steps; `kept_tokens` is the LRU cache's size.
        """
        self.decoder, self.max_rows, self.prefill_tokens = decoder, max_rows, prefill_tokens
        self.kept = KeptPasts(kept_tokens)
        self.num_reused = 0  # prompt tokens whose keys and values were found, so far
        self._waiting: deque[Row] = deque()
        self._rows: list[Row | None] = []  # by place in the decoder's batch
        self._tokens = mx.zeros(0, dtype=mx.uint32)  # the queued ones (B,)
        self._scores: Scores | None = None
        self._sampler: Sampler | None = None
        self._next_id = 0

    def insert(self, request: Request) -> Row:
        """Add a row, which waits for a place."""
        self._next_id += 1
        self._waiting.append(Row(self._next_id, request, list(request.prompt), make_draws(request.sampling.seed)))
        return self._waiting[-1]

    def remove(self, row: Row) -> None:
        """End a row."""
        if row in self._waiting:
            self._waiting.remove(row)
            return
        place = self._rows.index(row)
        if row.request.reuse:
            self.kept.keep(row.ids[: self.decoder.lengths[place]], self.decoder, place)
        self._rows[place] = None
        self.decoder.lengths[place] = 0
        self._sampler = None

    def next(self) -> list[Event]:
        """Queue the next token of every row; return the tokens that were queued before."""
        self._admit()
        rows, scores = self._rows, self._scores
        if not any(rows):
            return []
        reports = [row is not None and row.begun for row in rows]
        tokens, given = self._inputs()
        values: list[int] | None = None
        left = [row.request.max_new_tokens - row.num_answered if row else 0 for row in rows]
        if any(count > done for count, done in zip(left, reports, strict=True)):
            longest = int(self.decoder.lengths.max()) + 1
            if longest > self.decoder.room:
                self.decoder.resize(range(len(rows)), len(rows), longest)
            logits = self.decoder.step(tokens, [row is not None for row in rows])
            in_step = [(place, row) for place, row in enumerate(rows) if row and row.request.in_step]
            if in_step:
                mx.async_eval(logits)
                values = np.asarray(tokens).tolist()
                for place, row in in_step:
                    answer = [*row.ids, values[place]] if reports[place] else row.ids
                    logits = row.request.restrict(logits, place, answer[len(row.request.prompt) :])
            self._sample(logits)
        values = np.asarray(tokens).tolist() if values is None else values
        known = scores.read() if scores else []
        events = []
        for place, each in enumerate(rows):
            if each is not None and each.begun:
                each.ids.append(values[place])
                events.append(Event(id=each.id, token=values[place], sampled=not given[place]))
                if each.request.logprobs is not None and known and not given[place]:
                    events[-1].logprob, alternatives = known[place]
                    events[-1].top_logprobs = alternatives[: each.request.logprobs]
            elif each is not None:
                each.begun = True
        return events

    def _inputs(self) -> tuple[mx.array, list[bool]]:
        """Return the tokens to forward (B,), and which of them are given instead of sampled."""
        given = [-1] * len(self._rows)
        for place, row in enumerate(self._rows):
            if row is not None and not row.begun:
                given[place] = row.request.prompt[-1]
            elif row is not None and row.given:
                given[place] = row.given.popleft()
        is_given = [token >= 0 for token in given]
        if not any(is_given):
            return self._tokens, is_given
        instead = mx.array(given)
        tokens = mx.where(instead >= 0, instead.astype(mx.uint32), self._tokens)
        mx.async_eval(tokens)  # on its own, so that reading it does not wait for the step
        return tokens, is_given

    def _sample(self, logits: mx.array) -> None:
        """Start the computation of the next tokens and of what is reported with them."""
        if self._sampler is None:
            self._sampler = Sampler([row.request.sampling if row else Sampling() for row in self._rows])
        draws = [] if self._sampler.is_greedy else [row.draws.random() if row else 0.0 for row in self._rows]
        self._tokens = self._sampler(logits, draws)
        asked = [row.request.logprobs for row in self._rows if row and row.request.logprobs is not None]
        self._scores = score_tokens(logits, self._tokens, max(asked)) if asked else None
        mx.async_eval(self._tokens, self._scores or [], self.decoder.state())

    def _admit(self) -> None:
        """Read prompts and give them places; limit what is read if other rows are being decoded."""
        kept = [place for place, row in enumerate(self._rows) if row is not None]
        budget = self.prefill_tokens if kept else 1 << 60
        chosen: list[Row] = []
        while self._waiting and len(kept) + len(chosen) < self.max_rows and budget > 0:
            row = self._waiting[0]
            if row.request.reuse and row.past is None:
                row.past = self.kept.find(row.request.prompt)
                self.num_reused += tokens_of(row.past)
            rest = row.unread
            budget -= min(len(rest), self.prefill_tokens)
            if len(rest) > self.prefill_tokens or (rest and row.past):  # a chunk of its own
                last = row.request.prompt[-len(rest) - 2] if row.past else None
                (row.past,) = self.decoder.read([rest[: self.prefill_tokens]], row.past, last)
                if row.unread:
                    continue
            chosen.append(self._waiting.popleft())
        self._read_together(chosen)
        for row in chosen:  # samples of a question share its reading
            for other in self._waiting:
                if other.past is None and other.request.prompt == row.request.prompt:
                    other.past = row.past
        if chosen or (not self._waiting and batch_rows(len(kept)) < len(self._rows)):
            self._place(kept, chosen)

    def _read_together(self, rows: list[Row]) -> None:
        """Read the unread prompts of rows, each different one once, in batches of similar length."""
        prompts = sorted(dict.fromkeys(tuple(row.unread) for row in rows if row.unread), key=len)
        while prompts:
            widest = [len(prompt) * (place + 1) for place, prompt in enumerate(prompts)]
            count = max(1, sum(tokens <= _BATCH_PARTS * self.prefill_tokens for tokens in widest))
            read = dict(zip(prompts, self.decoder.read(prompts[:count]), strict=False))
            for row in rows:
                row.past = row.past or read.get(tuple(row.unread))
            del prompts[:count]

    def _place(self, kept: list[int], more: list[Row]) -> None:
        """Give rows places behind those that stay, in a batch that is not larger than needed."""
        rows = batch_rows(len(kept) + len(more)) if kept or more else 0
        longest = [*self.decoder.lengths[kept].tolist(), *(len(row.request.prompt) for row in more)]
        self.decoder.resize(kept, rows, max(longest, default=0) + 1)
        if rows:
            chosen = mx.array(kept + [0] * (rows - len(kept)), dtype=mx.int32)
            self._tokens = (self._tokens if len(self._tokens) else mx.zeros(1, dtype=mx.uint32))[chosen]
            self._scores = Scores(*(part[chosen] for part in self._scores)) if self._scores and kept else None
        self._rows = [*(self._rows[place] for place in kept), *more]
        self._rows += [None] * (rows - len(self._rows))
        if more:
            self.decoder.fill(len(kept), [row.past for row in more], [row.request.prompt[-2:][0] for row in more])
        for row in more:
            row.past = None
        self._sampler = None


def batch_rows(rows: int) -> int:
    """Return the batch size that is allocated for `rows`."""
    return next((size for size in BATCH_ROWS if size >= rows), -(-rows // BATCH_ROWS[-1]) * BATCH_ROWS[-1])


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """Return the length of the sequences' common prefix."""
    low, high = min(sequences), max(sequences)  # in lexicographic order all others lie between them
    different = (place for place, (a, b) in enumerate(zip(low, high, strict=False)) if a != b)
    return next(different, min(len(low), len(high)))


class KeptPasts:
    """An LRU cache of prefixes' keys and values with at most `max_tokens` together."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.held: list[tuple[list[int], Past]] = []  # least recently used first

    def find(self, prompt: list[int]) -> Past | None:
        """Return the past of the longest common prefix, at most of all tokens but the last."""
        found = [(common_prefix([prompt[:-1], ids]), place) for place, (ids, _) in enumerate(self.held)]
        tokens, place = max(found, default=(0, 0))
        if tokens < _LEAST_KEPT_TOKENS:
            return None
        self.held.append(self.held.pop(place))
        return [(keys[:, :, :tokens], values[:, :, :tokens]) for keys, values in self.held[-1][1]]

    def keep(self, ids: list[int], decoder: Decoder, row: int) -> None:
        """Add the tokens of a decoder's row; drop the least recently used ones."""
        if _LEAST_KEPT_TOKENS <= len(ids) <= self.max_tokens:
            self.held = [(held, past) for held, past in self.held if held != ids[: len(held)]]  # its own prefixes
            self.held.append((ids, decoder.past_of(row, len(ids))))
        while sum(len(held) for held, _ in self.held) > self.max_tokens:
            del self.held[0]
