"""Bodies of requests. Fields that OpenAI's clients may send and that change nothing here are let through."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator


class _FirstOnly(FailFast):
    """A list reports its first bad item only: errors of 300,000 items block the event loop."""

    __hash__ = object.__hash__  # for unions


FIRST_ONLY = _FirstOnly()
Temperature = Annotated[float, Field(ge=0, le=2)]
Tokens = Annotated[int, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Strings = Annotated[list[str], FIRST_ONLY, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""One string or several."""
# Numbers in quotes, and true for 1, are somebody's mistake: OpenAI's servers refuse them too.
STRICT = ConfigDict(strict=True)


class StreamOptions(BaseModel):
    """What a stream tells besides."""

    model_config = STRICT

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
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logit_bias: dict[str, Any] = {}
    """Token → what is added to its logit; `prompts.py` reports the first bad item."""
    truncation: Literal["auto", "disabled"] = "disabled"
    """auto: leave out the oldest turns of a conversation that exceeds the limits or the model's context; system
    messages stay. The response counts them in `mlxchat.truncated_turns`."""


class Message(BaseModel):
    """One message of a conversation."""

    model_config = STRICT

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[dict[str, Any]], FIRST_ONLY] | None = None


class JsonSchema(BaseModel):
    """A schema with its name; every one is followed strictly."""

    model_config = STRICT

    name: str = ""
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(BaseModel):
    """What form an answer has."""

    model_config = STRICT

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Generation):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], FIRST_ONLY] = Field(min_length=1)
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Any] | None = None
    response_format: ResponseFormat | None = None


class TextRequest(Generation):
    """Body of /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], FIRST_ONLY]
        | Annotated[list[int], FIRST_ONLY]
        | Annotated[list[Annotated[list[int], FIRST_ONLY]], FIRST_ONLY]
    ) = ""
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: str | None = None
    best_of: int | None = None


class NanochatMessage(BaseModel):
    """A message as nanochat's page sends it."""

    model_config = STRICT

    role: Literal["user", "assistant"]
    content: str


class NanochatRequest(BaseModel):
    """Body of nanochat's /chat/completions."""

    messages: Annotated[list[NanochatMessage], FIRST_ONLY] = Field(min_length=1)
    temperature: Temperature | None = None
    max_tokens: Tokens | None = None
    top_k: Annotated[int, Field(ge=0, le=200)] | None = None
    stream: bool = True
