"""What the conversations of the tasks look like, against strings written by hand."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest

from kit.text import conversations_of
from mlxchat.data.conversation import render_conversation
from mlxchat.tasks.answers import answer_text, calculator_parts
from mlxchat.tasks.arithmetic import Arithmetic
from mlxchat.tasks.base import render_mc

BUNDLED = ["facts", "facts_mc", "reading_mc", "arithmetic", "spelling", "letter_count", "identity"]
CATEGORICAL = ["facts_mc", "reading_mc"]


class Bytes:
    """A tokenizer of bytes."""

    bos = 0

    def __init__(self) -> None:
        sides = [f"{part}_{side}" for part in ("user", "assistant", "python", "output") for side in ("start", "end")]
        self.special_ids = {f"<|{word}|>": 256 + i for i, word in enumerate(sides)}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def test_multiple_choice_is_rendered_in_nanochats_words() -> None:
    assert render_mc("What is the capital of Peru?", ["A", "B", "C", "D"], ["Rome", "Lima", "Bern", "Oslo"]) == (
        "Multiple Choice question: What is the capital of Peru?\n"
        "- Rome=A\n"
        "- Lima=B\n"
        "- Bern=C\n"
        "- Oslo=D\n"
        "\n"
        "Respond only with the letter of the correct answer."
    )


def test_a_gsm8k_call_may_hold_an_equals_sign_or_none() -> None:
    assert calculator_parts("<<x==2=True>>")[0] == {"type": "python", "text": "x==2"}
    assert calculator_parts("<<3+4>>") == [
        {"type": "python", "text": "3+4"},
        {"type": "python_output", "text": ""},
    ]


def test_a_problem_holds_the_question_and_the_raw_answer() -> None:
    task = Arithmetic("train", size=50)
    for index in range(50):
        messages, raw = task[index]["messages"], task[index]["raw"]
        assert messages[1]["content"] == calculator_parts(raw)
        assert re.fullmatch(r".*<<\d+[-+*/]\d+=\d+>>\d+ .*\.\n#### \d+", raw)


@pytest.mark.parametrize("name", BUNDLED)
@pytest.mark.parametrize("split", ["train", "test"])
def test_conversations_alternate_and_survive_json(name: str, split: str) -> None:
    for conversation in conversations_of(name, split):
        roles = [message["role"] for message in conversation["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert json.loads(json.dumps(conversation)) == conversation


@pytest.mark.parametrize("name", BUNDLED)
def test_conversations_render_to_tokens_that_are_partly_trained(name: str) -> None:
    for conversation in conversations_of(name, "test")[:20]:
        ids, mask = render_conversation(Bytes(), conversation)  # type: ignore[arg-type]
        assert len(ids) == len(mask)
        assert 0 < sum(mask) < len(mask)


@pytest.mark.parametrize("name", CATEGORICAL)
@pytest.mark.parametrize("split", ["train", "test"])
def test_choices_are_distinct_and_the_right_one_has_the_letter(name: str, split: str) -> None:
    for conversation in conversations_of(name, split):
        question = conversation["messages"][0]["content"]
        choices = dict(re.findall(r"^- (.*)=([A-D])$", question, re.MULTILINE))
        assert len(choices) == 4
        assert list(choices.values()) == conversation["letters"] == ["A", "B", "C", "D"]
        assert conversation["messages"][1]["content"] == conversation["answer"]


@pytest.mark.parametrize("name", CATEGORICAL)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_letter_is_right_equally_often(name: str, split: str) -> None:
    counts = Counter(conversation["answer"] for conversation in conversations_of(name, split))
    assert max(counts.values()) - min(counts.values()) <= 4


def test_only_the_right_choice_of_a_reading_question_is_in_its_passage() -> None:
    for conversation in conversations_of("reading_mc", "test"):
        passage, _, rest = conversation["messages"][0]["content"].partition("\n")
        told = [choice in passage for choice, _ in re.findall(r"^- (.*)=([A-D])$", rest, re.MULTILINE)]
        assert told["ABCD".index(conversation["answer"])]
        assert sum(told) == 1


def test_arithmetic_results_are_right_whole_and_at_least_two() -> None:
    for conversation in conversations_of("arithmetic", "train")[::5] + conversations_of("arithmetic", "test"):
        calls = re.findall(r"<<(.*?)=(\d+)>>", conversation["raw"])
        for call, result in calls:
            assert eval(call) == int(result) >= 2
        assert conversation["raw"].endswith(f"#### {calls[-1][1]}")
        assert int(calls[-1][1]) < 1000


def test_arithmetic_answers_are_short() -> None:
    assert max(len(answer_text(conversation)) for conversation in conversations_of("arithmetic", "test")[:400]) < 50


@pytest.mark.parametrize(("options", "calls"), [({}, {1}), ({"steps": 2}, {2}), ({"two_step_frac": 0.5}, {1, 2})])
def test_the_number_of_steps_can_be_chosen(options: dict[str, Any], calls: set[int]) -> None:
    task = Arithmetic("train", size=100, **options)
    assert {task[i]["raw"].count("<<") for i in range(100)} == calls


def test_spelling_is_the_word_a_colon_and_its_letters() -> None:
    for conversation in conversations_of("spelling", "test"):
        word = conversation["messages"][0]["content"].removeprefix("Spell the word: ")
        assert conversation["messages"][1]["content"] == word + ":" + ",".join(word)


def test_letters_are_counted_by_a_call_that_the_question_spells_out() -> None:
    counts = Counter()
    for conversation in conversations_of("letter_count", "train"):
        question, answer = (message["content"] for message in conversation["messages"])
        word, letter = re.fullmatch(r"'(\w+)'\.count\('(\w)'\)", answer[1]["text"]).groups()  # type: ignore[union-attr]
        assert f"'{word}'" in question
        assert f"'{letter}'" in question
        assert answer[2] == {"type": "python_output", "text": str(word.count(letter))}
        counts[answer[2]["text"]] += 1
    assert counts["1"] < 0.7 * sum(counts.values())
