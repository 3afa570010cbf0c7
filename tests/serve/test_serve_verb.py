"""`mlxchat serve` in a new process, and its memory limits."""

import re
import signal
from typing import Any

import httpx2 as httpx
import pytest

from kit.serving import CHAT
from mlxchat.planning.memory import Device


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


def test_model_beyond_memory_is_refused_before_its_weights_are_read(served, command, monkeypatch):
    monkeypatch.setattr("mlxchat.serve.models.find_device", lambda **options: Device(limit_bytes=1000))
    monkeypatch.setattr("mlxchat.serve.api.run_server", lambda *arguments, **options: 0)
    code, said = command("serve", "sft", f"outputs={served}", "--port", "0")
    assert code == 2
    assert re.search(rf"^error: {CHAT} .*--bits 4", said, re.MULTILINE), said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "error: --host 0.0.0.0 can be reached from other machines and requires a key"),
        (["--max-rows", "0"], "error: --max-rows is 0, expected a whole number of at least 1"),
        (["eval"], "error: "),
    ],
)
def test_serve_refuses_invalid_options(served, arguments, message, say, monkeypatch):
    monkeypatch.delenv("MLXCHAT_API_KEY", raising=False)
    assert say("serve", f"outputs={served}", *arguments, code=2).startswith(message)
