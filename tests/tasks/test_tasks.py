"""Bundled tasks: splits that share nothing, right answers, the same conversations everywhere, verdicts."""

import re
from functools import cache
from typing import Any

import pytest

from mlxchat.data.tokenizer import render_conversation
from mlxchat.tasks import load_task
from mlxchat.tasks.base import answer_text, calculator_parts, content_text, dialogue, held_out, number_and_form
from mlxchat.tasks.quickstart import Arithmetic, first_words


@cache
def conversations_of(task: str, split: str) -> list[dict[str, Any]]:
    loaded = load_task(task, split)
    return [loaded[index] for index in range(len(loaded))]


BUNDLED = ["kinds_mc", "arithmetic", "first_letter_count", "identity"]


@cache
def user_messages(name: str, split: str) -> set[str]:
    more = load_task(name, split, steps=2, size=2000) if name == "arithmetic" else []
    return {
        message["content"]
        for conversation in [*conversations_of(name, split), *(more[i] for i in range(len(more)))]
        for message in conversation["messages"]
        if message["role"] == "user"
    }


@cache
def exchanges(split: str) -> list[tuple[str, str]]:
    """Return (question, answer in GSM8K's notation) of the first 2,000 everyday conversations."""
    task = load_task("everyday", split, size=2000)
    talks = [task[index]["messages"] for index in range(len(task))]
    return [
        (talk[i]["content"], content_text(talk[i + 1]["content"])) for talk in talks for i in range(0, len(talk), 2)
    ]


# Splits


@pytest.mark.parametrize("test_name", BUNDLED)
def test_splits_of_all_tasks_share_no_user_message(test_name):
    asked = user_messages(test_name, "test")
    for name in BUNDLED:
        assert not user_messages(name, "train") & asked


def test_everyday_wordings_and_words_of_the_test_split_are_not_trained():
    def frame(question: str) -> str:
        return re.sub(r"\W+", " ", question).strip().lower()

    trained = {frame(question) for question, _ in exchanges("train")}
    asked = {frame(question) for question, _ in exchanges("test")}
    assert len(asked) > 500
    assert not trained & asked
    spelled = {word for _, answer in exchanges("train") for word in re.findall(r"The word (\w+):", answer)}
    assert len(spelled) > 200
    assert not [word for word in spelled if held_out(f"word/{word}", 0.15) and word not in first_words()]


# Conversations


@pytest.mark.parametrize("name", BUNDLED)
@pytest.mark.parametrize("split", ["train", "test"])
def test_conversations_render_and_their_answers_are_right(name, split, tokenizer):
    task = load_task(name, split)
    for number, conversation in enumerate(conversations_of(name, split)[:300]):
        roles = [message["role"] for message in conversation["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert task.evaluate(conversation, answer_text(conversation))
        assert task.reward(conversation, "") == 0.0
        if number < 20:
            ids, mask = render_conversation(tokenizer, conversation)
            assert 0 < sum(mask) < len(mask) == len(ids)


@pytest.mark.parametrize(("options", "calls"), [({}, {1}), ({"steps": 2}, {2}), ({"two_step_frac": 0.5}, {1, 2})])
def test_arithmetic_has_right_results_and_the_steps_of_its_options(options, calls):
    task = Arithmetic("train", size=500, **options)
    talks = [task[index] for index in range(500)]
    assert {talk["raw"].count("<<") for talk in talks} == calls
    for talk in talks:
        steps = re.findall(r"<<(.*?)=(\d+)>>", talk["raw"])
        assert all(eval(step) == int(result) >= 2 for step, result in steps)
        assert talk["raw"].endswith(f"#### {steps[-1][1]}")
        assert talk["messages"][1]["content"] == calculator_parts(talk["raw"])


# The same everywhere


def test_golden_problems_never_change():
    train, test = Arithmetic("train"), Arithmetic("test", seed=1, steps=2)
    assert [(talk["messages"][0]["content"], talk["raw"]) for talk in (train[0], test[7])] == [
        (
            "There are 16 stones on the table and 81 in the box. How many stones are there in all?",
            "There are 16+81=<<16+81=97>>97 stones.\n#### 97",
        ),
        (
            "Eva has 12 boxes with 7 cups in each box. She gives 2 cups away. How many cups are left?",
            "Eva has 12*7=<<12*7=84>>84 cups. Then she has 84-2=<<84-2=82>>82 cups.\n#### 82",
        ),
    ]


# Verdicts


@pytest.mark.parametrize(
    ("name", "conversation", "right", "wrong"),
    [
        ("arithmetic", dialogue("?", calculator_parts("Tom has 12+7=<<12+7=19>>19 apples.\n#### 19")),
         ["Tom has 12+7=19 apples.\n#### 19", "#### 19.", "#### 1,9", "#### 19 apples"],
         ["#### 119", "#### 19.5", "#### -19", "####19", "19", "#### 18\n#### 19"]),
        ("kinds_mc", dialogue("?", "B", answer="B"), ["B", " B\n"], ["A", "B.", "AB"]),
        ("everyday", dialogue("3 + 4", calculator_parts("The answer is <<3+4=7>>7.")),
         ["The answer is <|python_start|>3+4<|python_end|><|output_start|>7<|output_end|>7."], ["The answer is 8."]),
    ],
    ids=["arithmetic", "kinds_mc", "everyday"],
)  # fmt: skip
def test_verdicts(name, conversation, right, wrong):
    task = load_task(name, "test")
    assert [task.evaluate(conversation, response) for response in right + wrong] == [
        response in right for response in right + wrong
    ]


@pytest.mark.parametrize(
    ("response", "number", "form"),
    [
        ("12-4=<<12-4=8>>8\n#### 8", True, True),
        ("He has <|python_start|>12-4<|python_end|><|output_start|>8<|output_end|>8 left.", True, False),
        ("It is 12-8", True, False),
        ("8 or 9", False, False),
        ("8, so\n#### 9", False, True),
        ("eight", False, False),
    ],
)
def test_right_number_and_right_form_are_told_apart(response, number, form):
    assert number_and_form("The rest.\n#### 8", response) == (number, form)
    assert number_and_form("Paris", response) is None
