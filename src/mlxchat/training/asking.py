"""Questions of RL with their sampled and judged answers; questions that teach nothing make room for the next ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxchat.config import RLConfig
from mlxchat.data.conversation import render_for_completion
from mlxchat.engine.generate import Completion, Engine
from mlxchat.tasks.base import Task, answer_text
from mlxchat.training.draws import draw_seed
from mlxchat.training.policy_batch import Floats
from mlxchat.training.rewards import Answer, Reward


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question and its answers."""

    number: int
    """In the task."""
    prompt: list[int]
    completions: list[Completion]
    answers: list[Answer]
    judged: list[tuple[float, dict[str, float]]]
    """Reward and its parts."""

    @property
    def rewards(self) -> Floats:
        """Return the rewards of the answers."""
        return np.array([reward for reward, _ in self.judged])

    @property
    def teaches(self) -> bool:
        """Whether some answers are better than others; else each advantage is 0."""
        return len({reward for reward, _ in self.judged}) > 1


class Asker:
    """Asks a task's questions in a shuffled order, again and again."""

    def __init__(self, engine: Engine, task: Task, config: RLConfig, *, seed: int) -> None:
        """Import the functions of the reward, and try them out on the first question and its own answer.

        Raises:
            ConfigError: a function cannot be imported.
            StepFailed: it fails.
        """
        self.engine, self.task, self.config, self.seed = engine, task, config, seed
        self.reward = Reward(task, config.rewards)
        self.reward.try_out(task[0])
        self._order = np.random.default_rng(seed).permutation(len(task))

    def ask(self, iteration: int, first: int) -> tuple[list[Asked], list[Asked]]:
        """Return what an iteration trains on, and all that was asked for it, this included.

        Questions whose answers are rewarded alike give their places to the next ones that teach something, in
        `resample_rounds` rounds at most; what is left of them then stays. The answers depend on the model, the
        iteration and `first` alone.

        Args:
            iteration: counted from 0.
            first: place in the order where it begins; the next iteration begins behind all that was asked.
        """
        seed = draw_seed(self.seed, iteration)
        chosen = self._answer(first, self.config.questions_per_iteration, seed)
        asked = list(chosen)
        for further in range(1, self.config.resample_rounds + 1):
            open_places = [place for place, each in enumerate(chosen) if not each.teaches]
            if not open_places:
                break
            more = self._answer(first + len(asked), len(open_places), draw_seed(seed, further))
            asked += more
            for place, each in zip(open_places, (each for each in more if each.teaches), strict=False):
                chosen[place] = each
        return chosen, asked

    def _answer(self, first: int, count: int, seed: int) -> list[Asked]:
        """Return some of the questions with their answers."""
        config, tokenizer = self.config, self.engine.tokenizer
        samples = config.samples_per_question
        numbers = [int(self._order[(first + index) % len(self._order)]) for index in range(count)]
        conversations = [self.task[number] for number in numbers]
        prompts = [render_for_completion(tokenizer, conversation) for conversation in conversations]
        completions = self.engine.complete(
            [prompt for prompt in prompts for _ in range(samples)],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            seed=seed,
            log_probabilities=config.rollout_bits is not None,
        )
        found = []
        for index, (number, conversation, prompt) in enumerate(zip(numbers, conversations, prompts, strict=True)):
            own = completions[index * samples : (index + 1) * samples]
            answers = [
                Answer(conversation=conversation, text=row.text(tokenizer), num_tokens=sum(row.mask)) for row in own
            ]
            judged = [self.reward(answer) for answer in answers]
            found.append(Asked(number=number, prompt=prompt, completions=own, answers=answers, judged=judged))
        return found

    def numbers(self, chosen: list[Asked], asked: list[Asked]) -> dict[str, float]:
        """Return what is logged: means over all answers, and how much of what was asked teaches something."""
        completions = [row for each in asked for row in each.completions]
        judged = [judged for each in asked for judged in each.judged]
        numbers = {
            "reward": float(np.mean([reward for reward, _ in judged])),
            "completion_tokens": float(np.mean([len(row.ids) for row in completions])),
            "finished": float(np.mean([row.finished for row in completions])),
            "teaching_frac": float(np.mean([each.teaches for each in asked])),
        }
        if self.config.resample_rounds:
            numbers["questions_asked"] = len(asked)
            numbers["filled_frac"] = float(np.mean([each.teaches for each in chosen]))
        for name in self.config.rewards:
            numbers[f"reward_{name}"] = float(np.mean([parts[name] for _, parts in judged]))
        failures = {name: count for name, count in self.reward.failures().items() if count}
        return numbers | {f"reward_{name}_failures": count for name, count in failures.items()}

    def records(self, each: Asked, advantages: Floats) -> Iterator[dict[str, Any]]:
        """Yield what is kept of each answer to a question, for people."""
        prompt = self.engine.tokenizer.decode(each.prompt)
        for sample, (answer, completion) in enumerate(zip(each.answers, each.completions, strict=True)):
            reward, parts = each.judged[sample]
            yield {
                "question": each.number,
                "sample": sample,
                "prompt": prompt,
                "output": answer.text,
                "expected": answer_text(answer.conversation),
                "reward": reward,
                "parts": parts,
                "right": self.task.evaluate(answer.conversation, answer.text),
                "advantage": float(advantages[sample]),
                "tokens": len(completion.ids),
                "finished": completion.finished,
            }
