"""nanochat's mixtures and suites on complete data sets, if a local hub of them is present."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import TaskItem
from mlxchat.data.conversation import render_conversation, render_for_completion
from mlxchat.data.mixture import Mixture
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.tasks import load_item
from mlxchat.tasks.answers import final_number

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "hub"
# Sizes of the hub's data sets; SmolTalk and MMLU's training split are reduced there.
ROWS = {
    ("smoltalk", "train"): 5600, ("smoltalk", "test"): 400, ("mmlu", "auxiliary_train"): 5000, ("mmlu", "test"): 14_042,
    ("mmlu", "validation"): 1531, ("mmlu", "dev"): 285, ("gsm8k", "train"): 7473, ("gsm8k", "test"): 1319,
    ("arc_easy", "train"): 2251, ("arc_easy", "validation"): 570, ("arc_easy", "test"): 2376,
    ("arc_challenge", "train"): 1119, ("arc_challenge", "test"): 1172, ("humaneval", "test"): 164,
    ("identity_conversations", "train"): 1000,
}  # fmt: skip

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no local hub")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The hub's address, with caches of its own."""
    spec = importlib.util.spec_from_file_location("serve", FOLDER / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    serve: Any = importlib.util.module_from_spec(spec)
    sys.modules["serve"] = serve
    spec.loader.exec_module(serve)
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch, serve.HubServer(str(FOLDER / "root")) as hub:
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HOME", str(cache / "hf"))
        patch.setenv("MLXCHAT_CACHE", str(cache / "own"))
        yield hub.url


def here(item: TaskItem, url: str) -> TaskItem:
    """Return an item that reads from the hub or the bundled words instead of other addresses."""
    if item.task == "identity_conversations":
        return replace(item, source={"url": f"{url}/files/identity_conversations.jsonl"})
    return replace(item, source={"words": "bundled"}) if "spelling" in item.task else item


@pytest.mark.parametrize(("name", "split"), ROWS, ids=["-".join(key) for key in ROWS])
def test_every_row_is_a_conversation(name: str, split: str, served: str) -> None:
    task = load_item(here(TaskItem(task=name, split=split), served))
    assert len(task) == ROWS[name, split]
    for index in range(0, len(task), 1 + len(task) // 500):
        conversation = task[index]
        answer = conversation["messages"][-1]["content"]
        if task.kind == "categorical":
            assert [letter for letter in conversation["letters"] if task.evaluate(conversation, letter)] == [answer]
        if name == "gsm8k":
            assert final_number(answer[-1]["text"]) is not None
            assert task.reward(conversation, answer[-1]["text"]) == 1.0


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # Training rows of the hub's data sets, and what the lines take of them.
        ("oct2025_mid", 5600 + 5000 + 7473 + 2 * 1000 + 200_000 + 80_000),
        ("oct2025_sft", 2251 + 1119 + 7473 + 5600 + 1000 + 300 + 300),
        ("jul2026_sft", 5600 + 3 * 5000 + 4 * 7473),
        ("oct2025_mid_validation", 400 + 5200 + 420),
        ("oct2025_sft_validation", 400),
    ],
)
def test_nanochats_mixtures_have_the_expected_size(name: str, count: int, served: str) -> None:
    place = "validation" if name.endswith("validation") else "mixture"
    lines = getattr(compose_config([f"mixture@sft.{place}={name}"]).config.sft, place)
    mixture = Mixture({entry: here(item, served) for entry, item in lines.items()}, seed=42)
    assert len(mixture) == count
    tokenizer = Tokenizer({bytes([byte]): byte for byte in range(256)})
    for index in range(0, count, 1 + count // 200):
        ids, mask = render_conversation(tokenizer, mixture[index], max_tokens=None)
        assert 0 < sum(mask) < len(ids)


def test_every_chatcore_task_renders_a_prompt(served: str) -> None:
    tokenizer = Tokenizer({bytes([byte]): byte for byte in range(256)})
    for item in compose_config(["suite=chatcore"]).config.suite.values():
        task = load_item(here(item, served))
        prompt = render_for_completion(tokenizer, task[len(task) - 1])
        assert prompt[-1] == tokenizer.special_ids["<|assistant_start|>"]
