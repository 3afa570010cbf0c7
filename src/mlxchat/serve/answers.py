"""The answers of OpenAI's API: their types, for mypy and /openapi.json, and a choice while it is generated."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, cast

from typing_extensions import TypedDict  # pydantic reads the standard library's from Python 3.12 on

from mlxchat.engine.batch import Event, Kind
from mlxchat.engine.generate import content_of
from mlxchat.engine.third_party import AnyTokenizer
from mlxchat.serve.worker import Answer

FinishReason = Literal["stop", "length"]


class ErrorFields(TypedDict):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """Every answer with a status of 400 or more."""

    error: ErrorFields


class Usage(TypedDict):
    """Tokens of a request and its answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Valued(TypedDict):
    """A token with its log-probability."""

    token: str
    logprob: float | None
    bytes: list[int]


class ChatLogprob(Valued):
    """A token of an answer, with the most likely ones at its place."""

    top_logprobs: list[Valued]


class ChatLogprobs(TypedDict):
    """The tokens of a message."""

    content: list[ChatLogprob]
    refusal: None


class Part(TypedDict):
    """A part of a message: text, Python that the model ran, or its output."""

    type: str
    text: str


class AnswerMessage(TypedDict):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str
    refusal: None
    parts: NotRequired[list[Part]]


class _AnyChoice(TypedDict):
    index: int
    finish_reason: FinishReason


class ChatChoice(_AnyChoice):
    """One answer of a chat completion."""

    message: AnswerMessage
    logprobs: ChatLogprobs | None


class TextChoice(_AnyChoice):
    """One text of a completion."""

    text: str
    logprobs: None


class _Answer(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class ChatCompletion(_Answer):
    """A chat completion; with `stream` its chunks are server-sent events."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    mlxchat: NotRequired[dict[Literal["truncated_turns"], int]]


class Completion(_Answer):
    """A text completion; with `stream` its chunks are server-sent events."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class ModelEntry(TypedDict):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    mlxchat: dict[str, Any]


class ModelList(TypedDict):
    """All models, the default first."""

    object: Literal["list"]
    data: list[ModelEntry]


Answers = dict[int | str, dict[str, Any]]
ERRORS: Answers = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


def answers(model: Any, content: dict[str, Any] | None = None) -> Answers:
    """Return the `responses` of a FastAPI route: its answer, also as other `content`, and its errors."""
    return {200: {"model": model, "content": content or {}}, **ERRORS}


@dataclass
class Choice:
    """A choice up to its newest event."""

    tokenizer: AnyTokenizer
    texts: list[tuple[Kind, str]] = field(default_factory=list)
    scored: list[Event] = field(default_factory=list)
    """The text's tokens with log-probabilities."""
    num_sampled: int = 0
    finish_reason: FinishReason | None = None

    def add(self, event: Event) -> list[tuple[Kind, str]]:
        """Add an event; return the new (kind, text) to show."""
        self.num_sampled += event.sampled
        if self._is_scored(event):
            self.scored.append(event)
        if event.finish_reason is not None:
            self.finish_reason = "length" if event.finish_reason == "length" else "stop"
        new = [(event.kind, event.text)] if event.text else []
        self.texts += new
        return new

    def for_chat(self, index: int) -> ChatChoice:
        """Return the choice of a chat completion; its message has `parts` if it used a tool."""
        assert self.finish_reason is not None
        text = "".join(text for kind, text in self.texts if kind == "text")
        message: AnswerMessage = {"role": "assistant", "content": text, "refusal": None}
        parts = content_of(self.texts)
        if any(part["type"] != "text" for part in parts):
            message["parts"] = cast(list[Part], parts)
        return {
            "index": index, "message": message, "logprobs": self.logprobs(self.scored),
            "finish_reason": self.finish_reason,
        }  # fmt: skip

    def for_text(self, index: int) -> TextChoice:
        """Return the choice of a text completion; its text includes tool calls and their results."""
        assert self.finish_reason is not None
        return {
            "index": index, "text": "".join(text for _, text in self.texts), "logprobs": None,
            "finish_reason": self.finish_reason,
        }  # fmt: skip

    def chat_pieces(self, event: Event) -> Iterator[dict[str, Any]]:
        """Add an event; yield the fields of its chunks in a chat's stream."""
        shown = self.add(event)
        logprobs = self.logprobs([event] if self._is_scored(event) else [])
        for kind, text in shown or ([("text", "")] if logprobs else []):
            delta = {"content": text} if kind == "text" else {"part": {"type": kind, "text": text}}
            yield {"delta": delta, "logprobs": logprobs}
            logprobs = None
        if self.finish_reason:
            yield {"delta": {}, "finish_reason": self.finish_reason}

    def text_pieces(self, event: Event) -> Iterator[dict[str, Any]]:
        """Add an event; yield the fields of its chunk in a text's stream."""
        text = "".join(text for _, text in self.add(event))
        if text or self.finish_reason:
            yield {"text": text, "finish_reason": self.finish_reason}

    def logprobs(self, events: list[Event]) -> ChatLogprobs | None:
        """Return the log-probabilities of these tokens; None without any."""
        return {"content": [self._entry(event) for event in events], "refusal": None} if events else None

    def _is_scored(self, event: Event) -> bool:
        is_special = event.token in self.tokenizer.special_ids.values()
        return event.logprob is not None and event.kind == "text" and not is_special

    def _entry(self, event: Event) -> ChatLogprob:
        top = [self._valued(id_, value) for id_, value in event.top_logprobs or ()]
        return {**self._valued(event.token, event.logprob), "top_logprobs": top}

    def _valued(self, token: int | None, logprob: float | None) -> Valued:
        data = b"" if token is None else self.tokenizer.decode_bytes([token])
        return {"token": self._token(token), "logprob": logprob, "bytes": list(data)}

    def _token(self, token: int | None) -> str:
        r"""Return a token's text; incomplete UTF-8 in OpenAI's notation, such as bytes:\xe2\x96."""
        data = b"" if token is None else self.tokenizer.decode_bytes([token])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def usage_of(answer: Answer, choices: list[Choice], each: int) -> Usage:
    """Return OpenAI's usage: a prompt counts once for its `each` choices; tokens forced by tools do not count."""
    prompt = sum(len(request.prompt) for request in answer.requests[::each])
    completion = sum(choice.num_sampled for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
