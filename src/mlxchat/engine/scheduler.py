"""Requests as text: tool calls, stop strings and streamed text around the rows of a generator.

A program of the Python tool delays only its own row.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

from mlxchat.engine.batch import Generator, Request, Token
from mlxchat.engine.sample import Scored
from mlxchat.engine.tools import CALL_TOKENS, PythonTool, calculate
from mlxchat.errors import ConfigError

if TYPE_CHECKING:
    from mlxchat.engine.third_party import AnyTokenizer, ThirdPartyGenerator

# Maximum duration of a step in which every row waits for a program, so that requests and cancellations are noticed.
_PATIENCE_SECONDS = 0.02

Kind = Literal["text", "python", "python_output"]
_KINDS: tuple[Kind, ...] = ("python", "text", "python_output", "text")
"""What follows each of CALL_TOKENS."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """A token of a request, or its end."""

    id: int
    token: int | None  # none: the request was cancelled
    sampled: bool = False  # False if a tool forced the token
    text: str = ""  # text that can be shown now
    kind: Kind = "text"
    """What the text and the token belong to; the tokens around a call belong to what stands before them."""
    logprob: float | None = None  # by the model's distribution, if requested and the token was sampled
    top_logprobs: list[tuple[int, float]] | None = None
    prompt_logprobs: list[Scored] | None = None  # (log-probability, alternatives) of each prompt token except the first
    finish_reason: str | None = None
    """'stop' (an end token or a stop string), 'length', 'cancelled'; None: not finished."""


@dataclass
class _Row:
    request: Request
    shown: ShownText | None
    kind: Kind = "text"
    tokens: int = 0  # of the answer so far
    call: list[int] | None = None  # tokens of a call that has begun
    running: Future[str] | None = None  # A program for whose output the row waits


class Scheduler:
    """Runs requests on one thread, with nanochat's protocol of calls: an answer is forced when a call ends."""

    def __init__(
        self, source: Generator | ThirdPartyGenerator, tokenizer: AnyTokenizer, *, python: PythonTool | None = None
    ) -> None:
        """Start without requests; only a `Generator` has tools, of which `python` runs what is no sum."""
        self.source, self.tokenizer, self.python = source, tokenizer, python
        self._special = [tokenizer.special_ids.get(name, -1) for name in CALL_TOKENS]
        self._kinds = dict(zip(self._special, _KINDS, strict=True))
        self._forces = source if isinstance(source, Generator) and -1 not in self._special else None
        self._rows: dict[int, _Row] = {}
        self._cancelled: list[int] = []

    @property
    def idle(self) -> bool:
        """Whether there are no requests."""
        return not self._rows

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
        shown = ShownText(self.tokenizer, request.stop, skip_blank=request.skip_blank) if request.text else None
        id = self.source.insert(request)
        self._rows[id] = _Row(request, shown)
        return id

    def cancel(self, id: int) -> None:
        """End a request with an event of the next step; no effect if it has ended."""
        if id in self._rows:
            self._cancelled.append(id)

    def step(self) -> list[Event]:
        """Return the events of the next token of every row that has one by now.

        Raises:
            StepFailed: this machine cannot start an interpreter for a program.
        """
        events = [self._cancel(id) for id in self._cancelled if id in self._rows]
        self._cancelled = []
        for id, row in self._rows.items():
            if row.running is not None and row.running.done():
                self._force(id, row.running.result())
                row.running = None
        running = [row.running for row in self._rows.values() if row.running is not None]
        if running and len(running) == len(self._rows):
            wait(running, _PATIENCE_SECONDS, FIRST_COMPLETED)
            return events
        return [*events, *(self._event(token) for token in self.source.next() if token.id in self._rows)]

    def _cancel(self, id: int) -> Event:
        row = self._rows[id]
        self._end(id)
        text = row.shown.finish() if row.shown else ""
        return Event(id=id, token=None, text=text, kind=row.kind, finish_reason="cancelled")

    def _follow(self, id: int, row: _Row, token: int) -> None:
        """Answer the call that a token ends, if it is an expression or may be a program."""
        start, end, *_ = self._special
        if token == start:
            row.call = []
        elif token == end and row.call is not None:
            code, row.call = self.tokenizer.decode(row.call), None
            answer = calculate(code)
            if answer is not None:
                self._force(id, answer)
            elif self.python is not None and code.strip():
                row.running = self.python.start(code, row.request.sampling.seed)
                self._force(id, None)
        elif row.call is not None:
            row.call.append(token)

    def _force(self, id: int, output: str | None) -> None:
        """Continue a row by a call's output; None: hold it."""
        assert self._forces is not None
        *_, start, end = self._special
        tokens = [] if output is None else [start, *self.tokenizer.encode(output), end]
        self._forces.force(id, tokens, hold=output is None)

    def _event(self, token: Token) -> Event:
        """Return the event of a row's next token."""
        row = self._rows[token.id]
        request = row.request
        prompt_scores = None
        if request.prompt_logprobs and row.tokens == 0:
            most = request.logprobs or 0
            prompt_scores = self.source.score(request.prompt, most) if len(request.prompt) > 1 else []
        row.tokens += 1
        text, reason = row.shown.add(token.token) if row.shown else "", None
        if token.token in self.tokenizer.ends or (row.shown and row.shown.stopped):
            reason = "stop"
        elif row.tokens >= request.max_new_tokens:
            reason = "length"
        if reason:
            text += row.shown.finish() if row.shown else ""
            self._end(token.id)
        elif request.tools and self._forces:
            self._follow(token.id, row, token.token)
        logprob, alternatives = token.scored or (None, None)
        kind, row.kind = row.kind, self._kinds.get(token.token, row.kind)
        return Event(
            id=token.id, token=token.token, sampled=token.sampled, text=text, kind=kind, logprob=logprob,
            top_logprobs=alternatives, prompt_logprobs=prompt_scores, finish_reason=reason,
        )  # fmt: skip

    def _end(self, id: int) -> None:
        row = self._rows.pop(id)
        if row.running is not None:
            row.running.cancel()  # if it is queued; else it ends by its limits
        self.source.remove(id)


class ShownText:
    """Streams a row's text without special tokens, incomplete characters, and beginnings of stop strings."""

    def __init__(self, tokenizer: AnyTokenizer, stop: tuple[str, ...] = (), *, skip_blank: bool = False) -> None:
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


def content_of(texts: Iterable[tuple[Kind, str]]) -> list[dict[str, Any]]:
    """Return (kind, text) pieces as content of a conversation's message: one part for neighbours of the same kind."""
    return [{"type": kind, "text": "".join(text for _, text in each)} for kind, each in groupby(texts, itemgetter(0))]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text that is an incomplete beginning of the stop string."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)
