"""mlxchat show --examples for RL: questions with all their answers, by iteration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxchat.commands.examples import show_rollouts
from mlxchat.errors import DataError


def answer(iteration: int, question: int, sample: int, reward: float, **changes: Any) -> dict[str, Any]:
    return {
        "iteration": iteration, "question": question, "sample": sample, "prompt": f"<|bos|>what is {question}?",
        "output": f"it is {sample}", "expected": "it is 1", "reward": reward, "parts": {}, "right": reward == 1,
        "advantage": reward - 0.5, "tokens": 3, "finished": True,
    } | changes  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    answers = [
        *(answer(1, 7, sample, float(sample)) for sample in (0, 1)),
        *(answer(9, 8, sample, 0.0) for sample in (0, 1)),
        *(answer(9, 5, sample, float(sample), parts={"brief": -0.25}) for sample in (0, 1)),
    ]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in answers))
    return tmp_path


def shown(folder: Path, capsys: pytest.CaptureFixture[str], **asked: Any) -> str:
    assert show_rollouts(folder, **({"which": "all", "count": 5, "iteration": None} | asked)) == 0
    return capsys.readouterr().out


def test_question_is_shown_once_best_answer_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(folder, capsys, iteration=9)
    assert text.count("what is 5?") == text.count("what is 8?") == 1
    assert "iteration 9, question 5: 1 of 2 right, mean reward 0.5" in text
    best, worst = text.index("right  reward 1  brief -0.25  advantage +0.500"), text.index("wrong  reward 0  brief")
    assert best < worst
    assert "<|bos|>" not in text


def test_last_iteration_comes_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(folder, capsys, count=2)
    assert "question 8" in text
    assert "question 5" in text
    assert "question 7" not in text
    assert "answers of 2 iterations are kept, 1 to 9: --iteration N shows one" in text


def test_control_characters_of_answers_are_escaped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "rollouts.jsonl").open("a") as file:
        hostile = {"output": "\x1b[2Jgone", "parts": {"\x1b]52;c;bHM=\x07": 1.0}}
        file.write(json.dumps(answer(10, 1, 0, 0.0, finished=False, **hostile)) + "\n")
    text = shown(folder, capsys, iteration=10)
    assert not {"\x1b", "\x07"} & set(text)
    assert "3 tokens  cut" in text


@pytest.mark.parametrize(
    "line",
    ["{nothing", "[" * 100_000, "[]", "5", '{"iteration": 1}',
     *(json.dumps(answer(1, 1, 0, 0.0) | change) for change in (
         {"iteration": "9"}, {"question": []}, {"reward": "much"}, {"parts": [1]}, {"parts": {"brief": "x"}},
         {"prompt": None}, {"output": 5}, {"sample": "1"}, {"advantage": "+1"},
     ))],
    ids=lambda line: line[:40],
)  # fmt: skip
def test_damaged_answers_are_reported(line: str, folder: Path) -> None:
    with (folder / "rollouts.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(DataError, match="cannot be read"):
        show_rollouts(folder, which="all", count=1, iteration=None)
