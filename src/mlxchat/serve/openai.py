"""OpenAI's interface: /v1/chat/completions, /v1/completions, /v1/models."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from mlxchat.engine.scheduler import Event
from mlxchat.engine.scheduler import Request as Asked
from mlxchat.serve.choices import Choice, Echo, choices_of, usage_of
from mlxchat.serve.faults import Fault
from mlxchat.serve.listening import EventStream, LargeAnswer, large_event, measured, while_connected
from mlxchat.serve.models import Model
from mlxchat.serve.prompts import ChatPrompt, chat_prompt, check_choices, json_constraint, requests_for
from mlxchat.serve.schemas import ChatRequest, Generation, TextRequest
from mlxchat.serve.service import Service
from mlxchat.serve.worker import Answer

Json = dict[str, Any]


def openai_routes(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(prefix="/v1")

    # Functions that are not async run in a thread: the event loop does not wait for files.
    @routes.get("/models")
    def list_models() -> Json:
        return {"object": "list", "data": service.models.entries()}

    @routes.get("/models/{name:path}")
    def show_model(name: str) -> Json:
        return service.models.entry(name)

    @routes.post("/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        model, prompt, asked = await run_in_threadpool(prepare_chat, service, body)
        answer = service.worker.ask(model, asked)
        head = _head("chatcmpl", "chat.completion", service, model)
        own = {"mlxchat": {"truncated_turns": prompt.truncated_turns}} if body.truncation == "auto" else {}
        if body.stream:
            return EventStream(answer, _chat_chunks(service, answer, head, body, own))
        choices = await while_connected(request, answer, collect(service, answer))

        def respond() -> LargeAnswer:
            told = [
                {
                    "index": index, "message": choice.message(), "logprobs": choice.chat_logprobs(choice.events),
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ]  # fmt: skip
            return LargeAnswer({**head, "choices": told, "usage": usage_of(answer, choices, body.n), **own})

        return await run_in_threadpool(respond)

    @routes.post("/completions", response_model=None)
    async def complete(body: TextRequest, request: Request) -> Response:
        model, echoes, asked = await run_in_threadpool(_prepare_text, service, body)
        answer = service.worker.ask(model, asked)
        head = _head("cmpl", "text_completion", service, model)
        if body.stream:
            return EventStream(answer, _text_chunks(service, answer, head, body, echoes))
        choices = await while_connected(request, answer, collect(service, answer, echoes))

        def respond() -> LargeAnswer:
            told = [
                {
                    "index": index, "text": echoes[index][0] + choice.all_text,
                    "logprobs": choice.text_logprobs(choice.events),
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ]  # fmt: skip
            return LargeAnswer({**head, "choices": told, "usage": usage_of(answer, choices, body.n)})

        return await run_in_threadpool(respond)

    return routes


def prepare_chat(service: Service, body: ChatRequest) -> tuple[Model, ChatPrompt, list[Asked]]:
    """Return what a chat request asks for; it reads files and encodes text, so it runs outside the event loop."""
    model = service.models.find(body.model)
    if body.top_logprobs and not body.logprobs:
        raise Fault("top_logprobs needs logprobs=true", param="top_logprobs")
    most = body.max_completion_tokens or body.max_tokens
    prompt = chat_prompt(model, body.messages, service.limits, answer_tokens=most, truncate=body.truncation == "auto")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    asked = requests_for(
        model, body, [prompt.ids], service.limits, service.defaults, max_tokens=most, logprobs=logprobs,
        constraint=json_constraint(model, body.response_format, service.limits),
    )  # fmt: skip
    return model, prompt, asked


def _prepare_text(service: Service, body: TextRequest) -> tuple[Model, list[Echo], list[Asked]]:
    """Return what a text completion asks for, with what each choice echoes; it runs outside the event loop, too."""
    model = service.models.find(body.model)
    if body.best_of not in (None, body.n):
        raise Fault("best_of is not supported", param="best_of", code="unsupported_parameter")
    prompts = _text_prompts(service, model, body)
    most = body.max_tokens if body.max_tokens is not None else min(128, service.limits.max_tokens)
    asked = requests_for(
        model, body, [ids for ids, _ in prompts], service.limits, service.defaults,
        max_tokens=most, logprobs=body.logprobs, prompt_logprobs=body.echo and body.logprobs is not None,
    )  # fmt: skip
    return model, [echo if body.echo else ("", []) for _, echo in prompts for _ in range(body.n)], asked


async def collect(service: Service, answer: Answer, echoes: Sequence[Echo] = ()) -> list[Choice]:
    """Return the choices of an answer when all have ended."""
    choices = choices_of(answer, echoes)
    async for index, event in measured(answer, service.metrics):
        if event.prompt_logprobs:
            await run_in_threadpool(choices[index].add, event)
        else:
            choices[index].add(event)
    return choices


async def _chat_chunks(
    service: Service, answer: Answer, head: Json, body: ChatRequest, own: Json
) -> AsyncIterator[Json | str]:
    """Yield the chunks of a stream; the first one has the fields `own`."""
    head = {**head, "object": "chat.completion.chunk"}
    choices = choices_of(answer)
    usage = _usage_field(body)

    def chunk(index: int, delta: Json, reason: str | None = None, logprobs: Json | None = None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice], **usage}

    for index in range(len(choices)):
        yield {**chunk(index, {"role": "assistant", "content": ""}), **(own if index == 0 else {})}
    async for index, event in measured(answer, service.metrics):
        choice = choices[index]
        shown = choice.add(event)
        logprobs = choice.chat_logprobs(choice.newest)
        for kind, text in shown:
            delta = {"content": text} if kind == "text" else {"part": {"type": kind, "text": text}}
            yield chunk(index, delta, None, logprobs)
            logprobs = None
        if logprobs:
            yield chunk(index, {"content": ""}, None, logprobs)
        if choice.finish_reason:
            yield chunk(index, {}, choice.finish_reason)
    if usage:
        yield {**head, "choices": [], "usage": usage_of(answer, choices, body.n)}
    yield "[DONE]"


async def _text_chunks(
    service: Service, answer: Answer, head: Json, body: TextRequest, echoes: list[Echo]
) -> AsyncIterator[Json | str | bytes]:
    choices = choices_of(answer, echoes)
    usage = _usage_field(body)

    def chunk(index: int, text: str, reason: str | None = None, logprobs: Json | None = None) -> Json:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice], **usage}

    waiting = [text for text, _ in echoes]
    if body.logprobs is None:  # else the prompt comes with its log-probabilities, together with the first token
        for index, text in enumerate(waiting):
            if text:
                yield chunk(index, text)
        waiting = [""] * len(echoes)

    def take(index: int, event: Event) -> Json | None:
        choice = choices[index]
        text = waiting[index] + "".join(text for _, text in choice.add(event))
        waiting[index] = ""
        logprobs = choice.text_logprobs(choice.newest)
        return chunk(index, text, choice.finish_reason, logprobs) if text or logprobs or choice.finish_reason else None

    async for index, event in measured(answer, service.metrics):
        if event.prompt_logprobs:  # of thousands of tokens
            yield await run_in_threadpool(lambda index, event: large_event(take(index, event)), index, event)
        elif (item := take(index, event)) is not None:
            yield item
    if usage:
        yield {**head, "choices": [], "usage": usage_of(answer, choices, body.n)}
    yield "[DONE]"


def _text_prompts(service: Service, model: Model, body: TextRequest) -> list[tuple[list[int], Echo]]:
    """Return (ids, echo) of every prompt; text begins a document, ids are taken as they are."""
    tokenizer, limits = model.tokenizer, service.limits
    given: list[Any] = [body.prompt] if isinstance(body.prompt, str) else list(body.prompt)
    if given and all(isinstance(each, int) for each in given):
        given = [given]
    if not given:
        raise Fault("prompt is an empty list", param="prompt")
    check_choices(len(given) * body.n, limits)  # before any of them is encoded
    found: list[tuple[list[int], Echo]] = []
    for prompt in given:
        if len(prompt) > limits.max_conversation_chars:
            raise Fault(f"a prompt has {len(prompt)} characters, at most {limits.max_conversation_chars} may be",
                        param="prompt")  # fmt: skip
        if isinstance(prompt, str):
            ids = tokenizer.encode(prompt)
            found.append(([tokenizer.bos, *ids], (tokenizer.decode(ids), ids)))  # as UTF-8 has it
            continue
        if not prompt or not all(0 <= id_ < tokenizer.vocab_size for id_ in prompt):
            raise Fault(f"a prompt of ids needs at least one, from 0 to {tokenizer.vocab_size - 1}", param="prompt")
        found.append((prompt, (tokenizer.decode(prompt), prompt)))
    return found


def _head(prefix: str, kind: str, service: Service, model: Model) -> Json:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model.name,
        "system_fingerprint": service.models.fingerprint(model.digest),
    }  # fmt: skip


def _usage_field(body: Generation) -> Json:
    """Return what every chunk says of usage: null where it comes at the end, else nothing."""
    return {"usage": None} if body.stream_options and body.stream_options.include_usage else {}
