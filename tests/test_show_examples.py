"""`mlxchat show ID --examples`: examples of an evaluation, and RL's questions with all their answers."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from mlxchat.commands.examples import show_examples
from mlxchat.errors import ConfigError
from mlxchat.evals.examples import write_examples


def shown(capsys: pytest.CaptureFixture[str], folder: Path, **options: Any) -> str:
    chosen = {"examples": "all", "n": 5, "task": None, "iteration": None} | options
    assert show_examples(folder, Namespace(**chosen)) == 0
    return capsys.readouterr().out


def example(task: str, index: int, *, verdict: bool, **changes: Any) -> dict[str, Any]:
    return {
        "task": task, "index": index, "seed": None, "prompt": f"question {index}", "output": f"said {index}",
        "expected": f"wanted {index}", "verdict": verdict, "tokens": 3, "details": {}, **changes,
    }  # fmt: skip


def test_examples_are_spread_over_tasks(capsys, tmp_path):
    rows = [example("gsm8k", index, verdict=index % 2 == 0) for index in range(10)]
    rows += [example("mmlu", index, verdict=True) for index in range(4)]
    write_examples(tmp_path / "examples.parquet", rows)
    lines = [line for line in shown(capsys, tmp_path, examples="right", n=4).splitlines() if "3 tokens" in line]
    assert [line.split("  ")[0] for line in lines] == ["gsm8k 0", "gsm8k 2", "mmlu 0", "mmlu 1"]
    assert "gsm8k: 5 of 10 right" in shown(capsys, tmp_path, task="gsm8k")
    with pytest.raises(ConfigError, match='Did you mean "gsm8k"'):
        shown(capsys, tmp_path, task="gsm8")


def test_rollouts_show_rewards_best_answers_first(capsys, tmp_path):
    answers = [
        {
            "iteration": iteration, "question": 5, "sample": sample, "prompt": "<|bos|>what?", "output": f"it {sample}",
            "expected": "it is 1", "reward": float(sample), "parts": {"brief": -0.25}, "right": sample == 1,
            "advantage": sample - 0.5, "tokens": 3, "finished": True,
        }
        for iteration in (1, 9) for sample in (0, 1)
    ]  # fmt: skip
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in answers))
    text = shown(capsys, tmp_path, iteration=9)
    assert "iteration 9, question 5: 1 of 2 right, mean reward 0.5" in text
    best, worst = text.index("right  reward 1  brief -0.25  advantage +0.500"), text.index("wrong  reward 0  brief")
    assert best < worst
    assert "iteration 1," not in text
    assert "<|bos|>" not in text
