"""RL from the task's questions to a weighted batch, and pass@k on held-out questions.

Counterpart of nanochat's chat_rl.py: on-policy REINFORCE with the group's mean reward as baseline.
`Rollouts.next_batch` follows an iteration: sample a group of completions per question, reward each (`Reward`),
compare the rewards within a group (advantages, loss.py), compute log-probabilities where the loss needs them
(`PolicyScores`), derive one weight per sampled token from the loss (loss.py). `TrainStep` then minimises
Σ weight × cross-entropy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxchat.config.pins import load_part
from mlxchat.config.schema import PreferenceConfig, RewardConfig, RLConfig
from mlxchat.data.packing import IGNORED, Batch, BatchSource, Ints
from mlxchat.data.tokenizer import Tokenizer, render_for_completion
from mlxchat.distributed.team import Team
from mlxchat.engine.generate import Completion, Engine
from mlxchat.errors import StepFailed
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters, set_parameters
from mlxchat.model.scoring import row_of, score_rows
from mlxchat.ops.device import round_tokens
from mlxchat.ops.machine import round_up
from mlxchat.optim.optimizer import Flat
from mlxchat.rl.loss import Floats, advantages_of, check_rollout_drift, importance_weights, policy_loss
from mlxchat.tasks.base import Conversation, Task, answer_text

Log = Callable[[dict[str, Any]], None]

_EVALUATED_ROWS = 128
_ENTROPY_EVERY = 5  # rollouts between measurements of the entropy, one forward pass each
_QUESTIONS_KEPT = 4  # of each rollout in rollouts.jsonl
# Heights of batches are multiples of it, so that few shapes are compiled.
_ROWS_STEP = 16
Part = Callable[[Conversation, str, int], float]


class Reward:
    """Σ weight × value over the parts; without parts, the task's reward."""

    def __init__(self, task: Task, parts: dict[str, RewardConfig]) -> None:
        """Import the users' functions among the parts."""
        self._task = task
        parts = dict(sorted(parts.items()))  # the order of the configuration must not change a sum's last bits
        self._weights = {name: part.weight for name, part in parts.items()}
        self._parts = {name: _make_part(name, part, task) for name, part in parts.items()}

    def __call__(self, conversation: Conversation, text: str, num_tokens: int) -> tuple[float, dict[str, float]]:
        """Return the reward of a completion and the unweighted value of each part; StepFailed if a function failed.

        `num_tokens` are the sampled tokens, without forced ones; `text` lacks the token that ended it.
        """
        if not self._parts:
            return self._task.reward(conversation, text), {}
        values = {name: part(conversation, text, num_tokens) for name, part in self._parts.items()}
        return sum(self._weights[name] * value for name, value in values.items()), values


def _make_part(name: str, part: RewardConfig, task: Task) -> Part:
    """Return a part as a function; which fields its kind needs is checked with the configuration."""
    if part.kind == "format":
        pattern = re.compile(part.pattern or "", re.DOTALL)
        return lambda conversation, text, num_tokens: float(pattern.search(text) is not None)
    if part.kind == "length":
        free, most = part.free_tokens or 0, part.most_tokens or 0
        # 0 up to `free` tokens, −1 from `most` on, linear in between (DAPO, arXiv 2503.14476, eq. 13).
        return lambda conversation, text, num_tokens: -min(1.0, max(0, num_tokens - free) / (most - free))
    if part.kind == "exact":
        return lambda conversation, text, num_tokens: task.reward(conversation, text)
    title, function = f"rl.rewards.{name}: {part.function}", load_part(part.function or "")

    def call(conversation: Conversation, text: str, num_tokens: int) -> float:
        try:
            value = float(function(conversation, text))
        except (Exception, SystemExit) as error:  # a user's code may raise anything
            raise StepFailed(f"{title} raised {type(error).__name__}: {error}. The answer was {text!r}") from error
        if not math.isfinite(value):
            raise StepFailed(f"{title} returned {value}, expected a finite number. The answer was {text!r}")
        return value

    return call


class Group(NamedTuple):
    """The sampled and rewarded completions of one question."""

    question: int  # index in the task
    prompt: list[int]
    completions: list[Completion]
    rewards: list[float]
    parts: list[dict[str, float]]  # of each reward, by name, without weights

    @property
    def has_signal(self) -> bool:
        """Whether rewards differ; otherwise every advantage is 0."""
        return len(set(self.rewards)) > 1


@dataclass(kw_only=True)
class Rollout:
    """Completions as rows, group by group. Target t of a row is `ids[t + 1]`; arrays (B, T) belong to targets."""

    questions: Ints  # (groups,)
    ids: Ints  # (B, T + 1): prompt, completion, padding
    lengths: Ints  # (B,): tokens of prompt and completion
    mask: Floats  # (B, T): 1 where the target was sampled; 0 in prompts, forced output of tools and padding
    finished: Ints  # (B,): 1 where the completion ended before max_new_tokens
    advantages: Floats  # (B,)
    rollout_log_probs: Floats | None = None  # (B, T): log-probabilities under the quantised weights that sampled
    old_log_probs: Floats | None = None  # (B, T): those under the policy when the rollout was sampled
    ref_log_probs: Floats | None = None  # (B, T): those under the frozen reference

    @classmethod
    def of_groups(cls, groups: list[Group], advantages: Floats, *, padding: int) -> Rollout:
        """Place each completion behind its prompt; `padding` is a token id, advantages are (groups, samples)."""
        answers = [(group.prompt, completion) for group in groups for completion in group.completions]
        lengths = np.array([len(prompt) + len(completion.ids) for prompt, completion in answers], dtype=np.int32)
        shape = (len(answers), round_tokens(lengths.max()))
        ids = np.full((shape[0], shape[1] + 1), padding, dtype=np.int32)
        mask, log_probs = np.zeros(shape), np.zeros(shape)
        for row, (prompt, completion) in enumerate(answers):
            ids[row, : lengths[row]] = [*prompt, *completion.ids]
            targets = slice(len(prompt) - 1, lengths[row] - 1)
            mask[row, targets] = completion.mask
            if completion.log_probabilities:
                log_probs[row, targets] = completion.log_probabilities
        return cls(
            questions=np.array([group.question for group in groups]),
            ids=ids,
            lengths=lengths,
            mask=mask,
            finished=np.array([completion.finished for _, completion in answers], dtype=np.int32),
            advantages=advantages.reshape(-1),
            rollout_log_probs=log_probs if any(completion.log_probabilities for _, completion in answers) else None,
        )

    @property
    def targets(self) -> Ints:
        """Return (B, T): the sampled tokens, all others ignored."""
        return np.where(self.mask > 0, self.ids[:, 1:], IGNORED).astype(np.int32)

    def minibatch(self, index: int, count: int) -> Rollout:
        """Return the `index`-th of `count` parts with equally many groups, as narrow as its own rows allow."""
        part = {name: np.split(value, count)[index] for name, value in vars(self).items() if value is not None}
        width = round_tokens(part["lengths"].max())
        narrow = {name: value[:, :width] for name, value in part.items() if value.ndim == 2}
        return Rollout(**part | narrow | {"ids": part["ids"][:, : width + 1]})

    def batch(self, weights: Floats, *, padding: int) -> Batch:
        """Return a batch whose loss is Σ weight × cross-entropy; rows without any weight are left out."""
        useful = np.flatnonzero(weights.any(axis=1))
        width = round_tokens(self.lengths[useful].max(initial=1))
        height = round_up(max(1, len(useful)), _ROWS_STEP)
        ids = np.full((height, width + 1), padding, dtype=np.int32)
        placed = np.zeros((height, width), dtype=np.float32)
        ids[: len(useful)] = self.ids[useful, : width + 1]
        placed[: len(useful)] = weights[useful, :width]
        targets = np.where(placed != 0, ids[:, 1:], IGNORED).astype(np.int32)
        return Batch(ids[:, :-1], targets, placed)

    def state(self) -> dict[str, Any]:
        """Return all arrays as JSON data, from which `of_state` restores the same bits."""
        return {name: value.tolist() for name, value in vars(self).items() if value is not None}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Rollout:
        """Return the rollout whose `state` this is."""
        return cls(**{name: np.array(value) for name, value in state.items()})


class PolicyScores:
    """Scores rows with the forward pass of training, under the model's present weights or under others."""

    def __init__(self, model: GPT, *, micro_tokens: int, dtype: mx.Dtype, team: Team | None = None) -> None:
        """Take a float32 model, tokens of a forward pass, its dtype, and the ranks that share the rows."""
        self._model = model
        self._options: dict[str, Any] = {"batch_tokens": micro_tokens, "dtype": dtype, "team": team}

    def __call__(self, ids: Ints, targets: Ints, weights: Flat | None = None) -> tuple[Floats, Floats]:
        """Return log-probabilities and entropies in nats (B, T) of targets (B, T), 0 where the target is negative.

        `weights` replace the model's parameters by name, such as those of the frozen reference.
        """
        own = flatten_parameters(self._model)
        role = "model" if weights is None else "reference"
        set_parameters(self._model, weights or {})
        rows = [row_of(*row) for row in zip(ids, targets, strict=True)]
        found = score_rows(self._model, rows, ("losses", "entropies"), role=role, **self._options)
        set_parameters(self._model, own)
        losses, entropies = np.zeros(ids.shape), np.zeros(ids.shape)
        losses[targets >= 0], entropies[targets >= 0] = np.concatenate(found, axis=1)
        return -losses, entropies


class Rollouts(BatchSource):
    """A source of batches for `fit` that samples its own data. Its position is the number of updates.

    The next rows are sampled with the weights after this update, so none are prepared. Sampling is no wait for data.
    """

    def __init__(
        self, engine: Engine, task: Task, config: RLConfig, *, seed: int, log: Log, scores: PolicyScores,
        keep: Log = lambda record: None, reference: Flat | None = None,
    ) -> None:  # fmt: skip
        """Shuffle the questions; `seed` is also that of all samples.

        `engine` samples from the trained model or its quantised weights, `scores` are those of the trained model. `log`
        gets the numbers of each iteration and update, `keep` the completions of the first questions, one record each.
        `reference` are the weights of the frozen reference; None: no KL term.
        """
        self.engine, self._task, self._config, self._seed = engine, task, config, seed
        self._log, self._keep, self._scores, self._reference = log, keep, scores, reference
        self._reward = Reward(task, config.rewards)
        self._order = np.random.default_rng(seed).permutation(len(task))
        self._rollout: Rollout | None = None
        self._partway = False  # whether further updates train on the rollout
        self._questions: list[int] = []
        self._num_asked = 0
        self.mean_reward = 0.0

    def next_batch(self, iteration: int) -> Batch:
        """Return the rows of an update; the first update of a rollout samples it."""
        config = self._config
        number, update = divmod(iteration, updates_per_rollout(config))
        if update == 0:
            self._rollout = self._sample(number, iteration + 1)
        assert self._rollout is not None, "restored, or sampled by an earlier update"
        part = self._rollout.minibatch(update % config.minibatches_per_rollout, config.minibatches_per_rollout)
        self._questions = part.questions.tolist()
        self._partway = update + 1 < updates_per_rollout(config)
        log_probs = part.old_log_probs if update == 0 else self._score(part)[0]
        importance = None
        if part.rollout_log_probs is not None and part.old_log_probs is not None:
            importance, _ = importance_weights(part.old_log_probs, part.rollout_log_probs, part.mask, config)
        loss = policy_loss(
            part.mask if config.train_unfinished else part.mask * part.finished[:, None], part.advantages, config,
            log_probs=log_probs, old_log_probs=part.old_log_probs, ref_log_probs=part.ref_log_probs,
            importance=importance,
        )  # fmt: skip
        if log_probs is not None:
            self._log({"iteration": iteration + 1, "policy_loss": loss.value, **loss.numbers})
        return part.batch(loss.weights, padding=self.engine.tokenizer.assistant_end)

    def documents(self) -> list[str]:
        """Return the names of the last batch's questions, for warnings."""
        return [f"question {question}" for question in self._questions]

    def state(self) -> dict[str, Any]:
        """Return what a resumed training needs, as JSON data; between the updates of a rollout, the rollout too."""
        partway = {"rollout": self._rollout.state()} if self._rollout is not None and self._partway else {}
        return {"mean_reward": self.mean_reward, "num_asked": self._num_asked, **partway}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.mean_reward, self._num_asked = state["mean_reward"], state["num_asked"]
        self._rollout = Rollout.of_state(state["rollout"]) if "rollout" in state else None
        self._partway = self._rollout is not None

    def _sample(self, number: int, iteration: int) -> Rollout:
        """Sample, reward and score the completions of the `number`-th rollout; log them under `iteration`."""
        config = self._config
        first = self._num_asked if config.resample_rounds else number * config.questions_per_iteration
        groups, asked = self._sample_groups(first, draw_seed(self._seed, number))
        advantages = advantages_of(np.array([group.rewards for group in groups]), config.advantages)
        rollout = Rollout.of_groups(groups, advantages, padding=self.engine.tokenizer.assistant_end)
        numbers = self._numbers(groups, asked)
        if needs_log_probs(config) or number % _ENTROPY_EVERY == 0:
            numbers |= self._add_log_probs(rollout, iteration)
        self._log({"iteration": iteration, **numbers})
        for group, own in list(zip(groups, advantages, strict=True))[:_QUESTIONS_KEPT]:
            self._keep_group(iteration, group, own)
        # Last, because a failure above must leave the position as it was: the training is saved then.
        self.mean_reward, self._num_asked = numbers["reward"], first + len(asked)
        return rollout

    def _sample_groups(self, first: int, seed: int) -> tuple[list[Group], list[Group]]:
        """Return the groups to train on, and all that were sampled for them.

        Later questions replace those whose group has no signal, in `resample_rounds` rounds at most (DAPO).
        """
        groups = self._sample_questions(first, self._config.questions_per_iteration, seed)
        asked = list(groups)
        for attempt in range(1, self._config.resample_rounds + 1):
            places = [place for place, group in enumerate(groups) if not group.has_signal]
            if not places:
                break
            more = self._sample_questions(first + len(asked), len(places), draw_seed(seed, attempt))
            asked += more
            for place, group in zip(places, (group for group in more if group.has_signal), strict=False):
                groups[place] = group
        return groups, asked

    def _sample_questions(self, first: int, count: int, seed: int) -> list[Group]:
        config, tokenizer = self._config, self.engine.tokenizer
        questions = [int(self._order[(first + place) % len(self._order)]) for place in range(count)]
        conversations = [self._task[question] for question in questions]
        prompts = [render_for_completion(tokenizer, conversation) for conversation in conversations]
        options = {"seed": seed, "log_probabilities": config.rollout_bits is not None}
        sampled = sample(self.engine, prompts, config, config.samples_per_question, **options)
        groups = []
        for question, conversation, prompt, completions in zip(questions, conversations, prompts, sampled, strict=True):
            judged = [self._reward(conversation, row.text(tokenizer), sum(row.mask)) for row in completions]
            rewards, parts = (list(each) for each in zip(*judged, strict=True))
            groups.append(Group(question, prompt, completions, rewards, parts))
        return groups

    def _add_log_probs(self, rollout: Rollout, iteration: int) -> dict[str, float]:
        """Set the log-probabilities that the loss needs; return entropy and drift for the log."""
        config = self._config
        log_probs, entropies = self._score(rollout)
        numbers: dict[str, float] = {}
        if rollout.rollout_log_probs is not None:
            _, numbers = importance_weights(log_probs, rollout.rollout_log_probs, rollout.mask, config)
            check_rollout_drift(numbers["rollout_kl"], config, iteration)
        if needs_log_probs(config):
            rollout.old_log_probs = log_probs
            if self._reference is not None:
                rollout.ref_log_probs, _ = self._score(rollout, self._reference)
        return {"entropy": float((entropies * rollout.mask).sum() / max(1.0, rollout.mask.sum())), **numbers}

    def _score(self, rollout: Rollout, weights: Flat | None = None) -> tuple[Floats, Floats]:
        return self._scores(rollout.ids[:, :-1], rollout.targets, weights)

    def _numbers(self, groups: list[Group], asked: list[Group]) -> dict[str, float]:
        completions = [completion for group in asked for completion in group.completions]
        values: dict[str, list[float]] = {
            "reward": [reward for group in asked for reward in group.rewards],
            "completion_tokens": [len(completion.ids) for completion in completions],
            "finished": [completion.finished for completion in completions],
            "teaching_frac": [group.has_signal for group in asked],
        }
        if self._config.resample_rounds:
            values |= {"filled_frac": [group.has_signal for group in groups], "questions_asked": [len(asked)]}
        for name in self._config.rewards:
            values[f"reward_{name}"] = [parts[name] for group in asked for parts in group.parts]
        return {name: float(np.mean(each)) for name, each in values.items()}

    def _keep_group(self, iteration: int, group: Group, advantages: Floats) -> None:
        tokenizer, conversation = self.engine.tokenizer, self._task[group.question]
        common = {"iteration": iteration, "question": group.question, "prompt": tokenizer.decode(group.prompt)}
        for index, completion in enumerate(group.completions):
            text = completion.text(tokenizer)
            answer = {"sample": index, "output": text, "expected": answer_text(conversation)}
            rewards = {"reward": group.rewards[index], "parts": group.parts[index]}
            verdict = {"right": self._task.evaluate(conversation, text), "advantage": float(advantages[index])}
            size = {"tokens": len(completion.ids), "finished": completion.finished}
            self._keep(common | answer | rewards | verdict | size)


def updates_per_rollout(config: RLConfig) -> int:
    """Return how many updates train on the completions of an iteration."""
    return config.minibatches_per_rollout * config.passes_per_rollout


def needs_log_probs(config: RLConfig) -> bool:
    """Return True if the loss needs log-probabilities. With one update per rollout all ratios are 1."""
    return updates_per_rollout(config) > 1 or config.kl_coefficient > 0 or config.rollout_bits is not None


def sample(
    engine: Engine, prompts: list[list[int]], config: RLConfig | PreferenceConfig, samples: int, **options: Any
) -> list[list[Completion]]:
    """Return `samples` completions per prompt, sampled as configured; for the options see `Engine.complete`."""
    drawn = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature, "top_k": config.top_k}
    found = engine.complete([prompt for prompt in prompts for _ in range(samples)], **drawn | options)
    return [found[start : start + samples] for start in range(0, len(found), samples)]


def pass_at_k(engine: Engine, task: Task, config: RLConfig, *, seed: int) -> dict[str, float]:
    """Return the share of questions that one of the first k samples solves, for k = 1 … eval_samples.

    Counted and sampled as in nanochat, with standard errors over questions. `held_out_reward` is the mean over all
    samples, less noisy than pass_at_1.
    """
    samples, tokenizer = config.eval_samples, engine.tokenizer
    solved: list[list[bool]] = []
    per_pass = max(1, _EVALUATED_ROWS // samples)
    for start in range(0, len(task), per_pass):
        conversations = [task[index] for index in range(start, min(start + per_pass, len(task)))]
        prompts = [render_for_completion(tokenizer, conversation) for conversation in conversations]
        groups = sample(engine, prompts, config, samples, seed=draw_seed(seed, start))
        for conversation, completions in zip(conversations, groups, strict=True):
            solved.append([task.evaluate(conversation, row.text(tokenizer)) for row in completions])
    verdicts = np.array(solved)
    each = {f"pass_at_{k}": verdicts[:, :k].any(axis=1) for k in range(1, samples + 1)}
    each["held_out_reward"] = verdicts.mean(axis=1)
    means = {name: float(values.mean()) for name, values in each.items()}
    return means | {f"{name}_stderr": float(values.std() / np.sqrt(len(task))) for name, values in each.items()}


def longest_prompt(tokenizer: Tokenizer, *tasks: Task) -> int:
    """Return the tokens of the longest prompt of some tasks."""
    return max(len(render_for_completion(tokenizer, task[index])) for task in tasks for index in range(len(task)))


def draw_seed(seed: int, number: int) -> int:
    """Return the seed of the `number`-th draw for one purpose."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
