"""Batches of pairs weighted by the loss under the present weights; the reference; validation.

`PairBatches.next_batch` follows an iteration: take the next pairs of the epoch's order, sum the answers'
log-probabilities (rl/scores.py), derive one weight per answer from the loss (loss.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mlxchat.config.schema import PreferenceConfig
from mlxchat.data.packing import IGNORED, Ints
from mlxchat.data.tokens import Tokens
from mlxchat.evals.core_journal import Journal
from mlxchat.preference.loss import PairLoss, pair_loss
from mlxchat.rl.loss import Floats
from mlxchat.rl.scores import PolicyScores, round_up
from mlxchat.runner.context import Context
from mlxchat.training.batches import Batch

Log = Callable[[dict[str, Any]], None]

_WIDTH_STEP = 32  # of batches, so that few shapes are compiled
_SCORED_PAIRS = 32
"""Pairs whose log-probabilities are computed between two checks for a signal."""


class PairRows:
    """Pairs as rows of tokens, numbered from 0 without those that are too long."""

    def __init__(self, tokens: Tokens, *, answer_start: int, padding: int, row_tokens: int) -> None:
        """Leave out pairs with a row of more than `row_tokens` inputs.

        Args:
            tokens: both answers of each pair as conversations, the chosen one first.
            answer_start: the token after which an answer begins.
            padding: the id that fills the rest of a row.
            row_tokens: longest row.
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
        width = round_up(max(len(self._tokens.ids(place)) for place in places) - 1, _WIDTH_STEP)
        ids = np.full((len(places), width + 1), self._padding, dtype=np.int32)
        targets = np.full((len(places), width), IGNORED, dtype=np.int32)
        for row, place in enumerate(places):
            found, trained = self._tokens.ids(place).astype(np.int32), self._tokens.trained(place)
            begin = int(np.flatnonzero(found == self._answer_start)[-1]) + 1
            ids[row, : len(found)] = found
            targets[row, begin - 1 : len(found) - 1] = np.where(trained[begin:], found[begin:], IGNORED)
        return ids[:, :-1], targets


class PairBatches:
    """A source of batches for `fit`. Its position is the number of iterations."""

    waited_seconds = 0.0

    def __init__(
        self, pairs: PairRows, scores: PolicyScores, reference: Floats | None, config: PreferenceConfig, *, seed: int,
        log: Log,
    ) -> None:  # fmt: skip
        """Start at the first pair.

        Args:
            pairs: to train on.
            scores: log-probabilities under the model that is trained.
            reference: those of each pair's answers (P, 2) under the model that training starts from; None: not needed.
            config: the loss, and how many pairs an iteration has.
            seed: of the pairs' order, a new one in each epoch.
            log: gets the numbers of each iteration.
        """
        self._pairs, self._scores, self._reference, self._config = pairs, scores, reference, config
        self._seed, self._log = seed, log
        self._chosen: list[int] = []
        self._order = (-1, np.zeros(0, dtype=int))

    def next_batch(self, iteration: int) -> Batch:
        """Return the rows of an iteration with weights that make its gradient that of the loss."""
        count = self._config.pairs_per_iteration
        pairs = self._chosen = [self._pair(number) for number in range(iteration * count, (iteration + 1) * count)]
        ids, targets = self._pairs.rows(pairs)
        sums, lengths = sum_answers(self._scores, ids, targets)
        reference = None if self._reference is None else self._reference[pairs]
        loss = pair_loss(sums, lengths, reference, self._config)
        self._log({"iteration": iteration + 1, **_numbers(loss, sums)})
        weights = (loss.weights.reshape(-1, 1) * (targets >= 0)).astype(np.float32)
        return Batch(ids, targets, weights, offset=float(loss.values.mean() + (loss.weights * sums).sum()))

    def documents(self) -> list[str]:
        """Return the names of the last batch's pairs, for warnings."""
        return [f"pair {pair}" for pair in self._chosen]

    def state(self) -> dict[str, Any]:
        """Return nothing: a batch follows from the iteration and the weights."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state."""

    def _pair(self, number: int) -> int:
        """Return the `number`-th pair of the training."""
        epoch, place = divmod(number, len(self._pairs))
        if epoch != self._order[0]:
            self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self._pairs))
        return int(self._order[1][place])


def sum_answers(scores: PolicyScores, ids: Ints, targets: Ints) -> tuple[Floats, Floats]:
    """Return the sums of the answers' log-probabilities in nats and their numbers of tokens (P, 2), of 2P rows."""
    log_probs, _ = scores(ids, targets)
    return log_probs.sum(axis=1).reshape(-1, 2), (targets >= 0).sum(axis=1).reshape(-1, 2).astype(float)


def reference_sums(ctx: Context, name: str, pairs: PairRows, scores: PolicyScores) -> Floats:
    """Return the sums (P, 2) of all pairs under the model as it is; each part is saved, and computed once.

    Raises:
        Interrupted: a signal stopped the run; the same call continues.
    """
    journal = Journal(ctx.work / "reference" / f"{name}.jsonl", {"pairs": len(pairs)})
    with ctx.progress(len(pairs), f"{name} pairs scored", start=len(journal.records)) as progress:
        for part in pairs.parts:
            if part[0] in journal.records:
                continue
            sums, _ = _score_part(ctx, pairs, part, scores)
            journal.append([{"index": pair, "sums": row} for pair, row in zip(part, sums.tolist(), strict=True)])
            progress.update(len(journal.records))
    return np.array([journal.records[index]["sums"] for index in range(len(pairs))])


def validate(
    ctx: Context, pairs: PairRows, scores: PolicyScores, reference: Floats | None, config: PreferenceConfig
) -> dict[str, float]:
    """Return the means over held-out pairs under the present weights, all with the prefix val_.

    Raises:
        Interrupted: a signal stopped the run.
    """
    found = [_score_part(ctx, pairs, part, scores) for part in pairs.parts]
    order = [pair for part in pairs.parts for pair in part]
    sums, lengths = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    loss = pair_loss(sums, lengths, None if reference is None else reference[order], config)
    numbers = {"loss": float(loss.values.mean()), **_numbers(loss, sums)}
    numbers["pair_accuracy_stderr"] = float(_is_preferred(loss).std() / np.sqrt(len(pairs)))
    return {f"val_{name}": value for name, value in numbers.items()}


def _score_part(ctx: Context, pairs: PairRows, part: list[int], scores: PolicyScores) -> tuple[Floats, Floats]:
    if ctx.should_stop():
        raise ctx.stop("the log-probabilities of pairs", saved=True)
    return sum_answers(scores, *pairs.rows(part))


def _numbers(loss: PairLoss, sums: Floats) -> dict[str, float]:
    """Return what is logged of pairs: accuracy and margin, and the log-probabilities of whole answers in nats."""
    chosen, rejected = sums.mean(axis=0).tolist()
    return {
        "pair_accuracy": float(_is_preferred(loss).mean()), "margin": float(loss.margins.mean()),
        "chosen_log_prob": chosen, "rejected_log_prob": rejected,
    }  # fmt: skip


def _is_preferred(loss: PairLoss) -> Floats:
    """Return (P,): 1 where the chosen answer is preferred, 0 where the rejected one is, 1/2 where neither is."""
    found: Floats = (1 + np.sign(loss.margins)) / 2
    return found
