"""One run of `mlxchat distill`: choose the questions, keep the usable answers, write the file."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlxchat import __version__
from mlxchat.config.secrets import redact
from mlxchat.config.wording import format_count, format_seconds
from mlxchat.distill.answers import Answer, Answers, public_url, request_key
from mlxchat.distill.collect import Collected, Collector, Limits, Request
from mlxchat.distill.cost import Prices, Usage, most_tokens
from mlxchat.distill.questions import Message, Question, clean, one_line
from mlxchat.distill.teacher import Failed, Teacher
from mlxchat.errors import ConfigError, DataError, Interrupted, PassingError, StoreError
from mlxchat.hub.cache import read_json
from mlxchat.runner.process import stop_on_signals
from mlxchat.runner.progress import Progress
from mlxchat.store.files import now, sync, write_whole
from mlxchat.store.fingerprint import hash_file
from mlxchat.tasks.base import held_out

_MOST_SHOWN = 5
_IDENTITY_SECONDS = 20.0
_HELD_OUT_FRAC = 0.1  # of the task jsonl
# Finish reasons of an answer that was not finished.
_CUT = ("length", "content_filter")
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


@dataclass(kw_only=True)
class Order:
    """The settings of a run."""

    teacher: str
    """Address of the endpoint, without the route."""
    key: str | None
    """For it; never written down."""
    model: str
    questions: Sequence[Question]
    source: dict[str, Any]
    """Where the questions come from, for the provenance."""
    system: str | None = None
    """System prompt of each request; it is not part of the conversations that are written."""
    samples: int = 1
    """Answers to each question."""
    body: dict[str, Any] = field(default_factory=dict)
    """Further fields of each request. A seed is that of the first sample; the next ones count on."""
    limits: Limits = field(default_factory=Limits)
    timeout_seconds: float = 300.0
    prices: Prices = field(default_factory=Prices)
    only_correct: bool = False
    keep_cut: bool = False
    """Whether answers that max_tokens cut are kept."""
    out: Path
    cache: Path
    refresh: bool = False
    """Whether kept answers are asked again."""
    fingerprint: str | None = None
    """Of the model behind the name, if the endpoint sends it; found by `_open_answers`."""

    @property
    def ledger(self) -> Path:
        """The file beside the output with the costs of all its runs that have a limit."""
        return self.out.with_name(f"{self.out.name.removesuffix('.jsonl')}.costs.log")

    def requests(self) -> list[list[Request]]:
        """Return the requests of each question, one for each sample."""
        return [[self._request(question, sample) for sample in range(self.samples)] for question in self.questions]

    def _request(self, question: Question, sample: int) -> Request:
        messages = _with_system(question.asked(), self.system)
        body: dict[str, Any] = {"model": self.model, "messages": messages, **self.body}
        if isinstance(body.get("seed"), int):
            body["seed"] += sample
        return Request(key=request_key(self.teacher, body, sample, self.fingerprint), name=question.name, body=body)

    def describe(self) -> dict[str, Any]:
        """Return the settings for the provenance, without secrets."""
        return {
            "teacher": {"url": public_url(self.teacher), "model": self.model, "fingerprint": self.fingerprint},
            "questions": self.source,
            "sampling": {"system": self.system, "samples": self.samples, "body": self.body},
            "kept": {"only_correct": self.only_correct, "cut": self.keep_cut},
        }


@dataclass
class Tally:
    """How many answers were kept and left out."""

    kept: int = 0
    missing: int = 0
    """Not answered."""
    empty: int = 0
    cut: int = 0
    wrong: int = 0
    repeated: int = 0
    """Equal to an earlier answer to the same question."""
    judged: int = 0
    usage: Usage = field(default_factory=Usage)
    """Of all answers that there are."""
    models: set[str] = field(default_factory=set)
    """Names that the teacher gives itself."""

    def describe(self) -> str:
        """Return what was left out, for people; empty: nothing."""
        counts = {
            "wrong": self.wrong, "cut off": self.cut, "empty": self.empty, "the same again": self.repeated,
            "not answered": self.missing,
        }  # fmt: skip
        return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


async def find_model(base: str, key: str | None, timeout_seconds: float) -> str:
    """Return the name of a teacher's only model.

    Raises:
        ConfigError: it has several or none, or does not list them.
        PassingError: it does not answer.
    """
    async with Teacher(base, key, timeout_seconds=timeout_seconds, concurrency=1) as teacher:
        try:
            names = await teacher.models()
        except Failed as error:
            if error.retry:
                raise PassingError(f"{public_url(base)} does not answer: {error}") from None
            raise ConfigError(f"--model is missing, and {public_url(base)} names none: {error}") from None
    if len(names) == 1:
        return names[0]
    told = ", ".join(one_line(name, 80) for name in names[:20]) or "none"
    raise ConfigError(f"--model is missing; {public_url(base)} has {told}")


def estimate(order: Order) -> str:
    """Return what a run would ask and the most that it can cost, for people; nothing is asked."""
    answers = _open_answers(order)
    missing = [each for samples in order.requests() for each in samples if each.key not in answers]
    total = Usage()
    for request in missing:
        total.add(most_tokens(request.body, order.limits.max_tokens))
    cost = order.prices.of(total)
    count = len(order.questions) * order.samples
    return (
        f"{len(order.questions):,} questions, {count:,} answers, {count - len(missing):,} of them known, "
        f"{len(missing):,} to ask: at most {format_count(total.input)} + {format_count(total.output)} tokens"
        + ("" if cost is None else f", cost at most {cost:.4f}")
    )


def distill(order: Order) -> int:
    """Ask what has no answer yet, write the file and print a summary; return the exit code.

    Raises:
        MlxchatError: the teacher refuses or does not answer, or the disk fails. Answers so far are kept, and written
            if there are any.
        Interrupted: a signal stopped the run.
    """
    began = now()
    answers = _open_answers(order)
    requests = order.requests()
    every = {request.key: request for samples in requests for request in samples}
    missing = [request for key, request in every.items() if key not in answers]
    known = len(every) - len(missing)
    stopped: list[int] = []
    collected = Collected()
    if missing:
        collected = asyncio.run(_collect(order, answers, missing, known, stopped))
    tally = Tally()
    lines = [_line_of(conversation) for conversation in _choose(order, requests, answers, tally)]
    if lines:
        counts = {name: value for name, value in asdict(tally).items() if isinstance(value, int)}
        record = {
            **order.describe(), "models": sorted(one_line(model) for model in tally.models),
            "mlxchat": __version__, "began": began, "ended": now(), "complete": not tally.missing,
            "counts": {"questions": len(order.questions), **counts, "asked": collected.asked,
                       "known": known, "failed": len(collected.failed)},
            "tokens": asdict(tally.usage), "prices": asdict(order.prices), "cost": order.prices.of(tally.usage),
            "tokens_now": asdict(collected.usage), "cost_now": order.prices.of(collected.usage),
            "unanswered_cost_now": collected.unanswered_cost,
        }  # fmt: skip
        _write(order, b"".join(lines), record)
        _report(order, tally, collected, known, answers)
    if collected.fault is not None:
        raise collected.fault
    if stopped:
        raise Interrupted(
            f"stopped: {tally.missing:,} answers are missing. The same command asks for these alone.", stopped[0]
        )
    if not lines:
        reasons = [*list(collected.failed.values())[:_MOST_SHOWN], *_describe_costs(order, collected)]
        first = f"no answer is left, so {order.out} is not written: {tally.describe() or 'no question was answered'}"
        raise DataError("\n".join([first, *reasons]))
    return 1 if collected.failed else 0


def find_out_problems(out: Path) -> list[str]:
    """Return why a file must not be written, or be replaced."""
    if out.suffix != ".jsonl":
        return [f"--out is {out}, expected a file that ends in .jsonl"]
    if out.is_dir():
        return [f"--out: {out} is a folder"]
    if not out.absolute().parent.is_dir():
        return [f"--out: there is no folder {out.absolute().parent}"]
    if not out.exists():
        return []
    known = read_json(_provenance_place(out))
    ours = [known.get("sha256"), known.get("replaces")] if isinstance(known, dict) else []
    if hash_file(out) in ours:
        return []
    return [f"--out: {out} is there and is not as mlxchat distill left it. Move it away"]


def next_setting(order: Order) -> str:
    """Return the setting that puts the file into SFT's mixture, quoted for a shell and for Hydra."""
    path = str(order.out)
    if not all(char.isalnum() or char in "._-/" for char in path):
        path = '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'
    first = [next(str(m["content"]) for m in question.messages if m["role"] == "user") for question in order.questions]
    # The task jsonl holds conversations out by their first user message; of very few it may hold out all.
    trained = any(not held_out(f"jsonl/{text}", _HELD_OUT_FRAC) for text in first)
    options = "" if trained else ", options: {held_out_frac: 0}"
    setting = f"+sft.mixture.teacher={{task: jsonl, path: {path}{options}}}"
    return "'" + setting.replace("'", "'\\''") + "'"


def _open_answers(order: Order) -> Answers:
    """Find the model's fingerprint, and return its kept answers without those to ask again."""
    answers = Answers(order.cache, order.teacher, order.model)
    place = public_url(order.teacher)
    try:
        order.fingerprint = asyncio.run(_find_fingerprint(order))
    except Failed as error:
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


async def _collect(order: Order, answers: Answers, missing: list[Request], known: int, stopped: list[int]) -> Collected:
    async with Teacher(
        order.teacher, order.key, timeout_seconds=order.timeout_seconds, concurrency=order.limits.concurrency
    ) as teacher:
        teacher.fingerprint = order.fingerprint
        collector = Collector(teacher, answers, order.limits, order.prices, order.ledger)

        def request_stop(number: int) -> None:
            stopped.append(number)
            collector.stop()

        with Progress("distill", known + len(missing), "answers", start=known) as progress:

            def announce() -> None:
                progress.note("stopping: waits for the answers under way; again to leave at once, nothing is lost")

            with stop_on_signals(request_stop, announce):
                return await collector.run(missing, progress, known)


def _choose(
    order: Order, requests: Sequence[Sequence[Request]], answers: Answers, tally: Tally
) -> Iterator[dict[str, Any]]:
    """Yield a conversation for each answer that is kept, in the order of questions and samples; count in `tally`."""
    for question, samples in zip(order.questions, requests, strict=True):
        seen: set[str] = set()
        for request in samples:
            if request.key not in answers:
                tally.missing += 1
                continue
            answer = answers[request.key]
            tally.usage.add(answer.tokens)
            tally.models |= {answer.model} if answer.model else set()
            content = _content_of(answer)
            text = content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")
            mark = json.dumps(content)
            if not text.strip():
                tally.empty += 1
            elif answer.finish in _CUT and not order.keep_cut:
                tally.cut += 1
            elif mark in seen:
                tally.repeated += 1
            elif order.only_correct and not _is_right(question, text, tally):
                tally.wrong += 1
            else:
                tally.kept += 1
                yield {"messages": [*question.messages, {"role": "assistant", "content": content}]}
            seen.add(mark)


def _is_right(question: Question, text: str, tally: Tally) -> bool:
    assert question.judge is not None, "checked before anything was asked"
    tally.judged += 1
    return question.judge(text)


def _content_of(answer: Answer) -> str | list[dict[str, str]]:
    """Return an answer as a message's content, without the <think> … </think> that reasoning models begin with."""
    if answer.parts is not None:
        parts = [{"type": part["type"], "text": clean(part["text"])} for part in answer.parts]
        if any(part["type"] != "text" for part in parts):
            return parts
    return _THOUGHT.sub("", clean(answer.text), count=1).strip()


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    """Return messages that begin with a system prompt; one that is there already follows it in the same message."""
    if system is None:
        return messages
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{system}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages]


def _line_of(conversation: dict[str, Any]) -> bytes:
    """Return a conversation as a line of JSON, in which no reader finds another line end."""
    text = json.dumps(conversation, ensure_ascii=False).replace("\u2028", "\\u2028")
    return text.replace("\u2029", "\\u2029").replace("\x85", "\\u0085").encode("utf-8", "replace") + b"\n"


def _write(order: Order, data: bytes, record: dict[str, Any]) -> None:
    """Write the conversations and their provenance, each by one rename."""
    out = order.out
    try:
        replaces = hash_file(out) if out.exists() else None
        record = redact(record) | {"sha256": hashlib.sha256(data).hexdigest(), "replaces": replaces}
        if order.key:
            record = _without(record, order.key)
        # First, with both hashes: whichever of the two files a kill leaves there is recognised as ours.
        write_whole(_provenance_place(out), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        write_whole(out, data)
        sync(out.absolute().parent)
    except OSError as error:
        raise StoreError(
            f"{out} cannot be written ({error.strerror}). The answers are kept: mend that and run the command again."
        ) from None


def _provenance_place(out: Path) -> Path:
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.provenance.json")


def _report(order: Order, tally: Tally, collected: Collected, known: int, answers: Answers) -> None:
    """Print the summary, and the command that trains on the file."""
    left_out = tally.describe()
    print(f"{order.out}: {tally.kept:,} conversations of {len(order.questions):,} questions"
          + (f" ({left_out})" if left_out else ""))  # fmt: skip
    if tally.judged:
        print(f"  right    {1 - tally.wrong / tally.judged:.1%} of {tally.judged:,} judged answers")
    rate = (
        f" in {format_seconds(collected.seconds)}, {collected.asked / collected.seconds:.3g}/s"
        if collected.asked
        else ""
    )
    print(f"  answers  {collected.asked:,} asked{rate}, {known:,} known before"
          + (f", {len(collected.failed):,} failed" if collected.failed else ""))  # fmt: skip
    print(f"  tokens   {_format_usage(order.prices, collected.usage)}" + (
        f"; of all answers {_format_usage(order.prices, tally.usage)}" if known else ""))  # fmt: skip
    print(f"  teacher  {one_line(order.model)} at {public_url(order.teacher)}, see {_provenance_place(order.out)}")
    if answers.num_damaged:
        print(f"  {answers.num_damaged:,} damaged lines of {answers.path} counted for nothing")
    for reason in list(collected.failed.values())[:_MOST_SHOWN]:
        print(f"  failed   {reason}")
    if collected.failed:
        print("  The same command asks for these again.")
    for line in _describe_costs(order, collected):
        print(f"  {line}")
    print(f"Train on it:\n  mlxchat {next_setting(order)}")


def _describe_costs(order: Order, collected: Collected) -> Iterable[str]:
    if collected.unanswered_cost:
        yield f"cut      cost {collected.unanswered_cost:.4f} counted for requests without an answer (may be billed)"
    if collected.out_of_money:
        yield (
            f"stopped at --max-cost {order.limits.max_cost:g}: {collected.spent:.4f} is spent, "
            f"{collected.spent_before:.4f} of it by earlier runs ({order.ledger}). With a larger one the same command "
            "goes on"
        )


def _format_usage(prices: Prices, usage: Usage) -> str:
    cost = prices.of(usage)
    told = f"{format_count(usage.input)} + {format_count(usage.output)}"
    told += "" if cost is None else f", cost {cost:.4f}"
    return told + (f" (not told for {usage.unknown:,} answers)" if usage.unknown else "")


def _without(value: Any, key: str) -> Any:
    """Return plain nested data in which a key is hidden."""
    if isinstance(value, str):
        return value.replace(key, "<key>")
    if isinstance(value, dict):
        return {name: _without(item, key) for name, item in value.items()}
    return [_without(item, key) for item in value] if isinstance(value, list) else value
