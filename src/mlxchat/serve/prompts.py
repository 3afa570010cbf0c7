"""From a request's body to what the engine computes: prompts within the limits and the context, settings, seeds."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlxchat.data.conversation import render_for_completion
from mlxchat.engine.sample import Sampling
from mlxchat.engine.scheduler import Request
from mlxchat.errors import DataError
from mlxchat.serve.faults import Fault
from mlxchat.serve.limits import Limits
from mlxchat.serve.models import Model
from mlxchat.serve.schemas import Generation, Message

_SAID_PARTS = ("text", "input_text", "output_text")
_SEEDS = 2**63


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a request gets that does not say: nanochat's values."""

    temperature: float = 0.8
    top_k: int | None = 50


def chat_prompt(
    model: Model, messages: Sequence[Message], limits: Limits, *, answer_tokens: int | None, truncate: bool
) -> list[int]:
    """Return the ids that ask for the next message.

    Args:
        model: that is asked.
        messages: system messages are joined to the user's that follows; neighbours of one role are joined.
        limits: of the server.
        answer_tokens: how many the answer may take; None: as many as fit.
        truncate: leave the oldest turns out where the context is too short for all.

    Raises:
        Fault: the model cannot converse, or the conversation is beyond a limit or has no form.
    """
    if not model.converses:
        raise Fault(
            f"{model.name} was only pretrained: it continues text (POST /v1/completions) and answers nobody",
            param="model", code="unsupported_model",
        )  # fmt: skip
    _check_sizes(messages, limits)
    turns = _turns(messages)
    room = model.context_tokens - min(answer_tokens or 256, model.context_tokens // 2) if truncate else None
    while True:
        try:
            ids = render_for_completion(model.tokenizer, {"messages": turns})
        except DataError as error:
            raise Fault(str(error), param="messages") from None
        if room is None or len(ids) <= room or len(turns) < 3:
            return ids
        turns = turns[2:]


def requests_for(
    model: Model, body: Generation, prompts: Sequence[list[int]], limits: Limits, defaults: Defaults, *,
    max_tokens: int | None, logprobs: int | None = None, tools: bool = True,
) -> list[Request]:  # fmt: skip
    """Return what the engine is asked: `n` choices for each prompt, each with a seed of its own.

    Raises:
        Fault: a prompt leaves no room in the context, or the body asks for what there is not.
    """
    _refuse_unsupported(body)
    if len(prompts) * body.n > limits.max_choices:
        raise Fault(f"{len(prompts) * body.n} choices are asked for, at most {limits.max_choices} may be", param="n")
    if max_tokens is not None and max_tokens > limits.max_tokens:
        raise Fault(f"max_tokens is {max_tokens}, at most {limits.max_tokens} may be asked for", param="max_tokens")
    stop = tuple(body.stop or ())
    if len(stop) > 16 or any(len(each) > 200 for each in stop):
        raise Fault("stop takes at most 16 strings of at most 200 characters", param="stop")
    first = secrets.randbelow(_SEEDS) if body.seed is None else body.seed
    top_k = defaults.top_k if body.top_k is None else body.top_k or None
    temperature = defaults.temperature if body.temperature is None else body.temperature
    # What can be asked for again gets the same bits again, whatever was asked before.
    repeatable = body.seed is not None or temperature == 0 or body.n > 1
    found = []
    for prompt in prompts:
        room = model.context_tokens - len(prompt)
        if room < 1:
            raise Fault(
                f"this model's context is {model.context_tokens} tokens; the prompt has {len(prompt)} and leaves no "
                'room for an answer. Shorten it, or ask with truncation="auto"',
                param="messages", code="context_length_exceeded",
            )  # fmt: skip
        for choice in range(body.n):
            sampling = Sampling(
                temperature=temperature,
                top_k=top_k,
                top_p=body.top_p,
                min_p=body.min_p or None,
                repetition_penalty=body.repetition_penalty,
                seed=(first + choice) % _SEEDS,
            )
            most = min(max_tokens or limits.max_tokens, limits.max_tokens, room)
            found.append(
                Request(
                    prompt=prompt, max_new_tokens=most, sampling=sampling, stop=stop, tools=tools, logprobs=logprobs,
                    reuse="exact" if repeatable else "close",
                )
            )  # fmt: skip
    return found


def _refuse_unsupported(body: Generation) -> None:
    for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
        if getattr(body, name):
            raise Fault(f"{name} is not supported; repetition_penalty is", param=name, code="unsupported_parameter")
    for name, fine in (("tools", []), ("suffix", ""), ("response_format", {"type": "text"})):
        value = getattr(body, name, None)
        if value not in (None, fine):
            raise Fault(f"{name} is not supported", param=name, code="unsupported_parameter")


def _check_sizes(messages: Sequence[Message], limits: Limits) -> None:
    if len(messages) > limits.max_messages:
        raise Fault(f"the conversation has {len(messages)} messages, at most {limits.max_messages} may be",
                    param="messages")  # fmt: skip
    sizes = [sum(len(part["text"]) for part in _parts(message)) for message in messages]
    for index, size in enumerate(sizes):
        if size > limits.max_message_chars:
            raise Fault(f"message {index} has {size} characters, at most {limits.max_message_chars} may be",
                        param="messages")  # fmt: skip
    if sum(sizes) > limits.max_conversation_chars:
        raise Fault(f"the conversation has {sum(sizes)} characters, at most {limits.max_conversation_chars} may be",
                    param="messages")  # fmt: skip


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return turns of user and assistant in alternation, the user's first and last."""
    turns: list[dict[str, Any]] = []
    waiting: list[str] = []
    for message in messages:
        parts = _parts(message)
        said = "".join(part["text"] for part in parts if part["type"] == "text")
        if message.role in ("system", "developer"):
            waiting.append(said)
        elif message.role == "user":
            text = "\n\n".join([*waiting, said])
            waiting = []
            if turns and turns[-1]["role"] == "user":
                turns[-1]["content"] += "\n\n" + text
            else:
                turns.append({"role": "user", "content": text})
        elif turns and turns[-1]["role"] == "assistant":
            turns[-1]["content"] += parts
        else:
            turns.append({"role": "assistant", "content": parts})
    if not turns or turns[0]["role"] != "user":
        raise Fault("the first message after the system's must be the user's", param="messages")
    if turns[-1]["role"] != "user" or waiting:
        raise Fault("the last message must be the user's", param="messages")
    return turns


def _parts(message: Message) -> list[dict[str, str]]:
    """Return the content of a message as parts: text; of the assistant's also python and python_output."""
    content = message.content if message.content is not None else ""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    found = []
    for part in content:
        kind, text = part.get("type"), part.get("text")
        own = message.role == "assistant" and kind in ("python", "python_output")
        if not isinstance(text, str) or not (own or kind in _SAID_PARTS):
            raise Fault(f"parts of type {kind!r} are not supported; text is", param="messages")
        found.append({"type": str(kind) if own else "text", "text": text})
    return found
