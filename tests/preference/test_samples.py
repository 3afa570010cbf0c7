"""Pairs of the model's own answers: which answers become pairs, their file, and sampling that continues."""

from typing import Any

import pytest

from kit.models import make_model, make_tokenizer
from kit.training import make_context
from mlxchat.data.conversation import parse_answer, render_conversation
from mlxchat.engine.generate import Completion, Engine
from mlxchat.errors import DataError, Interrupted
from mlxchat.preference.samples import sample_pairs, write_pairs
from mlxchat.tasks import load_task
from mlxchat.tasks.answers import Conversation
from mlxchat.tasks.base import Task, dialogue
from preference.test_loss import make_config

ANSWERS = ["the cat", "the dog", "the cat", "the mat", "the log", "the cat sat", "cat", "dog"]


class Cats(Task):
    name = "cats"

    def _own_size(self) -> int:
        return 40

    def _conversation(self, index: int, rng: Any) -> Conversation:
        return dialogue(f"who sat {index}", "the cat")

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        return "cat" in response


class Scripted(Engine):
    """Answers as a script says; the last of a question's answers is cut off."""

    calls = 0

    def complete(self, prompts: list[list[int]], **how: Any) -> list[Completion]:
        self.calls += 1
        end = self.tokenizer.assistant_end
        rows = [self.tokenizer.encode(ANSWERS[number % len(ANSWERS)]) for number in range(len(prompts))]
        finished = [number % len(ANSWERS) < len(ANSWERS) - 1 for number in range(len(prompts))]
        return [
            Completion(ids=[*ids, end] if whole else ids, mask=[1] * (len(ids) + whole), finished=whole)
            for ids, whole in zip(rows, finished, strict=True)
        ]


def make_engine() -> Scripted:
    return Scripted(make_model(), make_tokenizer())


def test_different_right_answers_are_paired_with_different_wrong_ones(tmp_path):
    ctx = make_context(tmp_path)
    pairs = sample_pairs(ctx, "data", Cats("train"), make_engine(), make_config(pairs_per_question=4), seed=1)
    of_one = [(pair["messages"][-1]["content"], pair["rejected"]) for pair in pairs[:3]]
    assert of_one == [("the cat", "the dog"), ("the cat sat", "the mat"), ("cat", "the log")]
    assert len(pairs) == 3 * 40
    assert pairs[3]["messages"][0]["content"] == "who sat 1"
    assert ctx.derived == {"data_questions": 40, "data_right_frac": 4 / 8}
    fewer = sample_pairs(ctx, "other", Cats("train"), make_engine(), make_config(pairs_per_question=1), seed=1)
    assert fewer == pairs[::3]


def test_interrupted_sampling_continues_and_gives_the_same_pairs(tmp_path):
    how: dict[str, Any] = {"config": make_config(max_new_tokens=4, samples_per_question=8, top_k=5), "seed": 1}
    task = Cats("train", size=20)
    task.evaluate = lambda conversation, response: len(response) % 2 == 0  # type: ignore[method-assign]  # the verdict of this test
    engine = Engine(make_model(scale=0.4), make_tokenizer())
    whole = sample_pairs(make_context(tmp_path / "whole"), "data", task, _ending(engine), **how)
    stopping = _ending(engine)
    ctx = make_context(tmp_path, stop_signal=lambda: 15 if stopping.calls else None)
    with pytest.raises(Interrupted, match="question 16 of 20"):
        sample_pairs(ctx, "data", task, stopping, **how)
    again = _ending(engine)
    assert sample_pairs(make_context(tmp_path), "data", task, again, **how) == whole
    assert (stopping.calls, again.calls) == (1, 1)
    assert len(whole) > 1


def _ending(engine: Engine) -> Any:
    """Return an engine whose answers all end by themselves, and which counts its calls."""

    class Ending(Engine):
        calls = 0

        def complete(self, prompts: list[list[int]], **how: Any) -> list[Completion]:
            self.calls += 1
            end = self.tokenizer.assistant_end
            rows = super().complete(prompts, **how)
            return [row if row.finished else Completion(ids=[*row.ids, end], finished=True) for row in rows]

    return Ending(engine.model, make_tokenizer())


def test_task_without_right_answers_is_refused(tmp_path):
    task = Cats("train")
    task.evaluate = lambda conversation, response: False  # type: ignore[method-assign]  # the verdict of this test
    with pytest.raises(
        DataError, match=r"none of 40 questions has a right and a wrong answer among its 8 samples \(0\.0%"
    ):
        sample_pairs(make_context(tmp_path), "data", task, make_engine(), make_config(), seed=1)


def test_written_pairs_are_read_as_they_were(tmp_path):
    kinds = {"text": "1+1=", "python": "1+1", "python_output": "2"}
    parts = [{"type": kind, "text": text} for kind, text in kinds.items()]
    pair = {"messages": [{"role": "user", "content": "sum?"}, {"role": "assistant", "content": parts}], "rejected": "3"}
    write_pairs(tmp_path / "pairs.jsonl", [pair])
    assert load_task("pairs", "train", path=tmp_path / "pairs.jsonl", held_out_frac=0)[0] == pair


def test_parsed_answers_render_to_the_same_tokens():
    """Tokens that no content renders to give None."""
    tokenizer = make_tokenizer()
    text, python, empty = ({"type": kind, "text": text} for kind, text in
                           (("text", "it is "), ("python", "1+1"), ("python_output", "")))  # fmt: skip
    for content in ("the cat", [text, python, {**empty, "text": "2"}], [python, empty, text]):
        ids, _ = render_conversation(tokenizer, dialogue("who", content))
        begin = ids.index(tokenizer.special_ids["<|assistant_start|>"]) + 1
        assert parse_answer(tokenizer, ids[begin:-1]) == content
    for tokens in (["<|python_start|>"], ["<|user_start|>"], ["<|python_end|>"], []):
        assert parse_answer(tokenizer, [tokenizer.special_ids[token] for token in tokens]) is None
