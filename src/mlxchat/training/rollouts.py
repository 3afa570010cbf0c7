"""Batches for RL: answers sampled from the model as it is now, weighted by what the loss makes of their advantages.

Counterpart of nanochat's chat_rl.py, whose recipe is the default: advantage = reward − mean reward of the question's
samples; the loss is −Σ log p × advantage over the sampled tokens, divided by the number of sampled tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlxchat.config import RLConfig
from mlxchat.engine.generate import Completion, Engine
from mlxchat.optim.groups import Flat
from mlxchat.tasks.base import Task
from mlxchat.training.advantages import advantages_of
from mlxchat.training.asking import Asker
from mlxchat.training.policy_batch import Floats, of_completions, sampled_mask, scored_rows, weighted_rows
from mlxchat.training.policy_loss import policy_loss
from mlxchat.training.policy_scores import PolicyScores
from mlxchat.training.quantised_rollouts import correct, refuse_if_apart
from mlxchat.training.step import Batch

Log = Callable[[dict[str, Any]], None]


@dataclass
class Rollout:
    """The answers of one iteration, in the order of its questions."""

    questions: list[int]
    prompts: list[list[int]]
    completions: list[Completion]
    advantages: Floats
    sampled: Floats | None = None
    """(B, L) log-probabilities of the completions' tokens when they were sampled, where they will be needed."""
    reference: Floats | None = None
    """(B, L) those under the frozen reference."""

    def part(self, rows: slice) -> Rollout:
        """Return some of the rows."""
        return Rollout(
            questions=self.questions,
            prompts=self.prompts[rows],
            completions=self.completions[rows],
            advantages=self.advantages[rows],
            sampled=None if self.sampled is None else self.sampled[rows],
            reference=None if self.reference is None else self.reference[rows],
        )

    def record(self) -> dict[str, Any]:
        """Return all of it as JSON data; floats come back as they were."""
        arrays = {"advantages": self.advantages, "sampled": self.sampled, "reference": self.reference}
        return {
            "questions": self.questions,
            "prompts": self.prompts,
            "completions": [asdict(completion) for completion in self.completions],
            **{name: None if array is None else array.tolist() for name, array in arrays.items()},
        }

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Rollout:
        """Return what `record` was made of."""
        names = ("advantages", "sampled", "reference")
        arrays = {name: None if record[name] is None else np.array(record[name], dtype=np.float64) for name in names}
        completions = [Completion(**completion) for completion in record["completions"]]
        return cls(**{**record, **arrays, "completions": completions})


class Rollouts:
    """A source of batches that samples its own data. The position is the number of updates."""

    def __init__(
        self,
        engine: Engine,
        task: Task,
        config: RLConfig,
        *,
        seed: int,
        log: Log,
        keep: Log = lambda record: None,
        scores: PolicyScores | None = None,
        reference: Flat | None = None,
    ) -> None:
        """Ask the task's questions in a shuffled order.

        Args:
            engine: of the model that is trained; with weights of `rollout_bits`.
            task: whose questions are asked.
            config: of RL.
            seed: of the order and of all draws.
            log: gets rewards and other numbers of each iteration.
            keep: gets some of the answers.
            scores: of the same model; None: no log-probability is needed and no entropy measured.
            reference: weights of the frozen reference, None where there is no divergence to take.

        Raises:
            ConfigError: a function of the reward cannot be imported.
            StepFailed: it fails with a question's own answer.
        """
        self.engine, self.config, self.log, self._keep = engine, config, log, keep
        self._scores, self._reference = scores, reference
        self._asker = Asker(engine, task, config, seed=seed)
        self.mean_reward = 0.0
        self.waited_seconds = 0.0
        """Sampling is work, no waiting."""
        self._rollout: Rollout | None = None
        self._saved: dict[str, Any] | None = None
        self._questions: list[int] = []
        self._num_asked = 0

    def next_batch(self, iteration: int) -> Batch:
        """Return the rows of an update; before the first of an iteration, sample answers to its questions."""
        config = self.config
        number, turn = divmod(iteration, updates_per_rollout(config))
        if turn == 0:
            self._rollout = self._sample(number, iteration)
            self._saved = self._rollout.record() if updates_per_rollout(config) > 1 else None
        assert self._rollout is not None, "an update in the middle of a rollout comes after its first, or is restored"
        size = config.questions_per_iteration // config.minibatches_per_rollout
        first = turn % config.minibatches_per_rollout * size
        self._questions = self._rollout.questions[first : first + size]
        samples = config.samples_per_question
        rollout = self._rollout.part(slice(first * samples, (first + size) * samples))
        now = rollout.sampled
        if turn:
            now, _ = self._score(rollout)
        mask = sampled_mask(rollout.completions)
        if not config.train_unfinished:
            mask *= np.array([row.finished for row in rollout.completions], dtype=np.float64)[:, None]
        width = mask.shape[1]
        now, sampled, reference = (
            None if array is None else array[:, :width] for array in (now, rollout.sampled, rollout.reference)
        )
        correction = None
        if config.rollout_bits is not None and sampled is not None:
            correction, _ = correct(sampled, rollout.completions, config)
        loss = policy_loss(
            mask, rollout.advantages, config, now=now, sampled=sampled, reference=reference, correction=correction
        )
        if loss.numbers:
            self.log({"iteration": iteration + 1, "policy_loss": loss.value, **loss.numbers})
        padding = self.engine.tokenizer.assistant_end
        return weighted_rows(rollout.prompts, rollout.completions, loss.weights, padding=padding)

    def documents(self) -> list[str]:
        """Return what people call the questions of the last batch."""
        return [f"question {index}" for index in self._questions]

    def state(self) -> dict[str, Any]:
        """Return the last reward and, where it does not follow from the iteration, how many questions were asked.

        Where an iteration has several updates, its answers, too.
        """
        state: dict[str, Any] = {"mean_reward": self.mean_reward}
        if self.config.resample_rounds:
            state["num_asked"] = self._num_asked
        return state if self._saved is None else {**state, "rollout": self._saved}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position."""
        self.mean_reward, self._num_asked = state["mean_reward"], state.get("num_asked", 0)
        self._saved = state.get("rollout")
        self._rollout = None if self._saved is None else Rollout.of_record(self._saved)

    def _sample(self, number: int, iteration: int) -> Rollout:
        """Ask the questions of the `number`-th iteration, log what came of it and keep some answers."""
        config, asker = self.config, self._asker
        first = self._num_asked if config.resample_rounds else number * config.questions_per_iteration
        chosen, asked = asker.ask(number, first)
        advantages = advantages_of(np.array([each.rewards for each in chosen]), config.advantages)
        rollout = Rollout(
            questions=[each.number for each in chosen],
            prompts=[each.prompt for each in chosen for _ in each.completions],
            completions=[row for each in chosen for row in each.completions],
            advantages=advantages.reshape(-1),
        )
        numbers = asker.numbers(chosen, asked)
        self.log({"iteration": iteration + 1, **numbers, **self._measure(rollout, number, iteration)})
        for each, own in list(zip(chosen, advantages, strict=True))[: config.rollouts_kept]:
            for record in asker.records(each, own):
                self._keep({"iteration": iteration + 1, **record})
        self.mean_reward, self._num_asked = numbers["reward"], first + len(asked)
        return rollout

    def _measure(self, rollout: Rollout, number: int, iteration: int) -> dict[str, float]:
        """Set the log-probabilities that the loss will need; return the entropy where it was measured."""
        config = self.config
        needed = needs_log_probabilities(config)
        due = config.entropy_every is not None and number % config.entropy_every == 0
        if self._scores is None or not (needed or due):
            return {}
        sampled, entropies = self._score(rollout)
        mask = sampled_mask(rollout.completions)
        numbers: dict[str, float] = {}
        if config.rollout_bits is not None:
            _, numbers = correct(sampled, rollout.completions, config)
            refuse_if_apart(numbers, config, iteration + 1)
        if needed:
            rollout.sampled = sampled
            if self._reference is not None:
                rollout.reference, _ = self._score(rollout, self._reference)
        return {"entropy": float((entropies * mask).sum() / max(1.0, mask.sum())), **numbers}

    def _score(self, rollout: Rollout, parameters: Flat | None = None) -> tuple[Floats, Floats]:
        """Return log-probabilities and entropies (B, L) of the completions' tokens."""
        assert self._scores is not None, "this configuration needs log-probabilities"
        prompts, completions = rollout.prompts, rollout.completions
        ids, targets = scored_rows(prompts, completions, padding=self.engine.tokenizer.assistant_end)
        log_probabilities, entropies = self._scores(ids, targets, parameters)
        return of_completions(log_probabilities, prompts, completions), of_completions(entropies, prompts, completions)


def updates_per_rollout(config: RLConfig) -> int:
    """Return how many updates an iteration's answers give."""
    return config.minibatches_per_rollout * config.passes_per_rollout


def needs_log_probabilities(config: RLConfig) -> bool:
    """Tell whether the loss needs log-probabilities: in the first update after sampling every ratio is 1."""
    return updates_per_rollout(config) > 1 or config.kl_coefficient > 0 or config.rollout_bits is not None
