"""SpellingBee, SimpleSpelling and identity conversations, from files and addresses."""

import json
from pathlib import Path

import pytest

from mlxchat.engine.generate import calculate
from mlxchat.tasks import load_task

WORDS = ["strawberry", "mississippi", "banana", "onomatopoeia", "queue", "rhythm", "zebra"]


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("\r\n".join(WORDS) + "\r\n", encoding="utf-8")
    return path


def test_spelling_bee_counts_are_consistent(words):
    task = load_task("spelling_bee", "train", size=60, path=words)
    for index in range(60):
        by_hand, _, call, output, end = (part["text"] for part in task[index]["messages"][1]["content"])
        word, letter = call.split("'")[1], call.split("'")[3]
        count = sum(char == letter for char in word)
        assert by_hand.count(" hit! ") == count
        assert f"\n{word}:{','.join(word)}\n" in by_hand
        assert calculate(call) == output == str(count)
        assert end.endswith(f"#### {count}")
        assert task.evaluate(task[index], f"#### {count}.")
        assert not task.evaluate(task[index], str(count))


def test_words_are_downloaded_and_recorded(hub):
    hub.files["words_alpha.txt"] = b"aardvark\n"
    task = load_task("simple_spelling", "train", words=f"{hub.url}/files/words_alpha.txt")
    assert hub.log == []
    assert task[7]["messages"][1]["content"] == "aardvark:a,a,r,d,v,a,r,k"
    assert [source["name"] for source in task.sources()] == ["words_alpha.txt"]


def test_identity_conversations_keep_the_files_order(hub):
    # nanochat accepts a user message at the end
    turns = [["Who?", f"I am {n}."] + ["Bye"] * (n % 2) for n in range(30)]
    talks = [[{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(each)] for each in turns]
    hub.files["me.jsonl"] = "".join(json.dumps(talk) + "\n" for talk in talks).encode()
    task = load_task("identity_conversations", "train", url=f"{hub.url}/files/me.jsonl", size=7)
    assert [task[n]["messages"] for n in range(len(task))] == talks[:7]
