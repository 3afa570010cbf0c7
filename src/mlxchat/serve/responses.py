"""OpenAI's newer interface, /v1/responses, in its basic form: text in, text or JSON out, streamed or whole.

Nothing is stored: a conversation is sent whole each time.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from mlxchat.serve.choices import Choice, choices_of, usage_of
from mlxchat.serve.faults import Fault
from mlxchat.serve.listening import EventStream, LargeAnswer, measured, while_connected
from mlxchat.serve.openai import collect, prepare_chat
from mlxchat.serve.schemas import FIRST_ONLY, STRICT, ChatRequest, Generation, Message, ResponseFormat, Tokens
from mlxchat.serve.service import Service
from mlxchat.serve.worker import Answer

Json = dict[str, Any]


class TextFormat(BaseModel):
    """What form an answer has; the schema stands beside its type."""

    model_config = STRICT

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    description: str | None = None

    def as_response_format(self) -> ResponseFormat:
        """Return what chat completions call it."""
        schema = None if self.schema_ is None else {"name": self.name, "schema": self.schema_}
        return ResponseFormat.model_validate({"type": self.type, "json_schema": schema})


class TextOptions(BaseModel):
    """The field `text`."""

    model_config = ConfigDict(extra="allow", strict=True)

    format: TextFormat = TextFormat()


class InputMessage(Message):
    """A message of the input; clients send back what they were told, with its id and status."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["message"] = "message"


class ResponsesRequest(Generation):
    """Body of /v1/responses."""

    input: str | Annotated[list[InputMessage], FIRST_ONLY]
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    text: TextOptions = TextOptions()

    def as_chat(self) -> ChatRequest:
        """Return the same as a chat completion.

        Raises:
            Fault: it asks for what is stored or computed elsewhere.
        """
        extra = self.model_extra or {}
        for name in ("previous_response_id", "conversation", "background", "prompt"):
            if extra.get(name):
                raise Fault(
                    f"{name} is not supported: nothing is stored here", param=name, code="unsupported_parameter"
                )
        said = [Message(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            said.append(Message(role="user", content=self.input))
        else:
            said += [Message(role=each.role, content=each.content) for each in self.input]
        settings = self.model_dump(exclude_unset=True, exclude={"input", "instructions", "max_output_tokens", "text"})
        return ChatRequest(
            **settings, messages=said, max_completion_tokens=self.max_output_tokens,
            response_format=self.text.format.as_response_format(),
        )  # fmt: skip


def responses_routes(service: Service) -> APIRouter:
    """Return the route."""
    routes = APIRouter(prefix="/v1")

    @routes.post("/responses", response_model=None)
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        if body.n != 1:
            raise Fault("a response has one choice", param="n")
        model, prompt, asked = await run_in_threadpool(lambda: prepare_chat(service, body.as_chat()))
        answer = service.worker.ask(model, asked)
        head: Json = {
            "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()),
            "model": model.name, "instructions": body.instructions, "temperature": asked[0].sampling.temperature,
            "top_p": body.top_p, "max_output_tokens": body.max_output_tokens, "metadata": {}, "tools": [],
            "tool_choice": "none", "parallel_tool_calls": False, "error": None, "incomplete_details": None,
            "text": {"format": body.text.format.model_dump(by_alias=True, exclude_none=True)},
            "truncation": body.truncation, "mlxchat": {"truncated_turns": prompt.truncated_turns},
        }  # fmt: skip
        if body.stream:
            return EventStream(answer, _events(service, answer, head))
        (choice,) = await while_connected(request, answer, collect(service, answer))
        return LargeAnswer(_whole(head, answer, choice))

    return routes


def _message(head: Json, choice: Choice | None, status: str) -> Json:
    content = [] if choice is None else [_part(choice.parts.text)]
    name = "msg_" + str(head["id"]).removeprefix("resp_")
    return {"type": "message", "id": name, "role": "assistant", "status": status, "content": content}


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _whole(head: Json, answer: Answer, choice: Choice) -> Json:
    """Return the response at its end."""
    cut = choice.finish_reason == "length"
    status = "incomplete" if cut else "completed"
    used = usage_of(answer, [choice], 1)
    return {
        **head, "status": status, "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": [_message(head, choice, status)],
        "usage": {
            "input_tokens": used["prompt_tokens"], "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": used["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
        },
    }  # fmt: skip


async def _events(service: Service, answer: Answer, head: Json) -> AsyncIterator[Json]:
    """Yield the events of a stream, numbered."""
    count = 0
    (choice,) = choices_of(answer)
    at: Json = {"item_id": _message(head, None, "")["id"], "output_index": 0, "content_index": 0}

    def event(kind: str, **fields: Any) -> Json:
        nonlocal count
        count += 1
        return {"type": f"response.{kind}", "sequence_number": count - 1, **fields}

    begun = {**head, "status": "in_progress", "output": [], "usage": None}
    yield event("created", response=begun)
    yield event("in_progress", response=begun)
    yield event("output_item.added", output_index=0, item=_message(head, None, "in_progress"))
    yield event("content_part.added", **at, part=_part(""))
    async for _, told in measured(answer, service.metrics):
        for kind, text in choice.add(told):
            if kind == "text":
                yield event("output_text.delta", **at, delta=text, logprobs=[])
    whole = _whole(head, answer, choice)
    (item,) = whole["output"]
    yield event("output_text.done", **at, text=choice.parts.text, logprobs=[])
    yield event("content_part.done", **at, part=item["content"][0])
    yield event("output_item.done", output_index=0, item=item)
    yield event(whole["status"], response=whole)
