"""Everyday questions and the practice of the default run: right answers, held-out wordings and words."""

import re
from functools import cache

import pytest

from mlxchat.engine.tools import calculate
from mlxchat.errors import ConfigError
from mlxchat.evals.chat import expected_text
from mlxchat.tasks import load_task
from mlxchat.tasks.answers import calculator_parts, content_text
from mlxchat.tasks.base import dialogue
from mlxchat.tasks.everyday import wordings
from mlxchat.tasks.spelling import first_words, is_only_spelled, is_test_word


@cache
def exchanges(split: str) -> list[tuple[str, str]]:
    """Return (question, answer in GSM8K's notation) of the first 2,000 conversations."""
    task = load_task("everyday", split, size=2000)
    talks = [task[index]["messages"] for index in range(len(task))]
    return [
        (talk[i]["content"], content_text(talk[i + 1]["content"])) for talk in talks for i in range(0, len(talk), 2)
    ]


@pytest.mark.parametrize("split", ["train", "test"])
def test_calculator_agrees_with_every_call(split):
    calls = [
        re.fullmatch(r"(.*)=(-?\d+)", call)
        for _, answer in exchanges(split)
        for call in re.findall(r"<<(.*?)>>", answer)
    ]
    assert len(calls) > 300
    for call in calls:
        assert call
        assert calculate(call[1]) == call[2]


def test_plain_sums_are_right():
    sums = [
        (int(found[1]), found[2], int(found[3]), int(answer.rstrip(".").split(">>")[-1]))
        for question, answer in exchanges("train")
        if (found := re.search(r"(?<!\d)(\d+) (plus|minus|times|divided by) (\d+)(?!\w| added)", question.lower()))
    ]
    assert len(sums) > 30
    for a, sign, b, result in sums:
        assert result == {"plus": a + b, "minus": a - b, "times": a * b, "divided by": a / b}[sign]


def test_spelled_words_are_the_words_asked_for():
    for question, answer in exchanges("train"):
        for word, letters in re.findall(r"The word (\w+): ((?:\w )*\w)\.", answer):
            assert letters.replace(" ", "") == word
            assert word in question.lower()


def test_wordings_and_words_of_the_test_split_are_not_trained():
    def frame(question: str) -> str:
        return re.sub(r"\W+", " ", question).strip().lower()

    trained = {frame(question) for question, _ in exchanges("train")}
    asked = {frame(question) for question, _ in exchanges("test")}
    assert len(asked) > 500
    assert not trained & asked
    spelled = {word for _, answer in exchanges("train") for word in re.findall(r"The word (\w+):", answer)}
    assert len(spelled) > 200
    assert not [word for word in spelled if is_test_word(word)]


def test_training_spells_held_out_words_but_never_counts_their_letters():
    held_out = {word for word in first_words() if is_only_spelled(word)}
    counted = {word for _, answer in exchanges("train") for word in re.findall(r"The word (\w+): <<", answer)}
    spelled = {word for _, answer in exchanges("train") for word in re.findall(r"The word (\w+): \w ", answer)}
    counting = {split: load_task("first_letter_count", split) for split in ("train", "test")}
    asked = {
        split: {
            re.findall(r"in (?:the word )?(\w+)", task[index]["messages"][0]["content"])[-1]
            for index in range(len(task))
        }
        for split, task in counting.items()
    }
    assert counted
    assert asked["train"]
    assert not (counted | asked["train"]) & held_out
    assert asked["test"] == held_out
    assert len(spelled & held_out) > 20


def test_no_first_question_has_a_wording_of_the_training_data():
    def words(text: str) -> str:
        return " ".join(re.sub(r"[^\w{}+*/=' -]", " ", text.lower()).split())

    # A placeholder stands for one to three words.
    slot = r"(?:\\S+(?: \\S+){0,2}?)"
    frames = [re.compile(re.sub(r"\\{\w+\\}", slot, re.escape(words(wording)))) for wording in set(wordings())]
    task = load_task("first_questions", "test")
    questions = [task[index]["messages"][0]["content"] for index in range(len(task))]
    assert len(questions) >= 50
    assert not [question for question in questions for frame in frames if frame.fullmatch(words(question))]


def test_first_questions_have_readable_expected_answers():
    task = load_task("first_questions", "test")
    for talk in (task[index] for index in range(len(task))):
        expected = expected_text(talk)
        assert task.evaluate(talk, expected)
        assert re.fullmatch(r"[\w ,.!']+", expected)


def test_practice_has_the_shares_of_its_options():
    task = load_task("practice", "train", size=500, letters_frac=0.3, everyday_frac=0.2, two_step_frac=0.5)
    talks = [task[index] for index in range(500)]
    numbered = [talk["raw"] for talk in talks if "raw" in talk]
    letters = sum("count(" in raw for raw in numbered)
    two_step = sum(raw.count("<<") == 2 for raw in numbered)
    # Four standard errors of a binomial share.
    for count, share in ((letters, 0.3), (len(talks) - len(numbered), 0.2), (two_step, 0.25)):
        assert abs(count - 500 * share) < 4 * (500 * share * (1 - share)) ** 0.5
    assert all("####" in raw for raw in numbered)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"letters_frac": 2}, r"letters_frac of task practice is 2, expected 0 to 1"),
        ({"letters_frac": 0.6, "everyday_frac": 0.5}, r"letters_frac \+ everyday_frac of task practice is 1.1"),
    ],
)
def test_impossible_shares_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        load_task("practice", "train", **options)


def test_calls_are_no_part_of_a_response():
    task = load_task("everyday", "test")
    talk = dialogue("3 + 4", calculator_parts("The answer is <<3+4=7>>7."))
    call = "<|python_start|>3+4<|python_end|><|output_start|>7<|output_end|>"
    assert task.evaluate(talk, f"The answer is {call}7.")
    assert not task.evaluate(talk, f"The answer is {call}8.")
