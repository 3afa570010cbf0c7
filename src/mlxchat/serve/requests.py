"""Request bodies, and the prompts, sampling settings and seeds that the engine gets from them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator

from mlxchat.engine.batch import Request
from mlxchat.engine.sample import Constraint, Sampling
from mlxchat.errors import ConfigError, DataError, suggest
from mlxchat.serve.models import Model
from mlxchat.serve.security import Fault, Limits

_TEXT_PARTS = ("text", "input_text", "output_text")
_SEEDS = 2**63
_MOST_BIASES = 1024
# Fields of OpenAI's API that change no answer here.
_HARMLESS = {
    "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user",
}  # fmt: skip
# Fields of OpenAI's API that this server lacks, with the values that change no answer; other values are refused.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "suffix": ("",), "echo": (False,), "modalities": (["text"],), "include": ([],),
}  # fmt: skip
_MOST_SHOWN, _SHOWN_CHARS = 8, 80


class _FirstOnly(FailFast):
    """Reports only the first bad item of a list: errors of 300,000 items would block the event loop."""

    __hash__ = object.__hash__  # for unions


FIRST_ONLY = _FirstOnly()
Temperature = Annotated[float, Field(ge=0, le=2)]
Tokens = Annotated[int, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Strings = Annotated[list[str], FIRST_ONLY, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""One string or several."""
# Refuse numbers in quotes and true for 1, as OpenAI's servers do.
STRICT = ConfigDict(strict=True)


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = STRICT

    include_usage: bool = False


class Generation(BaseModel):
    """Fields that all bodies share; None: the server's default. `refuse_unknown` checks all other fields."""

    # Unknown fields are refused by `refuse_unknown`, except those of OpenAI's API that change no answer.
    model_config = ConfigDict(extra="allow", strict=True, json_schema_extra={"additionalProperties": False})

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """Drop null fields: some clients send every field."""
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
    """0: off."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logit_bias: dict[str, Any] = {}
    """Token id → number added to its logit; `_logit_bias` reports the first bad item."""
    truncation: Literal["auto", "disabled"] = "disabled"
    """auto: drop the oldest turns of a conversation that exceeds the limits or the model's context, but no system
    message. `mlxchat.truncated_turns` in the response counts them."""

    def refuse_unknown(self) -> None:
        """Raise a Fault if the body has unsupported fields that would change the answer, or unknown fields."""
        unknown = []
        for name, value in (self.model_extra or {}).items():
            if value in _UNSUPPORTED.get(name, ()) or name in _HARMLESS:
                continue
            if name in _UNSUPPORTED:
                verb = "are" if name.endswith("s") else "is"
                raise Fault(f"{name} {verb} not supported", param=name, code="unsupported_parameter")
            unknown.append(name[:_SHOWN_CHARS])
        if unknown:
            hint = suggest(unknown[0], type(self).model_fields)
            listed = ", ".join(unknown[:_MOST_SHOWN]) + (" and more" if len(unknown) > _MOST_SHOWN else "")
            noun = "field" if len(unknown) == 1 else "fields"
            raise Fault(f"unknown {noun} {listed}.{hint}", param=unknown[0], code="unknown_parameter")


class Message(BaseModel):
    """One message of a conversation."""

    model_config = STRICT

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[dict[str, Any]], FIRST_ONLY] | None = None


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

    messages: Annotated[list[Message], FIRST_ONLY] = Field(min_length=1)
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None


class TextRequest(Generation):
    """Body of /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], FIRST_ONLY]
        | Annotated[list[int], FIRST_ONLY]
        | Annotated[list[Annotated[list[int], FIRST_ONLY]], FIRST_ONLY]
    ) = ""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Default settings of requests: nanochat's values."""

    temperature: float = 0.8
    top_k: int | None = 50


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as token ids."""

    ids: list[int]
    truncated_turns: int
    """Number of oldest turns that were dropped. A turn is a user message with its replies, if any."""


def chat_prompt(
    model: Model, messages: Sequence[Message], limits: Limits, *, answer_tokens: int | None, truncate: bool
) -> ChatPrompt:
    """Return the prompt for the assistant's next message.

    Args:
        model: the model that will answer.
        messages: system messages are joined to the user message that follows; consecutive messages of one role are
            joined.
        limits: limits of the server; with `truncate` they apply to the remaining messages.
        answer_tokens: length limit of the answer; None: the rest of the context.
        truncate: drop the oldest turns until the rest is within the limits and the context. System messages and the
            last user message always stay.

    Raises:
        Fault: the model is a base model, the messages are malformed, or they exceed a limit or the context.
    """
    if not model.converses:
        raise Fault(
            f"{model.name} is a base model, which cannot chat: use POST /v1/completions",
            param="model", code="unsupported_model",
        )  # fmt: skip
    checked = _check_form(messages)
    room = model.context_tokens - min(answer_tokens or 256, model.context_tokens // 2) if truncate else None
    turns = _turns(checked)
    kept = turns if room is None else _latest_turns(model, checked, turns, limits, room)
    while True:
        chosen = {index for turn in kept for index in turn}
        left = [each for index, each in enumerate(checked) if each.role == "system" or index in chosen]
        _check_sizes(left, limits, truncate=truncate)
        try:
            ids = model.render(_joined(left, keep_system=model.third_party))
        except DataError as error:
            raise Fault(str(error), param="messages") from None
        if room is None or len(ids) <= room or len(kept) == 1:
            break
        kept = kept[1:]  # joined messages may have a few more tokens than the single ones
    if len(ids) >= model.context_tokens:
        subject, advice = _excess(left, truncate=truncate)
        raise Fault(
            f"This model's maximum context length is {model.context_tokens} tokens, answer included; "
            f"{subject} {len(ids)} tokens. {advice}.",
            param="messages", code="context_length_exceeded",
        )  # fmt: skip
    return ChatPrompt(ids, len(turns) - len(kept))


def text_prompts(model: Model, body: TextRequest, limits: Limits) -> list[list[int]]:
    """Return the ids of every prompt; text gets a <|bos|>, ids are used unchanged.

    Raises:
        Fault: there is no prompt, there are too many, or one is too long or has impossible ids.
    """
    tokenizer = model.tokenizer
    given: list[Any] = [body.prompt] if isinstance(body.prompt, str) else list(body.prompt)
    if given and all(isinstance(each, int) for each in given):
        given = [given]
    if not given:
        raise Fault("prompt is an empty list", param="prompt")
    check_choices(len(given) * body.n, limits)  # before encoding
    found: list[list[int]] = []
    for prompt in given:
        if len(prompt) > limits.max_conversation_chars:
            raise Fault(f"a prompt has {len(prompt)} characters; at most {limits.max_conversation_chars} are accepted",
                        param="prompt")  # fmt: skip
        if isinstance(prompt, str):
            found.append([tokenizer.bos, *tokenizer.encode(prompt)])
            continue
        if not prompt or not all(0 <= id_ < tokenizer.vocab_size for id_ in prompt):
            raise Fault(f"a prompt of ids needs at least one id from 0 to {tokenizer.vocab_size - 1}", param="prompt")
        found.append(prompt)
    return found


def requests_for(
    model: Model, body: Generation, prompts: Sequence[list[int]], limits: Limits, defaults: Defaults, *,
    max_tokens: int | None, logprobs: int | None = None,
    constraint: Constraint | None = None, skip_blank: bool = False,
) -> list[Request]:  # fmt: skip
    """Return the engine's requests: `n` choices for each prompt, each with a different seed.

    Raises:
        Fault: a prompt leaves no room in the context, or a field has an impossible value.
    """
    check_choices(len(prompts) * body.n, limits)
    if max_tokens is not None and max_tokens > limits.max_tokens:
        raise Fault(f"max_tokens is {max_tokens}; at most {limits.max_tokens} are accepted", param="max_tokens")
    stop = tuple(body.stop or ())
    if len(stop) > 16 or any(len(each) > 200 for each in stop):
        raise Fault("stop takes at most 16 strings of at most 200 characters", param="stop")
    bias = _logit_bias(model, body)
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
            most = min(max_tokens or limits.max_tokens, limits.max_tokens, room)
            found.append(
                # A seed means the same answer each time: reused keys and values differ by rounding.
                Request(
                    prompt=prompt, max_new_tokens=most, sampling=sampling, stop=stop, logprobs=logprobs,
                    reuse=body.seed is None, tools=constraint is None,
                    constraint=constraint.copy() if constraint else None, skip_blank=skip_blank,
                )
            )  # fmt: skip
    return found


def check_choices(count: int, limits: Limits) -> None:
    """Raise a Fault if a request has too many choices."""
    if count > limits.max_choices:
        raise Fault(f"the request has {count} choices; at most {limits.max_choices} are accepted", param="n")


def json_constraint(model: Model, form: ResponseFormat | None, limits: Limits) -> Constraint | None:
    """Return the JSON constraint of an answer; None for text.

    Raises:
        Fault: the schema is missing, too long, or not supported.
    """
    if form is None or form.type == "text":
        return None
    if form.type == "json_schema" and form.json_schema is None:
        raise Fault("response_format of type json_schema requires json_schema", param="response_format")
    schema = form.json_schema.schema_ if form.json_schema else {"type": "object"}
    try:
        if (size := len(json.dumps(schema))) > limits.max_conversation_chars:
            raise ConfigError(
                f"the JSON schema has {size} characters; at most {limits.max_conversation_chars} are accepted"
            )
        return model.grammars.constraint(schema)
    except (ConfigError, RecursionError) as error:
        raise Fault(str(error), param="response_format") from None


def _logit_bias(model: Model, body: Generation) -> tuple[tuple[int, float], ...]:
    given, most = body.logit_bias, model.tokenizer.vocab_size - 1
    if len(given) > _MOST_BIASES:
        raise Fault(f"logit_bias has {len(given)} tokens; at most {_MOST_BIASES} are accepted", param="logit_bias")
    for token, more in given.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 9 and int(token) <= most):
            raise Fault(f"logit_bias has token {token[:40]!r}, expected ids from 0 to {most}", param="logit_bias")
        if type(more) not in (int, float) or not -100 <= more <= 100:
            raise Fault(f"logit_bias of token {token}: expected a number from -100 to 100", param="logit_bias")
    return tuple((int(token), float(more)) for token, more in given.items())


@dataclass(frozen=True)
class _Checked:
    """A well-formed message."""

    role: str
    """system, user or assistant."""
    parts: list[dict[str, str]]

    @property
    def num_chars(self) -> int:
        return sum(len(part["text"]) for part in self.parts)

    @property
    def text(self) -> str:
        return "".join(part["text"] for part in self.parts if part["type"] == "text")


def _check_form(messages: Sequence[Message]) -> list[_Checked]:
    checked = [_Checked("system" if each.role == "developer" else each.role, _parts(each)) for each in messages]
    if next((each.role for each in checked if each.role != "system"), None) != "user":
        raise Fault("the first message after the system's must be the user's", param="messages")
    if checked[-1].role != "user":
        raise Fault("the last message must be the user's", param="messages")
    return checked


def _check_sizes(checked: Sequence[_Checked], limits: Limits, *, truncate: bool) -> None:
    subject, advice = _excess(checked, truncate=truncate)
    if len(checked) > limits.max_messages:
        count = f"the conversation has {len(checked)} messages"
        raise Fault(f"{count}; at most {limits.max_messages} are accepted. {advice}.", param="messages")
    for index, each in enumerate(checked):
        if each.num_chars > limits.max_message_chars:
            kept = each.role == "system" or index == len(checked) - 1
            name = "the system prompt" if each.role == "system" else "the message" if kept else f"message {index}"
            raise Fault(f"{name} has {each.num_chars} characters; at most {limits.max_message_chars} are accepted. "
                        f"{'Shorten it' if kept else advice}.", param="messages")  # fmt: skip
    if (total := sum(each.num_chars for each in checked)) > limits.max_conversation_chars:
        raise Fault(f"{subject} {total} characters; at most {limits.max_conversation_chars} are accepted. {advice}.",
                    param="messages")  # fmt: skip


def _excess(checked: Sequence[_Checked], *, truncate: bool) -> tuple[str, str]:
    r"""Return the subject of a message about a limit, and advice.

    Neither has a double quote: Python's repr would then escape the apostrophe of "This model's" as \', and litellm,
    which searches for these words, would miss them.
    """
    if not truncate:
        return "the conversation has", "Shorten it, or send truncation=auto to leave out the oldest turns"
    if len(checked) == 1:
        return "the message has", "Shorten it"
    return "the system prompt and the message have", "Shorten one of them"


def _turns(checked: Sequence[_Checked]) -> list[list[int]]:
    """Return the indices of each turn's messages: a user message and the assistant messages that follow it."""
    turns: list[list[int]] = []
    for index, each in enumerate(checked):
        if each.role == "user":
            turns.append([index])
        elif each.role == "assistant":
            turns[-1].append(index)
    return turns


def _latest_turns(
    model: Model, checked: Sequence[_Checked], turns: list[list[int]], limits: Limits, room: int
) -> list[list[int]]:
    """Return the last turn and as many earlier ones as the limits and `room` tokens allow.

    Skips unanswered messages that are too long, so that they do not hide earlier turns.
    """

    def cost(indices: Sequence[int]) -> tuple[int, int, int] | None:
        """Return messages, characters and tokens; None: a message is over its own limit."""
        chars = [checked[index].num_chars for index in indices]
        if any(each > limits.max_message_chars for each in chars):
            return None
        texts = [part["text"] for index in indices for part in checked[index].parts]
        return len(chars), sum(chars), sum(2 + len(model.tokenizer.encode(text)) for text in texts)

    always = [index for index, each in enumerate(checked) if each.role == "system"] + turns[-1]
    used = cost(always)
    kept = [turns[-1]]
    if used is None:
        return kept
    most = (limits.max_messages, limits.max_conversation_chars, room - 2)  # <|bos|> and <|assistant_start|>
    for turn in reversed(turns[:-1]):
        more = cost(turn)
        total = None if more is None else (used[0] + more[0], used[1] + more[1], used[2] + more[2])
        if total is not None and all(have <= limit for have, limit in zip(total, most, strict=True)):
            kept.insert(0, turn)
            used = total
        elif len(turn) > 1:
            break
    return kept


def _joined(checked: Sequence[_Checked], *, keep_system: bool) -> list[dict[str, Any]]:
    """Return alternating user and assistant messages; system messages are joined to the user message that follows.

    With `keep_system`, system messages at the beginning become one system message.
    """
    joined: list[dict[str, Any]] = []
    waiting: list[str] = []
    for each in checked:
        if each.role == "system":
            waiting.append(each.text)
        elif each.role == "user":
            if keep_system and waiting and not joined:
                joined.append({"role": "system", "content": "\n\n".join(waiting)})
                waiting = []
            text, waiting = "\n\n".join([*waiting, each.text]), []
            if joined and joined[-1]["role"] == "user":
                joined[-1]["content"] += "\n\n" + text
            else:
                joined.append({"role": "user", "content": text})
        elif joined[-1]["role"] == "assistant":
            joined[-1]["content"] += each.parts
        else:
            joined.append({"role": "assistant", "content": [*each.parts]})
    return joined


def _parts(message: Message) -> list[dict[str, str]]:
    """Return the content of a message as parts: text, and for the assistant also python and python_output."""
    content = message.content if message.content is not None else ""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    found = []
    for part in content:
        kind, text = part.get("type"), part.get("text")
        own = message.role == "assistant" and kind in ("python", "python_output")
        if not isinstance(text, str) or not (own or kind in _TEXT_PARTS):
            raise Fault(f"parts of type {kind!r} are not supported, only text", param="messages")
        found.append({"type": str(kind) if own else "text", "text": text})
    return found
