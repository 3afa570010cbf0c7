"""Chat evaluation: who answers what, in which order, and what the scores are."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.data.conversation import render_for_completion
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.generate import Completion, Engine
from mlxchat.errors import DataError
from mlxchat.evals.chat import Score, evaluate_task, mean_centered
from mlxchat.model.gpt import GPT


class Questions:
    """A task of questions of different lengths; the verdict is whether the response is the expected text."""

    def __init__(self, expected: list[str], kind: str = "generative", letters: list[str] | None = None) -> None:
        self.expected, self.kind, self.letters = expected, kind, letters or ["A", "B", "C", "D"]
        self.chance = 0.25 if kind == "categorical" else 0.0

    def __len__(self) -> int:
        return len(self.expected)

    def __getitem__(self, index: int) -> dict[str, Any]:
        question = f"{index}:" + " the" * (index * 7 % 5)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": self.expected[index]}]
        return {"messages": messages, "letters": self.letters}

    def evaluate(self, conversation: dict[str, Any], response: str) -> bool:
        return response == conversation["messages"][-1]["content"]


class ScriptedEngine:
    """An engine that answers question i with `answers[i]` and notes what it is asked."""

    def __init__(self, tokenizer: Tokenizer, answers: list[str]) -> None:
        self.tokenizer, self.answers = tokenizer, answers
        self.batches: list[list[int]] = []
        self.settings: list[dict[str, Any]] = []

    def complete(self, prompts: list[list[int]], **settings: Any) -> list[Completion]:
        numbers = [int(self.tokenizer.decode(prompt).split("<|user_start|>")[1].split(":")[0]) for prompt in prompts]
        self.batches.append(numbers)
        self.settings.append(settings)
        return [Completion(ids=self.tokenizer.encode(self.answers[number])) for number in numbers]


def evaluate(engine: Any, task: Any, **changes: Any) -> tuple[Score, list[dict[str, Any]]]:
    return evaluate_task(engine, task, **{"batch_rows": 4, "max_new_tokens": 9} | changes)


ANSWERS = ["yes", "no", "yes", "maybe", "", "yes", "no"]


def test_the_accuracy_is_the_share_of_right_answers(tokenizer: Tokenizer) -> None:
    score, _ = evaluate(ScriptedEngine(tokenizer, ANSWERS), Questions(["yes"] * 7))
    assert (score.accuracy, score.num_examples, score.chance) == (3 / 7, 7, 0.0)


def test_records_are_in_the_order_of_the_task_whatever_order_was_asked(tokenizer: Tokenizer) -> None:
    engine, task = ScriptedEngine(tokenizer, ANSWERS), Questions(["yes"] * 7)
    _, records = evaluate(engine, task)
    assert [record["index"] for record in records] == list(range(7))
    assert [record["answer"] for record in records] == ANSWERS
    assert [record["question"] for record in records] == [task[index]["messages"][0]["content"] for index in range(7)]
    assert [record["correct"] for record in records] == [answer == "yes" for answer in ANSWERS]
    assert [number for batch in engine.batches for number in batch] != list(range(7))


@pytest.mark.parametrize(("batch_rows", "sizes"), [(1, [1] * 7), (3, [3, 3, 1]), (100, [7])])
def test_every_question_is_asked_once_in_batches_of_the_size(
    tokenizer: Tokenizer, batch_rows: int, sizes: list[int]
) -> None:
    engine = ScriptedEngine(tokenizer, ANSWERS)
    evaluate(engine, Questions(["yes"] * 7), batch_rows=batch_rows)
    assert [len(batch) for batch in engine.batches] == sizes
    assert sorted(number for batch in engine.batches for number in batch) == list(range(7))


def test_answers_are_greedy_and_of_the_length_allowed(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ANSWERS)
    evaluate(engine, Questions(["yes"] * 7), max_new_tokens=5)
    assert all(settings["max_new_tokens"] == 5 and not settings.get("temperature") for settings in engine.settings)


def test_progress_counts_the_answered_questions(tokenizer: Tokenizer) -> None:
    done: list[int] = []
    evaluate(ScriptedEngine(tokenizer, ANSWERS), Questions(["yes"] * 7), batch_rows=3, on_progress=done.append)
    assert done == [3, 6, 7]


def test_the_expected_answer_is_not_shown_to_the_model(tokenizer: Tokenizer) -> None:
    prompts: list[list[int]] = []

    class Spy(ScriptedEngine):
        def complete(self, asked: list[list[int]], **settings: Any) -> list[Completion]:
            prompts.extend(asked)
            return super().complete(asked, **settings)

    evaluate(Spy(tokenizer, ANSWERS), Questions(["a secret"] * 7))
    assert not any("secret" in tokenizer.decode(prompt) for prompt in prompts)
    assert {prompt[-1] for prompt in prompts} == {tokenizer.special_ids["<|assistant_start|>"]}


# Multiple choice


def boosted(model: GPT, tokenizer: Tokenizer, letter: str) -> GPT:
    """Return the model with a strong wish for a letter: its logit is made large wherever it is positive."""
    head = np.array(model.lm_head.weight)
    (token,) = tokenizer.encode(letter)
    head[token] *= 50
    model.lm_head.weight = mx.array(head)
    return model


def best_letters(model: GPT, tokenizer: Tokenizer, task: Questions) -> list[str]:
    """Choose by the logits of each prompt alone."""
    chosen = []
    for index in range(len(task)):
        logits = np.asarray(model(mx.array([render_for_completion(tokenizer, task[index])])))[0, -1]
        chosen.append(max(task.letters, key=lambda letter: logits[tokenizer.encode(letter)[0]]))
    return chosen


@pytest.mark.parametrize("batch_rows", [1, 3, 100])
@pytest.mark.parametrize("letters", [["A", "B", "C", "D"], ["A", "B"], ["C", "A", "E"]])
def test_the_letter_with_the_highest_logit_is_chosen_in_any_batch(
    model: GPT, tokenizer: Tokenizer, batch_rows: int, letters: list[str]
) -> None:
    task = Questions(["A"] * 20, kind="categorical", letters=letters)
    expected = best_letters(model, tokenizer, task)
    score, records = evaluate(Engine(model, tokenizer), task, batch_rows=batch_rows)
    assert [record["answer"] for record in records] == expected
    assert len(set(expected)) > 1
    assert score.accuracy == expected.count("A") / 20


def test_a_letter_that_is_not_offered_is_never_chosen(model: GPT, tokenizer: Tokenizer) -> None:
    task = Questions(["A"] * 20, kind="categorical", letters=["A", "B"])
    _, records = evaluate(Engine(boosted(model, tokenizer, "C"), tokenizer), task)
    assert {record["answer"] for record in records} <= {"A", "B"}


def test_letters_of_several_tokens_are_refused(model: GPT, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="single tokens"):
        evaluate(Engine(model, tokenizer), Questions(["A"], kind="categorical", letters=["A", "BC"]))


# Scores


def score(accuracy: float, chance: float, num_examples: int = 100) -> Score:
    return Score(kind="categorical", accuracy=accuracy, chance=chance, num_examples=num_examples)


@pytest.mark.parametrize(
    ("accuracy", "chance", "centered"),
    [(0.25, 0.25, 0.0), (1.0, 0.25, 1.0), (0.625, 0.25, 0.5), (0.1, 0.0, 0.1), (0.0, 0.5, -1.0)],
)
def test_a_centred_score_is_zero_at_chance_and_one_at_best(accuracy: float, chance: float, centered: float) -> None:
    assert score(accuracy, chance).centered == pytest.approx(centered)


def test_the_standard_error_is_that_of_a_share() -> None:
    assert score(0.3, 0.25, 400).stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 400))


def test_the_mean_of_centred_scores_is_chatcores_formula() -> None:
    """nanochat's table for its SFT model: ARC-E, ARC-C, MMLU, GSM8K and HumanEval give ChatCORE 0.0884."""
    table: list[tuple[float, float]] = [(0.3876, 0.25), (0.2807, 0.25), (0.3151, 0.25), (0.0455, 0.0), (0.0854, 0.0)]
    assert mean_centered([score(*row) for row in table]) == pytest.approx(0.0884, abs=1e-4)


def test_no_scores_have_no_mean() -> None:
    assert mean_centered([]) is None


def test_a_score_is_written_with_everything_that_a_reader_needs() -> None:
    assert score(0.5, 0.25).to_dict() == {
        "kind": "categorical", "accuracy": 0.5, "chance": 0.25, "centered": pytest.approx(1 / 3),
        "num_examples": 100, "stderr": 0.05,
    }  # fmt: skip
