"""Chat in the terminal: turns, commands, files, pipes, base models."""

import re
from pathlib import Path
from typing import Any

import pytest

from mlxchat.data.tokenizer import render_for_completion
from mlxchat.engine.generate import Engine, continue_prompts
from mlxchat.errors import ConfigError
from mlxchat.terminal.chat import Chat
from serve.servers import BASE, CHAT


@pytest.fixture
def chat(served: Path) -> Chat:
    return Chat.load(served / "store" / CHAT, temperature=0.0, top_k=None, max_tokens=8, seed=0)


def said(chat: Chat) -> list[str]:
    return [message["content"] for message in chat.messages if message["role"] == "user"]


def test_chat_keeps_history_and_system_prompt(chat, model):
    chat.system = "the log"
    chat.ask("the cat")
    chat.ask("the dog")
    told = {"messages": [{"role": "system", "content": "the log"}, *chat.messages[:3]]}
    prompt = render_for_completion(chat.engine.tokenizer, told)
    (expected,) = Engine(model, chat.engine.tokenizer).complete([prompt], max_new_tokens=8)
    special = set(chat.engine.tokenizer.special_ids.values())
    text = "".join(part["text"] for part in chat.messages[-1]["content"])
    assert text == chat.engine.tokenizer.decode([id_ for id_ in expected.ids if id_ not in special])


def test_retry_and_edit_undo_the_last_turn(chat):
    assert chat.obey("/retry") == "there is no question yet"
    chat.ask("the cat")
    chat.obey("/temperature 1.5")
    chat.obey("/seed 3")
    chat.ask("the dog")
    first = chat.messages[-1]
    assert chat.obey("/retry") == ""
    assert (said(chat), chat.messages[-1] != first) == (["the cat", "the dog"], True)
    chat.obey("/seed 3")
    chat.obey("/retry")
    assert chat.messages[-1] == first
    assert chat.obey("/edit the mat") == ""
    assert said(chat) == ["the cat", "the mat"]


def test_base_model_continues_texts_without_memory(served, model, capsys):
    settings: dict[str, Any] = {"temperature": 0.0, "top_k": None, "max_tokens": 6, "seed": 0}
    chat = Chat.load(served / "store" / BASE, **settings)
    ((_, expected),) = continue_prompts(Engine(model, chat.engine.tokenizer), ["the cat"], 6)
    for _ in range(2):
        chat.answer_once("the cat")
    assert capsys.readouterr().out == f"the cat{expected}\n" * 2
    assert chat.messages == []
    assert "knows no system prompt" in chat.obey("/system x")
    with pytest.raises(ConfigError, match="knows no system prompt"):
        Chat.load(served / "store" / BASE, **settings, system="the log")


def test_chat_reports_dropped_turns(chat, capsys, monkeypatch):
    prompts: list[list[int]] = []
    monkeypatch.setattr(chat, "_stream", lambda prompt: prompts.append(prompt) or [])
    chat.system = "the log"
    turns = [{"role": role, "content": f"the cat sat {n}"} for n in range(9) for role in ("user", "assistant")]
    chat.messages = list(turns)
    chat.ask("the mat")
    (line,) = capsys.readouterr().err.splitlines()
    left_out = int(re.match(r"left out the (\d+) oldest turns: the model reads 128 tokens, of which 8 are", line)[1])
    kept = [{"role": "system", "content": "the log"}, *turns[2 * left_out :], {"role": "user", "content": "the mat"}]
    assert prompts == [render_for_completion(chat.engine.tokenizer, {"messages": kept})]
    assert len(prompts[0]) <= 120
