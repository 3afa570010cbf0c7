"""Chat evaluation: order of answers, sampling, resuming, multiple choice, scores, files of examples."""

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit.training import make_context
from mlxchat.data.tokenizer import Tokenizer, render_for_completion
from mlxchat.engine.generate import Completion, Engine
from mlxchat.errors import Interrupted
from mlxchat.evals.measure import Answering, evaluate_task, question_text
from mlxchat.evals.scores import CHATCORE_SETS, Measure, Score, chatcore, mean_centered_stderr
from mlxchat.model.gpt import GPT
from mlxchat.tasks.base import content_text
from mlxchat.tasks.downloads import GSM8K

Evaluate = Callable[..., tuple[Score, list[dict[str, Any]]]]


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

    def explain(self, conversation: dict[str, Any], response: str) -> tuple[bool, dict[str, Any]]:
        return self.evaluate(conversation, response), {}

    def evaluate(self, conversation: dict[str, Any], response: str) -> bool:
        return response == conversation["messages"][-1]["content"]


class ScriptedEngine:
    """An engine that answers question i with `answers[i]` and records what it is asked."""

    team, context_tokens = None, 1000

    def __init__(self, tokenizer: Tokenizer, answers: list[str]) -> None:
        self.tokenizer, self.answers = tokenizer, answers
        self.batches: list[list[int]] = []
        self.prompts: list[list[int]] = []

    def render(self, messages: list[dict[str, Any]]) -> list[int]:
        return render_for_completion(self.tokenizer, {"messages": messages})

    def complete(self, prompts: list[list[int]], **settings: Any) -> list[Completion]:
        numbers = [int(self.tokenizer.decode(prompt).split("<|user_start|>")[1].split(":")[0]) for prompt in prompts]
        self.batches.append(numbers)
        self.prompts += prompts
        return [Completion(ids=self.tokenizer.encode(self.answers[number])) for number in numbers]


@pytest.fixture
def evaluate(tmp_path: Path) -> Evaluate:
    def run(engine: Any, task: Any, batch_tokens: int = 1000, stops: bool = False, work: str | None = None, **how: Any):
        ctx = make_context(tmp_path, stop_signal=lambda: 15 if stops else None)
        folder = tmp_path / (work or f"{len(list(tmp_path.iterdir()))}")
        answering = Answering(**{"batch_rows": 4, "max_new_tokens": 9} | how)
        engine.batch_tokens = batch_tokens
        return evaluate_task(ctx, engine, task, answering, name="toy", work=folder)

    return run


ANSWERS = ["yes", "no", "yes", "maybe", "", "yes", "no"]


def test_records_keep_the_order_of_the_task(tokenizer, evaluate):
    engine, task = ScriptedEngine(tokenizer, ANSWERS), Questions(["yes"] * 7)
    score, records = evaluate(engine, task, batch_rows=3, max_new_tokens=5)
    assert (score.accuracy, score.num_examples, score.chance) == (3 / 7, 7, 0.0)
    assert [len(batch) for batch in engine.batches] == [3, 3, 1]
    assert [number for batch in engine.batches for number in batch] != list(range(7)), "sorted by length"
    for index, (record, answer) in enumerate(zip(records, ANSWERS, strict=True)):
        assert record == {
            "index": index, "seed": None, "prompt": task[index]["messages"][0]["content"], "output": answer,
            "expected": "yes", "verdict": answer == "yes", "tokens": len(tokenizer.encode(answer)),
            "details": {"finished": False},
        }  # fmt: skip
    assert not any("yes" in tokenizer.decode(prompt) for prompt in engine.prompts)
    assert {prompt[-1] for prompt in engine.prompts} == {tokenizer.special_ids["<|assistant_start|>"]}


# Samples


@pytest.fixture
def sampled(model: GPT, tokenizer: Tokenizer, evaluate: Evaluate) -> Evaluate:
    def run(**changes: Any) -> tuple[Score, list[dict[str, Any]]]:
        how = {"seeds": 3, "temperature": 1.0, "max_new_tokens": 6, "seed": 5} | changes
        return evaluate(Engine(model, tokenizer), Questions(["yes"] * 7), **how)

    return run


def test_samples_depend_on_seed_and_question_not_the_batch(sampled):
    one, other = sampled(batch_rows=1)[1], sampled(seed=6)[1]
    assert [(example["seed"], example["index"]) for example in one] == [(k, i) for k in range(3) for i in range(7)]
    assert all(len({each["output"] for each in one if each["index"] == index}) > 1 for index in range(7))
    assert one == sampled(batch_rows=7)[1]
    assert [example["output"] for example in one] != [example["output"] for example in other]


# Continuing


def test_stopped_evaluation_resumes_with_equal_results(sampled):
    whole, attempts, found = sampled(batch_rows=2), 0, None
    while found is None and attempts < 20:
        attempts += 1
        with suppress(Interrupted):  # each attempt does one batch
            found = sampled(batch_rows=2, work="kept", stops=True)
    assert found == whole
    assert attempts == 13  # three times four batches, and one that finds all of them done


# Multiple choice


@pytest.mark.parametrize("batch_tokens", [60, 10_000])
@pytest.mark.parametrize("letters", [["A", "B", "C", "D"], ["C", "A", "E"]])
def test_letter_with_the_highest_logit_is_chosen(model, tokenizer, evaluate, batch_tokens, letters):
    """By the logits of each prompt alone; computed once, whatever the number of seeds."""
    task = Questions(["A"] * 20, kind="categorical", letters=letters)
    score, records = evaluate(Engine(model, tokenizer), task, batch_tokens=batch_tokens, seeds=5, temperature=1.0)
    assert ({record["seed"] for record in records}, score.per_seed) == ({None}, ())
    for index, example in enumerate(records):
        logits = np.asarray(model(mx.array([render_for_completion(tokenizer, task[index])])))[0, -1]
        wanted = {letter: float(logits[tokenizer.encode(letter)[0]]) for letter in letters}
        assert example["output"] == max(letters, key=wanted.__getitem__)
        assert example["details"]["logits"] == pytest.approx(wanted, abs=1e-4)  # float32, another shape
    outputs = [record["output"] for record in records]
    assert len(set(outputs)) > 1
    assert score.accuracy == outputs.count("A") / 20


def test_long_prompts_keep_their_end(model, tokenizer, evaluate):
    """The context of this model is 64 tokens."""

    class Long(Questions):
        def __getitem__(self, index: int) -> dict[str, Any]:
            conversation = super().__getitem__(index)
            conversation["messages"][0]["content"] = " the cat" * 60 * index + " the end"
            return conversation

    task = Long(["A"] * 2, kind="categorical")
    score, records = evaluate(Engine(model, tokenizer), task)
    assert score.to_dict()["cropped"] == 1
    ids = render_for_completion(tokenizer, task[1])
    logits = np.asarray(model(mx.array([[ids[0], *ids[-63:]]])))[0, -1]
    assert records[1]["output"] == max("ABCD", key=lambda letter: logits[tokenizer.encode(letter)[0]])
    assert [example["details"].get("cropped") for example in records] == [None, True]
    assert [example["tokens"] for example in records] == [len(render_for_completion(tokenizer, task[0])), 64]


# Scores


def accuracy_of(accuracy: float, chance: float) -> Score:
    return Score(kind="categorical", accuracy=accuracy, chance=chance, num_examples=100)


def test_standard_errors_by_hand():
    """Three questions, right in 2, 1 and 0 of 2 samples: shares 1, 1/2, 0, whose variance is 1/6."""
    score = Score.of([[True, True, False], [True, False, False]], kind="generative", chance=0.0)
    assert score.accuracy == pytest.approx(0.5)
    assert score.stderr == pytest.approx(math.sqrt(1 / 6 / 3))
    assert score.per_seed == pytest.approx((2 / 3, 1 / 3))
    found = score.to_dict()
    assert (found["seeds"], found["seed_stderr"]) == (2, pytest.approx(1 / 6))  # their standard deviation is √2 / 6
    one = Score.of([[True, False, False, True, True]], kind="generative", chance=0.0)
    assert one.stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 5))
    assert (one.per_seed, "seed_stderr" in one.to_dict()) == ((), False)
    # Errors of 0.05 and 0.04, the first stretched by 1 / (1 − 0.25).
    measure = Measure(name="boolq", metric="task", value=0.5, stderr=0.05, chance=0.25)
    assert measure.centered_stderr == pytest.approx(0.05 / 0.75)
    both = [accuracy_of(0.5, 0.25), accuracy_of(0.2, 0.0)]
    assert mean_centered_stderr(both) == pytest.approx(math.sqrt((0.05 / 0.75) ** 2 + 0.04**2) / 2)


def suite_scores(names: tuple[str, ...]) -> dict[str, Score]:
    chances = {"arc_easy": 0.25, "arc_challenge": 0.25, "mmlu": 0.25}
    accuracies = [0.3561, 0.2875, 0.3111, 0.025, 0.0671, 0.99]
    return {name: accuracy_of(acc, chances.get(name, 0.0)) for name, acc in zip(names, accuracies, strict=False)}


@pytest.mark.parametrize(("which", "value"), [("oct2025", 0.2258388888888889), ("jul2026", 0.07300666666666666)])
def test_chatcore_of_a_snapshot_is_nanochats(which, value):
    """The values are nanochat's own for these accuracies."""
    names = CHATCORE_SETS[which]
    found = chatcore(suite_scores(names), {name: name for name in names})
    assert found["value"] == pytest.approx(value)
    assert (found["set"], found["tasks"]) == (which, list(names))


def test_expected_answers_show_calls_and_results():
    """Guards against "37+53=37+539090": the text, the call, its result and the text again without anything between."""
    parts = [
        {"type": "text", "text": "37+53="}, {"type": "python", "text": "37+53"},
        {"type": "python_output", "text": "90"}, {"type": "text", "text": "90"},
    ]  # fmt: skip
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": parts}]
    assert content_text(parts) == "37+53=<<37+53=90>>90"
    messages += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "91"}]
    assert question_text({"messages": messages}) == "user: ?\n\nassistant: 37+53=<<37+53=90>>90\n\nuser: And?"


def test_gsm8k_has_both_verdicts_and_shares_of_right_numbers_and_forms(tokenizer, evaluate):
    """Guards against scores beside published ones of another rule: "#### 18." is right here, wrong for nanochat."""

    class Numbers(Questions):
        nanochat_verdict = False
        explain = GSM8K.explain
        evaluate = GSM8K.evaluate

        def __getitem__(self, index: int) -> dict[str, Any]:
            conversation = super().__getitem__(index)
            conversation["messages"][-1]["content"] = [{"type": "text", "text": self.expected[index]}]
            return conversation

    answers = ["#### 18", "#### 18.", "It is 18.", "#### 7"]
    score, records = evaluate(ScriptedEngine(tokenizer, answers), Numbers(["#### 18"] * 4))
    assert [record["verdict"] for record in records] == [True, True, False, False]
    assert [record["details"]["nanochat_verdict"] for record in records] == [True, False, False, False]
    found = score.to_dict()
    assert (found["accuracy"], found["nanochat_accuracy"]) == (0.5, 0.25)
    assert found["nanochat_stderr"] == pytest.approx(math.sqrt(0.25 * 0.75 / 4))
    assert (found["right_number"], found["right_form"]) == (0.75, 0.75)
    whole = chatcore(dict.fromkeys(CHATCORE_SETS["jul2026"], score), {n: n for n in CHATCORE_SETS["jul2026"]})
    assert (whole["value"], whole["nanochat_value"]) == (0.5, 0.25)
