"""A chat server in a thread of this process, and the names of the models that it serves."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import uvicorn

from kit.commands import wait_until
from mlxchat.serve.api import Service, make_app
from mlxchat.serve.worker import Worker

CHAT, BASE = "sft-d2-" + "c" * 16, "pretrain-d2-" + "b" * 16


class Server:
    """A server in a thread of this process."""

    def __init__(self, service: Service, **options: Any) -> None:
        self.service = service
        config = uvicorn.Config(
            make_app(service, **options), host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=5,
        )  # fmt: skip
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> "Server":
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        self.client = httpx.Client(base_url=self.url, timeout=30)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(15)
        assert not self.thread.is_alive()

    @property
    def worker(self) -> Worker:
        return self.service.worker

    def chat(self, text: str = "the cat", **body: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 12, **body}
        return self.client.post("/v1/chat/completions", json=body)

    def until(self, reached: Callable[[], bool], seconds: float = 10) -> None:
        wait_until(reached, seconds=seconds)


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """Return what a streamed answer consists of."""
    assert response.headers["content-type"].startswith("text/event-stream")
    data = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(each) for each in data]
