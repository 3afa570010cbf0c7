"""Pairs as rows and batches: what is trained on, the gradient of a batch, the order, the reference."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from kit.models import make_model, make_tokenizer
from kit.training import make_context, make_optimizer
from mlxchat.data.conversation import render_conversation
from mlxchat.data.tokens import Tokens
from mlxchat.errors import Interrupted
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters
from mlxchat.preference.batches import PairBatches, PairRows, reference_sums, validate
from mlxchat.rl.scores import PolicyScores
from mlxchat.tasks.answers import Conversation
from mlxchat.tasks.pairs import Answers
from mlxchat.training.step import TrainStep
from preference.test_loss import make_config

ASKED = {"role": "user", "content": "who sat"}


def pair(chosen: Any, rejected: Any, *before: dict[str, Any]) -> Conversation:
    return {"messages": [*(before or [ASKED]), {"role": "assistant", "content": chosen}], "rejected": rejected}


PAIRS = [pair("the cat", "on the mat and the log"), pair("sat", "the dog"), pair("mat", "sat on"), pair("a", "bb")]


def make_rows(pairs: list[Conversation], row_tokens: int = 64) -> PairRows:
    tokenizer = make_tokenizer()
    rendered = [render_conversation(tokenizer, answer, None) for answer in Answers(pairs)]
    offsets = np.cumsum([0, *(len(ids) for ids, _ in rendered)])
    ids, trained = (np.concatenate([each[which] for each in rendered]) for which in (0, 1))
    tokens = Tokens(offsets, ids.astype(np.uint16), trained.astype(bool))
    return PairRows(
        tokens, answer_start=tokenizer.special_ids["<|assistant_start|>"],
        padding=tokenizer.assistant_end, row_tokens=row_tokens,
    )  # fmt: skip


def make_scores(model: GPT) -> PolicyScores:
    return PolicyScores(model, micro_tokens=128, dtype=mx.float32)


def make_batches(rows: PairRows, model: GPT, reference: Any, **changes: Any) -> PairBatches:
    config = make_config(**{"pairs_per_iteration": 2} | changes)
    return PairBatches(rows, make_scores(model), reference, config, seed=3, log=lambda record: None)


def test_only_the_last_answers_own_tokens_are_targets():
    tokenizer = make_tokenizer()
    earlier = {"role": "assistant", "content": "the dog"}
    parts = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "2"}]
    _, targets = make_rows([pair("the log", parts, ASKED, earlier, ASKED)]).rows([0])
    chosen, rejected = (tokenizer.decode(row[row >= 0].tolist()) for row in targets)
    assert chosen == "the log<|assistant_end|>"
    assert rejected == "<|python_start|>1+1<|python_end|>2<|assistant_end|>"


def test_pairs_with_a_long_answer_are_left_out_whole():
    longest = max(len(render_conversation(make_tokenizer(), answer, None)[0]) for answer in Answers(PAIRS)) - 1
    assert make_rows(PAIRS, longest).num_left_out == 0
    rows = make_rows(PAIRS, longest - 1)
    assert (rows.num_left_out, len(rows)) == (1, len(PAIRS) - 1)
    assert (rows.rows([0])[1] == make_rows(PAIRS).rows([1])[1]).all()


@pytest.mark.parametrize(("loss", "micro_tokens"), [("dpo", 32), ("orpo", 32), ("dpo", 1024)])
def test_gradient_of_a_batch_is_that_of_the_loss(loss, micro_tokens):
    """Against MLX's gradient of the formula with the logits of whole rows; micro-batches of one row or of all."""
    model, start, rows = make_model(), make_model(seed=8), make_rows(PAIRS)
    reference = np.stack([make_scores(start)(*rows.rows([each]))[0].sum(axis=1) for each in range(len(PAIRS))])
    batches = make_batches(rows, model, reference, loss=loss, beta=0.3, odds_weight=0.4)
    batch = batches.next_batch(0)
    ids, targets = mx.array(batch.ids), mx.array(batch.targets)
    of_batch = mx.array(reference[[int(name.split()[1]) for name in batches.documents()]])

    def formula(parameters: dict[str, mx.array]) -> mx.array:
        set_parameters(model, parameters)
        losses = nn.losses.cross_entropy(model(ids), mx.maximum(targets, 0), reduction="none")
        counted = (targets >= 0).astype(mx.float32)
        sums = -(losses * counted).sum(1).reshape(-1, 2)
        if loss == "dpo":
            gained = sums - of_batch
            return -nn.log_sigmoid(0.3 * (gained[:, 0] - gained[:, 1])).mean()
        means = sums / counted.sum(1).reshape(-1, 2)
        odds = means - mx.log1p(-mx.exp(means))
        return (-means[:, 0] - 0.4 * nn.log_sigmoid(odds[:, 0] - odds[:, 1])).mean()

    parameters = flatten_parameters(model)
    value, expected = mx.value_and_grad(formula)(parameters)
    set_parameters(model, parameters)
    step = TrainStep(model, make_optimizer(model), micro_tokens=micro_tokens, dtype=mx.float32)
    surrogate, gradients = step.gradients(batch)
    assert float(surrogate.item()) + batch.offset == pytest.approx(float(value.item()), abs=1e-5)
    for name, gradient in expected.items():
        # Rounding of float32, relative to the largest derivative of the matrix.
        scale = float(mx.abs(gradient).max().item())
        assert np.abs(np.asarray(gradients[name]) - np.asarray(gradient)).max() <= 2e-4 * scale + 1e-7, name


def test_each_epoch_has_every_pair_once_in_another_order():
    rows = make_rows([pair(f"the {'cat ' * i}", "dog") for i in range(1, 7)])
    batches = make_batches(rows, make_model(), None, loss="orpo")
    seen = []
    for iteration in range(6):
        batches.next_batch(iteration)
        seen += batches.documents()
    assert sorted(seen[:6]) == sorted(seen[6:]) == [f"pair {number}" for number in range(6)]
    assert seen[:6] != seen[6:]
    again = make_batches(rows, make_model(), None, loss="orpo")
    again.restore(batches.state())
    again.next_batch(4)
    assert again.documents() == seen[8:10]


def test_interrupted_reference_resumes_without_recomputing(tmp_path):
    rows, calls, model = make_rows(PAIRS * 20), 0, make_model()
    whole = reference_sums(make_context(tmp_path / "whole"), "data", rows, make_scores(model))
    scores = make_scores(model)

    def count(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return scores(*arguments)

    counted: Any = count
    with pytest.raises(Interrupted, match="log-probabilities of pairs"):
        reference_sums(make_context(tmp_path, stop_signal=lambda: 15 if calls else None), "data", rows, counted)
    assert calls == 1
    assert (reference_sums(make_context(tmp_path), "data", rows, counted) == whole).all()
    assert (reference_sums(make_context(tmp_path), "data", rows, counted) == whole).all()
    assert calls == len(rows.parts) == 3


def test_validation_of_the_start_model_by_dpo_is_undecided(tmp_path):
    rows, model, ctx = make_rows(PAIRS * 20), make_model(), make_context(tmp_path)
    reference, config = reference_sums(ctx, "validation", rows, make_scores(model)), make_config(loss="dpo")
    start = validate(ctx, rows, make_scores(model), reference, config)
    assert (start["val_margin"], start["val_pair_accuracy"]) == (0, 0.5)
    assert start["val_loss"] == pytest.approx(np.log(2), rel=1e-12)
    other = make_model(seed=8)
    sums = reference_sums(make_context(tmp_path / "other"), "validation", rows, make_scores(other))
    gained = sums - reference
    found = validate(ctx, rows, make_scores(other), reference, config)
    assert found["val_pair_accuracy"] == pytest.approx((gained[:, 0] > gained[:, 1]).mean())
    assert (found["val_chosen_log_prob"], found["val_rejected_log_prob"]) == pytest.approx(tuple(sums.mean(axis=0)))
