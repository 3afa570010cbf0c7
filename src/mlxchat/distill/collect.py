"""One run of `mlxchat distill`: read questions, collect missing answers, choose, write the file and its provenance.

Questions come from a file or a task; reference answers are removed.
"""

import asyncio
import hashlib
import json
import math
import re
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import openai

from mlxchat import __version__
from mlxchat.config.schema import TaskItem
from mlxchat.distill.teacher import Answer, Answers, Failed, Prices, ask, connect, most_tokens, one_line, public_url
from mlxchat.errors import DataError, Interrupted, MlxchatError, PassingError, StoreError
from mlxchat.runner.process import Progress, stop_on_signals
from mlxchat.store.files import now, write_whole
from mlxchat.store.fingerprint import canonical_json
from mlxchat.tasks import load_item
from mlxchat.tasks.base import Conversation, answer_text, is_answer
from mlxchat.tasks.jsonl import parse_conversation, read_conversations

_MOST_SHOWN = 5
# This many refusals without any answer end the run: every request has the same fault.
_REFUSALS = 5
# Finish reasons of incomplete answers.
_CUT = ("length", "content_filter")
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


# Control characters except tab and newline, and lone surrogates.
_UNFIT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
Message = dict[str, Any]


def _object(**properties: Any) -> dict[str, Any]:
    """Return the JSON Schema of an object with these properties and no others."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


_MESSAGE = _object(role={"type": "string", "enum": ["user", "assistant"]}, content={"type": "string"})
_SCHEMA = _object(messages={"type": "array", "items": _MESSAGE})
CONVERSATION_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "conversation", "strict": True, "schema": _SCHEMA},
}
"""Field response_format of a request for a whole conversation, as in nanochat's dev/gen_synthetic_data.py."""


@dataclass(frozen=True)
class Question:
    """A conversation that ends with the user's message."""

    messages: list[Message]  # an optional system message, then user and assistant alternately
    name: str  # for messages: file and number, or task and number
    judge: Callable[[str], bool] | None = None  # returns True for a right answer; None: there is no reference answer

    def asked(self, system: str | None = None) -> list[Message]:
        """Return the messages in OpenAI's format, after a system prompt: contents made of parts become plain text."""
        asked = [{"role": each["role"], "content": _text_of(each["content"])} for each in self.messages]
        if system is not None and asked[0]["role"] == "system":
            system = f"{system}\n\n{asked.pop(0)['content']}"
        return asked if system is None else [{"role": "system", "content": system}, *asked]


def questions_of_task(item: TaskItem, limit: int | None = None) -> list[Question]:
    """Return the first `limit` questions of a task; its data are downloaded if necessary."""
    task = load_item(item)
    task.fetch()
    questions = []
    for index in range(len(task))[:limit]:
        conversation = task[index]
        judge = partial(task.evaluate, conversation)
        questions.append(_question(conversation, f"{item.task} conversation {index}", judge))
    return _distinct(questions)


def questions_of_file(path: Path) -> list[Question]:
    """Return the questions of a .txt file (one per line) or a .jsonl file; empty lines are skipped."""
    if path.suffix == ".jsonl":
        conversations = list(read_conversations(path, ends_answered=False, least=1))
    else:
        try:
            lines = path.read_bytes().decode("utf-8").split("\n")  # splitlines would also split at U+2028
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as UTF-8 text ({error}).") from None
        conversations = [{"messages": [{"role": "user", "content": line.strip()}]} for line in lines if line.strip()]
    if not conversations:
        raise DataError(f"{path} has no questions. Expected one on each line.")
    questions = []
    for number, conversation in enumerate(conversations, start=1):
        answered = conversation["messages"][-1]["role"] == "assistant"
        judge = partial(is_answer, conversation) if answered else None
        questions.append(_question(conversation, f"{path.name} question {number}", judge))
    return _distinct(questions)


def _text_of(content: Any) -> str:
    return clean(answer_text({"messages": [{"role": "assistant", "content": content}]}))


def _question(conversation: Conversation, name: str, judge: Callable[[str], bool] | None) -> Question:
    messages = [dict(message) for message in conversation["messages"]]
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        raise DataError(f"{name} has no user message")
    for message in messages:
        if message["role"] != "assistant":
            message["content"] = clean(message["content"])
    return Question(messages, name, judge)


def _distinct(questions: Sequence[Question]) -> list[Question]:
    return list({json.dumps(question.asked()): question for question in reversed(questions)}.values())[::-1]


def read_answered_conversation(text: str) -> tuple[list[Message], str]:
    """Return the messages of a conversation that a teacher wrote as JSON, and "" or the fault if it is not valid.

    User and assistant alternate; the user is first, the assistant last; contents are cleaned text, none is empty.
    """

    def cleaned(message: dict[str, Any]) -> dict[str, Any]:
        return {name: clean(value).strip() if isinstance(value, str) else value for name, value in message.items()}

    try:
        value = json.loads(text, object_hook=cleaned)
        messages = value.get("messages") if isinstance(value, dict) else value
        messages = parse_conversation({"messages": messages})["messages"]
    except json.JSONDecodeError as error:
        return [], f"not JSON ({error.msg} at character {error.pos})"
    except ValueError as error:
        return [], one_line(str(error))
    if messages[0]["role"] == "system":
        return [], 'message 1 is from "system", expected "user"'
    if not all(isinstance(message["content"], str) for message in messages):
        return [], "content of an assistant message is not text"
    return messages, ""


def clean(text: str) -> str:
    r"""Return a text without control characters and lone surrogates, with \n as its only line end.

    Special tokens of a chat format (<|assistant_end|>) stay: rendering encodes them as ordinary text.
    """
    return _UNFIT.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


@dataclass(frozen=True)
class Request:
    """One chat request."""

    question: Question
    body: dict[str, Any]
    key: str  # of the cache: a hash of endpoint, body and the index among several answers to the question


@dataclass(kw_only=True)
class Order:
    """The settings of a run."""

    teacher: str  # address of the endpoint, without the route
    key: str | None  # API key of the endpoint; never written to disk
    model: str
    questions: Sequence[Question]
    source: dict[str, Any]  # origin of the questions, for the provenance
    system: str | None  # system prompt of each request; not written to the conversations
    samples: int  # answers to each question
    body: dict[str, Any]  # further fields of each request. Sample number i gets seed + i
    max_tokens: int  # maximum length of an answer, whichever field of the request sets it
    concurrency: int
    timeout_seconds: float
    prices: Prices
    max_cost: float | None
    only_correct: bool
    conversations: bool
    """Whether an answer is a whole conversation as JSON (`CONVERSATION_FORMAT`) instead of the next message."""
    out: Path
    cache: Path

    def requests(self) -> list[Request]:
        """Return the requests in the order of questions and samples."""
        requests = []
        for question in self.questions:
            for sample in range(self.samples):
                body: dict[str, Any] = {"model": self.model, "messages": question.asked(self.system), **self.body}
                if isinstance(body.get("seed"), int):
                    body["seed"] += sample
                asked = canonical_json({"url": self.teacher, "body": body, "sample": sample})
                requests.append(Request(question, body, hashlib.sha256(asked.encode()).hexdigest()))
        return requests


def distill(order: Order, *, dry_run: bool) -> int:
    """Collect the missing answers, write the file, print a summary and return the exit code.

    If the teacher refuses, the disk fails or a signal stops the run, the file of the answers so far is written first.
    """
    answers = Answers(order.cache, order.teacher, order.model)
    requests = order.requests()
    missing = [request for request in requests if request.key not in answers.known]
    bounds = [most_tokens(request.body, order.max_tokens) for request in missing]
    most = order.prices.describe(sum(given for given, _ in bounds), sum(taken for _, taken in bounds))
    known = len(requests) - len(missing)
    print(f"{len(requests):,} answers: {known:,} cached, {len(missing):,} to request, at most {most}")
    if dry_run:
        return 0
    collector = Collector(order, answers)
    if missing:
        asyncio.run(collector.run(missing))
    chosen = Chosen(order, requests, answers)
    if chosen.lines:
        _write(order, chosen, {"cached": known, "asked": collector.asked, "failed": len(collector.failed)})
        _report(order, chosen, [f"{collector.asked:,} new, {known:,} cached", *collector.notes()])
    if collector.fault is not None:
        raise collector.fault
    if collector.signals:
        text = f"stopped: {chosen.counts['not answered']:,} answers are missing. Run the same command to get them."
        raise Interrupted(text, collector.signals[0])
    if not chosen.lines:
        first = f"no usable answer, so {order.out} is not written: {chosen.left_out()}"
        raise DataError("\n".join([first, *collector.notes(), *chosen.faults[:_MOST_SHOWN]]))
    return 1 if collector.failed else 0


class Collector:
    """Sends requests to the teacher in parallel, within the limits of rate and cost, and stores the answers."""

    def __init__(self, order: Order, answers: Answers) -> None:
        """Send nothing yet."""
        self._order, self._answers = order, answers
        self.asked = 0  # answers received in this run
        self.failed: list[str] = []  # question and reason of each
        self.fault: MlxchatError | None = None  # the error that ended the run
        self.signals: list[int] = []
        # Failed requests and answers without token counts count at their upper bound, since they may be billed.
        self._spent = 0.0
        self._reserved: list[float] = []  # upper bounds of the costs of requests in flight
        self._is_out_of_money = False
        self._queue: deque[Request] = deque()
        self._stopped = asyncio.Event()

    async def run(self, requests: Sequence[Request]) -> None:
        """Send the requests in order; after a signal or a fault of all requests, only await those in flight."""
        order = self._order
        loop = asyncio.get_running_loop()
        self._queue.extend(requests)

        def request_stop(number: int) -> None:
            self.signals.append(number)
            loop.call_soon_threadsafe(self._stopped.set)

        text = "stopping after the requests in flight; press Ctrl-C again to stop now"
        with (
            Progress("distill", len(requests), "answers") as progress,
            stop_on_signals(request_stop, lambda: progress.note(text)),
        ):
            async with connect(order.teacher, order.key, order.timeout_seconds) as client:
                await asyncio.gather(*(self._work(client, progress) for _ in range(order.concurrency)))

    async def _work(self, client: openai.AsyncOpenAI, progress: Progress) -> None:
        """Send requests until none is left, the run stops, or the next one does not fit the cost limit."""
        order = self._order
        while self._queue and not self._stopped.is_set():
            most = most_tokens(self._queue[0].body, order.max_tokens)
            most_cost = order.prices.of(*most) or 0.0
            if order.max_cost is not None and math.fsum([self._spent, most_cost, *self._reserved]) > order.max_cost:
                # The other workers go on: an answer frees a part of what is reserved for it.
                self._is_out_of_money = not self._reserved
                return
            request = self._queue.popleft()
            self._reserved.append(most_cost)
            tokens = await self._ask(client, request)
            self._spent += order.prices.of(*(tokens or most)) or 0.0
            self._reserved.remove(most_cost)
            progress.update(self.asked, cost=f"{self._spent:.4f}" if self._spent else "")

    async def _ask(self, client: openai.AsyncOpenAI, request: Request) -> tuple[int, int] | None:
        """Store the answer to a request and return its (input, output) tokens; None if they are unknown."""
        asked_before = self.asked
        try:
            answer = await ask(client, request.body)
            self.asked += 1
            self._answers.add(request.key, answer)
            return answer.tokens
        except StoreError as error:
            self._end(error)
        except Failed as error:
            self.failed.append(f"{one_line(request.question.name)}: {error}")
            if error.passing and self.asked == asked_before:
                self._end(PassingError(f"the teacher does not answer now: {error}"))
            elif error.for_all or (not self.asked and len(self.failed) >= _REFUSALS):
                self._end(MlxchatError(f"the teacher refuses: {error}"))
        return None

    def _end(self, fault: MlxchatError) -> None:
        self.fault = self.fault or fault
        self._stopped.set()

    def notes(self) -> list[str]:
        """Return lines about failures and a cost limit that was reached."""
        notes = [f"failed: {reason}" for reason in self.failed[:_MOST_SHOWN]]
        if len(self.failed) > _MOST_SHOWN:
            notes.append(f"and {len(self.failed) - _MOST_SHOWN:,} more")
        if self._is_out_of_money:
            limit = f"--max-cost {self._order.max_cost:g}"
            notes.append(f"stopped at {limit}: {self._spent:.4f} is spent. Raise it to continue")
        return notes


class Chosen:
    """The answers that are kept, as lines of the file in the order of the requests, and what was left out."""

    def __init__(self, order: Order, requests: Sequence[Request], answers: Answers) -> None:
        """Choose among the stored answers."""
        self._order = order
        self.lines: list[str] = []
        self.counts: Counter[str] = Counter()  # reason → answers left out for it
        self.faults: list[str] = []  # question and reason of the answers that are no conversation, with --conversations
        self.tokens = (0, 0)  # input and output tokens of all answers, cached ones included
        self.models: set[str] = set()  # model names in the responses
        seen: set[str] = set()
        for request in requests:
            if request.key not in answers.known:
                self.counts["not answered"] += 1
                continue
            answer = answers.known[request.key]
            given, taken = answer.tokens or (0, 0)
            self.tokens = (self.tokens[0] + given, self.tokens[1] + taken)
            self.models.add(answer.model or order.model)
            messages, reason = self._judge(request.question, answer)
            line = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
            mark = f"{request.question.name} {line}"
            if reason is None and mark in seen:
                reason = "duplicate"
            if reason is None:
                self.lines.append(line)
                seen.add(mark)
            else:
                self.counts[reason] += 1

    def _judge(self, question: Question, answer: Answer) -> tuple[list[Message], str | None]:
        """Return the conversation that an answer gives, and why it is left out; None: it is kept."""
        content = _content_of(answer)
        text = content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")
        messages = [*question.messages, {"role": "assistant", "content": content}]
        if not text.strip():
            return messages, "empty"
        if answer.finish in _CUT:
            return messages, "truncated"
        if self._order.conversations:
            messages, fault = read_answered_conversation(text)
            if fault:
                self.faults.append(f"invalid: {one_line(question.name)}: {fault}")
                return messages, "invalid"
        if self._order.only_correct and question.judge is not None and not question.judge(text):
            return messages, "wrong"
        return messages, None

    def left_out(self) -> str:
        """Return what was left out as text; empty if nothing was."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.counts.items())


def _content_of(answer: Answer) -> str | list[dict[str, str]]:
    """Return an answer as a message's content, without the leading <think> … </think> of reasoning models."""
    if answer.parts is not None and any(part["type"] != "text" for part in answer.parts):
        return [{"type": part["type"], "text": clean(part["text"])} for part in answer.parts]
    return _THOUGHT.sub("", clean(answer.text), count=1).strip()


def provenance_place(out: Path) -> Path:
    """Return the path of the record beside a file of answers."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.provenance.json")


def _write(order: Order, chosen: Chosen, counts: dict[str, int]) -> None:
    data = "".join(chosen.lines).encode()
    record = {
        "mlxchat": __version__, "teacher": {"url": public_url(order.teacher), "model": order.model},
        "models": sorted(one_line(model) for model in chosen.models), "questions": order.source,
        "sampling": {"system": order.system, "samples": order.samples, "body": order.body},
        "kept": {"only_correct": order.only_correct, "conversations": order.conversations}, "written": now(),
        "complete": not chosen.counts["not answered"], "counts": {"kept": len(chosen.lines), **chosen.counts, **counts},
        "tokens": chosen.tokens, "prices": asdict(order.prices), "cost": order.prices.of(*chosen.tokens),
        "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    try:
        write_whole(order.out, data)
        write_whole(provenance_place(order.out), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        again = "The answers are cached: run the same command again."
        raise StoreError(f"{order.out} cannot be written ({error.strerror}). {again}") from None


def _report(order: Order, chosen: Chosen, notes: Sequence[str]) -> None:
    left_out = f" ({chosen.left_out()})" if chosen.left_out() else ""
    print(f"{order.out}: {len(chosen.lines):,} conversations of {len(order.questions):,} questions{left_out}")
    print(f"  {order.prices.describe(*chosen.tokens)}; see {provenance_place(order.out)}")
    for note in [*notes, *chosen.faults[:_MOST_SHOWN]]:
        print(f"  {note}")
    print(f"Train on it:\n  mlxchat '+sft.mixture.teacher={{task: jsonl, path: {order.out}}}'")
