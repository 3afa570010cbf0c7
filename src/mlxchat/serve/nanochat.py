"""nanochat's own routes (scripts/chat_web.py): what its page and scripts written for it ask."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from mlxchat.engine.scheduler import Event
from mlxchat.engine.scheduler import Request as Asked
from mlxchat.ops.machine import device_kind
from mlxchat.serve.listening import EventStream, measured, while_connected
from mlxchat.serve.models import Model
from mlxchat.serve.prompts import chat_prompt, requests_for
from mlxchat.serve.schemas import Generation, Message, NanochatRequest
from mlxchat.serve.service import Service
from mlxchat.serve.worker import Answer

Json = dict[str, Any]
_DEFAULT_TOKENS = 512
_SHOWN = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")


def nanochat_routes(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()
    worker = service.worker

    @routes.post("/chat/completions", response_model=None)
    async def chat(body: NanochatRequest, request: Request) -> Response | Json:
        model, asked = await run_in_threadpool(_prepare, service, body)
        answer = worker.ask(model, asked)
        if body.stream:
            return EventStream(answer, _chunks(service, answer))
        return {"response": await while_connected(request, answer, _whole(service, answer)), "gpu": 0}

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health")
    async def health(response: Response) -> Json:
        ready = worker.alive and worker.has_loaded
        response.status_code = 200 if ready else 503  # what probes look at
        return {
            "status": "stopping" if not worker.alive else "ok" if ready else "loading", "ready": ready, "num_gpus": 1,
            "available_workers": int(ready and worker.num_choices < service.limits.max_rows),
        }  # fmt: skip

    @routes.get("/stats")
    async def stats() -> Json:
        busy = int(worker.num_choices > 0)
        return {
            "total_workers": 1, "available_workers": 1 - busy, "busy_workers": busy,
            "workers": [{"gpu_id": 0, "device": device_kind("auto")}],
            "rows_running": worker.num_running, "rows_waiting": worker.num_waiting,
            "models": worker.loaded, "generated_tokens": worker.tokens_generated,
        }  # fmt: skip

    return routes


def _prepare(service: Service, body: NanochatRequest) -> tuple[Model, list[Asked]]:
    """Return what a request asks for; it reads files and encodes text, so it runs outside the event loop."""
    model = service.models.find(None)
    most = body.max_tokens or min(_DEFAULT_TOKENS, service.limits.max_tokens)
    messages = [Message(role=message.role, content=message.content) for message in body.messages]
    prompt = chat_prompt(model, messages, service.limits, answer_tokens=most, truncate=True)
    settings = Generation(temperature=body.temperature, top_k=body.top_k)
    return model, requests_for(model, settings, [prompt.ids], service.limits, service.defaults, max_tokens=most)


async def _texts(service: Service, answer: Answer) -> AsyncIterator[str]:
    """Yield text as nanochat's server has it: the delimiters of calls are part of it."""
    special = answer.model.tokenizer.special_ids
    shown = {special[name]: name for name in _SHOWN}
    async for _, event in measured(answer, service.metrics):
        text = _text_of(event, shown)
        if text:
            yield text


def _text_of(event: Event, shown: dict[int, str]) -> str:
    return event.text + ("" if event.token is None else shown.get(event.token, ""))


async def _chunks(service: Service, answer: Answer) -> AsyncIterator[Json]:
    async for text in _texts(service, answer):
        yield {"token": text, "gpu": 0}
    yield {"done": True}


async def _whole(service: Service, answer: Answer) -> str:
    return "".join([text async for text in _texts(service, answer)])
