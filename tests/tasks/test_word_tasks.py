"""SpellingBee, SimpleSpelling and identity conversations, from files and addresses."""

import json
import random
from pathlib import Path

import pytest

from mlxchat.engine.tools import calculate
from mlxchat.errors import ConfigError, DataError
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
        asked = task[index]["messages"][0]["content"]
        assert word in asked
        assert letter in asked
        assert task.evaluate(task[index], f"#### {count}.")
        assert not task.evaluate(task[index], str(count))


def test_words_follow_nanochats_draws(words):
    bee = load_task("spelling_bee", "train", size=30, path=words)
    spelling = load_task("simple_spelling", "train", size=30, path=words)
    shuffled = list(WORDS)
    random.Random(42).shuffle(shuffled)
    for index in range(30):
        assert f"'{random.Random(index).choice(WORDS)}'.count(" in bee[index]["messages"][1]["content"][2]["text"]
        word = random.Random(index).choice(shuffled)
        assert spelling[index]["messages"] == [
            {"role": "user", "content": f"Spell the word: {word}"},
            {"role": "assistant", "content": f"{word}:{','.join(word)}"},
        ]


def test_test_split_is_not_the_shifted_training_split(words):
    train, test = (load_task("spelling_bee", split, size=50, path=words) for split in ("train", "test"))
    assert sum(test[index] == train[index + 1] for index in range(49)) < 5
    theirs = load_task("spelling_bee", "test", size=50, path=words, nanochat_seeds=True)
    assert all(theirs[index] == train[index + 1] for index in range(49))


def test_seed_changes_conversations(words):
    first, other = (load_task("spelling_bee", "train", size=20, seed=seed, path=words) for seed in (0, 1))
    assert [first[index] for index in range(20)] != [other[index] for index in range(20)]


def test_words_are_downloaded_and_recorded(hub):
    hub.write_text("http://a/words_alpha.txt", "aardvark\n")
    task = load_task("simple_spelling", "train", words="http://a/words_alpha.txt")
    assert hub.asked == []
    assert task[7]["messages"][1]["content"] == "aardvark:a,a,r,d,v,a,r,k"
    assert [source["name"] for source in task.sources()] == ["words_alpha.txt"]


def test_bundled_words_need_no_network(hub):
    task = load_task("spelling_bee", "test", size=3, words="bundled")
    assert (len(task), task.needs(), task.sources()) == (3, [], [])
    assert task[0] == task[0]
    assert hub.asked == []


def test_empty_word_list_is_refused(tmp_path):
    (tmp_path / "none.txt").write_text("\n\n")
    with pytest.raises(DataError, match=r"none\.txt has no words"):
        load_task("spelling_bee", "train", path=tmp_path / "none.txt")[0]


def test_path_as_address_is_refused():
    with pytest.raises(ConfigError, match=r'words of task spelling_bee is "words\.txt".*path=FILE'):
        load_task("spelling_bee", "train", words="words.txt")


def talk(question: str, *more: str) -> str:
    turns = [question, *more]
    return json.dumps([{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)])


def test_identity_conversations_keep_the_files_order(hub):
    lines = [talk(f"q{n}", f"a{n}") for n in range(30)]
    hub.write_text("http://a/me.jsonl", "\n".join(lines) + "\n")
    task = load_task("identity_conversations", "train", url="http://a/me.jsonl")
    assert [task[n]["messages"] for n in range(len(task))] == [json.loads(line) for line in lines]
    assert len(load_task("identity_conversations", "train", url="http://a/me.jsonl", size=7)) == 7


def test_identity_conversations_read_a_local_file(tmp_path):
    path = tmp_path / "me.jsonl"
    path.write_text(talk("Who?", "I am Ada.", "Bye") + "\n")  # nanochat accepts a user message at the end
    assert load_task("identity_conversations", "train", path=path)[0]["messages"][2]["content"] == "Bye"


def test_wrong_sha256_is_refused(hub):
    hub.write_text("http://a/me.jsonl", talk("q", "a"))
    with pytest.raises(DataError, match="not what it should be"):
        len(load_task("identity_conversations", "train", url="http://a/me.jsonl", sha256="0" * 64))
