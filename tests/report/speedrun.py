"""A made-up run of nanochat's whole recipe, its scores written by the code that writes real ones."""

import random
from collections.abc import Callable
from typing import Any

from mlxchat.evals.core import task_data
from mlxchat.evals.core_bundle import CoreTask
from mlxchat.evals.examples import write_examples
from mlxchat.evals.scores import Score, chatcore, mean_centered, mean_centered_stderr

# label, kind, shots, baseline
CORE_TASKS = [("squad", "language_modeling", 10, 0.0), ("copa", "multiple_choice", 0, 0.5),
              *((f"task_{number}", "multiple_choice", 10, 0.25) for number in range(20))]  # fmt: skip
# task: chance, kind, questions
CHAT_TASKS = {
    "arc_easy": (0.25, "categorical", 2376),
    "arc_challenge": (0.25, "categorical", 1172),
    "mmlu": (0.25, "categorical", 14042),
    "gsm8k": (0.0, "generative", 1319),
    "humaneval": (0.0, "generative", 164),
    "spelling_bee": (0.0, "generative", 256),
}


def core_result(seed: int, level: float) -> dict[str, Any]:
    """Return what evals/core.py writes of a model with a mean centred accuracy near `level`."""
    draw = random.Random(seed)
    scores, tasks = [], {}
    for label, kind, shots, baseline in CORE_TASKS:
        accuracy = baseline + (1 - baseline) * max(0.0, min(0.9, draw.gauss(level, 0.15)))
        task = CoreTask(label=label, kind=kind, data="", num_fewshot=shots, delimiter=" ", baseline=baseline)
        count = draw.randint(200, 9000)
        scores.append(Score(kind=kind, chance=baseline, accuracy=accuracy, num_examples=count))
        tasks[label] = task_data(task, scores[-1])
    about = {"bundle_sha256": "0" * 64, "max_per_task": None, "long_prompts": "extend", "context_tokens": 2048}
    return {"core": mean_centered(scores), "stderr": mean_centered_stderr(scores), **about, "tasks": tasks}


def chat_result(seed: int, level: float, tasks: list[str]) -> dict[str, Any]:
    """Return what stages/eval.py writes of a chat model."""
    draw = random.Random(seed)
    scores = {}
    for name in tasks:
        chance, kind, count = CHAT_TASKS[name]
        share = chance + (1 - chance) * level
        verdicts = [[draw.random() < share for _ in range(count)]]
        scores[name] = Score.of(verdicts, kind=kind, chance=chance)
    return {
        "tasks": {name: score.to_dict() for name, score in scores.items()},
        "mean_centered": mean_centered(list(scores.values())),
        "chatcore": chatcore(scores, {name: name for name in tasks}),
    }


def example_rows(seed: int, tasks: list[str]) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {
            "task": task, "index": i, "seed": None, "prompt": f"What is {i} + {i}?\n<b>{task}</b>",
            "output": f"It is {2 * i + (0 if right else 1)}.", "expected": str(2 * i), "verdict": right, "tokens": 5,
            "details": {},
        }
        for task in tasks
        for i, right in enumerate(draw.random() < 0.5 for _ in range(40))
    ]  # fmt: skip


def make_speedrun(make: Callable[..., Any], *, depth: int = 20, tasks: int = 5, outside: int = 0) -> Any:
    """Return the outputs of a whole run: CORE for the base model, ChatCORE for the others, outside models too."""
    fake = make(**{f"outside_{i}": {"stage": "outside"} for i in range(outside)})
    chats = list(CHAT_TASKS)[:tasks]
    base = {"bpb": {"val": 0.8123, "perplexity": 16.4, "tokens": 65536}, "tasks": {}, "mean_centered": None}
    fake.edit_json("eval_base", "scores.json", **base, core=core_result(1, 0.22))
    for number, (step, level) in enumerate({"eval_mid": 0.07, "eval_sft": 0.09, "eval_rl": 0.1}.items()):
        fake.edit_json(step, "scores.json", **chat_result(number, level, chats))
        write_examples(fake.folder(step) / "examples.parquet", example_rows(number, chats))
    for i in range(outside):
        scores = {"checkpoint": f"gpt2_{i}", "core": core_result(50 + i, 0.12 + 0.1 * i), "tasks": {}, "samples": []}
        bpb = {"val": 0.7 + i / 10, "perplexity": 20.0, "tokens": 65536}  # better than ours: none of our merit
        fake.write_json(f"outside_{i}", "scores.json", scores | {"bpb": bpb, "mean_centered": None})
    full = {
        "model": {"name": f"d{depth}", "depth": depth, "context_tokens": 2048},
        "architecture": {"name": "oct2025"},
        "optimizer": {"kind": "muon", "matrix_lr": 0.02},
        "pretrain": {"tokens_per_parameter": 20.0, "num_iterations": None, "target_flops": None},
    }
    derived = {"num_layers": depth, "num_parameters": 561_000_000, "total_tokens": 11_220_000_000,
               "total_flops": 3.92e19, "num_iterations": 21_400}  # fmt: skip
    fake.edit_json("pretrain", "manifest.json", full_config=full, derived=derived)
    hub = {"corpus": {"name": "fineweb_edu", "hub": {"repository": "karpathy/fineweb-edu-100b-shuffle"}}}
    fake.edit_json("corpus", "manifest.json", full_config=hub)
    return fake
