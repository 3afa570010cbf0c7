"""A teacher behind an OpenAI-compatible endpoint: its answers, their cache, and what they cost.

`openai.AsyncOpenAI` does the HTTP and retries transient failures, waiting as long as Retry-After says.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import openai

from mlxchat.config.wording import format_count
from mlxchat.errors import ConfigError, PassingError, StoreError, visible
from mlxchat.store.files import Records

RETRIES = 6  # further attempts after a transient failure: 408, 409, 429, 5xx, timeouts, connections that fail or end
# Statuses caused by one question; other refusals apply to all requests.
_OF_THE_QUESTION = (400, 413, 415, 422, 451)
# openai's errors, and those of reading what an endpoint sends, which openai does not check.
_FAULTS = (openai.APIError, ValueError, TypeError, AttributeError, LookupError)
# Estimated tokens that a chat format adds around each message, and before the first one.
_MESSAGE_TOKENS = 16
_FORMAT_TOKENS = 64


class Failed(Exception):
    """A request without an answer, after all retries."""

    def __init__(self, reason: str, *, passing: bool = False, for_all: bool = False) -> None:
        """`passing`: the same request may succeed later. `for_all`: no other request can succeed either."""
        super().__init__(reason)
        self.passing, self.for_all = passing, for_all


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A teacher's answer to one request."""

    text: str
    parts: list[dict[str, str]] | None = None
    """Text and calculator calls, if the teacher separates them (mlxchat serve)."""
    finish: str | None = None  # the finish reason: stop, length, …
    tokens: tuple[int, int] | None = None  # input and output tokens, as the teacher counts them; None: unknown
    model: str | None = None  # the model's name in the response


@dataclass(frozen=True)
class Prices:
    """Prices of a million tokens, in any currency; None: unknown."""

    input: float | None = None
    output: float | None = None

    def of(self, given: int, taken: int) -> float | None:
        """Return what these input and output tokens cost, None if a price is unknown."""
        if self.input is None or self.output is None:
            return None
        return (given * self.input + taken * self.output) / 1e6

    def describe(self, given: int, taken: int) -> str:
        """Return input and output tokens, and their cost if the prices are known, as text."""
        cost = self.of(given, taken)
        return f"{format_count(given)} + {format_count(taken)} tokens" + ("" if cost is None else f", cost {cost:.4f}")


def connect(base: str, key: str | None, timeout_seconds: float) -> openai.AsyncOpenAI:
    """Return a client without a connection. `base` may have a query; `key` is sent as a bearer token."""
    return openai.AsyncOpenAI(
        base_url=public_url(base),
        default_query=dict(parse_qsl(urlsplit(base).query)),
        api_key=key or "<no key>",
        max_retries=RETRIES,
        timeout=timeout_seconds,
    )


async def ask(client: openai.AsyncOpenAI, body: dict[str, Any]) -> Answer:
    """Return the answer to a chat request. Raises Failed."""
    further = {name: value for name, value in body.items() if name not in ("model", "messages")}
    try:
        completion = await client.chat.completions.create(
            model=body["model"], messages=body["messages"], extra_body=further
        )
        return _read_answer(completion)
    except _FAULTS as error:
        raise _failure(client, error) from None


async def find_model(base: str, key: str | None, timeout_seconds: float) -> str:
    """Return the name of a teacher's only model; ConfigError if it has several, PassingError if it does not answer."""
    async with connect(base, key, timeout_seconds) as client:
        try:
            names = [model.id async for model in client.models.list()]
        except _FAULTS as error:
            failed = _failure(client, error)
            fault = PassingError if failed.passing else ConfigError
            raise fault(f"--model is missing, and {public_url(base)} does not list its models: {failed}") from None
    if len(names) != 1:
        raise ConfigError(f"--model is missing; {public_url(base)} has {', '.join(names[:20]) or 'none'}")
    return names[0]


def _failure(client: openai.AsyncOpenAI, error: Exception) -> Failed:
    """Return the failure with the teacher's text on one line, without the key, which it may repeat."""
    reason, passing, for_all = f"its response is no chat completion ({error})", True, False
    if isinstance(error, openai.APIStatusError):
        status = error.status_code
        message = error.body.get("message") if isinstance(error.body, dict) else None
        reason = f"{status} {message or error.response.reason_phrase}"
        if status in (404, 405):
            reason += ". Addresses of OpenAI-compatible endpoints usually end in /v1"
        passing = error.code != "insufficient_quota" and (status in (408, 409, 429) or status >= 500)
        for_all = not passing and status not in _OF_THE_QUESTION
    elif isinstance(error, openai.APIConnectionError):
        reason = f"{error} ({error.__cause__})"
    return Failed(one_line(reason.replace(client.api_key, "<key>")), passing=passing, for_all=for_all)


class Answers:
    """The cached answers of one teacher: an append-only JSONL file, keyed by the content of the request."""

    def __init__(self, folder: Path, url: str, model: str) -> None:
        """Read the file; damaged lines are skipped, so their requests are sent again."""
        name = hashlib.sha256(f"{url} {model}".encode()).hexdigest()[:16]
        self._records = Records(folder / f"{name}.jsonl")
        self.known: dict[str, Answer] = {}  # key of a request → its answer
        try:
            for record in self._records.read():
                if "answer" in record:
                    self.known[record["key"]] = Answer(**record["answer"])
        except (OSError, TypeError, LookupError) as error:
            raise StoreError(f"{self._records.path} cannot be read ({error}). Move it away.") from None

    def add(self, key: str, answer: Answer) -> None:
        """Append an answer to the file."""
        try:
            self._records.append({"key": key, "answer": asdict(answer)})
        except OSError as error:
            raise StoreError(f"{self._records.path} cannot be written ({error.strerror})") from None
        self.known[key] = answer


def public_url(url: str) -> str:
    """Return an address without its query, which may contain a key."""
    return urlunsplit(urlsplit(url)._replace(query="", fragment=""))


def most_tokens(body: dict[str, Any], max_tokens: int) -> tuple[int, int]:
    """Return an estimated upper bound of a request's (input, output) tokens: a text has at most as many as bytes."""
    further = {name: value for name, value in body.items() if name not in ("model", "messages")}
    size = sum(len(message["content"].encode()) + _MESSAGE_TOKENS for message in body["messages"])
    return _FORMAT_TOKENS + size + len(json.dumps(further)), max_tokens


def _read_answer(completion: Any) -> Answer:
    choice = completion.choices[0]
    content = choice.message.content or ""
    if not isinstance(content, str):
        raise TypeError("its content is not text")
    parts = (choice.message.model_extra or {}).get("parts") or []
    usage = completion.usage
    # Some endpoints report 0 tokens, which would disable the cost limit.
    is_counted = usage is not None and usage.prompt_tokens and usage.completion_tokens
    return Answer(
        text=content,
        parts=[{"type": str(part["type"]), "text": str(part["text"])} for part in parts] or None,
        finish=choice.finish_reason,
        tokens=(usage.prompt_tokens, usage.completion_tokens) if is_counted else None,
        model=completion.model,
    )


def one_line(text: str, longest: int = 200) -> str:
    """Return a text on one line, without control characters, cut to `longest` characters."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= longest else line[: longest - 1] + "…"
