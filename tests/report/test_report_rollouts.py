"""What the report shows of the answers that RL sampled."""

from pathlib import Path
from typing import Any

from mlxchat.report.examples import rollout_examples

CALL = "<|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>"


def answers(iteration: int, question: int, rewards: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "iteration": iteration, "question": question, "sample": sample, "right": reward > 0.5, "reward": reward,
            "prompt": f"<|bos|><|user_start|>ask {question}<|user_end|><|assistant_start|>",
            "output": f"say {sample}{CALL} <b>", "expected": "say", "advantage": reward - 0.5,
        }
        for sample, reward in enumerate(rewards)
    ]  # fmt: skip


def write(whole: Any) -> Path:
    folder: Path = whole.folder("rl")
    lines = [*answers(3, 9, [0.0, 0.0]), *answers(1, 4, [1.0, 1.0]), *answers(1, 5, [0.0, 1.0, 0.5])]
    whole.write_lines(folder / "rollouts.jsonl", lines)
    return folder


def test_best_and_worst_rollouts_are_shown(whole):
    found = rollout_examples(write(whole))
    assert [(each.prompt, each.output, each.is_right) for each in found] == [
        ("ask 5", "say 1<<1+1=2>> <b>", True), ("ask 5", "say 0<<1+1=2>> <b>", False),
        ("ask 9", "say 0<<1+1=2>> <b>", False), ("ask 9", "say 1<<1+1=2>> <b>", False),
    ]  # fmt: skip
    assert found[0].task == "iteration 1, reward 1, advantage +0.5"
