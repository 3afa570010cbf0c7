"""Sequences computed in rows with a common trunk have the results of each sequence alone."""

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit import models
from mlxchat.evals.branching import Continuation, make_batches, make_rows
from mlxchat.evals.language_model import OwnModel
from mlxchat.model.gpt import GPT

VOCAB = 97
make_model = partial(models.make_model, vocab_size=VOCAB, num_layers=3, width=64, context_tokens=512, seed=3)
TOLERANCE = 2e-5  # nats, in float32


def alone(model: GPT, continuation: Continuation) -> np.ndarray[Any, Any]:
    """Return the losses of one sequence, from all logits of a plain forward pass."""
    logits = np.asarray(model(mx.array([continuation.tokens]))[0], np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    places = np.arange(continuation.start, len(continuation.tokens))
    return -logits[places - 1, np.array(continuation.tokens)[places]]


def groups_of(rng: np.random.Generator, trunk: int, *branches: int, count: int = 5) -> list[list[Continuation]]:
    """Return groups whose sequences share about `trunk` tokens; each is scored from there."""
    groups = []
    for _ in range(count):
        shared = rng.integers(0, VOCAB, trunk + int(rng.integers(0, 3))).tolist()
        tails = [rng.integers(0, VOCAB, length).tolist() for length in branches]
        groups.append([Continuation(shared + tail, len(shared)) for tail in tails])
    return groups


@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
@pytest.mark.parametrize(
    ("trunk", "branches"),
    [(1, (3, 9)), (40, (5, 1, 12, 3)), (150, (4, 30)), (140, (7,))],
    ids=["short trunk", "four options", "longer than a window", "one sequence"],
)
def test_losses_equal_those_of_each_sequence_alone(architecture, trunk, branches):
    model = make_model(architecture)
    groups = groups_of(np.random.default_rng(trunk), trunk, *branches)
    for batch in make_batches(make_rows(groups, 4000), 4000):
        for row, found in zip(batch, OwnModel(model).losses(batch), strict=True):
            expected = [alone(model, each) for group in dict.fromkeys(row.groups) for each in groups[group]]
            for got, wanted in zip(found, expected, strict=True):
                np.testing.assert_allclose(got, wanted, atol=TOLERANCE)


@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_predictions_equal_those_of_each_sequence_alone(architecture):
    model = make_model(architecture)
    groups = groups_of(np.random.default_rng(0), 30, 6, 2)
    (batch,) = make_batches(make_rows(groups, 4000), 4000)
    for row, found in zip(batch, OwnModel(model).predictions(batch), strict=True):
        for got, each in zip(found, groups[row.groups[0]], strict=True):
            logits = np.asarray(model(mx.array([each.tokens]))[0])
            assert got.tolist() == logits[each.start - 1 : -1].argmax(-1).tolist()


def test_common_prefix_is_computed_once():
    rng = np.random.default_rng(1)
    story = rng.integers(0, VOCAB, 100).tolist()
    groups = [[Continuation(story + rng.integers(0, VOCAB, 8).tolist(), 104)] for _ in range(6)]
    rows = make_rows(groups, 1000)
    assert [sorted(row.groups) for row in rows] == [[0, 1, 2, 3, 4, 5]]
    assert rows[0].num_tokens == 100 + 6 * 7  # nothing follows a sequence's last token
    model = make_model()
    for group, got in zip(rows[0].groups, OwnModel(model).losses(rows)[0], strict=True):
        np.testing.assert_allclose(got, alone(model, groups[group][0]), atol=TOLERANCE)


def test_batches_respect_the_limit_and_hold_each_row_once():
    rng = np.random.default_rng(4)
    groups = [group for size in (5, 20, 60, 200) for group in groups_of(rng, size, 3, 9, count=7)]
    batches = make_batches(make_rows(groups, 100), 300)
    assert all(len(batch) == 1 or len(batch) * max(row.num_tokens for row in batch) <= 300 for batch in batches)
    assert sorted(group for batch in batches for row in batch for group in set(row.groups)) == list(range(28))


def test_next_logits_equal_those_of_each_prompt_alone():
    model = make_model("jul2026")
    prompts = [[5], [1, 2, 3], list(range(40))]
    found = OwnModel(model).next_logits(prompts)
    for prompt, got in zip(prompts, found, strict=True):
        np.testing.assert_allclose(got, np.asarray(model(mx.array([prompt]))[0, -1]), atol=TOLERANCE)


@pytest.mark.parametrize("length", [1, 5])
def test_options_without_scored_tokens_have_no_losses(length):
    same = Continuation(list(range(length)), length)
    rows = make_rows([[same, same]], 100)
    assert [[len(each) for each in row] for row in OwnModel(make_model()).losses(rows)] == [[0, 0]]
