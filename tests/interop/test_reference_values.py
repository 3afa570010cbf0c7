"""Imported models against values that nanochat computed from the same files."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.config.schema import ImportConfig
from mlxchat.data.conversation import render_conversation, render_for_completion
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.generate import Engine
from mlxchat.hub import listings
from mlxchat.interop.importing import import_model, model_sizes, pins_of
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.model.gpt import GPT, flatten_parameters
from mlxchat.store.fingerprint import hash_file

HUB = Path(__file__).resolve().parents[3] / "shared" / "hub"
EXPECTED = HUB / "expected_nanochat_import.json"
pytestmark = pytest.mark.skipif(not EXPECTED.exists(), reason="the reference values are not on this machine")
REPOSITORIES = ("sdobson/nanochat", "karpathy/nanochat-d32")


def config_of(**settings: Any) -> ImportConfig:
    return ImportConfig(**{"name": "x", "format": "nanochat", "repository": None, "revision": "main", "folder": None,
                           "step": None, "chat": None, **settings})  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Both models, imported from the local Hub, with their expected values."""
    spec = importlib.util.spec_from_file_location("shared_hub", HUB / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["shared_hub"] = module
    spec.loader.exec_module(module)
    found = {}
    with pytest.MonkeyPatch.context() as patch, module.HubServer(str(HUB / "root")) as server:
        patch.setenv("HF_ENDPOINT", server.url)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("MLXCHAT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        listings.forget()
        expected = json.loads(EXPECTED.read_text())["models"]
        for repository in REPOSITORIES:
            folder = tmp_path_factory.mktemp("model")
            config = config_of(repository=repository)
            sizes, externals = import_model(config, folder, lambda: None)
            pins = pins_of(config, hash_file)
            found[repository] = {
                "folder": folder, "loaded": load_checkpoint(folder), "expected": expected[repository], "pins": pins,
                "externals": externals, "sizes": (sizes, model_sizes(config)),
            }  # fmt: skip
    listings.forget()
    yield found
    del sys.modules["shared_hub"]


@pytest.fixture(params=REPOSITORIES)
def imported(request: pytest.FixtureRequest, models: dict[str, Any]) -> dict[str, Any]:
    return dict(models[request.param])


def loaded(imported: dict[str, Any]) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    model, tokenizer, facts = imported["loaded"]
    return model, tokenizer, facts


def test_tensors_are_nanochats(imported: dict[str, Any]) -> None:
    model, _, facts = loaded(imported)
    parameters = flatten_parameters(model)
    wanted = imported["expected"]["tensors"]
    assert parameters.keys() == wanted.keys()
    for name, expected in wanted.items():
        array = np.asarray(parameters[name])
        assert list(array.shape) == expected["shape"]
        assert array.ravel()[:3].tolist() == expected["first"]
        # A float64 sum of so many numbers depends on the order of adding by about 1e-10.
        assert abs(array.sum(dtype=np.float64) - expected["sum"]) < 1e-8
    stored = {name for name, expected in wanted.items() if expected["dtype"] == "bfloat16"}
    assert facts["imported"]["dtypes"] == dict.fromkeys(stored, "bfloat16")
    assert facts["imported"]["step"] == imported["expected"]["step"]


def test_token_ids_are_nanochats(imported: dict[str, Any]) -> None:
    _, tokenizer, _ = loaded(imported)
    expected = imported["expected"]
    assert len(expected["tokenizer"]) == 20
    for each in expected["tokenizer"]:
        assert tokenizer.encode(each["text"]) == each["ids"]
        assert tokenizer.decode(each["ids"]) == each["text"]
    assert tokenizer.special_ids == expected["special_tokens"]
    told = expected["token_bytes"]
    assert (len(tokenizer.token_bytes), int((tokenizer.token_bytes == 0).sum())) == (told["count"], told["zero"])


def test_conversation_and_mask_are_nanochats(imported: dict[str, Any]) -> None:
    _, tokenizer, _ = loaded(imported)
    expected = imported["expected"]["conversation"]
    ids, mask = render_conversation(tokenizer, {"messages": expected["messages"]})
    assert (ids, mask) == (expected["ids"], expected["mask"])


def test_prompts_are_nanochats(imported: dict[str, Any]) -> None:
    _, tokenizer, _ = loaded(imported)
    asked = [prompt for prompt in imported["expected"]["prompts"] if "messages" in prompt]
    assert asked
    for prompt in asked:
        assert render_for_completion(tokenizer, {"messages": prompt["messages"]}) == prompt["ids"]


def test_logits_are_nanochats(imported: dict[str, Any]) -> None:
    # The reference rounds its rotary tables to bfloat16 (8 bits), ours do not: logits of ±15 differ by 0.003.
    model, _, _ = loaded(imported)
    for prompt in imported["expected"]["prompts"]:
        logits = np.asarray(model(mx.array([prompt["ids"]]))[0, -1])
        assert np.abs(logits[:16] - np.array(prompt["logits_first16"])).max() < 0.005
        assert abs(logits.max() - prompt["logits_max"]) < 0.005
        assert int(logits.argmax()) == prompt["argmax"]


def test_greedy_text_is_nanochats(imported: dict[str, Any]) -> None:
    model, tokenizer, _ = loaded(imported)
    for prompt in imported["expected"]["prompts"]:
        # Each of nanochat's greedy tokens is the most likely one after those before it.
        ids = [*prompt["ids"], *prompt["greedy"]]
        likeliest = mx.argmax(model(mx.array([ids[:-1]]))[0], axis=-1).tolist()
        assert likeliest[len(prompt["ids"]) - 1 :] == prompt["greedy"]
        assert len(prompt["greedy"]) == 24
        assert tokenizer.decode(prompt["greedy"]) == prompt["greedy_text"]


def test_engine_stops_where_nanochat_does(imported: dict[str, Any]) -> None:
    model, tokenizer, _ = loaded(imported)
    for prompt in imported["expected"]["prompts"]:
        if "messages" in prompt:
            (answer,) = Engine(model, tokenizer).complete([prompt["ids"]], max_new_tokens=24, temperature=0.0)
            greedy = prompt["greedy"]
            end = greedy.index(tokenizer.assistant_end) if tokenizer.assistant_end in greedy else len(greedy)
            assert list(answer.ids)[: min(end, len(answer.ids))] == greedy[: min(end, len(answer.ids))]


def test_provenance_names_every_file_with_its_checksum(imported: dict[str, Any]) -> None:
    assert len(imported["externals"]) == 4
    for each in imported["externals"]:
        assert each["url"].startswith("hf://models/")
        assert len(each["revision"]) == 40
        assert len(each["sha256"]) == 64


def test_sizes_are_known_before_the_download(imported: dict[str, Any]) -> None:
    made, foretold = imported["sizes"]
    assert made == foretold


@pytest.mark.parametrize("repository", REPOSITORIES)
def test_folder_of_the_same_files_has_equal_pins(models: dict[str, Any], repository: str) -> None:
    folder = HUB / "root" / "models" / repository
    assert pins_of(config_of(folder=str(folder)), hash_file) == models[repository]["pins"]
