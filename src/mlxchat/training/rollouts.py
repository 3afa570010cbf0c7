"""Batches for RL: answers sampled from the model as it is now, weighted by their advantages.

Counterpart of nanochat's chat_rl.py: advantage = reward − mean reward of the question's samples; the loss is
−Σ log p × advantage over the sampled tokens, divided by the number of sampled tokens of the iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mlxchat.config import RLConfig
from mlxchat.data.conversation import render_for_completion
from mlxchat.data.packing import IGNORED
from mlxchat.engine.generate import Completion, Engine
from mlxchat.tasks.base import Task
from mlxchat.training.step import Batch

_WIDTH_STEP = 32
_ROWS_STEP = 16


class Rollouts:
    """A source of batches that samples its own data. The position is the number of questions asked."""

    def __init__(
        self, engine: Engine, task: Task, config: RLConfig, *, seed: int, log: Callable[[dict[str, Any]], None]
    ) -> None:
        """Ask the task's questions in a shuffled order; rewards go to `log` after each iteration."""
        self.engine, self.task, self.config, self.seed, self.log = engine, task, config, seed, log
        self.mean_reward = 0.0
        self.waited_seconds = 0.0
        """Sampling is work, no waiting."""
        self._questions: list[int] = []

    def next_batch(self, iteration: int) -> Batch:
        """Sample answers to the iteration's questions and return them as weighted rows."""
        config = self.config
        order = np.random.default_rng(self.seed).permutation(len(self.task))
        first = iteration * config.questions_per_iteration
        questions = [int(order[(first + index) % len(order)]) for index in range(config.questions_per_iteration)]
        self._questions = questions
        conversations = [self.task[index] for index in questions]
        prompts = [render_for_completion(self.engine.tokenizer, conversation) for conversation in conversations]
        samples = config.samples_per_question
        completions = self.engine.complete(
            [prompt for prompt in prompts for _ in range(samples)],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            seed=_mix(self.seed, iteration),
        )
        rewards = np.array(
            [
                self.task.reward(conversations[index // samples], row.text(self.engine.tokenizer))
                for index, row in enumerate(completions)
            ]
        )
        advantages = centre_rewards(rewards.reshape(-1, samples)).reshape(-1)
        self.mean_reward = float(rewards.mean())
        self.log(
            {
                "iteration": iteration + 1,
                "reward": self.mean_reward,
                "completion_tokens": float(np.mean([len(row.ids) for row in completions])),
                "finished": float(np.mean([row.finished for row in completions])),
            }
        )
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        return weighted_batch(repeated, completions, advantages, padding=self.engine.tokenizer.assistant_end)

    def documents(self) -> list[str]:
        """Return what people call the questions of the last batch."""
        return [f"question {index}" for index in self._questions]

    def state(self) -> dict[str, Any]:
        """Return the last reward; questions and seeds follow from the iteration."""
        return {"mean_reward": self.mean_reward}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position."""
        self.mean_reward = state["mean_reward"]


def centre_rewards(rewards: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the advantages (questions, samples): rewards less the mean of their question's, not rescaled."""
    centred: np.ndarray[Any, np.dtype[np.float64]] = rewards - rewards.mean(axis=1, keepdims=True)
    return centred


def weighted_batch(
    prompts: list[list[int]],
    completions: list[Completion],
    advantages: np.ndarray[Any, np.dtype[np.float64]],
    *,
    padding: int,
) -> Batch:
    """Return rows whose loss is −Σ log p × advantage / sampled tokens.

    Forced tokens (a tool's output), prompts and padding have weight 0. Rows without advantage change nothing and are
    left out, though their tokens count in the divisor.
    """
    sampled_tokens = max(1, sum(sum(row.mask) for row in completions))
    useful = [index for index in range(len(prompts)) if advantages[index] != 0]
    longest = max((len(prompts[index]) + len(completions[index].ids) for index in useful), default=_WIDTH_STEP)
    # Few shapes, so that few are compiled.
    width = -(-longest // _WIDTH_STEP) * _WIDTH_STEP
    height = max(_ROWS_STEP, -(-len(useful) // _ROWS_STEP) * _ROWS_STEP)
    ids = np.full((height, width + 1), padding, dtype=np.int32)
    weights = np.zeros((height, width + 1), dtype=np.float32)
    for row, index in enumerate(useful):
        prompt, completion = prompts[index], completions[index]
        end = len(prompt) + len(completion.ids)
        ids[row, :end] = [*prompt, *completion.ids]
        weights[row, len(prompt) : end] = np.array(completion.mask) * (advantages[index] / sampled_tokens)
    targets = np.where(weights[:, 1:] != 0, ids[:, 1:], IGNORED).astype(np.int32)
    return Batch(ids[:, :-1], targets, weights[:, 1:])


def pass_at_k(engine: Engine, task: Task, config: RLConfig, *, seed: int) -> dict[str, float]:
    """Return the share of held-out problems that one of the first k samples solves, for k = 1 … eval_samples.

    Sampling is as in training (temperature, top_k), counted as nanochat counts it. `held_out_reward` is the mean over
    all samples: what RL maximises, with less noise than the first sample alone.
    """
    samples = config.eval_samples
    conversations = [task[index] for index in range(len(task))]
    prompts = [render_for_completion(engine.tokenizer, conversation) for conversation in conversations]
    solved = np.zeros((len(task), samples), dtype=bool)
    per_pass = max(1, 128 // samples)
    for start in range(0, len(task), per_pass):
        part = range(start, min(start + per_pass, len(task)))
        completions = engine.complete(
            [prompts[index] for index in part for _ in range(samples)],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            seed=_mix(seed, start),
        )
        for place, completion in enumerate(completions):
            index = part[place // samples]
            text = completion.text(engine.tokenizer)
            solved[index, place % samples] = task.evaluate(conversations[index], text)
    numbers = {f"pass_at_{k}": float(solved[:, :k].any(axis=1).mean()) for k in range(1, samples + 1)}
    return {**numbers, "held_out_reward": float(solved.mean())}


def _mix(seed: int, number: int) -> int:
    """Return a seed for one of many draws."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
