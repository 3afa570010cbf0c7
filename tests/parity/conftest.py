"""Where the values computed by nanochat's own code are, and readers for them."""

from __future__ import annotations

import mlxchat  # isort: split

import base64
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from safetensors import safe_open

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.model.gpt import GPT
from mlxchat.model.sizing import GPTSizes
from mlxchat.model.weights import set_parameters
from mlxchat.ops.device import backend

assert mlxchat  # imported before MLX, so that a fast BLAS is loaded first

FOLDER = Path(os.environ.get("MLXCHAT_PARITY") or Path(__file__).resolve().parents[3] / "shared" / "parity")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that asks for `file` every file of the pattern that its mark names, or skip it."""
    mark = metafunc.definition.get_closest_marker("parametrize_files")
    if mark is not None:
        found = sorted(FOLDER.glob(mark.args[0])) if FOLDER.is_dir() else []
        skipped = pytest.param(None, marks=pytest.mark.skip(reason="nanochat's values are not here"), id="absent")
        metafunc.parametrize("file", [pytest.param(path, id=path.stem) for path in found] or [skipped])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "parametrize_files(pattern): run once for each file of nanochat's values")


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    backend.cache_clear()
    yield
    mx.set_default_device(before)
    backend.cache_clear()


@pytest.fixture(scope="session")
def read() -> Callable[[Path], Any]:
    """Read a JSON file of values."""
    cache: dict[Path, Any] = {}

    def read_json(path: Path) -> Any:
        if path not in cache:
            cache[path] = json.loads(path.read_text(encoding="utf-8"))
        return cache[path]

    return read_json


@pytest.fixture
def tokenizer_of(read: Callable[[Path], Any]) -> Callable[[Path], Tokenizer]:
    def make(path: Path) -> Tokenizer:
        """Return the tokenizer of the set to which a file belongs: its name ends as the set is called."""
        data = read(FOLDER / f"tokenizer_{path.stem.rsplit('_', 1)[1]}.json")
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(data["mergeable_ranks_base64"])}
        return Tokenizer(ranks)

    return make


@pytest.fixture
def load_model() -> Callable[..., GPT]:
    def load(path: Path, prefix: str = "") -> GPT:
        """Return the model of October 2025 whose weights a safetensors file holds under a prefix."""
        with safe_open(path, "np") as file:
            config = json.loads(file.metadata()["config"])
            weights = {
                name.removeprefix(prefix): mx.array(file.get_tensor(name))
                for name in file.keys()  # noqa: SIM118  (no dictionary)
                if name.startswith(prefix)
            }
        model = GPT(
            GPTSizes(
                vocab_size=config["vocab_size"], num_layers=config["n_layer"], num_heads=config["n_head"],
                num_kv_heads=config["n_kv_head"], width=config["n_embd"], context_tokens=config["sequence_len"],
                rope_theta=10_000.0,
            )
        )  # fmt: skip
        set_parameters(model, weights)
        return model

    return load
