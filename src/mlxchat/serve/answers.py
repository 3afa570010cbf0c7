"""The answers of OpenAI's API as types: mypy checks what the server builds, /openapi.json tells clients."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads the standard library's from Python 3.12 on

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


class ChatChoice(TypedDict):
    """One answer of a chat completion."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class TextChoice(TypedDict):
    """One text of a completion."""

    index: int
    text: str
    logprobs: None
    finish_reason: FinishReason


class Own(TypedDict):
    """Fields of this server."""

    truncated_turns: int


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
    mlxchat: NotRequired[Own]


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
