"""Request bodies, and the prompts, sampling settings and seeds that the engine gets from them."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mlxchat.data.tokenizer import fit_turns
from mlxchat.engine.batch import Request
from mlxchat.engine.sample import Constraint, Sampling
from mlxchat.errors import ConfigError, DataError, suggest
from mlxchat.serve.models import Model
from mlxchat.serve.security import Fault
from mlxchat.tasks.base import Conversation

_SEEDS = 2**63
_MOST_CHOICES = 16
_DEFAULT_TOKENS = 4096
"""Length limit of answers to requests without one, for models whose context is longer."""
# Fields of OpenAI's API that change no answer here.
_HARMLESS = {
    "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user",
}  # fmt: skip
# Values of fields that this server lacks which change no answer; other values are refused.
_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "suffix": ("",), "echo": (False,), "modalities": (["text"],), "best_of": (1,),
}  # fmt: skip
_SHOWN_CHARS = 80
_SYSTEM = ("system", "developer")


def _listed(value: Any) -> Any:
    """Return a list of one string for a string."""
    return [value] if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    """Return the parts of a message for its text."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else [] if value is None else value


Tokens = Annotated[int, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Stop = Annotated[
    list[Annotated[str, Field(max_length=200)]],
    Field(max_length=16, fail_fast=True),
    BeforeValidator(_listed, json_schema_input_type=str | list[str]),
]
Prompts = Annotated[
    list[Any],  # `_text_prompts` checks the items
    Field(min_length=1),
    BeforeValidator(_listed, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
# Refuse numbers in quotes and true for 1, as OpenAI's servers do.
STRICT = ConfigDict(strict=True)


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = STRICT

    include_usage: bool = False


class Generation(BaseModel):
    """Fields that all bodies share; None: the server's default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_idle_fields(cls, given: Any) -> Any:
        """Drop null fields and those that change no answer, which some clients send; refuse unknown ones."""
        if not isinstance(given, dict):
            return given
        kept = {}
        for name, value in given.items():
            if value is None or name in _HARMLESS or value in _NO_EFFECT.get(name, ()):
                continue
            if name not in cls.model_fields:
                shown = name[:_SHOWN_CHARS]
                hint = suggest(shown, cls.model_fields)
                raise Fault(f"{shown} is not supported.{hint}", param=shown, code="unsupported_parameter")
            kept[name] = value
        return kept

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] = 1
    max_tokens: Tokens | None = None
    stop: Stop | None = None
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=200)] | None = None
    """0: off."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=1024)] = {}
    """Token id → number added to its logit."""
    truncation: Literal["auto", "disabled"] = "disabled"
    """auto: drop the oldest turns of a conversation that exceeds the model's context, but no system message.
    `mlxchat.truncated_turns` in the response counts them."""


class ContentPart(BaseModel):
    """A part of a message. Only the assistant's may be Python that it ran, or its output."""

    model_config = STRICT

    type: Literal["text", "python", "python_output"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    model_config = STRICT

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[ContentPart],
        Field(fail_fast=True),
        BeforeValidator(_as_parts, json_schema_input_type=str | list[ContentPart] | None),
    ] = []


class JsonSchema(BaseModel):
    """A JSON schema with its name; always enforced strictly."""

    model_config = STRICT

    name: str = ""
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(BaseModel):
    """The format of an answer."""

    model_config = STRICT

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Generation):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None


class TextRequest(Generation):
    """Body of /v1/completions."""

    prompt: Prompts = [""]


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Default settings of requests: nanochat's values."""

    temperature: float = 0.8
    top_k: int | None = 50


def chat_requests(model: Model, body: ChatRequest, defaults: Defaults) -> tuple[list[Request], int]:
    """Return the engine's requests for a chat, and the number of turns that were dropped; Fault if it is invalid."""
    if body.top_logprobs and not body.logprobs:
        raise Fault("top_logprobs needs logprobs=true", param="top_logprobs")
    most = body.max_completion_tokens or body.max_tokens
    ids, dropped = chat_prompt(model, body.messages, answer_tokens=most, truncate=body.truncation == "auto")
    requests = _requests(
        model, body, [ids], defaults, max_tokens=most, logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=_json_constraint(model, body.response_format), skip_blank=model.third_party,
    )  # fmt: skip
    return requests, dropped


def text_requests(model: Model, body: TextRequest, defaults: Defaults) -> list[Request]:
    """Return the engine's requests for a text completion; Fault if it is invalid."""
    most = body.max_tokens if body.max_tokens is not None else 128
    return _requests(model, body, _text_prompts(model, body), defaults, max_tokens=most)


def chat_prompt(
    model: Model, messages: Sequence[Message], *, answer_tokens: int | None, truncate: bool
) -> tuple[list[int], int]:
    """Return the prompt's ids for the assistant's next message, and the number of turns that were dropped.

    System messages are joined to the user message that follows; consecutive messages of one role are joined.
    `answer_tokens` is the length limit of the answer; None: the rest of the context. `truncate` drops the oldest turns
    (a user message with its replies) until the rest fits; system messages and the last user message always stay.
    """
    if not model.converses:
        raise Fault(
            f"{model.name} is a base model, which cannot chat: use POST /v1/completions",
            param="model", code="unsupported_model",
        )  # fmt: skip
    _check_order(messages)
    given = [{"role": each.role, "content": [part.model_dump() for part in each.content]} for each in messages]

    def render(kept: Sequence[Conversation]) -> list[int]:
        try:
            return model.render(_joined(kept))
        except DataError as error:
            raise Fault(str(error), param="messages") from None

    if truncate:
        room = model.context_tokens - min(answer_tokens or 256, model.context_tokens // 2)
        ids, dropped = fit_turns(given, render, room)
    else:
        ids, dropped = render(given), 0
    if len(ids) >= model.context_tokens:
        # No double quote: Python's repr would then escape the apostrophe as \', and litellm, which searches for these
        # words, would miss them.
        advice = "" if truncate else ", or send truncation=auto to leave out the oldest turns"
        raise Fault(
            f"This model's maximum context length is {model.context_tokens} tokens, answer included; "
            f"the messages have {len(ids)} tokens. Shorten them{advice}.",
            param="messages", code="context_length_exceeded",
        )  # fmt: skip
    return ids, dropped


def _text_prompts(model: Model, body: TextRequest) -> list[list[int]]:
    """Return the ids of every prompt: text gets a <|bos|>, ids are used unchanged; Fault for impossible ids."""
    tokenizer, valid = model.tokenizer, range(model.tokenizer.vocab_size)
    given = [body.prompt] if isinstance(body.prompt[0], int) else body.prompt
    found: list[list[int]] = []
    for prompt in given:
        if isinstance(prompt, str):
            found.append([tokenizer.bos, *tokenizer.encode(prompt)])
        elif isinstance(prompt, list) and prompt and all(type(id_) is int and id_ in valid for id_ in prompt):
            found.append(prompt)
        else:
            raise Fault(f"prompt: expected text, or ids from 0 to {valid[-1]}", param="prompt")
    return found


def _requests(
    model: Model, body: Generation, prompts: Sequence[list[int]], defaults: Defaults, *,
    max_tokens: int | None, logprobs: int | None = None,
    constraint: Constraint | None = None, skip_blank: bool = False,
) -> list[Request]:  # fmt: skip
    """Return the engine's requests: `n` choices for each prompt, each with a different seed.

    Fault: there are too many choices, a prompt leaves no room in the context, or a biased token does not exist.
    """
    if (count := len(prompts) * body.n) > _MOST_CHOICES:
        raise Fault(f"the request has {count} choices; at most {_MOST_CHOICES} are accepted", param="n")
    bias = tuple((int(token), float(more)) for token, more in body.logit_bias.items())
    if any(token >= model.tokenizer.vocab_size for token, _ in bias):
        raise Fault(f"logit_bias: expected ids from 0 to {model.tokenizer.vocab_size - 1}", param="logit_bias")
    first = secrets.randbelow(_SEEDS) if body.seed is None else body.seed
    top_k = defaults.top_k if body.top_k is None else body.top_k or None
    temperature = defaults.temperature if body.temperature is None else body.temperature
    found = []
    for prompt in prompts:
        room = model.context_tokens - len(prompt)
        if room < 1:
            raise Fault(
                f"This model's maximum context length is {model.context_tokens} tokens, answer included; the prompt "
                f"has {len(prompt)} tokens. Shorten it.",
                param="prompt", code="context_length_exceeded",
            )  # fmt: skip
        for choice in range(body.n):
            sampling = Sampling(
                temperature=temperature, top_k=top_k, top_p=body.top_p, min_p=body.min_p or None, logit_bias=bias,
                repetition_penalty=body.repetition_penalty, frequency_penalty=body.frequency_penalty,
                presence_penalty=body.presence_penalty, seed=(first + choice) % _SEEDS,
            )  # fmt: skip
            found.append(
                # A seed means the same answer each time: reused keys and values differ by rounding.
                Request(
                    prompt=prompt, max_new_tokens=min(max_tokens or _DEFAULT_TOKENS, room), sampling=sampling,
                    stop=tuple(body.stop or ()), logprobs=logprobs, reuse=body.seed is None, tools=constraint is None,
                    constraint=constraint.copy() if constraint else None, skip_blank=skip_blank,
                )
            )  # fmt: skip
    return found


def _json_constraint(model: Model, form: ResponseFormat | None) -> Constraint | None:
    """Return the JSON constraint of an answer, None for text; Fault for a schema that is missing or not supported."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_schema" and form.json_schema is None:
        raise Fault("response_format of type json_schema requires json_schema", param="response_format")
    try:
        return model.grammars.constraint(form.json_schema.schema_ if form.json_schema else {"type": "object"})
    except (ConfigError, RecursionError) as error:
        raise Fault(str(error), param="response_format") from None


def _check_order(messages: Sequence[Message]) -> None:
    if next((each.role for each in messages if each.role not in _SYSTEM), None) != "user":
        raise Fault("the first message after the system's must be the user's", param="messages")
    if messages[-1].role != "user":
        raise Fault("the last message must be the user's", param="messages")
    for each in messages:
        if each.role != "assistant" and any(part.type != "text" for part in each.content):
            raise Fault("only the assistant's messages may have parts of Python", param="messages")


def _joined(messages: Sequence[Conversation]) -> list[Conversation]:
    """Return alternating user and assistant messages; system messages are joined to the user message that follows.

    Those at the beginning become one system message.
    """
    joined: list[Conversation] = []
    waiting: list[str] = []
    for each in messages:
        role, text = each["role"], "".join(part["text"] for part in each["content"] if part["type"] == "text")
        if role in _SYSTEM:
            waiting.append(text)
        elif role == "user":
            if waiting and not joined:
                joined.append({"role": "system", "content": "\n\n".join(waiting)})
                waiting = []
            text, waiting = "\n\n".join([*waiting, text]), []
            if joined and joined[-1]["role"] == "user":
                joined[-1]["content"] += "\n\n" + text
            else:
                joined.append({"role": "user", "content": text})
        elif joined[-1]["role"] == "assistant":
            joined[-1]["content"] += each["content"]
        else:
            joined.append({"role": "assistant", "content": list(each["content"])})
    return joined
