"""An outputs folder with two tiny models, and chat servers on it in this process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.models import ScriptedDecoder, make_model
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.batch import Generator
from mlxchat.engine.generate import Scheduler
from mlxchat.model.checkpoint import save_checkpoint
from mlxchat.model.gpt import GPT
from mlxchat.serve.api import Service
from mlxchat.serve.models import Model, Models, load_scheduler
from mlxchat.serve.requests import Defaults
from mlxchat.serve.security import Limits
from mlxchat.serve.worker import Worker
from mlxchat.store.manifest import write_manifest
from mlxchat.store.store import Store
from serve.servers import BASE, CHAT, Server


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


@pytest.fixture(scope="session")
def start(served: Path) -> Callable[..., Server]:
    """Make a server with these limits and options; with `seconds` a token it answers `says`, or the alphabet."""

    def make(
        *, limits: dict[str, int] | None = None, seconds: float | None = None, says: str | list[int] | None = None,
        outputs: Path = served, third_party: dict[str, Path] | None = None, **options: Any,
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
        default = next(iter((third_party or {}).values()), outputs / "store" / CHAT)
        models = Models(Store(outputs), default, third_party=third_party or {})
        return Server(Service(models, Worker(bounds, load), Defaults()), **options)

    return make


@pytest.fixture(scope="module")
def server(start: Callable[..., Server]) -> Iterator[Server]:
    with start() as running:
        yield running


@pytest.fixture
def slow(start: Callable[..., Server]) -> Iterator[Server]:
    """A server with one row, a queue of two, and 50 tokens/s."""
    with start(limits={"max_rows": 1, "max_queue": 2}, seconds=0.02) as running:
        yield running
