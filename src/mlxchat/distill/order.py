"""One command's distillation, from questions to a file: what is asked, what is known already, what is written."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlxchat import __version__
from mlxchat.config.secrets import redact
from mlxchat.config.wording import format_count, format_seconds
from mlxchat.distill.answers import Answers, request_key
from mlxchat.distill.collect import Collected, Collector, Limits, Request
from mlxchat.distill.cost import Prices, Usage
from mlxchat.distill.mixture_file import Choice, Tally, choose_answers, provenance_place, with_system, write_mixture
from mlxchat.distill.questions import Question
from mlxchat.distill.teacher import Passing, Refused, Teacher, public_url
from mlxchat.distill.words import one_line
from mlxchat.errors import ConfigError, DataError, Interrupted, PassingError
from mlxchat.runner.process import stop_on_signals
from mlxchat.runner.progress import Progress
from mlxchat.store.files import now
from mlxchat.tasks.base import held_out

_MOST_SHOWN = 5
_IDENTITY_SECONDS = 20.0
_HELD_OUT_FRAC = 0.1  # of the task jsonl


@dataclass(kw_only=True)
class Order:
    """What a teacher is to do."""

    teacher: str
    """Address of the endpoint, without the route."""
    key: str | None
    """For it; never written down."""
    model: str
    questions: Sequence[Question]
    source: dict[str, Any]
    """Where the questions come from, for the provenance."""
    system: str | None = None
    """What the teacher is told before each question."""
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int = 1024
    """Longest answer."""
    samples: int = 1
    """Answers to each question."""
    seed: int | None = None
    """Of the first sample; the next ones count on. None: none is sent."""
    body: dict[str, Any] = field(default_factory=dict)
    """Further fields of each request; None leaves one out."""
    limits: Limits = field(default_factory=Limits)
    timeout_seconds: float = 300.0
    prices: Prices = field(default_factory=Prices)
    choice: Choice = field(default_factory=Choice)
    out: Path
    cache: Path
    refresh: bool = False
    """Whether what is known already is asked again."""
    fingerprint: str | None = None
    """Of the model behind the name, where the endpoint says it; found by `_open_answers`."""

    @property
    def ledger(self) -> Path:
        """Where the costs of all runs with a limit for this file are kept, beside it."""
        return self.out.with_name(f"{self.out.name.removesuffix('.jsonl')}.costs.log")

    def requests(self) -> list[list[Request]]:
        """Return the requests of each question, one for each sample."""
        return [[self._request(question, sample) for sample in range(self.samples)] for question in self.questions]

    def _request(self, question: Question, sample: int) -> Request:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": with_system(question.asked(), self.system),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "seed": None if self.seed is None else self.seed + sample,
            **self.body,
        }
        body = {name: value for name, value in body.items() if value is not None}
        return Request(key=request_key(self.teacher, body, sample, self.fingerprint), name=question.name, body=body)

    def describe(self) -> dict[str, Any]:
        """Return the settings, for the provenance, without anything secret."""
        return {
            "teacher": {"url": public_url(self.teacher), "model": self.model, "fingerprint": self.fingerprint},
            "questions": self.source,
            "sampling": {
                "system": self.system, "temperature": self.temperature, "top_p": self.top_p, "samples": self.samples,
                "max_tokens": self.max_tokens, "seed": self.seed, "body": self.body,
            },
            "kept": asdict(self.choice),
        }  # fmt: skip


async def find_model(base: str, key: str | None, timeout_seconds: float) -> str:
    """Return the name of a teacher's only model.

    Raises:
        ConfigError: it has several, none, or does not say.
        PassingError: it does not answer.
    """
    async with Teacher(base, key, timeout_seconds=timeout_seconds, concurrency=1) as teacher:
        try:
            names = await teacher.models()
        except Refused as error:
            raise ConfigError(f"--model is missing, and {public_url(base)} names none: {error}") from None
        except Passing as error:
            raise PassingError(f"{public_url(base)} does not answer: {error}") from None
    if len(names) == 1:
        return names[0]
    told = ", ".join(one_line(name, 80) for name in names[:20]) or "none"
    raise ConfigError(f"--model is missing; {public_url(base)} has {told}")


def _open_answers(order: Order) -> Answers:
    """Return the answers that are kept, once it is known which model's they must be; forget those to ask again."""
    answers = Answers(order.cache, order.teacher, order.model)
    place = public_url(order.teacher)
    try:
        order.fingerprint = asyncio.run(_find_fingerprint(order))
    except Passing as error:
        order.fingerprint = answers.fingerprint
        if order.fingerprint is not None:
            print(
                f"note: {place} does not answer ({error}); kept answers are those of its latest model", file=sys.stderr
            )
    else:
        if order.fingerprint is None:
            print(
                f"note: {place} does not say which weights are behind {one_line(order.model)!r}: all answers kept "
                "under that name count as its own. --refresh asks again",
                file=sys.stderr,
            )
        answers.identify(order.fingerprint)
    if order.refresh:
        answers.forget(request.key for samples in order.requests() for request in samples)
    return answers


async def _find_fingerprint(order: Order) -> str | None:
    seconds = min(order.timeout_seconds, _IDENTITY_SECONDS)
    async with Teacher(order.teacher, order.key, timeout_seconds=seconds, concurrency=1) as teacher:
        return await teacher.find_fingerprint(order.model)


def estimate(order: Order) -> str:
    """Return what an order would ask, and the most that it can cost, for people; nothing is asked."""
    answers = _open_answers(order)
    missing = [each for samples in order.requests() for each in samples if each.key not in answers]
    total = Usage()
    for request in missing:
        total.add(request.most_tokens(order.limits.max_tokens))
    cost = order.prices.of(total)
    count = len(order.questions) * order.samples
    known = count - len(missing)
    return (
        f"{len(order.questions):,} questions, {count:,} answers, {known:,} of them known, {len(missing):,} to ask: "
        f"at most {format_count(total.input)} + {format_count(total.output)} tokens"
        + ("" if cost is None else f", cost at most {cost:.4f}")
    )


def distill(order: Order) -> int:
    """Ask what is not known yet, write the file, and tell what came of it; return the exit code.

    Raises:
        MlxchatError: the teacher refuses or does not answer, or the disk does not take what it said. What was answered
            is kept, and written where there is anything to write.
        Interrupted: a signal asked to stop.
    """
    began = now()
    answers = _open_answers(order)
    requests = order.requests()
    every = {request.key: request for samples in requests for request in samples}
    missing = [request for key, request in every.items() if key not in answers]
    stopped: list[int] = []
    collected = Collected()
    if missing:
        collected = asyncio.run(_collect(order, answers, missing, len(every) - len(missing), stopped))
    tally = Tally()
    keys = [[request.key for request in samples] for samples in requests]

    def describe() -> dict[str, Any]:
        told = {**order.describe(), "models": sorted(one_line(model) for model in tally.models)}
        counts = {name: value for name, value in asdict(tally).items() if isinstance(value, int)}
        record = {
            **told, "mlxchat": __version__, "began": began, "ended": now(), "complete": not tally.missing,
            "counts": {"questions": len(order.questions), **counts, "asked": collected.asked,
                       "known": len(every) - len(missing), "failed": len(collected.failed)},
            "tokens": asdict(tally.usage), "prices": asdict(order.prices), "cost": order.prices.of(tally.usage),
            "tokens_now": asdict(collected.usage), "cost_now": order.prices.of(collected.usage),
            "unanswered_cost_now": collected.unanswered_cost,
        }  # fmt: skip
        hidden = redact(record)
        return _without(hidden, order.key) if order.key else hidden

    nothing: DataError | None = None
    try:
        write_mixture(order.out, choose_answers(order.questions, keys, answers, order.choice, tally), describe)
        _report(order, tally, collected, len(every) - len(missing), answers)
    except DataError as error:
        nothing = error
    if collected.fault is not None:
        raise collected.fault
    if stopped:
        raise Interrupted(
            f"stopped: {tally.missing:,} answers are missing. The same command asks for these alone.", stopped[0]
        )
    if nothing is not None:
        shown = list(collected.failed.values())[:_MOST_SHOWN]
        reasons = [tally.describe(), *shown, *_tell_money(order, collected)]
        raise DataError("\n".join([f"{nothing}: {reasons[0] or 'no question was answered'}", *reasons[1:]]))
    return 1 if collected.failed else 0


async def _collect(order: Order, answers: Answers, missing: list[Request], known: int, stopped: list[int]) -> Collected:
    limits = order.limits
    async with Teacher(
        order.teacher, order.key, timeout_seconds=order.timeout_seconds, concurrency=limits.concurrency
    ) as teacher:
        teacher.fingerprint = order.fingerprint
        collector = Collector(teacher, answers, limits, order.prices, order.ledger)

        def request_stop(number: int) -> None:
            stopped.append(number)
            collector.stop()

        with Progress("distill", known + len(missing), "answers", start=known) as progress:

            def announce() -> None:
                progress.note("stopping: waits for the answers under way; again to leave at once, nothing is lost")

            with stop_on_signals(request_stop, announce):
                return await collector.run(missing, progress, known)


def _report(order: Order, tally: Tally, collected: Collected, known: int, answers: Answers) -> None:
    """Print what came of it, and the command that trains on it."""
    left_out = tally.describe()
    print(f"{order.out}: {tally.kept:,} conversations of {len(order.questions):,} questions"
          + (f" ({left_out})" if left_out else ""))  # fmt: skip
    if order.choice.only_correct and tally.judged:
        print(f"  right    {1 - tally.wrong / tally.judged:.1%} of {tally.judged:,} judged answers")
    rate = (
        f" in {format_seconds(collected.seconds)}, {collected.asked / collected.seconds:.3g}/s"
        if collected.asked
        else ""
    )
    print(f"  answers  {collected.asked:,} asked{rate}, {known:,} known before"
          + (f", {len(collected.failed):,} failed" if collected.failed else ""))  # fmt: skip
    print(f"  tokens   {_told(order.prices, collected.usage)}" + (
        f"; of all answers {_told(order.prices, tally.usage)}" if known else ""))  # fmt: skip
    print(f"  teacher  {one_line(order.model)} at {public_url(order.teacher)}, see {provenance_place(order.out)}")
    if answers.num_damaged:
        print(f"  {answers.num_damaged:,} damaged lines of {answers.path} counted for nothing")
    for reason in list(collected.failed.values())[:_MOST_SHOWN]:
        print(f"  failed   {reason}")
    if collected.failed:
        print("  The same command asks for these again.")
    for line in _tell_money(order, collected):
        print(f"  {line}")
    print(f"Train on it:\n  mlxchat {next_setting(order)}")


def _tell_money(order: Order, collected: Collected) -> Iterator[str]:
    if collected.unanswered_cost:
        yield f"cut      cost {collected.unanswered_cost:.4f} counted for requests without an answer (may be billed)"
    if collected.out_of_money:
        yield (
            f"stopped at --max-cost {order.limits.max_cost:g}: {collected.spent:.4f} is spent, "
            f"{collected.spent_before:.4f} of it by earlier runs ({order.ledger}). With a larger one the same command "
            "goes on"
        )


def next_setting(order: Order) -> str:
    """Return the setting that puts the file into SFT's mixture, quoted for a shell and for Hydra."""
    path = str(order.out)
    plain = all(char.isalnum() or char in "._-/" for char in path)
    if not plain:
        path = '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'
    first = [next(str(m["content"]) for m in question.messages if m["role"] == "user") for question in order.questions]
    # The task jsonl holds conversations out by their first user message; of very few it may hold out all.
    trained = any(not held_out(f"jsonl/{text}", _HELD_OUT_FRAC) for text in first)
    options = "" if trained else ", options: {held_out_frac: 0}"
    setting = f"+sft.mixture.teacher={{task: jsonl, path: {path}{options}}}"
    return "'" + setting.replace("'", "'\\''") + "'"


def _told(prices: Prices, usage: Usage) -> str:
    cost = prices.of(usage)
    told = f"{format_count(usage.input)} + {format_count(usage.output)}" + (
        "" if cost is None else f", cost {cost:.4f}"
    )
    return told + (f" (not told for {usage.unknown:,} answers)" if usage.unknown else "")


def _without(value: Any, key: str) -> Any:
    """Return plain nested data in which a key of any name is hidden."""
    if isinstance(value, str):
        return value.replace(key, "<key>")
    if isinstance(value, dict):
        return {name: _without(item, key) for name, item in value.items()}
    return [_without(item, key) for item in value] if isinstance(value, list) else value
