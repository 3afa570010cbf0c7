"""HTTP servers in a thread of this process: the plain one, and a scripted teacher."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class QuietHandler(BaseHTTPRequestHandler):
    """HTTP/1.1 without a log."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass


class Loopback(ThreadingHTTPServer):
    """A server on a free port, started and stopped as a context manager; broken connections print nothing."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        pass

    def __enter__(self) -> Self:
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()


class Served:
    """What answers by way of a `Loopback`, until it stops."""

    server: Loopback

    def __enter__(self) -> Self:
        self.server.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Answer nobody any more."""
        self.server.__exit__()

    @property
    def url(self) -> str:
        return self.server.url


@dataclass
class Reply:
    """What the server does to one request."""

    text: str | None = "yes"
    status: int = 200
    raw: bytes | None = None
    seconds: float = 0.0
    usage: dict[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 10, "completion_tokens": 5})


class Teacher(Served):
    """A scripted endpoint: `script(question, tries)` says what happens; what was asked is kept."""

    def __init__(self) -> None:
        self.script: Callable[[str, int], Reply] = lambda question, tries: Reply(f"answer to {question}")
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: set[str] = set()
        self.at_once, self.most_at_once = 0, 0
        self._lock = threading.Lock()
        teacher = self

        class Endpoint(QuietHandler):
            def do_GET(self) -> None:
                value = {"data": [{"id": "only"}]}
                self.send(Reply(raw=json.dumps(value).encode()))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = body["messages"][-1]["content"]
                with teacher._lock:
                    teacher.bodies.append(body)
                    teacher.paths.add(self.path)
                    teacher.headers.append(dict(self.headers))
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
                choice = {"message": {"role": "assistant", "content": reply.text}, "finish_reason": "stop"}
                value = {"model": "teacher-2026", "choices": [choice], "usage": reply.usage}
                data = json.dumps(value).encode() if reply.raw is None else reply.raw
                self.send_response(reply.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = Loopback(Endpoint)

    @property
    def url(self) -> str:
        return f"{super().url}/v1"

    def asked(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.bodies]
