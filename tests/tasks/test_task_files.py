"""Tasks from the user's own .jsonl files."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from mlxchat.errors import ConfigError, DataError
from mlxchat.tasks import jsonl
from mlxchat.tasks import load_task as load
from mlxchat.tasks.jsonl import read_conversations


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    "line",
    [
        {"messages": MESSAGES},
        MESSAGES,
        {"question": "Hi", "answer": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
    ],
)
def test_a_line_may_have_any_of_four_forms(line: Any, tmp_path: Path) -> None:
    task = load("jsonl", "train", path=write(tmp_path / "a.jsonl", line), held_out_frac=0)
    assert [task[i] for i in range(len(task))] == [{"messages": MESSAGES}]


def test_a_raw_gsm8k_answer_in_a_file_becomes_parts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"})
    task = load("jsonl", "train", path=path, held_out_frac=0)
    assert [part["type"] for part in task[0]["messages"][1]["content"]] == [
        "text",
        "python",
        "python_output",
        "text",
    ]
    assert task.evaluate(task[0], "so #### 2.")
    assert not task.evaluate(task[0], "2")


@pytest.mark.parametrize(
    ("answer", "response", "equal", "contained"),
    [
        ("4", "4", True, True),
        ("4", " 4. ", True, True),
        ("4", "It is 4.", False, True),
        ("4", "It is 14.", False, False),
        ("4", "4.5", False, False),
        ("4", "1,4", False, False),
        ("4", "-4", False, False),
        ("-4", "it is -4", False, True),
        ("no", "No!", True, True),
        ("no", "I do not know", False, False),
        ("no", "Well, no, never", False, True),
        ("Straße  7", "straße 7", True, True),
        ("Straße 7", "STRASSE 7", True, True),
        ("C++", "c++ is one", False, True),
        ("...", "anything", False, False),
        ("...", "...", True, True),
        ("?", "", False, False),
        ("...", "", False, False),
        ("4", "4.0", True, True),
        ("1000", "1,000", True, True),
        ("1000", "about $1,000", False, False),
        ("0.5", ".50", True, True),
        ("4.5", "4,5", False, False),
        ("-5", "−5", True, True),
        ("5", "+5.", True, True),
        ("5", "5%", False, False),
        ("2019", "**2019**.", True, True),
        ("yes, sir", "Yes sir", True, True),
        ('"Paris"', "(Paris)", True, True),
        ("Paris", "It's Paris—the capital", False, True),
        ("it's", "It’s", True, True),
        ("é", "e\u0301", True, True),
        ("C", "C++", False, False),
        ("C", "C#", False, False),
        ("+", "-", False, False),
        ("*", "*", True, True),
        ("a * b", "a b", False, False),
        ("new york", "York is new", False, False),
        ("4", "#### 4", False, True),
        ("#### 4", "#### 4.0", True, True),
        ("#### 4", "4", False, False),
        ("#### 1.2.3", "#### 1.2.3", True, True),
    ],
)
def test_responses_are_judged_by_equality_or_by_whole_words(
    tmp_path: Path, answer: str, response: str, equal: bool, contained: bool
) -> None:
    """Guards against containment without word borders: "4" in "14", "no" in "know", "..." in everything."""
    path = write(tmp_path / "a.jsonl", {"question": "?", "answer": answer})
    strict, lenient = (load("jsonl", "train", path=path, held_out_frac=0, **o) for o in ({}, {"contains": 1.0}))
    assert strict.evaluate(strict[0], response) is equal
    assert lenient.evaluate(lenient[0], response) is contained


def test_contains_of_another_value_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "?", "answer": "x"})
    with pytest.raises(ConfigError, match="contains of task jsonl is 0"):
        load("jsonl", "train", path=path, contains=0.5)


def test_an_answer_without_a_number_must_be_the_whole_response(tmp_path: Path) -> None:
    task = load("jsonl", "train", path=write(tmp_path / "a.jsonl", MESSAGES), held_out_frac=0)
    assert task.evaluate(task[0], "hello!")
    assert not task.evaluate(task[0], "Well, hello!")
    assert not task.evaluate(task[0], "Hi")


def test_every_bad_line_is_named_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        MESSAGES,
        "{not json",
        "",
        {"text": "no messages"},
        [MESSAGES[1], MESSAGES[0]],
        MESSAGES[:1],
        [*MESSAGES, MESSAGES[0]],
        [MESSAGES[0], {"role": "assistant"}],
        [MESSAGES[0], {"role": "assistant", "content": [{"type": "image", "text": ""}]}],
        {"question": 1, "answer": "x"},
    )
    with pytest.raises(DataError) as caught:
        load("jsonl", "train", path=path)
    assert str(caught.value).splitlines()[:-1] == [
        f"{path} has 8 lines that are no conversations:",
        "  line 2: not JSON (Expecting property name enclosed in double quotes at column 2)",
        "  line 4: no messages",
        '  line 5: message 1 is from "assistant", expected "user"',
        "  line 6: 1 messages, expected a user and an assistant message or more",
        "  line 7: the last message is not from the assistant",
        "  line 8: a message lacks role or content",
        '  line 9: a part of the content is not {"type": one of text, python, python_output, "text": ...}',
        "  line 10: question and answer must be text",
    ]


def test_a_line_that_is_nested_too_deeply_or_endless_is_a_fault_like_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One conversation of 100 MB once took 3 GB and a minute, to be cut to the first row."""
    monkeypatch.setattr(jsonl, "_MOST_LINE_BYTES", 200_000)
    path = tmp_path / "talks.jsonl"
    path.write_text("[" * 100_000 + "\n" + json.dumps({"question": "?", "answer": "x" * 300_000}) + "\n")
    with pytest.raises(
        DataError, match=r"line 1: nested too deeply\n  line 2: 300,\d+ bytes, expected at most 200,000"
    ):
        read_conversations(path)


def test_of_many_bad_lines_the_last_are_only_numbered(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *["x"] * 23)
    with pytest.raises(DataError, match="and 3 more, lines 21, 22, 23"):
        load("jsonl", "train", path=path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read"):
        load("jsonl", "train", path=tmp_path / "none.jsonl")


def test_conversations_with_the_same_opening_are_in_one_split(tmp_path: Path) -> None:
    lines = [{"question": f"q{i % 40}", "answer": f"a{i}"} for i in range(120)]
    path = write(tmp_path / "a.jsonl", *lines)
    train, test = (load("jsonl", split, path=path, held_out_frac=0.3) for split in ("train", "test"))
    assert len(train) + len(test) == 120
    opening = [{task[i]["messages"][0]["content"] for i in range(len(task))} for task in (train, test)]
    assert not opening[0] & opening[1]


def test_an_empty_split_says_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no conversation for the test split .*held_out_frac 0"):
        load("jsonl", "test", path=write(tmp_path / "a.jsonl", MESSAGES), held_out_frac=0)


def test_a_system_message_may_stand_first(tmp_path: Path) -> None:
    line = [{"role": "system", "content": "Be kind."}, *MESSAGES]
    task = load("jsonl", "train", path=write(tmp_path / "a.jsonl", line), held_out_frac=0)
    assert task[0]["messages"] == line


def test_a_larger_size_repeats_the_file(tmp_path: Path) -> None:
    task = load("jsonl", "train", path=write(tmp_path / "a.jsonl", MESSAGES), held_out_frac=0, size=3)
    assert [task[i] for i in range(3)] == [{"messages": MESSAGES}] * 3


def test_the_identity_can_be_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "me.jsonl", {"question": "Who are you?", "answer": "I am Ada."})
    task = load("identity", "train", path=path, held_out_frac=0)
    assert task[0]["messages"][1]["content"] == "I am Ada."


def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    line = json.dumps({"question": "a\u2028b\x0bc", "answer": "d"}, ensure_ascii=False)
    task = load("jsonl", "train", path=write(tmp_path / "a.jsonl", line, ""), held_out_frac=0)
    assert task[0]["messages"][0]["content"] == "a\u2028b\x0bc"


def test_a_line_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(MESSAGES).encode() + b'\n["\xff"]\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        load("jsonl", "train", path=path)


def test_of_a_large_file_only_the_places_of_its_lines_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{n}", "answer": "a" * 1000}) + "\n" for n in range(5000)))
    tracemalloc.start()
    task = load("jsonl", "train", path=path, held_out_frac=0)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert (len(task), task[7]["messages"][1]["content"]) == (5000, "a" * 1000)
    assert kept < 500_000  # of five million


def test_a_file_that_changes_afterwards_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", MESSAGES, MESSAGES)
    task = load("jsonl", "train", path=path, held_out_frac=0)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"a\.jsonl changed while it was read"):
        [task[index] for index in range(2)]
