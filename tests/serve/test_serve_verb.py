"""The verb in a process of its own: it says where it is, and ends when it is told to."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx


def test_it_says_where_it_is_answers_and_stops(
    served: Path, start_mlxchat: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start_mlxchat("serve", f"outputs={served}", "--port", "0", "sft", "--temperature", "0")
    assert process.stdout is not None
    try:
        line: Any = ""
        while "http://" not in line:
            line = process.stdout.readline()
            assert line, "it ended"
        url = re.search(r"http://127\.0\.0\.1:\d+", line)[0]  # type: ignore[index]
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
