"""Completes batches of prompts, and runs requests as text: tool calls, stop strings, streamed text.

A row ends with <|assistant_end|> or <|bos|>. When the model closes a call with <|python_end|>, the calculator's output
is forced into the row; forced tokens have mask 0 and are never trained on. The loop is in `batch.py`.
"""

from __future__ import annotations

import ast
import codecs
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxchat.data.tokenizer import Tokenizer, render_for_completion
from mlxchat.data.vocabulary import SPECIAL_TOKENS
from mlxchat.distributed.team import Team, name_of
from mlxchat.engine.batch import Event, Generator, Kind, Request, Row
from mlxchat.engine.decode import Decoder
from mlxchat.engine.sample import Sampling
from mlxchat.errors import ConfigError, DataError
from mlxchat.model.checkpoint import model_on, sync_model
from mlxchat.model.gpt import GPT
from mlxchat.model.lora import packed_copy
from mlxchat.model.parameters import computing_in
from mlxchat.model.scoring import Floats, ScoredRow, score_rows
from mlxchat.ops.loss import ScoreKind
from mlxchat.ops.machine import DECODED_ROWS, SCORED_TOKENS

if TYPE_CHECKING:
    from mlxchat.engine.third_party import AnyTokenizer, ThirdPartyGenerator


@dataclass
class Completion:
    """The generated tokens of a row."""

    ids: list[int] = field(default_factory=list)  # including the final <|assistant_end|>
    mask: list[int] = field(default_factory=list)  # 1 where the id was sampled, 0 where it was forced
    log_probabilities: list[float] = field(default_factory=list)  # if requested: in nats; 0 where the id was forced
    finished: bool = False  # whether the row ended with an end token

    def text(self, tokenizer: Any) -> str:
        """Return the answer's text, without the end token."""
        return str(tokenizer.decode(self.ids[:-1] if self.finished else self.ids))


class Engine:
    """A model with its tokenizer: answers, continues and scores text."""

    is_ours = True

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, *, bits: int | None = None, dtype: mx.Dtype | None = None,
        max_rows: int = DECODED_ROWS, batch_tokens: int = SCORED_TOKENS, team: Team | None = None,
    ) -> None:  # fmt: skip
        """Create an engine of one of our models, whose weights may change between calls.

        `bits` (8 or 4) quantises the weights (`packed_copy`), for prompts, too; `dtype` is that of computations, None:
        of the model's parameters; `max_rows` are decoded and `batch_tokens` scored at a time. A team's ranks share
        `complete` and `score`, which rank 0 calls; schedulers always run in this process.
        """
        self.model: Any = model
        self.context_tokens = model.sizes.context_tokens
        """Maximum length of an input: that of the model's training rows."""
        self.tokenizer: Any = tokenizer
        self.team = team if team is not None and team.size > 1 else None
        self.bits, self.dtype, self.max_rows, self.batch_tokens = bits, dtype, max_rows, batch_tokens
        self.decoder: Callable[[GPT], Decoder] = Decoder

    def render(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Return the prompt of the assistant's next message; raises DataError for an invalid conversation."""
        return render_for_completion(self.tokenizer, {"messages": list(messages)})

    def scheduler(self, **options: Any) -> Scheduler:
        """Return a scheduler without requests; `options` are `Generator`'s."""
        model = self.model if self.bits is None else packed_copy(self.model, self.bits)
        return Scheduler(Generator(self.decoder(model), **{"max_rows": self.max_rows, **options}), self.tokenizer)

    def complete(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float = 0.0, top_k: int | None = None,
        seed: int | Sequence[int] = 0, log_probabilities: bool = False,
    ) -> list[Completion]:  # fmt: skip
        """Return one completion per prompt (token ids). `max_rows` rows are decoded at a time (continuous batching).

        `max_new_tokens` includes forced ones. A temperature of 0 is greedy; `top_k` draws among the k most likely
        tokens. With a seed for each prompt instead of one for all, its draws do not depend on other prompts.
        """
        if isinstance(seed, int):
            seed = [int(np.random.SeedSequence([seed, row]).generate_state(1)[0]) for row in range(len(prompts))]
        requests = [
            Request(
                prompt=prompt, max_new_tokens=max_new_tokens, logprobs=0 if log_probabilities else None,
                sampling=Sampling(temperature=temperature, top_k=top_k, seed=each),
            )
            for prompt, each in zip(prompts, seed, strict=True)
        ]  # fmt: skip
        if max_new_tokens < 1:
            return [Completion() for _ in prompts]
        if self.team is None or not all(prompts):  # refuses an empty prompt before other ranks take part
            return self._complete_here(requests)
        sync_model(self.team, self.model)
        settings = None
        if self.team.kept.get("engine") is not self:
            self.team.kept["engine"] = self
            settings = {
                "ranks": {token.hex(): rank for token, rank in self.tokenizer.ranks.items()},
                "pattern": self.tokenizer.pattern,
                "dtype": self.dtype and name_of(self.dtype),
                "options": {"bits": self.bits, "max_rows": self.max_rows},
            }
        given = {"engine": settings, "requests": [asdict(each) for each in requests]}
        found: list[Completion] = self.team.call(_complete, given)
        return found

    def score(self, rows: Sequence[ScoredRow], kinds: Sequence[ScoreKind] = ("losses",)) -> list[Floats]:
        """Return the scores (K, n) of each row; see `score_rows`."""
        return score_rows(self.model, rows, kinds, batch_tokens=self.batch_tokens, dtype=self.dtype, team=self.team)

    def letter_logits(self, prompts: Sequence[list[int]], letters: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return the logits of each prompt's letters as its next token; raises DataError if letters share a token."""
        rows = []
        for prompt, offered in zip(prompts, letters, strict=True):
            tokens = [self.tokenizer.encode(letter) for letter in offered]
            targets = np.array([each[-1] for each in tokens], np.int32)  # SentencePiece may add a token for the space
            if (self.is_ours and any(len(each) != 1 for each in tokens)) or len({*targets.tolist()}) < len(targets):
                raise DataError(f"the letters {list(offered)} must be different single tokens of this tokenizer")
            rows.append(ScoredRow(np.array(prompt, np.int32), np.full(len(targets), len(prompt) - 1), targets))
        return [values[0].tolist() for values in self.score(rows, ("logits",))]

    def _complete_here(self, requests: Sequence[Request]) -> list[Completion]:
        """Return the completions of requests in this process."""
        with nullcontext() if self.dtype is None else computing_in(self.model, self.dtype):
            scheduler, scored = self.scheduler(), any(request.logprobs is not None for request in requests)
            found = {scheduler.submit(request): Completion() for request in requests}
            while not scheduler.idle:
                for event in scheduler.step():
                    row = found[event.id]
                    assert event.token is not None, "nothing is cancelled"
                    row.ids.append(event.token)
                    row.mask.append(int(event.sampled))
                    if scored:
                        row.log_probabilities.append(event.logprob or 0.0)
                    row.finished = event.finish_reason == "stop"
            return list(found.values())


def _complete(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> list[Completion]:
    """Return the completions of all requests, each computed by one rank, equal to those of one process."""
    if (given := request["engine"]) is not None and not team.group.leads:
        ranks = {bytes.fromhex(token): rank for token, rank in given["ranks"].items()}
        dtype, tokenizer = given["dtype"] and getattr(mx, given["dtype"]), Tokenizer(ranks, given["pattern"])
        team.kept["engine"] = Engine(model_on(team), tokenizer, dtype=dtype, **given["options"])
    engine = team.kept["engine"]
    engine.model = model_on(team)
    # Strided, so that samples of a question and long prompts are spread evenly over the ranks.
    own = request["requests"][team.group.rank :: team.size]
    rows = engine._complete_here([Request(**each | {"sampling": Sampling(**each["sampling"])}) for each in own])
    completions = [Completion() for _ in request["requests"]]
    for rank, found in enumerate(team.group.gather_json([asdict(row) for row in rows])):
        completions[rank :: team.size] = [Completion(**row) for row in found]
    return completions


class Scheduler:
    """Runs requests on one thread, with nanochat's protocol of calls: an answer is forced when a call ends."""

    def __init__(self, source: Generator | ThirdPartyGenerator, tokenizer: AnyTokenizer) -> None:
        """Start without requests; only a `Generator` has the calculator."""
        self.source, self.tokenizer = source, tokenizer
        self._special = [tokenizer.special_ids.get(name, -1) for name in CALL_TOKENS]
        self._kinds = dict(zip(self._special, KINDS, strict=True))
        self._has_tools = isinstance(source, Generator) and -1 not in self._special
        self._rows: dict[int, Row] = {}

    @property
    def idle(self) -> bool:
        """Whether there are no requests."""
        return not self._rows

    def submit(self, request: Request) -> int:
        """Queue a request and return its id; raises ConfigError if the prompt is empty."""
        if not request.prompt:
            raise ConfigError("the prompt is empty; expected at least one token")
        row = self.source.insert(request)
        row.shown = ShownText(self.tokenizer, request.stop, skip_blank=request.skip_blank)
        self._rows[row.id] = row
        return row.id

    def cancel(self, id: int) -> None:
        """End a request without a further event; no effect if it has ended."""
        if id in self._rows:
            self._end(self._rows[id])

    def step(self) -> list[Event]:
        """Return the events of the next token of every row that has one by now."""
        events = self.source.next()
        for event in events:
            self._complete(event, self._rows[event.id])
        return events

    def _complete(self, event: Event, row: Row) -> None:
        """Add to a token's event what its text means."""
        request, token = row.request, event.token
        assert token is not None
        assert row.shown is not None
        event.text = row.shown.add(token)
        if token in self.tokenizer.ends or row.shown.stopped:
            event.finish_reason = "stop"
        elif row.num_answered >= request.max_new_tokens:
            event.finish_reason = "length"
        if event.finish_reason:
            event.text += row.shown.finish()
            self._end(row)
        elif request.tools and self._has_tools:
            self._follow(row, token)
        event.kind = row.kind
        row.kind = self._kinds.get(token, row.kind)

    def _follow(self, row: Row, token: int) -> None:
        """Answer the call that a token ends, if it is an expression."""
        start, end, *output = self._special
        if token == start:
            row.call = []
        elif token == end and row.call is not None:
            answer = calculate(self.tokenizer.decode(row.call))
            row.call = None
            if answer is not None:
                row.given.extend([output[0], *self.tokenizer.encode(answer), output[1]])
        elif row.call is not None:
            row.call.append(token)

    def _end(self, row: Row) -> None:
        del self._rows[row.id]
        self.source.remove(row)


class ShownText:
    """Streams a row's text without special tokens, incomplete characters, and beginnings of stop strings."""

    def __init__(self, tokenizer: AnyTokenizer, stop: tuple[str, ...] = (), *, skip_blank: bool = False) -> None:
        """Start a row; the text ends before the first `stop` string."""
        self.stopped = False  # whether a stop string was found
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


CALL_TOKENS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
KINDS: tuple[Kind, ...] = ("python", "text", "python_output", "text")  # what follows each of CALL_TOKENS
_MOST_CHARS = 200
_LARGEST = 1e15

_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip


def calculate(expression: str) -> str | None:
    """Return the result of an expression as text; None: not an expression of the calculator.

    Not supported: names, calls other than str.count, powers, more than 200 characters, numbers beyond 1e15.
    """
    expression = expression.strip()
    if not expression or len(expression) > _MOST_CHARS:
        return None
    if "'" not in expression and '"' not in expression:
        expression = expression.replace(",", "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about syntax such as 1or 2
            value = _evaluate(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    value = round(value, 10)  # 1.1*3-0.3 is 3, not 3.0000000000000004
    return str(int(value) if value == int(value) else value)


def _evaluate(node: ast.expr) -> float:
    value: float
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            value = number
        case ast.UnaryOp(op=operation, operand=operand) if type(operation) in _OPERATORS:
            value = _OPERATORS[type(operation)](_evaluate(operand))
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _OPERATORS:
            value = _OPERATORS[type(operation)](_evaluate(left), _evaluate(right))
        case ast.Call(ast.Attribute(ast.Constant(str(text)), "count"), [ast.Constant(str(part))], []):
            value = text.count(part)
        case _:
            raise ValueError("no arithmetic")
    if not abs(value) <= _LARGEST:
        raise ValueError("beyond the calculator's range")
    return value


def continue_prompts(engine: Engine, prompts: list[str], max_new_tokens: int, **how: Any) -> list[tuple[str, str]]:
    """Return each prompt with the model's continuation; sampling parameters are those of `Engine.complete`."""
    ids = [[engine.tokenizer.bos, *engine.tokenizer.encode(prompt)] for prompt in prompts]
    completions = engine.complete(ids, max_new_tokens=max_new_tokens, **how)
    return list(zip(prompts, [readable(engine.tokenizer.decode(each.ids)) for each in completions], strict=True))


def answer_prompts(engine: Engine, prompts: list[str], max_new_tokens: int) -> list[tuple[str, str]]:
    """Return each prompt with the model's greedy answer as an assistant."""
    ids = [engine.render([{"role": "user", "content": prompt}]) for prompt in prompts]
    completions = engine.complete(ids, max_new_tokens=max_new_tokens)
    return list(zip(prompts, [readable(engine.tokenizer.decode(each.ids)) for each in completions], strict=True))


def readable(text: str) -> str:
    """Return generated text with calculator calls as <<call=result>> and without special tokens."""
    for token, shown in (("<|python_start|>", "<<"), ("<|python_end|><|output_start|>", "="), ("<|output_end|>", ">>")):
        text = text.replace(token, shown)
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "")
    return text
