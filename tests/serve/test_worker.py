"""The worker: full queue, disconnects, failures, shutdown, several models."""

import gc
import string
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest

from serve.servers import chunks


def streaming(server: Any, **body: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 100, "stream": True, **body}
    return server.client.stream("POST", "/v1/chat/completions", json=body)


def test_full_queue_gives_429_with_retry_after(slow):
    with ThreadPoolExecutor() as pool:
        accepted = [pool.submit(slow.chat, max_tokens=15) for _ in range(3)]
        slow.until(lambda: slow.worker.num_choices == 3)
        refused = slow.chat()
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert [each.result().status_code for each in accepted] == [200] * 3
    assert slow.chat().status_code == 200


def test_disconnect_cancels_generation(slow):
    with streaming(slow) as response:
        next(response.iter_lines())
        assert slow.worker.num_choices == 1
    slow.until(lambda: slow.worker.num_choices == 0, seconds=1.5)
    with pytest.raises(httpx.ReadTimeout):
        slow.client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]}, timeout=0.3)
    slow.until(lambda: slow.worker.num_choices == 0, seconds=1.5)
    with streaming(slow), streaming(slow):  # the second one waits for a row
        assert slow.worker.num_choices == 2
    slow.until(lambda: slow.worker.num_choices == 0, seconds=1.5)
    assert slow.chat().json()["choices"][0]["message"]["content"] == string.ascii_lowercase[:12]


def test_failed_computation_is_reported_and_recovers(slow, monkeypatch):
    assert slow.chat().status_code == 200
    (scheduler,) = slow.worker._schedulers.values()
    monkeypatch.setattr(scheduler, "step", lambda: 1 / 0)
    failed = slow.chat()
    assert failed.status_code == 500
    assert failed.json()["error"] == {
        "message": "the computation failed: ZeroDivisionError: division by zero", "type": "server_error",
        "param": None, "code": None,
    }  # fmt: skip
    assert slow.chat().status_code == 200, "the model was loaded anew"


def test_signal_lets_answers_finish_within_the_grace_period(start):
    with start(seconds=0.05) as server, ThreadPoolExecutor() as pool:
        server.server.config.timeout_graceful_shutdown = 1
        short = pool.submit(server.chat, max_tokens=4)
        with streaming(server) as response:
            lines = response.iter_lines()
            next(lines)
            server.server.should_exit = True
            with pytest.raises(httpx.HTTPError):
                list(lines)
        assert short.result().json()["usage"]["completion_tokens"] == 4
        server.thread.join(5)
        assert not server.thread.is_alive()


def test_unloaded_models_are_freed(start, monkeypatch):
    """A reference cycle would keep an evicted model until the garbage collector runs."""
    server = start(limits={"max_models": 1})
    load, loaded = server.worker._load, []

    def recorded(model: Any, limits: Any) -> Any:
        assert [each() for each in loaded if each() is not None] == [], "in memory while another one is loaded"
        scheduler = load(model, limits)
        loaded.append(weakref.ref(scheduler.source.decoder.model))
        return scheduler

    monkeypatch.setattr(server.worker, "_load", recorded)
    gc.collect()
    gc.disable()
    try:
        with server:
            for name in ("sft", "pretrain", "sft"):
                body = {"model": name, "prompt": "a", "max_tokens": 2}
                assert server.client.post("/v1/completions", json=body).status_code == 200
            assert [each() is None for each in loaded] == [True, True, False]
    finally:
        gc.enable()


def stream_once(server: Any, number: int) -> tuple[int, str, str]:
    """Return (number, streamed text, why it ended) of one request with its own question, seed and length."""
    options = {"seed": number, "temperature": 1.0, "max_tokens": 10 + number % 20, "stream": True}
    told = [chunk["choices"][0] for chunk in chunks(server.chat(f"the cat {number}", **options))]
    texts = [each["delta"].get("content") or each["delta"].get("part", {}).get("text", "") for each in told]
    return number, "".join(texts), told[-1]["finish_reason"]


def test_sixteen_concurrent_streams_are_exact(start):
    """Each answer equals that of the same request alone."""
    with start(limits={"max_rows": 8}) as server, ThreadPoolExecutor(16) as pool:
        expected = [stream_once(server, number) for number in range(16)]
        assert [*pool.map(lambda number: stream_once(server, number), range(16))] == expected
        server.until(lambda: server.worker.num_choices == 0)


def test_further_model_waits_for_an_idle_one(start, monkeypatch):
    with start(limits={"max_models": 1}, seconds=0.0) as server, ThreadPoolExecutor() as pool:
        worker, gate, entered, loads = server.worker, threading.Event(), threading.Event(), []
        server.until(lambda: len(worker.loaded) == 1)
        (scheduler,) = worker._schedulers.values()
        own, load = scheduler.step, worker._load
        monkeypatch.setattr(scheduler, "step", lambda: entered.set() or (gate.wait(60) and own()))
        monkeypatch.setattr(worker, "_load", lambda model, *more: loads.append(model.name[:3]) or load(model, *more))

        def ask(model: str) -> int:
            body = {"model": model, "prompt": "a", "max_tokens": 20}
            return int(server.client.post("/v1/completions", json=body).status_code)

        asked = []
        for number, model in enumerate(("sft", "pretrain", "sft", "pretrain"), 1):
            asked.append(pool.submit(ask, model))
            server.until(lambda number=number: worker.num_choices == number)
            assert entered.wait(60)
        gate.set()
        assert [each.result() for each in asked] == [200] * 4
    assert loads == ["pre", "sft", "pre"], "first come, first served: no model waits forever"
