"""Tasks from the user's own .jsonl files."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from mlxchat.errors import DataError, MlxchatError
from mlxchat.tasks import jsonl
from mlxchat.tasks import load_task as load
from mlxchat.tasks.jsonl import read_conversations


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    "line",
    [{"messages": MESSAGES}, MESSAGES, {"question": "Hi", "answer": "Hello"}, {"prompt": "Hi", "completion": "Hello"}],
)
def test_four_line_formats_are_read(line, tmp_path):
    task = load("jsonl", "train", path=write(tmp_path / "a.jsonl", line))
    assert [task[i] for i in range(len(task))] == [{"messages": MESSAGES}]


def test_gsm8k_calls_in_a_file_become_parts(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"})
    task = load("jsonl", "train", path=path)
    assert [part["type"] for part in task[0]["messages"][1]["content"]] == ["text", "python", "python_output", "text"]
    assert task.evaluate(task[0], "so #### 2.")
    assert not task.evaluate(task[0], "2")


@pytest.mark.parametrize(
    ("answer", "response", "equal", "contained"),
    [
        ("4", "4", True, True), ("4", " 4. ", True, True), ("4", "It is 4.", False, True),
        ("4", "It is 14.", False, False), ("4", "4.5", False, False), ("4", "1,4", False, False),
        ("4", "-4", False, False), ("-4", "it is -4", False, True), ("no", "No!", True, True),
        ("no", "I do not know", False, False), ("no", "Well, no, never", False, True),
        ("Straße  7", "straße 7", True, True), ("Straße 7", "STRASSE 7", True, True),
        ("C++", "c++ is one", False, True), ("...", "anything", False, False), ("...", "...", True, True),
        ("?", "", False, False), ("...", "", False, False), ("4", "4.0", True, True), ("1000", "1,000", True, True),
        ("1000", "about $1,000", False, False), ("0.5", ".50", True, True), ("4.5", "4,5", False, False),
        ("-5", "−5", True, True), ("5", "+5.", True, True), ("5", "5%", False, False),
        ("2019", "**2019**.", True, True), ("yes, sir", "Yes sir", True, True), ('"Paris"', "(Paris)", True, True),
        ("Paris", "It's Paris—the capital", False, True), ("it's", "It’s", True, True), ("é", "e\u0301", True, True),
        ("C", "C++", False, False), ("C", "C#", False, False), ("+", "-", False, False), ("*", "*", True, True),
        ("a * b", "a b", False, False), ("new york", "York is new", False, False), ("4", "#### 4", False, True),
        ("#### 4", "#### 4.0", True, True), ("#### 4", "4", False, False), ("#### 1.2.3", "#### 1.2.3", True, True),
    ],
)  # fmt: skip
def test_verdict_by_equality_or_by_contained_words(tmp_path, answer, response, equal, contained):
    """Guards against containment without word borders: "4" in "14", "no" in "know", "..." in everything."""
    path = write(tmp_path / "a.jsonl", {"question": "?", "answer": answer})
    strict, lenient = (load("jsonl", "train", path=path, **o) for o in ({}, {"contains": 1.0}))
    assert strict.evaluate(strict[0], response) is equal
    assert lenient.evaluate(lenient[0], response) is contained


def test_all_invalid_lines_are_named(tmp_path):
    path = write(
        tmp_path / "a.jsonl", MESSAGES, "{not json", "", {"text": "no messages"}, [MESSAGES[1], MESSAGES[0]],
        MESSAGES[:1], [*MESSAGES, MESSAGES[0]], [MESSAGES[0], {"role": "assistant"}],
        [MESSAGES[0], {"role": "assistant", "content": [{"type": "image", "text": ""}]}],
        {"question": 1, "answer": "x"},
    )  # fmt: skip
    with pytest.raises(DataError) as caught:
        load("jsonl", "train", path=path)
    assert str(caught.value).splitlines()[:-1] == [
        f"{path} has 8 lines that are not conversations:",
        "  line 2: not JSON (Expecting property name enclosed in double quotes at column 2)",
        "  line 4: no messages",
        '  line 5: message 1 is from "assistant", expected "user"',
        "  line 6: 1 messages, expected a user and an assistant message or more",
        "  line 7: the last message is not from the assistant",
        "  line 8: a message lacks role or content",
        '  line 9: a part of the content is not {"type": one of text, python, python_output, "text": ...}',
        "  line 10: question and answer must be text",
    ]


def test_deeply_nested_and_huge_lines_are_refused(tmp_path, monkeypatch):
    """A conversation of 100 MB took 3 GB and a minute, and was truncated to one row."""
    monkeypatch.setattr(jsonl, "_MOST_LINE_BYTES", 200_000)
    path = tmp_path / "talks.jsonl"
    path.write_text("[" * 100_000 + "\n" + json.dumps({"question": "?", "answer": "x" * 300_000}) + "\n")
    with pytest.raises(
        DataError, match=r"line 1: nested too deeply\n  line 2: 300,\d+ bytes, expected at most 200,000"
    ):
        read_conversations(path)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {}, r"a\.jsonl cannot be read"),
        (json.dumps(MESSAGES).encode() + b'\n["\xff"]\n', {}, "line 2: not UTF-8"),
        (b"x\n" * 23, {}, "and 3 more, lines 21, 22, 23"),
        (
            json.dumps(MESSAGES).encode(),
            {"split": "test"},
            "none of its conversations is in the test split",
        ),
        (json.dumps(MESSAGES).encode(), {"contains": 0.5}, "contains of task jsonl is 0"),
    ],
    ids=["missing", "not UTF-8", "many", "empty split", "contains"],
)
def test_unusable_files_are_refused(content, options, message, tmp_path):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MlxchatError, match=message):
        load("jsonl", path=path, **{"split": "train", **options})


def test_equal_first_messages_are_in_one_split(tmp_path):
    lines = [{"question": f"q{i % 40}", "answer": f"a{i}"} for i in range(120)]
    path = write(tmp_path / "a.jsonl", *lines)
    train, test = (load("jsonl", split, path=path, held_out_frac=0.3) for split in ("train", "test"))
    assert len(train) + len(test) == 120
    opening = [{task[i]["messages"][0]["content"] for i in range(len(task))} for task in (train, test)]
    assert not opening[0] & opening[1]


def test_identity_reads_the_users_file_and_repeats_it(tmp_path):
    line = [{"role": "system", "content": "Be kind."}, *MESSAGES]
    task = load("identity", "train", path=write(tmp_path / "me.jsonl", line), size=3)
    assert [task[i] for i in range(3)] == [{"messages": line}] * 3


def test_lines_end_at_line_feeds_only(tmp_path):
    line = json.dumps({"question": "a\u2028b\x0bc", "answer": "d"}, ensure_ascii=False)
    task = load("jsonl", "train", path=write(tmp_path / "a.jsonl", line, ""))
    assert task[0]["messages"][0]["content"] == "a\u2028b\x0bc"


def test_only_line_offsets_are_in_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{n}", "answer": "a" * 1000}) + "\n" for n in range(5000)))
    tracemalloc.start()
    task = load("jsonl", "train", path=path)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert (len(task), task[7]["messages"][1]["content"]) == (5000, "a" * 1000)
    assert kept < 500_000  # of five million


def test_changed_file_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", MESSAGES, MESSAGES)
    task = load("jsonl", "train", path=path)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"a\.jsonl changed while it was read"):
        [task[index] for index in range(2)]
