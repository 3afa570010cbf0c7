"""An outputs folder with two tiny models, and chat servers on it in this process.

Fixtures of tests/serve and tests/evals, which import them.
"""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn

from kit.models import make_model
from kit.scripted import ScriptedDecoder
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.batch import Generator
from mlxchat.engine.generate import Scheduler
from mlxchat.model.checkpoint import save_checkpoint
from mlxchat.model.gpt import GPT
from mlxchat.serve.api import Service, make_app
from mlxchat.serve.models import Model, Models, load_scheduler
from mlxchat.serve.requests import Defaults
from mlxchat.serve.security import Limits
from mlxchat.serve.worker import Worker
from mlxchat.store.manifest import write_manifest
from mlxchat.store.store import Store

CHAT, BASE = "sft-d2-" + "c" * 16, "pretrain-d2-" + "b" * 16


@pytest.fixture(scope="session")
def model() -> GPT:
    return make_model(context_tokens=128, seed=3, scale=0.3, head_scale=0.15)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, model: GPT, tokenizer: Tokenizer) -> Path:
    """An outputs folder as a run leaves it: a base model, a chat model made from it, and scores of the latter."""
    outputs = tmp_path_factory.mktemp("served") / "outputs"
    made: dict[str, Any] = {}
    for name, stage, kind, metrics in (
        (BASE, "pretrain", "base", {"val_bpb": 1.5}),
        (CHAT, "sft", "chat", {"val_loss": 0.5, "broken": None}),
    ):
        folder = outputs / "store" / name
        folder.mkdir(parents=True)
        save_checkpoint(folder, model, tokenizer, {"stage": stage, "format": kind})
        _describe(folder, stage, "checkpoint", metrics, {"checkpoint": made} if made else {})
        made = {"step": stage, "artifact": name, "rid": name[-16:] + "x" * 36, "tree": "0" * 64}
        Store(outputs).set_ref("latest", stage, folder)
    scores = outputs / "store" / ("eval-d2-" + "e" * 16)
    scores.mkdir()
    _describe(scores, "eval", "scores", {"kinds_mc": 0.25}, {"checkpoint": made})
    return outputs


def _describe(folder: Path, stage: str, kind: str, metrics: dict[str, Any], inputs: dict[str, Any]) -> None:
    manifest = {
        "rid": folder.name[-16:] + "x" * 36, "name": folder.name, "stage": stage, "step": stage, "kind": kind,
        "version": 1, "config": {"seed": 42, stage: {"lr": 0.1}}, "full_config": {}, "excluded": {}, "inputs": inputs,
        "tree": "0" * 64, "outputs": [], "metrics": metrics, "seconds": 1.0, "run": "run1", "attempts": [],
        "published": f"2026-01-01T00:00:0{len(stage) % 10}+00:00", "overrides": [], "seed": 42,
    }  # fmt: skip
    write_manifest(folder, manifest)


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
        ends = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < ends, "it never came to that"
            time.sleep(0.01)


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """Return what a streamed answer consists of."""
    assert response.headers["content-type"].startswith("text/event-stream")
    data = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(each) for each in data]


@pytest.fixture(scope="session")
def start(served: Path) -> Callable[..., Server]:
    """Make a server with these limits and options.

    `seconds` a token makes it answer with `says`, or the alphabet.
    """

    def make(
        *, limits: dict[str, int] | None = None, seconds: float | None = None, says: str | list[int] | None = None,
        outputs: Path = served, **options: Any,
    ) -> Server:  # fmt: skip
        def load(model: Model, limits: Limits) -> Scheduler:
            if seconds is None:
                return load_scheduler(model, limits)
            tokenizer = model.tokenizer
            said = tokenizer.encode(says) if isinstance(says, str) else says
            script = [*range(ord("a"), ord("z") + 1)] * 1000 if said is None else [*said, *tokenizer.ends[:1]]
            decoder = ScriptedDecoder([script], tokenizer.vocab_size, seconds)
            generator = Generator(decoder, max_rows=limits.max_rows, kept_tokens=limits.kept_tokens)
            return Scheduler(generator, tokenizer)

        bounds = Limits(**limits or {})
        models = Models(Store(outputs), outputs / "store" / CHAT)
        return Server(Service(models, Worker(bounds, load), Defaults()), **options)

    return make
