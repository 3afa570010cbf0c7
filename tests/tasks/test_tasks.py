"""Tasks: train and test splits that share nothing, the same conversations everywhere, verdicts, refusals."""

import json
import os
import re
import subprocess
import sys
from functools import cache

import pytest

from kit.text import conversations_of
from mlxchat.errors import ConfigError
from mlxchat.tasks import arithmetic, load_task
from mlxchat.tasks.answers import answer_text, calculator_parts, number_and_form
from mlxchat.tasks.arithmetic import Arithmetic
from mlxchat.tasks.base import dialogue, held_out
from mlxchat.tasks.facts import FIELDS, facts, is_test_pair, with_article

BUNDLED = ["facts", "facts_mc", "reading_mc", "arithmetic", "spelling", "letter_count", "identity"]


@cache
def user_messages(name: str, split: str) -> set[str]:
    more = load_task(name, split, steps=2, size=2000) if name == "arithmetic" else []
    return {
        message["content"]
        for conversation in [*conversations_of(name, split), *(more[i] for i in range(len(more)))]
        for message in conversation["messages"]
        if message["role"] == "user"
    }


@pytest.mark.parametrize("test_name", BUNDLED)
def test_splits_of_all_tasks_share_no_user_message(test_name):
    asked = user_messages(test_name, "test")
    for name in BUNDLED:
        assert not user_messages(name, "train") & asked


@cache
def _markers() -> list[tuple[str, tuple[str, str]]]:
    found = []
    for fact in facts():
        if is_test_pair(fact):
            pair = (fact.field, fact.country)
            field = FIELDS[fact.field]
            found += [(field.ask(fact.country, i), pair) for i in range(len(field.questions))]
            found += [(fact.state(i), pair) for i in range(len(field.statements))]
    return found


@pytest.mark.parametrize("name", ["facts", "facts_mc", "reading_mc"])
def test_held_out_facts_are_in_no_training_sentence(name):
    training = {
        sentence.strip()
        for conversation in conversations_of(name, "train")
        for message in conversation["messages"]
        for sentence in re.split(r"(?<=[.?:])\s", message["content"])
    }
    assert training
    assert not [pair for marker, pair in _markers() if marker in training]


def test_held_out_facts_are_in_no_training_list():
    tags = {(fact.country, FIELDS[fact.field].tag(fact.value)) for fact in facts() if is_test_pair(fact)}
    for conversation in conversations_of("reading_mc", "train"):
        question = conversation["messages"][0]["content"]
        listed = re.match(r"Multiple Choice question: ([A-Z][A-Za-z' -]+): (.*?)\. [A-Z]", question)
        assert not listed or not [tag for country, tag in tags if country == listed[1] and tag in listed[2]]


def test_about_15_percent_of_each_field_are_held_out():
    for field in FIELDS:
        chosen = [is_test_pair(fact) for fact in facts() if fact.field == field]
        assert 0.05 < sum(chosen) / len(chosen) < 0.25


def test_capitals_of_examples_are_trained_on():
    asked = user_messages("facts", "train")
    for country in ("France", "Japan", "Peru", "United States"):
        questions = {FIELDS["capital"].ask(country, i) for i in range(4)}
        assert questions & asked


def test_arithmetic_splits_share_no_template_with_equal_numbers():
    def frame(question: str) -> str:
        question = re.sub(r"\b(he|she|him|her)\b", "they", question, flags=re.IGNORECASE)
        words = arithmetic.texts()
        names, things = "|".join(words["he"] + words["she"]), "|".join(words["things"])
        return re.sub(rf"\b({things})\b", "things", re.sub(rf"\b({names})\b", "name", question))

    train, test = ({frame(question) for question in user_messages("arithmetic", split)} for split in ("train", "test"))
    assert len({re.sub(r"\d+", "#", text) for text in test}) == 21
    assert len(test) > 1000
    assert not train & test


def test_split_is_a_stable_hash():
    assert [key for key in "abcdefgh" if held_out(key, 0.5)] == ["b", "c", "d", "e", "f"]
    assert not held_out("a", 0.0)
    assert held_out("a", 1.0)


def test_golden_problems_never_change():
    train, test = Arithmetic("train"), Arithmetic("test", seed=1, steps=2)
    found = [(talk["messages"][0]["content"], talk["raw"]) for talk in (train[0], test[7])]
    assert found == [GOLDEN[:2], GOLDEN[2:]]


GOLDEN = (
    "There are 16 stones on the table and 81 in the box. How many stones are there in all?",
    "There are 16+81=<<16+81=97>>97 stones.\n#### 97",
    "Eva has 12 boxes with 7 cups in each box. She gives 2 cups away. How many cups are left?",
    "Eva has 12*7=<<12*7=84>>84 cups. Then she has 84-2=<<84-2=82>>82 cups.\n#### 82",
)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_conversations_do_not_depend_on_the_hash_seed(hash_seed):
    code = (
        "import json; from mlxchat.tasks import load_task\n"
        f"for name in {BUNDLED}:\n    task = load_task(name, 'test')\n"
        "    print(json.dumps([task[i] for i in range(5)]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    ours = [json.dumps(conversations_of(name, "test")[:5]) for name in BUNDLED]
    assert done.stdout.splitlines() == ours


@pytest.mark.parametrize("name", BUNDLED)
def test_size_takes_a_prefix_and_the_seed_other_conversations(name):
    small, other = load_task(name, "train", size=20), load_task(name, "train", size=20, seed=5)
    assert [small[i] for i in range(20)] == conversations_of(name, "train")[:20]
    assert [other[i] for i in range(20)] != conversations_of(name, "train")[:20]
    with pytest.raises(IndexError):
        small[20]


@pytest.mark.parametrize("name", BUNDLED)
@pytest.mark.parametrize("split", ["train", "test"])
def test_reference_answer_is_right_and_an_empty_one_wrong(name, split):
    task = load_task(name, split)
    for conversation in conversations_of(name, split)[:200]:
        assert task.evaluate(conversation, answer_text(conversation))
        assert task.reward(conversation, "") == 0.0


@pytest.mark.parametrize(
    ("name", "conversation", "right", "wrong"),
    [
        ("arithmetic", dialogue("?", calculator_parts("Tom has 12+7=<<12+7=19>>19 apples.\n#### 19")),
         ["Tom has 12+7=19 apples.\n#### 19", "#### 19.", "#### 1,9", "#### 19 apples"],
         ["#### 119", "#### 19.5", "#### -19", "####19", "19", "#### 18\n#### 19"]),
        ("facts", dialogue("?", "The capital of Oman is Muscat.", answer="Muscat"),
         ["The capital of Oman is Muscat.", "muscat"], ["Muscats", "Oman"]),
        ("facts_mc", dialogue("?", "B", answer="B"), ["B", " B\n"], ["A", "B.", "AB"]),
    ],
    ids=["arithmetic", "facts", "facts_mc"],
)  # fmt: skip
def test_verdicts(name, conversation, right, wrong):
    task = load_task(name, "test")
    assert [task.evaluate(conversation, response) for response in right + wrong] == [
        response in right for response in right + wrong
    ]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("arithmatic", {}, r'task is "arithmatic", expected one of facts, .*Did you mean "arithmetic"\?'),
        ("facts", {"split": "validation"}, r'split of task facts is "validation", expected train or test'),
        ("facts", {"split": "trian"}, r'Did you mean "train"\?'),
        ("arithmetic", {"stepz": 2}, r'no option "stepz", expected one of size, .*Did you mean "steps"\?'),
        ("arithmetic", {"steps": 3}, r"steps of task arithmetic is 3, expected 1 or 2"),
        ("arithmetic", {"two_step_frac": 2}, r"two_step_frac of task arithmetic is 2, expected 0 to 1"),
        ("facts", {"fields": ["capitol"]}, r'fields of task facts has "capitol".*Did you mean "capital"\?'),
        ("facts", {"fields": []}, r"fields of task facts is empty"),
        ("spelling", {"size": 0}, r"size of task spelling is 0, expected 1 or more"),
        ("jsonl", {}, r"task jsonl has no path"),
        ("identity", {"held_out_frac": 1}, r"held_out_frac of task identity is 1, expected 0 to below 1"),
    ],
)
def test_wrong_names_and_options_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        load_task(name, **{"split": "train", **options})


def test_bundled_identity_names_mlxchat():
    both = conversations_of("identity", "train") + conversations_of("identity", "test")
    assert len(both) > 50
    assert "mlxchat" in next(answer_text(c) for c in both if c["messages"][0]["content"] == "Who are you?")


def test_place_names_have_their_article():
    assert with_article("Gambia") == "the Gambia"
    assert FIELDS["capital"].ask("Gambia") == "What is the capital of the Gambia?"


@pytest.mark.parametrize(
    ("response", "number", "form"),
    [
        ("12-4=<<12-4=8>>8\n#### 8", True, True),
        ("He has <|python_start|>12-4<|python_end|><|output_start|>8<|output_end|>8 left.", True, False),
        ("It is 12-8", True, False),
        ("8 or 9", False, False),
        ("8, so\n#### 9", False, True),
        ("eight", False, False),
        ("", False, False),
    ],
)
def test_right_number_and_right_form_are_told_apart(response, number, form):
    assert number_and_form("The rest.\n#### 8", response) == (number, form)
    assert number_and_form("Paris", response) is None
