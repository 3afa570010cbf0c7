"""Continuous batching: requests arrive at any time, and a finished row is reused at once.

A request's tokens depend only on its prompt, settings and seed: prompts are read separately in chunks aligned to their
first token, and a row's sums do not depend on other rows (`decode.py`). The only exception is `reuse="close"`, which
continues from earlier requests' caches (`cache.KeptPasts`) and agrees within float32's rounding, since part of these
was decoded instead of read. A program of the Python tool delays only its own row.
"""

from __future__ import annotations

import codecs
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from mlxchat.engine.cache import KeptPasts, batch_rows
from mlxchat.engine.constraint import Constraint
from mlxchat.engine.sample import Sampling, log_probability, sample_token
from mlxchat.engine.tools import CALL_TOKENS, PythonTool, ToolCalls
from mlxchat.errors import ConfigError
from mlxchat.ops.machine import DECODED_ROWS, KEPT_TOKENS, PREFILL_TOKENS

# Maximum duration of a step in which every row waits for a program, so that requests and cancellations are noticed.
_PATIENCE_SECONDS = 0.02


Kind = Literal["text", "python", "python_output"]
Scored = tuple[float, list[tuple[int, float]]]
"""The log-probability of a token, and (alternative, log-probability) pairs."""


class TextTokenizer(Protocol):
    """A tokenizer whose tokens can be decoded one by one: ours (`data.tokenizer`) or a third-party one."""

    @property
    def bos(self) -> int:
        """The token that begins a text."""

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer."""

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Special token → id; special tokens have no text."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text without added tokens."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids."""


class Forward(Protocol):
    """The rows of a batch: ours (`cache.Slots`) or a third-party model's. A past is a result of `read`."""

    def read(self, ids: list[int], past: Any, last: int | None) -> Any:
        """Return the past of a row of `past`, whose last token is `last`, followed by `ids`."""

    def score(self, ids: list[int]) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the logits (V,) after each of `ids`, at the beginning of a row."""

    def reserve(self, rows: int, tokens: int) -> None:
        """Grow to at least this many rows and tokens per row."""

    def keep(self, kept: list[int], tokens: int) -> None:
        """Keep only these rows, renumbered from 0, with room for `tokens`."""

    def clear(self) -> None:
        """Remove all rows."""

    def fill(self, row: int, past: Any) -> None:
        """Set the past of a row; None: empty."""

    def past_of(self, row: int, tokens: int) -> Any:
        """Return the past of a row's first tokens, or None if that is impossible."""

    def step(self, ids: list[int], previous: list[int], positions: list[int]) -> np.ndarray[Any, Any]:
        """Return logits (B, V) after one more token of each row; a free row has position 0."""


@dataclass(kw_only=True)
class Request:
    """A prompt and how to continue it."""

    prompt: list[int]
    """At least one token."""
    max_new_tokens: int
    """Including forced ones."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """Stop strings; the text ends before them."""
    tools: bool = True
    """Whether calls are answered by the calculator, and by Python if the scheduler has it."""
    logprobs: int | None = None
    """Number of alternatives to report with each token's log-probability; None: no log-probabilities."""
    prompt_logprobs: bool = False
    """Whether the first event has log-probabilities of the prompt's tokens; requires `logprobs`."""
    reuse: Literal["off", "exact", "close"] = "off"
    """Whether to reuse keys and values of an earlier request with the same prefix that allowed reuse, too.
    exact: only where results are bit-identical; close: also of decoded tokens, which differ by rounding."""
    text: bool = True
    """Whether events have text; False: no text and no stop strings."""
    skip_blank: bool = False
    """Whether to drop a blank at the beginning of the text."""
    constraint: Constraint | None = None
    """The grammar of the answer, not shared with other requests; None: unconstrained."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """A token of a request, or its end."""

    id: int
    token: int | None
    """None: the request was cancelled."""
    sampled: bool = False
    """False if a tool forced the token."""
    text: str = ""
    """Text that can be shown now."""
    logprob: float | None = None
    """By the model's distribution, if requested and the token was sampled."""
    top_logprobs: list[tuple[int, float]] | None = None
    prompt_logprobs: list[Scored] | None = None
    """(log-probability, alternatives) of each prompt token except the first."""
    finish_reason: str | None = None
    """'stop' (an end token or a stop string), 'length', 'cancelled'; None: not finished."""


@dataclass
class _Row:
    """A request that is waiting, being read, or being decoded."""

    id: int
    request: Request
    shown: ShownText | None
    draws: np.random.Generator
    calls: ToolCalls | None
    ids: list[int] = field(default_factory=list)
    """Prompt and answer."""
    past: Any = None
    cached: int = 0
    """Number of tokens with keys and values."""
    exact: int = 0
    """Number of first tokens whose keys and values are bit-identical to reading the prompt alone."""
    cancelled: bool = False

    @property
    def key(self) -> tuple[int, ...]:
        return tuple(self.request.prompt[:-1])


class Scheduler:
    """Runs requests. One thread calls `step`; `submit` and `cancel` are thread-safe."""

    def __init__(
        self, forward: Forward, tokenizer: TextTokenizer, *, max_rows: int = DECODED_ROWS,
        max_cached_tokens: int | None = None, prefill_tokens: int = PREFILL_TOKENS, kept_tokens: int = KEPT_TOKENS,
        python: PythonTool | None = None,
    ) -> None:  # fmt: skip
        """Start without requests.

        Args:
            forward: the model.
            tokenizer: the model's.
            max_rows: rows decoded at a time.
            max_cached_tokens: limit of rows × tokens of the longest row; a request waits until it fits, unless it is
                the only one; None: no limit.
            prefill_tokens: chunk size of prompts, and about the most that a step reads while rows are decoded.
            kept_tokens: size of the LRU cache of requests with `reuse`.
            python: runs calls that the calculator does not answer; None: these get no answer.
        """
        self.forward, self.tokenizer = forward, tokenizer
        self.max_rows, self.max_cached_tokens = max_rows, max_cached_tokens
        self.prefill_tokens, self.kept, self.python = prefill_tokens, KeptPasts(kept_tokens), python
        self._calls = has_calls(tokenizer)
        self._lock = threading.Lock()
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row | None] = []
        self._by_id: dict[int, _Row] = {}
        self._same: Counter[tuple[int, ...]] = Counter()
        self._read: dict[tuple[int, ...], Any] = {}
        self._next_id = 0

    @property
    def idle(self) -> bool:
        """Whether there are no requests."""
        return not self._by_id

    @property
    def num_active(self) -> int:
        """Number of rows being decoded."""
        return sum(row is not None for row in self._rows)

    def submit(self, request: Request) -> int:
        """Queue a request and return its id.

        Raises:
            ConfigError: a setting is impossible.
        """
        problems = request.sampling.problems()
        if not request.prompt:
            problems.append("the prompt is empty; expected at least one token")
        if request.max_new_tokens < 1:
            problems.append(f"max_new_tokens is {request.max_new_tokens}; expected at least 1")
        if problems:
            raise ConfigError("; ".join(problems))
        draws = np.random.Generator(np.random.Philox(np.random.SeedSequence(request.sampling.seed)))
        with self._lock:
            row = _Row(
                id=self._next_id, request=request, draws=draws,
                shown=ShownText(self.tokenizer, request.stop, skip_blank=request.skip_blank) if request.text else None,
                calls=ToolCalls(self.tokenizer, self.python, request.sampling.seed)
                if request.tools and self._calls else None,
                ids=list(request.prompt),
            )  # fmt: skip
            self._next_id += 1
            self._by_id[row.id] = row
            self._waiting.append(row)
            self._same[row.key] += 1
            return row.id

    def cancel(self, id: int) -> None:
        """End a request with an event of the next step; no effect if it has ended."""
        with self._lock:
            if id in self._by_id:
                self._by_id[id].cancelled = True

    def step(self) -> list[Event]:
        """Read some prompts, decode one token of every row, and return the events."""
        events = self._drop_cancelled()
        self._admit()
        self._shrink()
        if not self.num_active:
            return events
        inputs = list(self._rows)
        programs = [row.calls.running for row in inputs if row and row.calls and row.calls.waits()]
        if len(programs) == self.num_active:
            wait([each for each in programs if each], _PATIENCE_SECONDS, FIRST_COMPLETED)
            return events
        self.forward.reserve(len(inputs), 1 + max(row.cached for row in inputs if row is not None))
        logits = self.forward.step(
            [row.ids[row.cached] if row else 0 for row in inputs],
            [row.ids[row.cached - 1] if row and row.cached else 0 for row in inputs],
            [row.cached if row else 0 for row in inputs],
        )
        for place, row in enumerate(inputs):
            if row is None or (row.calls and row.calls.running):  # a row that waits for a program is decoded again
                continue
            row.cached += 1
            event = self._advance(row, logits[place])
            events.append(event)
            if event.finish_reason is not None:
                self._finish(place, row)
        return events

    def _drop_cancelled(self) -> list[Event]:
        with self._lock:
            gone = [row for row in self._by_id.values() if row.cancelled]
            for row in gone:
                if row in self._waiting:
                    self._waiting.remove(row)
                    self._forget_waiting(row)
                del self._by_id[row.id]
        for row in gone:
            if row.calls:
                row.calls.drop()
            if row in self._rows:
                self._rows[self._rows.index(row)] = None
        texts = {row.id: row.shown.finish() if row.shown else "" for row in gone}
        return [Event(id=id, token=None, text=text, finish_reason="cancelled") for id, text in texts.items()]

    def _admit(self) -> None:
        """Read prompts and assign rows while there are free ones; limit the tokens if other rows are being decoded."""
        budget = self.prefill_tokens if self.num_active else None
        while self._waiting and self.num_active < self.max_rows and (budget is None or budget > 0):
            row = self._waiting[0]
            longest = max([len(row.ids), *(each.cached + 1 for each in self._rows if each)])
            rows = self.num_active + 1
            if self.max_cached_tokens is not None and rows > 1 and rows * longest > self.max_cached_tokens:
                return
            read = self._read_some(row)
            budget = None if budget is None else budget - read
            if row.cached < len(row.ids) - 1:
                continue
            with self._lock:
                if row.cancelled:  # by another thread; the next step drops it
                    return
                self._waiting.popleft()
                self._forget_waiting(row)
            if None not in self._rows:
                self._rows.append(None)
            place = self._rows.index(None)
            self.forward.reserve(len(self._rows), row.cached + 1)
            self.forward.fill(place, row.past)
            self._rows[place], row.past = row, None

    def _read_some(self, row: _Row) -> int:
        """Read the next chunk of a prompt and return its tokens. The prompt's last token is decoded instead."""
        prompt = row.request.prompt
        target = len(prompt) - 1
        if row.cached == 0 and target > 0:
            if row.key in self._read:
                row.past, row.cached, row.exact = self._read[row.key], target, target
                return 0
            if row.request.reuse != "off":
                exactly = row.request.reuse == "exact"
                row.past, row.cached, row.exact = self.kept.find(prompt, self.prefill_tokens, exactly=exactly)
        if row.cached == target:
            return 0
        stop = min(target, (row.cached // self.prefill_tokens + 1) * self.prefill_tokens)
        row.past = self.forward.read(
            prompt[row.cached : stop], row.past, prompt[row.cached - 1] if row.cached else None
        )
        if row.cached == row.exact and row.cached % self.prefill_tokens == 0:
            row.exact = stop
        read, row.cached = stop - row.cached, stop
        if row.cached == target == row.exact and self._same[row.key] > 1:
            self._read[row.key] = row.past
        if row.cached == target and row.request.reuse != "off":
            self.kept.keep(prompt[:target], row.past, row.exact)
        return read

    def _forget_waiting(self, row: _Row) -> None:
        self._same[row.key] -= 1
        if self._same[row.key] <= 0:
            del self._same[row.key]
            self._read.pop(row.key, None)

    def _advance(self, row: _Row, logits: np.ndarray[Any, Any]) -> Event:
        """Draw a row's next token and return its event."""
        request, calls = row.request, row.calls
        forced = calls.forced if calls else None
        sampled = not forced
        if forced:
            token = forced.popleft()
        else:
            allowed = request.constraint.allowed(logits) if request.constraint else logits
            token = sample_token(allowed, request.sampling, row.draws, row.ids, len(request.prompt))
        if request.constraint:
            request.constraint.follow(token)
        logprob, alternatives = None, None
        if request.logprobs is not None and sampled:
            logprob, alternatives = log_probability(logits, token, request.logprobs)
        scored = None
        if request.prompt_logprobs and len(row.ids) == len(request.prompt):
            scored = self._score(request.prompt, request.logprobs or 0)
        row.ids.append(token)
        if calls:
            calls.follow(token)
        text, reason = row.shown.add(token) if row.shown else "", None
        if token in self.tokenizer.ends or (row.shown and row.shown.stopped):
            reason = "stop"
        elif len(row.ids) - len(request.prompt) >= request.max_new_tokens:
            reason = "length"
        if reason and row.shown:
            text += row.shown.finish()
        return Event(
            id=row.id, token=token, sampled=sampled, text=text, logprob=logprob, top_logprobs=alternatives,
            prompt_logprobs=scored, finish_reason=reason,
        )  # fmt: skip

    def _score(self, prompt: list[int], most: int) -> list[Scored]:
        if len(prompt) == 1:
            return []
        logits = self.forward.score(prompt[:-1])
        return [log_probability(each, token, most) for each, token in zip(logits, prompt[1:], strict=True)]

    def _finish(self, place: int, row: _Row) -> None:
        if row.request.reuse == "close":  # otherwise the prompt was kept after reading
            past = self.forward.past_of(place, row.cached)
            if past is not None:
                self.kept.keep(row.ids[: row.cached], past, row.exact)
        if row.calls:
            row.calls.drop()
        self._rows[place] = None
        with self._lock:
            self._by_id.pop(row.id, None)

    def _shrink(self) -> None:
        """Remove free rows if no request waits and a smaller batch is enough."""
        active = [place for place, row in enumerate(self._rows) if row is not None]
        if self._waiting or (active and batch_rows(len(active)) == batch_rows(len(self._rows))):
            return
        if active:
            rows = [self._rows[place] for place in active]
            self.forward.keep(active, max(row.cached for row in rows if row) + 1)
            self._rows = rows
        else:
            self.forward.clear()
            self._rows = []


class ShownText:
    """Streams a row's text without special tokens, incomplete characters, and beginnings of stop strings."""

    def __init__(self, tokenizer: TextTokenizer, stop: tuple[str, ...] = (), *, skip_blank: bool = False) -> None:
        """Start a row; the text ends before the first `stop` string."""
        self.stopped = False
        """Whether a stop string was found."""
        self._tokenizer, self._stop = tokenizer, tuple(filter(None, stop))
        self._special = set(tokenizer.special_ids.values())
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held, self._skips_blank = "", skip_blank

    def add(self, token: int) -> str:
        """Return the text that can be shown after `token`."""
        if token in self._special:
            return self._show(self._decoder.decode(b"", final=True))
        return self._show(self._decoder.decode(self._tokenizer.decode_bytes([token])))

    def finish(self) -> str:
        """Return the remaining text at the end of the row; an incomplete character becomes U+FFFD."""
        shown = self._show(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return shown if self.stopped else shown + held

    def _show(self, more: str) -> str:
        if self.stopped:
            return ""
        if more and self._skips_blank:
            more, self._skips_blank = more.removeprefix(" "), False
        text = self._held + more
        found = [place for place in map(text.find, self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


@dataclass
class Parts:
    """Separates the text of a row's events into text, calculator calls and their output."""

    tokenizer: TextTokenizer
    kind: Kind = "text"
    found: list[tuple[Kind, str]] = field(default_factory=list)
    """(kind, text) of every part so far."""

    def __post_init__(self) -> None:
        """Look up the special tokens that begin and end parts."""
        kinds: tuple[Kind, ...] = ("python", "text", "python_output", "text")
        special = self.tokenizer.special_ids
        names = CALL_TOKENS if has_calls(self.tokenizer) else ()
        self._turns = {special[name]: kind for name, kind in zip(names, kinds, strict=False)}

    def add(self, event: Event) -> Iterator[tuple[Kind, str]]:
        """Yield the kind and the text that can be shown now."""
        if event.text:
            if self.found and self.found[-1][0] == self.kind:
                self.found[-1] = self.kind, self.found[-1][1] + event.text
            else:
                self.found.append((self.kind, event.text))
            yield self.kind, event.text
        if event.token is not None:
            self.kind = self._turns.get(event.token, self.kind)

    @property
    def text(self) -> str:
        """The text without calls and their output."""
        return "".join(text for kind, text in self.found if kind == "text")

    @property
    def tools_used(self) -> bool:
        """Whether there was a call."""
        return any(kind != "text" for kind, _ in self.found)

    def as_content(self) -> list[dict[str, Any]]:
        """Return the parts as content of a conversation's message."""
        return [{"type": kind, "text": text} for kind, text in self.found]


def has_calls(tokenizer: TextTokenizer) -> bool:
    """Return True if a tokenizer has the special tokens of tool calls."""
    return tokenizer.special_ids.keys() >= set(CALL_TOKENS)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text that is an incomplete beginning of the stop string."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)
