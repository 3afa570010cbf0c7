"""`mlxchat show ID --examples`: examples of an evaluation, and RL's questions with all their answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlxchat.cli import dispatch
from mlxchat.commands.examples import _show_answers, _show_rollouts
from mlxchat.errors import ConfigError
from mlxchat.evals.examples import write_examples


def example(task: str, index: int, *, verdict: bool, **changes: Any) -> dict[str, Any]:
    return {
        "task": task, "index": index, "seed": None, "prompt": f"question {index}", "output": f"said {index}",
        "expected": f"wanted {index}", "verdict": verdict, "tokens": 3, "details": {}, **changes,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [example("gsm8k", index, verdict=index % 2 == 0) for index in range(10)]
    rows += [example("mmlu", index, verdict=True) for index in range(4)]
    write_examples(tmp_path / "examples.parquet", rows)
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], folder: Path, which: str, **changes: Any) -> list[str]:
    _show_answers(folder, **{"which": which, "count": 5, "task": None} | changes)
    return [line for line in capsys.readouterr().out.splitlines() if line.endswith("3 tokens")]


def test_examples_are_spread_over_tasks(capsys, folder):
    lines = shown(capsys, folder, "right", count=4)
    assert [line.split("  ")[0] for line in lines] == ["gsm8k 0", "gsm8k 2", "mmlu 0", "mmlu 1"]
    assert len(shown(capsys, folder, "all", count=100)) == 14


def test_examples_are_wrapped_to_the_terminal(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    details = {"logits": {"A": 0.5, "B": 1.25}, "finished": True, "status": "timeout"}
    row = example("t", 7, verdict=False, seed=2, prompt="word " * 40, output="def f():\n    return 1", details=details)
    write_examples(tmp_path / "examples.parquet", [row])
    _show_answers(tmp_path, which="wrong", count=1, task=None)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 60
    assert out.count("word") == 40
    for expected in ("t 7  seed 2  wrong", "  output   def f():\n               return 1\n", "  expected wanted 7"):
        assert expected in out
    assert '  details  logits: {"A": 0.5, "B": 1.25}\n           status: timeout\n' in out
    assert out.endswith("t: 0 of 1 right\n")


@pytest.mark.parametrize("words", [["--examples", "bad"], ["--examples", "all", "-n", "0"]])
def test_invalid_choices_and_counts_are_refused(words):
    with pytest.raises(ConfigError):
        dispatch(["show", "eval_sft", *words])


def test_show_prints_examples_of_a_run(finished, capsys):
    code = dispatch(
        ["show", "eval_sft", "--examples", "all", "-n", "2", "--task", "kinds_mc", f"outputs={finished.outputs}"]
    )
    out = capsys.readouterr().out
    assert code == 0
    assert out.count("Multiple Choice question:") == 2
    assert "kinds_mc: " in out


def answer(iteration: int, question: int, sample: int, reward: float, **changes: Any) -> dict[str, Any]:
    return {
        "iteration": iteration, "question": question, "sample": sample, "prompt": f"<|bos|>what is {question}?",
        "output": f"it is {sample}", "expected": "it is 1", "reward": reward, "parts": {}, "right": reward == 1,
        "advantage": reward - 0.5, "tokens": 3, "finished": True,
    } | changes  # fmt: skip


@pytest.fixture
def answers_folder(tmp_path: Path) -> Path:
    answers = [
        *(answer(1, 7, sample, float(sample)) for sample in (0, 1)),
        *(answer(9, 8, sample, 0.0) for sample in (0, 1)),
        *(answer(9, 5, sample, float(sample), parts={"brief": -0.25}) for sample in (0, 1)),
    ]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in answers))
    return tmp_path


def shown_answers(answers_folder: Path, capsys: pytest.CaptureFixture[str], **asked: Any) -> str:
    _show_rollouts(answers_folder, **({"which": "all", "count": 5, "iteration": None} | asked))
    return capsys.readouterr().out


def test_question_is_shown_once_best_answer_first(answers_folder, capsys):
    text = shown_answers(answers_folder, capsys, iteration=9)
    assert text.count("what is 5?") == text.count("what is 8?") == 1
    assert "iteration 9, question 5: 1 of 2 right, mean reward 0.5" in text
    best, worst = text.index("right  reward 1  brief -0.25  advantage +0.500"), text.index("wrong  reward 0  brief")
    assert best < worst
    assert "<|bos|>" not in text


def test_last_iteration_comes_first(answers_folder, capsys):
    text = shown_answers(answers_folder, capsys, count=2)
    assert "question 8" in text
    assert "question 5" in text
    assert "question 7" not in text
    assert "answers of 2 iterations are kept, 1 to 9: --iteration N shows one" in text
