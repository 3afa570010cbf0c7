"""Health, metrics and access control."""

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import TypeAdapter

from mlxchat.serve import answers

CHAT = "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "the cat"}], "temperature": 0.0, "max_tokens": 8}


def test_metrics_count_requests_and_tokens(server):
    def metrics() -> dict[str, float]:
        response = server.client.get("/metrics")
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        samples = [each for family in text_string_to_metric_families(response.text) for each in family.samples]
        return {"".join([each.name, *each.labels.values()]): each.value for each in samples}

    before, told, after = metrics(), server.chat().json()["usage"], metrics()
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["mlxchat_prompt_tokens_total"] == told["prompt_tokens"]
    assert grown["mlxchat_generated_tokens_total"] == told["completion_tokens"]
    assert grown["mlxchat_requests_total/v1/chat/completions200"] == 1
    assert grown["mlxchat_time_to_first_token_seconds_count"] == 1
    assert after["mlxchat_rows_running"] == 0
    assert {"process_resident_memory_bytes", "process_start_time_seconds", "process_cpu_seconds_total"} <= after.keys()


def test_health_status_reflects_readiness(start):
    server, may_load = start(), threading.Event()
    own = server.worker._load
    server.worker._load = lambda *given: may_load.wait(30) and own(*given)
    with server as slow:
        loading = slow.client.get("/health")
        assert (loading.status_code, loading.json()["status"]) == (503, "loading")
        may_load.set()
        slow.until(lambda: slow.client.head("/health").status_code == 200)
        assert slow.client.get("/health").json() == {"status": "ok", "ready": True}
        for path in ("/", "/metrics"):
            assert slow.client.head(path).status_code == 200


def test_page_loads_nothing_elsewhere_and_forbids_frames(server):
    page = server.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    for place in re.findall(r'(?:src|href)="([^"#]+)"', page.text):
        assert place.startswith("/")
        assert server.client.get(place).status_code == 200


def test_oversized_bodies_are_refused_unread(server):
    assert server.client.post("/v1/chat/completions", json={"messages": "a" * 1_100_000}).status_code == 413

    def pieces() -> Any:
        yield b'{"messages": "'
        for _ in range(20):
            yield b"a" * 100_000

    headers = {"content-type": "application/json"}
    assert server.client.post("/v1/chat/completions", content=pieces(), headers=headers).status_code == 413


def test_key_protects_all_but_page_and_health(start):
    with start(api_key="secret", loopback_only=False) as guarded:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/api/runs"):
            assert guarded.client.get(path).status_code == 401
            assert guarded.client.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
            assert guarded.client.get(path, headers={"authorization": "Bearer secret"}).status_code == 200
        assert guarded.client.post(CHAT, json=QUESTION).status_code == 401
        for path in ("/", "/runs", "/page/chat.js", "/health"):
            assert guarded.client.get(path).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "error: --host 0.0.0.0 can be reached from other machines and requires a key"),
        (["--port", "70000"], "error: --port is 70000"),
        (["--max-rows", "0"], "error: --max-rows is 0, expected a whole number of at least 1"),
        (["eval"], "error: "),
    ],
)
def test_serve_refuses_invalid_options(served, arguments, message, say, monkeypatch):
    monkeypatch.delenv("MLXCHAT_API_KEY", raising=False)
    assert say("serve", f"outputs={served}", *arguments, code=2).startswith(message)


def test_files_and_text_are_processed_outside_the_event_loop(start, monkeypatch):
    """On the event loop, loading tokenizers and encoding prompts would block all streams."""
    from mlxchat.data.tokenizer import Tokenizer
    from mlxchat.serve import models
    from mlxchat.serve.choices import Choice

    threads: dict[str, set[int]] = {}

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            threads.setdefault(name, set()).add(threading.get_ident())
            return function(*arguments, **options)

        return called

    for name in ("read_catalog", "read_manifest"):
        monkeypatch.setattr(models, name, recorded(name, getattr(models, name)))
    monkeypatch.setattr(models, "render_for_completion", recorded("render", models.render_for_completion))
    monkeypatch.setattr(Tokenizer, "encode", recorded("encode", Tokenizer.encode))
    monkeypatch.setattr(Tokenizer, "load", recorded("load", Tokenizer.load))
    monkeypatch.setattr(Choice, "message", recorded("message", Choice.message))
    monkeypatch.setattr(Choice, "text_logprobs", recorded("text_logprobs", Choice.text_logprobs))
    models.read_model.cache_clear()
    with start() as server:
        assert server.chat(truncation="auto").status_code == 200
        body = {"model": "pretrain", "prompt": "a", "max_tokens": 2}
        assert server.client.post("/v1/completions", json=body).status_code == 200
        for path in ("/v1/models", "/v1/models/sft"):
            assert server.client.get(path).status_code == 200
        loop = server.thread.ident
    names = {"read_catalog", "read_manifest", "render", "encode", "load", "message", "text_logprobs"}
    assert threads.keys() == names
    assert [name for name, used in threads.items() if loop in used] == []


def test_description_says_what_is_answered(server):
    """Bug: bodies and answers were described as {}, so a generated client learnt nothing."""
    described = server.client.get("/openapi.json").json()["paths"]

    def check(response: Any, path: str) -> None:
        method, _, path = path.partition(" ")
        status = str(response.status_code) if response.is_success else "4XX"
        schema = described[path][method]["responses"][status]["content"]["application/json"]["schema"]
        answer: Any = TypeAdapter(getattr(answers, schema["$ref"].rpartition("/")[2]))
        assert answer.validate_python(response.json(), strict=True) == response.json(), "no other fields"

    check(server.chat(logprobs=True, top_logprobs=2, truncation="auto"), f"post {CHAT}")
    text = {"prompt": "a", "max_tokens": 2, "logprobs": 1}
    check(server.client.post("/v1/completions", json=text), "post /v1/completions")
    models = server.client.get("/v1/models")
    check(models, "get /v1/models")
    check(server.client.get(f"/v1/models/{models.json()['data'][0]['id']}"), "get /v1/models/{name}")
    for body in ({}, {"messages": []}, {**QUESTION, "temprature": 1}, {**QUESTION, "n": 0}):
        refused = server.client.post(CHAT, json=body)
        assert refused.status_code == 400
        check(refused, f"post {CHAT}")
    wrong = server.client.delete("/v1/models")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET")
