"""RL with rounded rollouts: the correction has the right mean, and what cannot be corrected ends with a message."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit.models import make_model
from kit.training import rl_config
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.generate import Completion, Engine
from mlxchat.errors import StepFailed
from mlxchat.evals.quantised import rounded_copy
from mlxchat.model.gpt import GPT
from mlxchat.training.policy_batch import of_completions, sampled_mask, scored_rows
from mlxchat.training.policy_scores import PolicyScores
from mlxchat.training.quantised_rollouts import conversation_rows, correct, refuse_if_apart
from mlxchat.training.rollouts import Rollouts

settings = partial(rl_config, max_new_tokens=12, top_k=None, rollouts_kept=0, rollout_bits=4)


@pytest.fixture
def wide() -> GPT:
    """Return a model whose rows have whole groups, so that they are rounded."""
    return make_model(width=128, scale=0.1)


def log_probabilities(model: GPT, prompts: list[list[int]], rows: list[Completion], padding: int) -> np.ndarray:
    ids, targets = scored_rows(prompts, rows, padding=padding)
    found, _ = PolicyScores(model, micro_tokens=4096, dtype=mx.float32)(ids, targets)
    return of_completions(found, prompts, rows)


def test_the_engine_tells_what_the_rounded_model_gave_the_tokens_that_it_drew(wide: GPT, tokenizer: Tokenizer) -> None:
    """Float32, 2e-4. Prompts of a token each, since what is read before is read with the model's own weights."""
    prompts = [[row] for row in range(6)]
    rows = Engine(wide, tokenizer, bits=4).complete(
        prompts, max_new_tokens=20, temperature=1.0, seed=1, log_probabilities=True
    )
    told = np.zeros(sampled_mask(rows).shape)
    for row, completion in enumerate(rows):
        told[row, : len(completion.ids)] = completion.log_probabilities
    rounded = log_probabilities(rounded_copy(wide, 4), prompts, rows, tokenizer.assistant_end)
    own = log_probabilities(wide, prompts, rows, tokenizer.assistant_end)
    assert np.abs(told - rounded).max() < 2e-4
    assert np.abs(told - own).max() > 0.05


def test_factors_make_the_mean_over_what_was_drawn_the_models_own() -> None:
    """Σ over all tokens of μ × factor × gain = Σ π × gain where no factor is cut; 1e-12."""
    rng = np.random.default_rng(0)
    logits, gain = rng.normal(size=50), rng.normal(size=50)
    rounded = logits + rng.normal(scale=0.1, size=50)
    own, drawn = (np.exp(x) / np.exp(x).sum() for x in (logits, rounded))
    rows = [Completion(ids=[token], mask=[1], log_probabilities=[float(np.log(drawn[token]))]) for token in range(50)]
    factors, numbers = correct(np.log(own)[:, None], rows, settings())
    assert (drawn * factors[:, 0] * gain).sum() == pytest.approx((own * gain).sum(), abs=1e-12)
    assert numbers["rollout_capped"] == 0


def test_factors_are_cut_and_of_whole_answers_where_the_ratio_is() -> None:
    rows = [Completion(ids=[1, 2, 3], mask=[1, 0, 1], log_probabilities=[-2.0, 0.0, -1.0])]
    sampled = np.array([[-1.0, 0.0, -1.5]])
    token, numbers = correct(sampled, rows, settings())
    np.testing.assert_allclose(token, [[2.0, 1.0, np.exp(-0.5)]])
    assert numbers == {"rollout_kl": -0.25, "rollout_capped": 0.5}
    sequence, _ = correct(sampled, rows, settings(ratio="sequence"))
    np.testing.assert_allclose(sequence, np.exp([[0.25] * 3]))


class Letters:
    """A task of conversations of one letter."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": str(index)}, {"role": "assistant", "content": "a" * index}]}

    def evaluate(self, conversation: dict[str, Any], response: str) -> bool:
        return len(response) % 2 == 0

    def reward(self, conversation: dict[str, Any], response: str) -> float:
        return float(self.evaluate(conversation, response))


def rollouts(model: GPT, tokenizer: Tokenizer, log: list[dict[str, Any]], **changes: Any) -> Rollouts:
    task: Any = Letters()
    config = settings(**changes)
    engine = Engine(model, tokenizer, bits=config.rollout_bits, trained=True)
    scores = PolicyScores(model, micro_tokens=4096, dtype=mx.float32)
    return Rollouts(engine, task, config, seed=3, log=log.append, scores=scores)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_iterations_weights_are_the_advantages_times_the_factors(wide: GPT, tokenizer: Tokenizer, bits: int) -> None:
    log: list[dict[str, Any]] = []
    source = rollouts(wide, tokenizer, log, rollout_bits=bits)
    made, rollout = source.next_batch(0), source._rollout
    assert rollout is not None
    own = log_probabilities(wide, rollout.prompts, rollout.completions, tokenizer.assistant_end)
    weights, apart = [], []
    for row, completion in enumerate(rollout.completions):
        for place, (sampled, drawn) in enumerate(zip(completion.mask, completion.log_probabilities, strict=True)):
            if sampled:
                apart.append(drawn - own[row, place])
            if sampled and rollout.advantages[row]:
                weights.append(rollout.advantages[row] * min(2.0, np.exp(own[row, place] - drawn)))
    expected = np.array(weights) / sampled_mask(rollout.completions).sum()
    np.testing.assert_allclose(made.weights[made.weights != 0], expected, rtol=1e-4)
    assert "rollout_capped" in log[0]
    assert log[0]["rollout_kl"] == pytest.approx(np.mean(apart), abs=1e-4)
    assert abs(log[0]["rollout_kl"]) < (0.01 if bits == 8 else 0.1)


def test_a_model_that_moved_away_from_its_rounded_self_ends_the_training(
    wide: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxchat.training.quantised_rollouts.MOST_CHANGE", -1.0)
    with pytest.raises(StepFailed, match=r"iteration 1 of RL: with weights of 4 bits .* rl.rollout_bits=8 or"):
        rollouts(wide, tokenizer, []).next_batch(0)
    with pytest.raises(StepFailed, match=r"nan nats"):
        refuse_if_apart({"rollout_kl": float("nan")}, settings(rollout_bits=8), 3)


def test_rows_of_conversations_have_the_assistants_words_as_targets(tokenizer: Tokenizer) -> None:
    task: Any = Letters()
    rows = conversation_rows(tokenizer, task)
    assert len({len(ids) for ids, _ in rows}) == 1
    for index, (ids, targets) in enumerate(rows):
        said = targets[targets >= 0].tolist()
        assert said == [*tokenizer.encode("a" * index), tokenizer.assistant_end]
        assert ids[np.flatnonzero(targets >= 0)].tolist() == [tokenizer.special_ids["<|assistant_start|>"], *said[:-1]]


def test_a_trained_models_arranged_weights_are_not_kept_between_answers(wide: GPT, tokenizer: Tokenizer) -> None:
    """Neither they nor the model's former weights: a training needs the room."""
    engine = Engine(wide, tokenizer, trained=True)
    engine.complete([[tokenizer.bos]], max_new_tokens=2)
    mx.clear_cache()
    before = mx.get_active_memory()
    for _ in range(2):
        block = wide.transformer["h"][0].mlp.c_fc
        block.weight = block.weight * 1.01
        mx.eval(block.weight)
        engine.complete([[tokenizer.bos]], max_new_tokens=2)
    assert mx.get_active_memory() - before < wide.transformer["h"][0].mlp.c_fc.weight.nbytes
