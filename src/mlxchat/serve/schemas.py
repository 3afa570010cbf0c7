"""Bodies of requests. Fields that OpenAI's clients may send and that change nothing here are let through."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator


class _FirstOnly(FailFast):
    """A list reports its first bad item only: errors of 300,000 items block the event loop."""

    __hash__ = object.__hash__  # for unions


_FIRST_ONLY = _FirstOnly()
Temperature = Annotated[float, Field(ge=0, le=2)]
Tokens = Annotated[int, Field(ge=1)]
Strings = Annotated[list[str], _FIRST_ONLY, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""One string or several."""
# Numbers in quotes, and true for 1, are somebody's mistake: OpenAI's servers refuse them too.
_STRICT = ConfigDict(strict=True)


class StreamOptions(BaseModel):
    """What a stream tells besides."""

    model_config = _STRICT

    include_usage: bool = False


class Generation(BaseModel):
    """What chat and text completions share; None: the server's default."""

    model_config = ConfigDict(extra="allow", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """Null says as much as nothing: some clients send every field."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, lt=1 << 63)] = 1
    max_tokens: Tokens | None = None
    stop: Strings | None = None
    seed: int | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=200)] | None = None
    """0 is off."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] = "disabled"
    """auto: leave out the oldest turns of a conversation that exceeds the limits or the model's context; system
    messages stay. The response counts them in `mlxchat.truncated_turns`."""


class Message(BaseModel):
    """One message of a conversation."""

    model_config = _STRICT

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[dict[str, Any]], _FIRST_ONLY] | None = None


class ChatRequest(Generation):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], _FIRST_ONLY] = Field(min_length=1)
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None


class TextRequest(Generation):
    """Body of /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], _FIRST_ONLY]
        | Annotated[list[int], _FIRST_ONLY]
        | Annotated[list[Annotated[list[int], _FIRST_ONLY]], _FIRST_ONLY]
    ) = ""
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: str | None = None
    best_of: int | None = None


class NanochatMessage(BaseModel):
    """A message as nanochat's page sends it."""

    model_config = _STRICT

    role: Literal["user", "assistant"]
    content: str


class NanochatRequest(BaseModel):
    """Body of nanochat's /chat/completions."""

    messages: Annotated[list[NanochatMessage], _FIRST_ONLY] = Field(min_length=1)
    temperature: Temperature | None = None
    max_tokens: Tokens | None = None
    top_k: Annotated[int, Field(ge=0, le=200)] | None = None
    stream: bool = True
