"""Tasks from the user's own .jsonl files: conversations, pairs, and verdicts on answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlxchat.errors import DataError
from mlxchat.tasks import load_task as load
from mlxchat.tasks.jsonl import parse_pair


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


USER, SYSTEM = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}
YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}


@pytest.mark.parametrize(
    "line",
    [
        {"messages": [USER, YES]},
        [USER, YES],
        {"question": "Hi", "answer": "yes"},
        {"prompt": "Hi", "completion": "yes"},
    ],
)
def test_four_line_formats_are_read(line, tmp_path):
    task = load("jsonl", "train", path=write(tmp_path / "a.jsonl", line))
    assert [task[i] for i in range(len(task))] == [{"messages": [USER, YES]}]


@pytest.mark.parametrize(
    ("answer", "response", "equal", "contained"),
    [
        ("4", " 4. ", True, True), ("4", "It is 4.", False, True), ("4", "It is 14.", False, False),
        ("4", "4.5", False, False), ("4", "1,4", False, False), ("4", "-4", False, False),
        ("-4", "it is -4", False, True), ("no", "No!", True, True), ("no", "I do not know", False, False),
        ("Straße  7", "straße 7", True, True), ("C++", "c++ is one", False, True), ("...", "anything", False, False),
        ("...", "...", True, True), ("?", "", False, False), ("4", "4.0", True, True), ("1000", "1,000", True, True),
        ("1000", "about $1,000", False, False), ("0.5", ".50", True, True), ("-5", "−5", True, True),
        ("5", "5%", False, False), ("2019", "**2019**.", True, True), ("yes, sir", "Yes sir", True, True),
        ('"Paris"', "(Paris)", True, True), ("Paris", "It's Paris—the capital", False, True),
        ("it's", "It’s", True, True), ("é", "e\u0301", True, True), ("C", "C#", False, False), ("*", "*", True, True),
        ("new york", "York is new", False, False), ("4", "#### 4", False, True), ("#### 4", "#### 4.0", True, True),
        ("#### 4", "4", False, False),
    ],
)  # fmt: skip
def test_verdict_by_equality_or_by_contained_words(tmp_path, answer, response, equal, contained):
    """Guards against containment without word borders: "4" in "14", "no" in "know", "..." in everything."""
    path = write(tmp_path / "a.jsonl", {"question": "?", "answer": answer})
    strict, lenient = (load("jsonl", "train", path=path, **o) for o in ({}, {"contains": 1.0}))
    assert strict.evaluate(strict[0], response) is equal
    assert lenient.evaluate(lenient[0], response) is contained


CONVERSATION_FAULTS: list[tuple[Any, str]] = [
    ("{not json", "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
    ({"text": "no messages"}, "no messages"),
    ([YES, USER], 'message 1 is from "assistant", expected "user"'),
    ([USER], "1 messages, expected a user and an assistant message or more"),
    ([USER, YES, USER], "the last message is not from the assistant"),
    ([USER, {"role": "assistant"}], "a message lacks role or content"),
    ([USER, {**YES, "content": [{"type": "image", "text": ""}]}], "content of the assistant message is not text, or a"),
    ({"question": 1, "answer": "x"}, "question and answer must be text"),
]
PAIR_FAULTS: list[tuple[Any, str]] = [
    ("not JSON", "not JSON"),
    ({"prompt": "Hi", "chosen": "yes"}, 'not an object with "chosen" and "rejected"'),
    ({"prompt": 3, "chosen": "yes", "rejected": "no"}, "no question before chosen"),
    ({"prompt": "Hi", "chosen": "yes", "rejected": ""}, "rejected: content of the assistant message is empty"),
    ({"prompt": "Hi", "chosen": "yes", "rejected": "yes"}, "chosen and rejected are the same"),
    ({"chosen": [USER, YES], "rejected": [{**USER, "content": "Ho"}, NO]}, "differ before their last message"),
    ({"chosen": [USER], "rejected": [USER, NO]}, "chosen: 1 messages, expected a user and an assistant message"),
]


@pytest.mark.parametrize(("name", "faults"), [("jsonl", CONVERSATION_FAULTS), ("pairs", PAIR_FAULTS)])
def test_faults_of_a_file_are_named_with_their_lines(name, faults, tmp_path):
    good = {"prompt": "Hi", "completion": "yes", "chosen": "yes", "rejected": "no"}
    path = write(tmp_path / "a.jsonl", good, "", *(line for line, _ in faults))
    with pytest.raises(DataError) as caught:
        len(load(name, "train", path=path))
    first, *lines, last = str(caught.value).splitlines()
    assert first == f"{path} has {len(faults)} lines that are wrong:"
    for line, (number, (_, fault)) in zip(lines, enumerate(faults, start=3), strict=True):
        assert line.startswith(f"  line {number}: ")
        assert fault in line
    assert last.startswith("Expected {")


def test_equal_first_messages_are_in_one_split(tmp_path):
    lines = [{"question": f"q{i % 40}", "answer": f"a{i}"} for i in range(120)]
    path = write(tmp_path / "a.jsonl", *lines)
    train, test = (load("jsonl", split, path=path, held_out_frac=0.3) for split in ("train", "test"))
    assert len(train) + len(test) == 120
    opening = [{task[i]["messages"][0]["content"] for i in range(len(task))} for task in (train, test)]
    assert not opening[0] & opening[1]
    assert opening[1]


@pytest.mark.parametrize(
    ("line", "before"),
    [
        ({"prompt": "Hi", "chosen": "yes", "rejected": "no"}, [USER]),
        ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, [USER]),
        ({"prompt": "Hi", "chosen": [USER, YES], "rejected": [USER, NO], "score_chosen": 8.5}, [USER]),
        ({"messages": [USER, YES, USER], "chosen": "yes", "rejected": "no"}, [USER, YES, USER]),
        ({"system": "Be brief.", "question": "Hi", "chosen": "yes", "rejected": "no"}, [SYSTEM, USER]),
        ({"chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]}, [SYSTEM, USER]),
    ],
)
def test_common_forms_of_pairs_give_messages_and_the_rejected_answer(line, before):
    assert parse_pair(line) == {"messages": [*before, YES], "rejected": "no"}
