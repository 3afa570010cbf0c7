"""A teacher on this machine that answers, fails and misbehaves as it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlxchat.distill import collect


@dataclass
class Reply:
    """What the server does to one request."""

    text: str | None = "yes"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    finish: str = "stop"
    seconds: float = 0.0
    drop: bool = False
    """Cut the connection in the middle of the answer."""
    usage: dict[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 10, "completion_tokens": 5})
    extra: dict[str, Any] = field(default_factory=dict)


class Teacher:
    """A scripted endpoint: `script(question, tries)` says what happens; what was asked is kept."""

    def __init__(self) -> None:
        self.script: Callable[[str, int], Reply] = lambda question, tries: Reply(f"answer to {question}")
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.paths: set[str] = set()
        self.models = ["only"]
        self.fingerprint: str | None = None
        """What `mlxchat serve` says of a model, and with each answer; None: as other endpoints."""
        self.at_once, self.most_at_once = 0, 0
        self._lock = threading.Lock()
        teacher = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                value: dict[str, Any] = {"data": [{"id": name} for name in teacher.models]}
                if not self.path.endswith("/models"):
                    own = {"mlxchat": {"fingerprint": teacher.fingerprint}} if teacher.fingerprint else {}
                    value = {"id": "m", "object": "model", **own}
                self.send(Reply(raw=json.dumps(value).encode()))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = body["messages"][-1]["content"]
                with teacher._lock:
                    teacher.bodies.append(body)
                    teacher.paths.add(self.path)
                    teacher.headers.append(dict(self.headers))
                    teacher.times.append(time.monotonic())
                    tries = sum(each["messages"][-1]["content"] == question for each in teacher.bodies)
                    teacher.at_once += 1
                    teacher.most_at_once = max(teacher.most_at_once, teacher.at_once)
                try:
                    reply = teacher.script(question, tries)
                    time.sleep(reply.seconds)
                finally:
                    with teacher._lock:
                        teacher.at_once -= 1
                self.send(reply)

            def send(self, reply: Reply) -> None:
                value = {
                    "model": "teacher-2026", "choices": [{"message": {"role": "assistant", "content": reply.text},
                    "finish_reason": reply.finish}], "usage": reply.usage,
                    "system_fingerprint": teacher.fingerprint, **reply.extra,
                }  # fmt: skip
                data = json.dumps(value).encode() if reply.raw is None else reply.raw
                self.send_response(reply.status)
                for name, header in {"Content-Type": "application/json", **reply.headers}.items():
                    self.send_header(name, header)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if reply.drop else data)
                if reply.drop:
                    self.close_connection = True

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None: ...

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def asked(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.bodies]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def teacher() -> Iterator[Teacher]:
    teacher = Teacher()
    yield teacher
    teacher.close()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a cache of its own, where nobody waits long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLXCHAT_TEACHER_API_KEY", raising=False)
    monkeypatch.setattr(collect, "FIRST_PAUSE_SECONDS", 0.01)
    return tmp_path
