"""One run of `mlxchat distill`: collect answers, filter them, write the file and its provenance."""

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
from mlxchat.distill.questions import Message, Question, clean, one_line, read_answered_conversation, read_verdict
from mlxchat.distill.teacher import Failed, Teacher
from mlxchat.errors import ConfigError, DataError, Interrupted, PassingError, StoreError
from mlxchat.hub.cache import read_json
from mlxchat.runner.process import stop_on_signals
from mlxchat.runner.progress import Progress
from mlxchat.store.files import now, sync, write_whole
from mlxchat.store.fingerprint import hash_file

_MOST_SHOWN = 5
_IDENTITY_SECONDS = 20.0
# Finish reasons of incomplete answers.
_CUT = ("length", "content_filter")
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


@dataclass(kw_only=True)
class Order:
    """The settings of a run."""

    teacher: str
    """Address of the endpoint, without the route."""
    key: str | None
    """API key of the endpoint; never written to disk."""
    model: str
    questions: Sequence[Question]
    source: dict[str, Any]
    """Origin of the questions, for the provenance."""
    system: str | None = None
    """System prompt of each request; not written to the conversations."""
    samples: int = 1
    """Answers to each question."""
    body: dict[str, Any] = field(default_factory=dict)
    """Further fields of each request. Sample number i gets seed + i."""
    limits: Limits = field(default_factory=Limits)
    timeout_seconds: float = 300.0
    prices: Prices = field(default_factory=Prices)
    only_correct: bool = False
    keep_cut: bool = False
    """Whether answers that max_tokens truncated are kept."""
    conversations: bool = False
    """Whether an answer is a whole conversation as JSON (`CONVERSATION_FORMAT`) instead of the next message."""
    out: Path
    cache: Path
    refresh: bool = False
    """Whether cached answers are replaced."""
    fingerprint: str | None = None
    """Of the model's weights, if the endpoint sends one; set by `_open_answers`."""

    @property
    def compares(self) -> bool:
        """Whether the teacher compares pairs of answers."""
        return any(question.answers is not None for question in self.questions)

    @property
    def ledger(self) -> Path:
        """The file beside the output that records the costs of its runs with --max-cost."""
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
            "conversations": self.conversations,
        }


@dataclass
class Tally:
    """Counts of answers kept and left out."""

    kept: int = 0
    missing: int = 0
    """Not answered."""
    empty: int = 0
    cut: int = 0
    wrong: int = 0
    invalid: int = 0
    """Not a conversation, with --conversations."""
    faults: list[str] = field(default_factory=list)
    """Of the invalid ones: question and reason."""
    repeated: int = 0
    """Equal to an earlier answer to the same question."""
    unclear: int = 0
    """Neither A, B nor tie, where answers are compared."""
    tied: int = 0
    preferred_first: int = 0
    """Verdicts for the answer shown first."""
    judged: int = 0
    usage: Usage = field(default_factory=Usage)
    """Of all answers, cached ones included."""
    models: set[str] = field(default_factory=set)
    """Model names in the responses."""

    def describe(self) -> str:
        """Return what was left out as text; empty if nothing was."""
        counts = {
            "wrong": self.wrong, "invalid": self.invalid, "truncated": self.cut, "empty": self.empty,
            "duplicate": self.repeated, "ties": self.tied, "without verdict": self.unclear,
            "not answered": self.missing,
        }  # fmt: skip
        return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


async def find_model(base: str, key: str | None, timeout_seconds: float) -> str:
    """Return the name of a teacher's only model.

    Raises:
        ConfigError: it has several models or none, or does not list them.
        PassingError: it does not answer.
    """
    async with Teacher(base, key, timeout_seconds=timeout_seconds, concurrency=1) as teacher:
        try:
            names = await teacher.models()
        except Failed as error:
            if error.retry:
                raise PassingError(f"{public_url(base)} does not answer: {error}") from None
            raise ConfigError(f"--model is missing, and {public_url(base)} lists none: {error}") from None
    if len(names) == 1:
        return names[0]
    listed = ", ".join(one_line(name, 80) for name in names[:20]) or "none"
    raise ConfigError(f"--model is missing; {public_url(base)} has {listed}")


def estimate(order: Order) -> str:
    """Return a text about the number of requests of a run and their maximum cost; no question is sent."""
    answers = _open_answers(order)
    missing = [each for samples in order.requests() for each in samples if each.key not in answers]
    total = Usage()
    for request in missing:
        total.add(most_tokens(request.body, order.limits.max_tokens))
    cost = order.prices.of(total)
    count = len(order.questions) * order.samples
    return (
        f"{len(order.questions):,} questions, {count:,} answers, {count - len(missing):,} of them cached, "
        f"{len(missing):,} to request: at most {format_count(total.input)} + {format_count(total.output)} tokens"
        + ("" if cost is None else f", cost at most {cost:.4f}")
    )


def distill(order: Order) -> int:
    """Collect the missing answers, write the file, print a summary and return the exit code.

    Raises:
        MlxchatError: the teacher refuses or does not answer, or the disk fails. The file is written from the answers
            so far, if there are any.
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
    chosen = list(_choose(order, requests, answers, tally))
    lines = [_line_of(conversation) for conversation in chosen]
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
        _report(order, tally, collected, known, answers, next_setting(order.out, chosen))
    if collected.fault is not None:
        raise collected.fault
    if stopped:
        raise Interrupted(
            f"stopped: {tally.missing:,} answers are missing. Run the same command to get them.", stopped[0]
        )
    if not lines:
        reasons = [*[*collected.failed.values(), *tally.faults][:_MOST_SHOWN], *_describe_costs(order, collected)]
        first = f"no usable answer, so {order.out} is not written: {tally.describe() or 'no question was answered'}"
        raise DataError("\n".join([first, *reasons]))
    return 1 if collected.failed else 0


def find_out_problems(out: Path) -> list[str]:
    """Return the reasons why a file must not be written or replaced."""
    if out.suffix != ".jsonl":
        return [f"--out is {out}, expected a file that ends in .jsonl"]
    if out.is_dir():
        return [f"--out: {out} is a folder"]
    if not out.absolute().parent.is_dir():
        return [f"--out: no folder {out.absolute().parent}"]
    if not out.exists():
        return []
    known = read_json(_provenance_place(out))
    ours = [known.get("sha256"), known.get("replaces")] if isinstance(known, dict) else []
    if hash_file(out) in ours:
        return []
    return [f"--out: {out} exists and was not written by mlxchat distill, or was changed since. Move it away"]


def next_setting(out: Path, conversations: Sequence[dict[str, Any]]) -> str:
    """Return the settings that train on the file of these conversations or pairs, quoted for shell and Hydra."""
    path = str(out)
    if not all(char.isalnum() or char in "._-/" for char in path):
        path = '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if "chosen" in conversations[0]:
        return "stage=preference " + _quote(f"preference.data.path={path}")
    return _quote(f"+sft.mixture.teacher={{task: jsonl, path: {path}}}")


def _quote(setting: str) -> str:
    return "'" + setting.replace("'", "'\\''") + "'"


def _open_answers(order: Order) -> Answers:
    """Set `order.fingerprint` and return the cached answers, without those that --refresh replaces."""
    answers = Answers(order.cache, order.teacher, order.model)
    place = public_url(order.teacher)
    try:
        order.fingerprint = asyncio.run(_find_fingerprint(order))
    except Failed as error:
        order.fingerprint = answers.fingerprint
        if order.fingerprint is not None:
            print(f"note: {place} does not answer ({error}); uses cached answers of its latest model", file=sys.stderr)
    else:
        if order.fingerprint is None:
            print(
                f"note: {place} sends no fingerprint of the weights of {one_line(order.model)!r}: all answers cached "
                "under that name are used. --refresh replaces them",
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
                progress.note("stopping after the requests in flight; press Ctrl-C again to stop now, nothing is lost")

            with stop_on_signals(request_stop, announce):
                return await collector.run(missing, progress, known)


def _choose(
    order: Order, requests: Sequence[Sequence[Request]], answers: Answers, tally: Tally
) -> Iterator[dict[str, Any]]:
    """Yield a conversation for each kept answer, in the order of questions and samples; update `tally`."""
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
            messages, fault = [*question.messages, {"role": "assistant", "content": content}], ""
            if order.conversations:
                messages, fault = read_answered_conversation(text)
            mark = json.dumps(messages)
            if not text.strip():
                tally.empty += 1
            elif answer.finish in _CUT and not order.keep_cut:
                tally.cut += 1
            elif fault:
                tally.invalid += 1
                tally.faults.append(f"{one_line(question.name)}: {fault}")
            elif mark in seen:
                tally.repeated += 1
            elif order.only_correct and not _is_right(question, text, tally):
                tally.wrong += 1
            elif question.answers is not None:
                yield from _pair_of(question, text, tally)
            else:
                tally.kept += 1
                yield {"messages": messages}
            seen.add(mark)


def _pair_of(question: Question, text: str, tally: Tally) -> Iterator[dict[str, Any]]:
    """Yield the pair that a judge's reply gives, if it prefers an answer; update `tally`."""
    verdict = read_verdict(text)
    tally.unclear += verdict is None
    tally.tied += verdict == "tie"
    if verdict in ("a", "b"):
        assert question.answers is not None
        tally.kept += 1
        tally.preferred_first += verdict == "a"
        chosen, rejected = question.answers if verdict == "a" else reversed(question.answers)
        yield {
            "prompt": question.messages,
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }


def _is_right(question: Question, text: str, tally: Tally) -> bool:
    assert question.judge is not None, "checked before the first request"
    tally.judged += 1
    return question.judge(text)


def _content_of(answer: Answer) -> str | list[dict[str, str]]:
    """Return an answer as a message's content, without the leading <think> … </think> of reasoning models."""
    if answer.parts is not None:
        parts = [{"type": part["type"], "text": clean(part["text"])} for part in answer.parts]
        if any(part["type"] != "text" for part in parts):
            return parts
    return _THOUGHT.sub("", clean(answer.text), count=1).strip()


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    """Return the messages with a system prompt in front; an existing one is appended to it."""
    if system is None:
        return messages
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{system}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages]


def _line_of(conversation: dict[str, Any]) -> bytes:
    """Return a conversation as one line of JSON with Unicode line separators escaped."""
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
        # First, with both hashes: after a kill between the two writes, the old file is still recognised as ours.
        write_whole(_provenance_place(out), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        write_whole(out, data)
        sync(out.absolute().parent)
    except OSError as error:
        raise StoreError(
            f"{out} cannot be written ({error.strerror}). The answers are cached: run the same command again."
        ) from None


def _provenance_place(out: Path) -> Path:
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.provenance.json")


def _report(order: Order, tally: Tally, collected: Collected, known: int, answers: Answers, setting: str) -> None:
    """Print a summary and the command that trains on the file."""
    left_out = tally.describe()
    what = ("pairs", "comparisons") if order.compares else ("conversations", "questions")
    print(f"{order.out}: {tally.kept:,} {what[0]} of {len(order.questions):,} {what[1]}"
          + (f" ({left_out})" if left_out else ""))  # fmt: skip
    if tally.judged:
        print(f"  right    {1 - tally.wrong / tally.judged:.1%} of {tally.judged:,} judged answers")
    rate = (
        f" in {format_seconds(collected.seconds)}, {collected.asked / collected.seconds:.3g}/s"
        if collected.asked
        else ""
    )
    if order.compares:
        print(f"  order    the answer shown first is preferred in {tally.preferred_first / tally.kept:.1%} of pairs")
    print(f"  answers  {collected.asked:,} new{rate}, {known:,} cached"
          + (f", {len(collected.failed):,} failed" if collected.failed else ""))  # fmt: skip
    print(f"  tokens   {_format_usage(order.prices, collected.usage)}" + (
        f"; of all answers {_format_usage(order.prices, tally.usage)}" if known else ""))  # fmt: skip
    print(f"  teacher  {one_line(order.model)} at {public_url(order.teacher)}, see {_provenance_place(order.out)}")
    if answers.num_damaged:
        print(f"  skipped  {answers.num_damaged:,} damaged lines of {answers.path}")
    for reason in list(collected.failed.values())[:_MOST_SHOWN]:
        print(f"  failed   {reason}")
    if collected.failed:
        print("  Run the same command to retry them.")
    for reason in tally.faults[:_MOST_SHOWN]:
        print(f"  invalid  {reason}")
    for line in _describe_costs(order, collected):
        print(f"  {line}")
    print(f"Train on it:\n  mlxchat {setting}")


def _describe_costs(order: Order, collected: Collected) -> Iterable[str]:
    if collected.unanswered_cost:
        yield f"unanswered requests count with {collected.unanswered_cost:.4f}, since they may be billed"
    if collected.out_of_money:
        yield (
            f"stopped at --max-cost {order.limits.max_cost:g}: {collected.spent:.4f} is spent, "
            f"{collected.spent_before:.4f} of it by earlier runs ({order.ledger}). Raise it to continue"
        )


def _format_usage(prices: Prices, usage: Usage) -> str:
    cost = prices.of(usage)
    text = f"{format_count(usage.input)} + {format_count(usage.output)}"
    text += "" if cost is None else f", cost {cost:.4f}"
    return text + (f" ({usage.unknown:,} answers without token counts)" if usage.unknown else "")


def _without(value: Any, key: str) -> Any:
    """Return nested plain data with the key replaced by <key>."""
    if isinstance(value, str):
        return value.replace(key, "<key>")
    if isinstance(value, dict):
        return {name: _without(item, key) for name, item in value.items()}
    return [_without(item, key) for item in value] if isinstance(value, list) else value
