"""Health, metrics, the description, and who may ask what: malformed and foreign requests are refused with a reason."""

import json
import re
import signal
import threading
from typing import Any

import httpx2 as httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import TypeAdapter

from mlxchat.planning.memory import Device
from mlxchat.serve import answers
from serve.servers import CHAT

URL = "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "the cat"}], "temperature": 0.0, "max_tokens": 8}


def post(server: Any, body: bytes | str, **headers: str) -> Any:
    headers = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return server.client.post(URL, content=body, headers=headers)


def test_metrics_count_requests_and_tokens(server):
    def metrics() -> dict[str, float]:
        response = server.client.get("/metrics")
        samples = [each for family in text_string_to_metric_families(response.text) for each in family.samples]
        return {"".join([each.name, *each.labels.values()]): each.value for each in samples}

    before, told, after = metrics(), server.chat().json()["usage"], metrics()
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["mlxchat_prompt_tokens_total"] == told["prompt_tokens"]
    assert grown["mlxchat_generated_tokens_total"] == told["completion_tokens"]
    assert grown["mlxchat_requests_total/v1/chat/completions200"] == 1
    assert grown["mlxchat_time_to_first_token_seconds_count"] == 1
    assert after["mlxchat_rows_running"] == after["mlxchat_rows_waiting"] == 0


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
    for path in ("/page/..%2f..%2fapp.py", "/page/%2e%2e/app.py", "/page/", "/page/%00"):
        assert server.client.get(path).status_code == 404


def test_key_protects_all_but_page_and_health(start):
    with start(api_key="secret", loopback_only=False) as guarded:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/api/runs"):
            assert guarded.client.get(path).status_code == 401
            assert guarded.client.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
            assert guarded.client.get(path, headers={"authorization": "Bearer secret"}).status_code == 200
        assert guarded.client.post(URL, json=QUESTION).status_code == 401
        for path in ("/", "/runs", "/page/chat.js", "/health"):
            assert guarded.client.get(path).status_code == 200


def test_dns_rebinding_is_refused(server):
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "0.0.0.0"):
        for path in ("/v1/models", "/", "/metrics", "/health"):
            assert server.client.get(path, headers={"host": host}).status_code in (400, 403)
    for host in ("LOCALHOST", "localhost.", "127.0.0.2", "[::1]:1"):
        assert server.client.get("/v1/models", headers={"host": host}).status_code == 200


def test_cross_site_posts_are_refused_without_cors(server, start):
    body, site = json.dumps({**QUESTION, "max_tokens": 1}), "https://site.example"
    for where in ("cross-site", "same-site"):
        assert post(server, body, sec_fetch_site=where, origin=site).status_code == 403
    assert post(server, body, sec_fetch_site="same-origin", origin=server.url).status_code == 200
    assert post(server, body, content_type="text/plain").status_code == 415, "what forms of other sites can send"
    asking = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    with start(cors=[site]) as open_one:
        for running, origin, allowed in (
            (server, site, None),
            (open_one, site, site),
            (open_one, "https://b.io", None),
        ):
            told = running.client.options(URL, headers={**asking, "origin": origin})
            assert told.headers.get("access-control-allow-origin") == allowed
            status = post(running, body, sec_fetch_site="cross-site", origin=origin).status_code
            assert status == (200 if allowed else 403)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"[]", 400), (b"\xff\xfe", 400), (b'{"a":' + b"[" * 90_000, 400),
        (b'{"' + b"x" * 5000 + b'\\ud800": 1}', 400), (b'{"messages": "' + b"a" * 1_100_000, 413),
    ],
    ids=range(6),
)  # fmt: skip
def test_malformed_bodies_are_refused(server, body, status):
    response = post(server, body)
    assert (response.status_code, len(response.text) < 1000) == (status, True)
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert server.chat().status_code == 200


# mlxchat serve in a new process, and its limits


def test_serve_prints_its_address_answers_and_stops(served, start_mlxchat):
    process = start_mlxchat("serve", f"outputs={served}", "--port", "0", "sft", "--temperature", "0")
    assert process.stdout is not None
    try:
        line: Any = ""
        while "http://" not in line:
            line = process.stdout.readline()
            assert line, "it ended"
        url = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        body = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 4}
        first, second = (httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json() for _ in range(2))
        assert first["choices"] == second["choices"], "the temperature is the one that was asked for"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
        assert "Traceback" not in process.stdout.read()
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def test_description_says_what_is_answered(server):
    described = server.client.get("/openapi.json").json()["paths"]

    def check(response: Any, path: str) -> None:
        method, _, path = path.partition(" ")
        status = str(response.status_code) if response.is_success else "4XX"
        schema = described[path][method]["responses"][status]["content"]["application/json"]["schema"]
        answer: Any = TypeAdapter(getattr(answers, schema["$ref"].rpartition("/")[2]))
        assert answer.validate_python(response.json(), strict=True) == response.json(), "no other fields"

    ask = server.client.post
    check(server.chat(logprobs=True, top_logprobs=2, truncation="auto"), f"post {URL}")
    check(ask("/v1/completions", json={"prompt": "a", "max_tokens": 2}), "post /v1/completions")
    check(server.client.get("/v1/models"), "get /v1/models")
    check(server.client.get("/v1/models/sft"), "get /v1/models/{name}")
    for body in ({}, {**QUESTION, "temprature": 1}, {**QUESTION, "n": 0}):
        check(ask(URL, json=body), f"post {URL}")
    wrong = server.client.delete("/v1/models")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET")


def test_model_beyond_memory_is_refused_before_its_weights_are_read(served, command, monkeypatch):
    monkeypatch.setattr("mlxchat.serve.models.find_device", lambda **options: Device(limit_bytes=1000))
    monkeypatch.setattr("mlxchat.serve.api.run_server", lambda *arguments, **options: 0)
    code, said = command("serve", "sft", f"outputs={served}", "--port", "0")
    assert code == 2
    assert re.search(rf"^error: {CHAT} .*--bits 4", said, re.MULTILINE), said


def test_serving_other_machines_requires_a_key(served, say, monkeypatch):
    monkeypatch.delenv("MLXCHAT_API_KEY", raising=False)
    told = say("serve", f"outputs={served}", "--host", "0.0.0.0", code=2)
    assert told.startswith("error: --host 0.0.0.0 can be reached from other machines and requires a key")
