"""Distillation from our own server gives a mixture for SFT."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxchat.cli import dispatch
from mlxchat.config.schema import TaskItem
from mlxchat.data.conversation import render_conversation
from mlxchat.data.mixture import Mixture


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "ask.txt").write_text("\n".join(["the cat", "the dog", "sat on", "<|assistant_end|> mat"]))

    def run(running: Any, *options: str) -> list[Any]:
        arguments = ["ask.txt", "--teacher", f"{running.url}/v1", "--model", "sft", "--out", "out.jsonl"]
        assert dispatch(["distill", *arguments, *options]) == 0
        return [json.loads(line)["messages"][-1] for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    return run


def test_answers_of_our_server_become_a_mixture(start, ask, tokenizer, tmp_path, monkeypatch):
    with start(limits={"max_rows": 3}) as running:
        options = ["--max-tokens", "8", "--temperature", "1", "--body", "seed=3", "--keep-cut", "--samples", "2"]
        first = ask(running, *options, "--concurrency", "8")
        monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path / "elsewhere"))
        again = ask(running, *options, "--concurrency", "1")
    assert first == again, "a seed's answer is the same alone and among others"
    item = TaskItem(task="jsonl", path=str(tmp_path / "out.jsonl"))
    mixture = Mixture({"teacher": item}, seed=0)
    assert len(mixture) == len(first)
    for conversation in mixture:
        ids, mask = render_conversation(tokenizer, conversation)
        assert (ids[-1], mask[-1]) == (tokenizer.assistant_end, 1)
        assert ids.count(tokenizer.assistant_end) == 1
