"""Preference training: pairs of answers, from a file or sampled, and batches weighted by their loss.

`PairBatches.next_batch` follows an iteration: take the next pairs of the epoch's order, sum the answers'
log-probabilities (scores.py), derive one weight per answer from the loss (loss.py).
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxchat.config.schema import PreferenceConfig
from mlxchat.data.packing import IGNORED, Batch, BatchSource, Ints
from mlxchat.data.tokenizer import Content, parse_answer
from mlxchat.data.tokens import Tokens
from mlxchat.engine.generate import Completion, Engine
from mlxchat.errors import DataError
from mlxchat.evals.examples import Example, answer_all
from mlxchat.ops.device import round_tokens
from mlxchat.rl.loss import Floats, PairLoss, pair_loss
from mlxchat.rl.rollouts import Log, PolicyScores, draw_seed, sample
from mlxchat.runner.context import Context
from mlxchat.tasks.base import Conversation, Task

# Pairs that are scored, and answers that are sampled, between two checks for a signal.
_SCORED_PAIRS = 32
_SAMPLED_ROWS = 128


class PairRows:
    """Pairs as rows of tokens, numbered from 0 without those that are too long."""

    def __init__(self, tokens: Tokens, *, answer_start: int, padding: int, row_tokens: int) -> None:
        """Leave out pairs with a row of more than `row_tokens` inputs.

        `tokens` are both answers of each pair as conversations, the chosen one first. An answer begins after the token
        `answer_start`; the id `padding` fills the rest of a row.
        """
        self._tokens, self._answer_start, self._padding = tokens, answer_start, padding
        lengths = np.diff(tokens.offsets).reshape(-1, 2).max(axis=1)
        self._places = np.flatnonzero(lengths <= row_tokens + 1)
        self.num_left_out = len(lengths) - len(self._places)
        # By length, since rows are padded to the longest of a part.
        order = np.argsort(lengths[self._places], kind="stable").tolist()
        self.parts = [order[start : start + _SCORED_PAIRS] for start in range(0, len(order), _SCORED_PAIRS)]
        """Numbers of all pairs, in parts of similar length."""

    def __len__(self) -> int:
        return len(self._places)

    def rows(self, pairs: list[int]) -> tuple[Ints, Ints]:
        """Return ids and targets (2P, T) of pairs: chosen, rejected, chosen, … Targets are the answers' tokens.

        Tokens of earlier answers of the conversation and outputs of tools are no targets.
        """
        places = [2 * self._places[pair] + which for pair in pairs for which in (0, 1)]
        width = round_tokens(max(len(self._tokens.ids(place)) for place in places) - 1)
        ids = np.full((len(places), width + 1), self._padding, dtype=np.int32)
        targets = np.full((len(places), width), IGNORED, dtype=np.int32)
        for row, place in enumerate(places):
            found, trained = self._tokens.ids(place).astype(np.int32), self._tokens.trained(place)
            begin = int(np.flatnonzero(found == self._answer_start)[-1]) + 1
            ids[row, : len(found)] = found
            targets[row, begin - 1 : len(found) - 1] = np.where(trained[begin:], found[begin:], IGNORED)
        return ids[:, :-1], targets


class PairBatches(BatchSource):
    """A source of batches for `fit`; a batch follows from the iteration and the weights."""

    def __init__(
        self, pairs: PairRows, scores: PolicyScores, reference: Floats | None, config: PreferenceConfig, *, seed: int,
        log: Log,
    ) -> None:  # fmt: skip
        """Start at the first pair; each epoch has an order of its own.

        `scores` are log-probabilities under the trained model, `reference` the sums of each pair's answers (P, 2) under
        the model that training starts from (None: not needed). `log` gets the numbers of each iteration.
        """
        self._pairs, self._scores, self._reference, self._config = pairs, scores, reference, config
        self._seed, self._log = seed, log
        self._chosen: list[int] = []

    def next_batch(self, iteration: int) -> Batch:
        """Return the rows of an iteration with weights that make its gradient that of the loss."""
        count = self._config.pairs_per_iteration
        numbers = range(iteration * count, (iteration + 1) * count)
        orders = {epoch: self._order(epoch) for epoch in {number // len(self._pairs) for number in numbers}}
        pairs = [orders[number // len(self._pairs)][number % len(self._pairs)] for number in numbers]
        self._chosen = pairs
        ids, targets = self._pairs.rows(pairs)
        sums, lengths = sum_answers(self._scores, ids, targets)
        loss = pair_loss(sums, lengths, None if self._reference is None else self._reference[pairs], self._config)
        self._log({"iteration": iteration + 1, **_numbers(loss, sums)})
        weights = (loss.weights.reshape(-1, 1) * (targets >= 0)).astype(np.float32)
        return Batch(ids, targets, weights, offset=float(loss.values.mean() + (loss.weights * sums).sum()))

    def documents(self) -> list[str]:
        """Return the names of the last batch's pairs, for warnings."""
        return [f"pair {pair}" for pair in self._chosen]

    def _order(self, epoch: int) -> list[int]:
        return list(np.random.default_rng([self._seed, epoch]).permutation(len(self._pairs)).tolist())


def sum_answers(scores: PolicyScores, ids: Ints, targets: Ints) -> tuple[Floats, Floats]:
    """Return the sums of the answers' log-probabilities in nats and their numbers of tokens (P, 2), of 2P rows."""
    log_probs, _ = scores(ids, targets)
    return log_probs.sum(axis=1).reshape(-1, 2), (targets >= 0).sum(axis=1).reshape(-1, 2).astype(float)


def sum_pairs(ctx: Context, pairs: PairRows, scores: PolicyScores) -> tuple[Floats, Floats]:
    """Return `sum_answers` of all pairs under the model as it is."""
    sums, lengths = np.zeros((len(pairs), 2)), np.zeros((len(pairs), 2))
    for part in pairs.parts:
        if ctx.should_stop():
            raise ctx.stop("the scoring of pairs")
        sums[part], lengths[part] = sum_answers(scores, *pairs.rows(part))
    return sums, lengths


def validate(
    ctx: Context, pairs: PairRows, scores: PolicyScores, reference: Floats | None, config: PreferenceConfig
) -> dict[str, float]:
    """Return the means over held-out pairs under the present weights, all with the prefix val_."""
    sums, lengths = sum_pairs(ctx, pairs, scores)
    loss = pair_loss(sums, lengths, reference, config)
    numbers = {"loss": float(loss.values.mean()), **_numbers(loss, sums)}
    numbers["pair_accuracy_stderr"] = float(_is_preferred(loss).std() / np.sqrt(len(pairs)))
    return {f"val_{name}": value for name, value in numbers.items()}


def _numbers(loss: PairLoss, sums: Floats) -> dict[str, float]:
    """Return what is logged of pairs: accuracy and margin, and the log-probabilities of whole answers in nats."""
    chosen, rejected = sums.mean(axis=0).tolist()
    accuracy, margin = float(_is_preferred(loss).mean()), float(loss.margins.mean())
    return {"pair_accuracy": accuracy, "margin": margin, "chosen_log_prob": chosen, "rejected_log_prob": rejected}


def _is_preferred(loss: PairLoss) -> Floats:
    """Return (P,): 1 where the chosen answer is preferred, 0 where the rejected one is, 1/2 where neither is."""
    return np.asarray((1 + np.sign(loss.margins)) / 2)


def sample_pairs(
    ctx: Context, name: str, task: Task, engine: Engine, config: PreferenceConfig, *, seed: int
) -> list[Conversation]:
    """Return pairs of answers to a task's questions, in the questions' order; each part is saved, and sampled once.

    DataError: no question has a right and a wrong answer.
    """
    samples = config.samples_per_question

    def answer(known: dict[int, Example]) -> Iterator[list[Example]]:
        for start in range(0, len(task), per_pass := max(1, _SAMPLED_ROWS // samples)):
            if start not in known:
                questions = range(start, min(start + per_pass, len(task)))
                prompts = [engine.render(task[question]["messages"][:-1]) for question in questions]
                groups = sample(engine, prompts, config, samples, seed=draw_seed(seed, start))
                yield [_compare(task, *each, engine, config) for each in zip(questions, groups, strict=True)]

    journal = ctx.work / "samples" / f"{name}.jsonl"
    about = {"questions": len(task)}
    records = answer_all(ctx, journal, about, len(task), f"{name} questions answered", answer)
    right = sum(record["right"] for record in records) / (samples * len(task))
    ctx.derive({f"{name}_questions": len(task), f"{name}_right_frac": right})
    pairs = [
        {"messages": [*task[record["index"]]["messages"][:-1], _answer(chosen)], "rejected": rejected}
        for record in records
        for chosen, rejected in record["pairs"]
    ]
    if not pairs:
        raise DataError(
            f"preference.{name}: none of {len(task):,} questions has a right and a wrong answer among its {samples} "
            f"samples ({right:.1%} of all are right). Give more preference.samples_per_question, or other questions"
        )
    return pairs


def write_pairs(path: Path, pairs: Sequence[Conversation]) -> None:
    """Write pairs as a file that task pairs reads."""
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            *prompt, chosen = pair["messages"]
            line = {"prompt": prompt, "chosen": [chosen], "rejected": [_answer(pair["rejected"])]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _compare(
    task: Task, question: int, completions: list[Completion], engine: Engine, config: PreferenceConfig
) -> dict[str, Any]:
    """Return how many answers to a question are right, and pairs of different right and wrong ones."""
    conversation = task[question]
    verdicts = [task.evaluate(conversation, row.text(engine.tokenizer)) for row in completions]
    found: tuple[dict[tuple[int, ...], Content], ...] = ({}, {})  # wrong and right ones, each once
    for row, verdict in zip(completions, verdicts, strict=True):
        content = parse_answer(engine.tokenizer, row.ids[:-1]) if row.finished else None
        if content is not None:
            found[verdict][tuple(row.ids)] = content
    wrong, right = (list(each.values()) for each in found)
    pairs = list(zip(right, wrong, strict=False))[: config.pairs_per_question]
    return {"index": question, "right": sum(verdicts), "pairs": pairs}


def _answer(content: Content) -> dict[str, Any]:
    return {"role": "assistant", "content": content}
