"""pass@k on held-out problems, with standard errors."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxchat.config import RLConfig
from mlxchat.data.conversation import render_for_completion
from mlxchat.engine.generate import Engine
from mlxchat.tasks.base import Task
from mlxchat.training.draws import draw_seed

_ROWS_PER_PASS = 128


def pass_at_k(engine: Engine, task: Task, config: RLConfig, *, seed: int) -> dict[str, float]:
    """Return the share of held-out problems that one of the first k samples solves, for k = 1 … eval_samples.

    Sampling is as in training (temperature, top_k), counted as nanochat counts it. `held_out_reward` is the mean over
    all samples: what RL maximises, with less noise than the first sample alone. Names with `_stderr` are the standard
    errors over problems.
    """
    samples = config.eval_samples
    conversations = [task[index] for index in range(len(task))]
    prompts = [render_for_completion(engine.tokenizer, conversation) for conversation in conversations]
    solved = np.zeros((len(task), samples), dtype=bool)
    per_pass = max(1, _ROWS_PER_PASS // samples)
    for start in range(0, len(task), per_pass):
        part = range(start, min(start + per_pass, len(task)))
        completions = engine.complete(
            [prompts[index] for index in part for _ in range(samples)],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            seed=draw_seed(seed, start),
        )
        for place, completion in enumerate(completions):
            index = part[place // samples]
            text = completion.text(engine.tokenizer)
            solved[index, place % samples] = task.evaluate(conversations[index], text)
    return summarise(solved)


def summarise(solved: np.ndarray[Any, np.dtype[np.bool_]]) -> dict[str, float]:
    """Return pass_at_k, held_out_reward and their standard errors from verdicts (problems, samples)."""
    count, samples = solved.shape
    passed = {f"pass_at_{k}": solved[:, :k].any(axis=1) for k in range(1, samples + 1)}
    each = {**passed, "held_out_reward": solved.mean(axis=1)}
    means = {name: float(values.mean()) for name, values in each.items()}
    return means | {f"{name}_stderr": float(values.std() / np.sqrt(count)) for name, values in each.items()}
