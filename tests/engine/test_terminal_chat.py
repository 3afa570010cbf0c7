"""Base models in the terminal continue texts, without memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.commands import Command
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.generate import Engine
from mlxchat.errors import ConfigError
from mlxchat.evals.samples import continue_prompts
from mlxchat.model.checkpoint import save_checkpoint
from mlxchat.model.gpt import GPT
from mlxchat.planning.memory import Device
from mlxchat.terminal.chat import Chat

SETTINGS = {"temperature": 0.0, "top_k": None, "max_tokens": 6, "seed": 0}


@pytest.fixture
def folder(tmp_path: Path, model: GPT, tokenizer: Tokenizer) -> Path:
    save_checkpoint(tmp_path, model, tokenizer, {"stage": "pretrain", "format": "base"})
    return tmp_path


def test_text_is_printed_with_its_continuation(
    folder: Path, model: GPT, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    ((_, expected),) = continue_prompts(Engine(model, tokenizer), ["the cat"], 6)
    Chat.load(folder, **SETTINGS).answer_once("the cat")
    assert capsys.readouterr().out == f"the cat{expected}\n"


def test_second_text_does_not_depend_on_the_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat.load(folder, **SETTINGS)
    for _ in range(2):
        chat.answer_once("the dog")
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert chat.messages == []


def test_seed_and_top_k_determine_continuations(model: GPT, tokenizer: Tokenizer) -> None:
    def drawn(seed: int, top_k: int | None) -> list[tuple[str, str]]:
        return continue_prompts(Engine(model, tokenizer), ["the cat"] * 4, 8, temperature=1.5, top_k=top_k, seed=seed)

    assert drawn(1, None) == drawn(1, None) != drawn(2, None)
    assert drawn(1, 1) == continue_prompts(Engine(model, tokenizer), ["the cat"] * 4, 8), "top_k=1 is greedy"


def test_model_too_large_for_memory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(limit_bytes=1000, limit_is="a test")
    monkeypatch.setattr("mlxchat.terminal.chat.find_device", lambda **options: device)
    with pytest.raises(
        ConfigError, match=r"needs about .*; the limit is .* \(a test\)\. To lower the need: --kv-bits 4"
    ):
        Chat.load(folder, **SETTINGS)


def test_impossible_settings_are_refused(command: Command, tmp_path: Path) -> None:
    code, printed = command("chat", "-p", "Hi", "--temperature", "-1", f"outputs={tmp_path / 'outputs'}")
    assert code == 2
    assert "--temperature and --top-k must be at least 0, --max-tokens at least 1" in printed
