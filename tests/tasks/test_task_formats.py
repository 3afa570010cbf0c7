"""The format of the bundled tasks' conversations."""

import json
import re
from collections import Counter

import pytest

from kit.text import conversations_of
from mlxchat.data.conversation import render_conversation
from mlxchat.tasks.answers import calculator_parts
from mlxchat.tasks.arithmetic import Arithmetic

BUNDLED = ["facts", "facts_mc", "reading_mc", "arithmetic", "spelling", "letter_count", "identity"]
CATEGORICAL = ["facts_mc", "reading_mc"]


def test_calls_with_two_or_no_equals_signs():
    assert calculator_parts("<<x==2=True>>")[0] == {"type": "python", "text": "x==2"}
    assert calculator_parts("<<3+4>>") == [{"type": "python", "text": "3+4"}, {"type": "python_output", "text": ""}]


def test_problem_has_parts_and_the_raw_answer():
    task = Arithmetic("train", size=50)
    for index in range(50):
        messages, raw = task[index]["messages"], task[index]["raw"]
        assert messages[1]["content"] == calculator_parts(raw)
        assert re.fullmatch(r".*<<\d+[-+*/]\d+=\d+>>\d+ .*\.\n#### \d+", raw)


@pytest.mark.parametrize("name", BUNDLED)
@pytest.mark.parametrize("split", ["train", "test"])
def test_conversations_alternate_and_render(name, split, tokenizer):
    for number, conversation in enumerate(conversations_of(name, split)):
        roles = [message["role"] for message in conversation["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert json.loads(json.dumps(conversation)) == conversation
        if number < 20:
            ids, mask = render_conversation(tokenizer, conversation)
            assert len(ids) == len(mask)
            assert 0 < sum(mask) < len(mask)


@pytest.mark.parametrize("name", CATEGORICAL)
@pytest.mark.parametrize("split", ["train", "test"])
def test_choices_are_distinct_and_letters_equally_frequent(name, split):
    talks = conversations_of(name, split)
    for talk in talks:
        choices = dict(re.findall(r"^- (.*)=([A-D])$", talk["messages"][0]["content"], re.MULTILINE))
        assert len(choices) == 4
        assert list(choices.values()) == talk["letters"] == ["A", "B", "C", "D"]
        assert talk["messages"][1]["content"] == talk["answer"]
    counts = Counter(talk["answer"] for talk in talks)
    assert max(counts.values()) - min(counts.values()) <= 4


def test_passage_contains_only_the_right_choice():
    for conversation in conversations_of("reading_mc", "test"):
        passage, _, rest = conversation["messages"][0]["content"].partition("\n")
        stated = [choice in passage for choice, _ in re.findall(r"^- (.*)=([A-D])$", rest, re.MULTILINE)]
        assert stated["ABCD".index(conversation["answer"])]
        assert sum(stated) == 1


def test_arithmetic_results_are_right():
    for conversation in conversations_of("arithmetic", "train")[::5] + conversations_of("arithmetic", "test"):
        calls = re.findall(r"<<(.*?)=(\d+)>>", conversation["raw"])
        for call, result in calls:
            assert eval(call) == int(result) >= 2
        assert conversation["raw"].endswith(f"#### {calls[-1][1]}")
        assert int(calls[-1][1]) < 1000


@pytest.mark.parametrize(("options", "calls"), [({}, {1}), ({"steps": 2}, {2}), ({"two_step_frac": 0.5}, {1, 2})])
def test_number_of_steps_is_an_option(options, calls):
    task = Arithmetic("train", size=100, **options)
    assert {task[i]["raw"].count("<<") for i in range(100)} == calls


def test_spelling_is_exact():
    for conversation in conversations_of("spelling", "test"):
        word = conversation["messages"][0]["content"].removeprefix("Spell the word: ")
        assert conversation["messages"][1]["content"] == word + ":" + ",".join(word)


def test_letter_count_calls_the_calculator():
    counts = Counter()
    for conversation in conversations_of("letter_count", "train"):
        question, answer = (message["content"] for message in conversation["messages"])
        spelled, letter = re.fullmatch(r'"((?: \w)+)"\.count\("(\w)"\)', answer[1]["text"]).groups()  # type: ignore[union-attr]
        word = spelled.replace(" ", "")
        assert re.search(rf"\b{word}\b", question)
        assert f"'{letter}'" in question
        assert answer[2] == {"type": "python_output", "text": str(word.count(letter))}
        counts[answer[2]["text"]] += 1
    assert counts["1"] < 0.7 * sum(counts.values())
