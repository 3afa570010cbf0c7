"""Advantages, the losses of the GRPO family and importance weights, against the formulas of the papers."""

import math
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kit.models import composed, make_model
from kit.training import optimizer_config, rl_config
from mlxchat.config.schema import RLConfig
from mlxchat.rl.loss import PolicyLoss, advantages_of, importance_weights, policy_loss
from mlxchat.training.finetune import make_optimizer

# Three answers of 4, 2 and 3 sampled tokens; the second token of the last was forced.
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1]], dtype=np.float64)
ADVANTAGES = np.array([1.5, -0.5, -1.0])


def log_probabilities() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return those now, at sampling, and of the reference: apart enough that bounds hold for some."""
    draw = np.random.default_rng(5)
    now = -3 * draw.random(MASK.shape) - 0.1
    return now, now + draw.normal(0, 0.4, MASK.shape), now + draw.normal(0, 0.5, MASK.shape)


def importance_of(config: RLConfig) -> np.ndarray:
    """Return importance weights of tokens, or of rows."""
    factors = np.random.default_rng(2).uniform(0.2, 2.0, MASK.shape)
    return np.broadcast_to(factors[:, :1], MASK.shape) if config.ratio == "sequence" else factors


def loss_of(config: RLConfig, now: np.ndarray, old: np.ndarray, ref: np.ndarray | None = None) -> PolicyLoss:
    known = {"log_probs": now, "old_log_probs": old, "ref_log_probs": ref}
    return policy_loss(MASK, ADVANTAGES, config, **known, importance=importance_of(config))


def as_written(config: RLConfig, now: np.ndarray, sampled: np.ndarray, reference: np.ndarray) -> float:
    """Return the loss token by token: min(ratio × A, clipped ratio × A) less the divergence, divided."""
    total, count, factors = 0.0, MASK.sum(), importance_of(config)
    for answer, advantage in enumerate(ADVANTAGES):
        places = [place for place in range(MASK.shape[1]) if MASK[answer, place]]
        apart = [now[answer, place] - sampled[answer, place] for place in places]
        divisors = {"tokens": count, "answers": len(MASK) * len(places), "longest": len(MASK) * config.max_new_tokens}
        for place, own in zip(places, apart, strict=True):
            ratio = math.exp(sum(apart) / len(apart)) if config.ratio == "sequence" else math.exp(own)
            low = 1 - config.clip_low if config.clip_low else 0.0
            high = 1 + config.clip_high if config.clip_high else math.inf
            gain = min(ratio * advantage, min(max(ratio, low), high) * advantage)
            distance = reference[answer, place] - now[answer, place]
            loss = -gain + config.kl_coefficient * (math.exp(distance) - distance - 1)
            total += factors[answer, place] * loss / divisors[config.loss_divisor]
    return total


CASES = [
    rl_config(ratio=ratio, loss_divisor=divisor, clip_low=low, clip_high=high, kl_coefficient=kl)
    for ratio, divisor, (low, high), kl in product(
        ("token", "sequence"), ("tokens", "answers", "longest"), ((None, None), (0.2, 0.28), (0.05, None)), (0.0, 0.3)
    )
]


def name(config: RLConfig) -> str:
    return f"{config.ratio}-{config.loss_divisor}-{config.clip_low}-{config.clip_high}-{config.kl_coefficient}"


@pytest.mark.parametrize("config", CASES, ids=name)
def test_value_and_weights_match_the_published_loss(config):
    """The weights against central differences, 1e-6."""
    now, sampled, reference = log_probabilities()
    frozen = reference if config.kl_coefficient else None
    got = loss_of(config, now, sampled, frozen)
    assert got.value == pytest.approx(as_written(config, now, sampled, reference), abs=1e-12)
    for place in np.ndindex(MASK.shape):
        step = np.zeros(MASK.shape)
        step[place] = 1e-6
        above, below = (as_written(config, now + sign * step, sampled, reference) for sign in (1, -1))
        assert got.weights[place] == pytest.approx((below - above) / 2e-6, abs=1e-6)


# Advantages


def test_advantages_are_relative_to_the_group():
    """Equal rewards have none."""
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.3, 0.3, 0.3, 0.3]])
    mean, z_score, others = (advantages_of(rewards, kind) for kind in ("mean", "z_score", "leave_one_out"))
    np.testing.assert_array_equal(mean, [[0.5, -0.5, -0.5, 0.5], [0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0]])
    assert z_score[:2].std(axis=1, ddof=1) == pytest.approx(1, abs=1e-3)
    np.testing.assert_array_equal(z_score[2], 0.0)
    expected = [[own - (row.sum() - own) / 3 for own in row] for row in rewards]
    np.testing.assert_allclose(others, expected, atol=1e-12)


# Recipes


def test_recipes_match_their_papers():
    """DeepSeekMath §4.1.3; DAPO §3; Dr. GRPO §3; GSPO §4.1 and §5.1."""
    found = {recipe: composed(f"rl={recipe}").rl for recipe in ("grpo", "dr_grpo", "dapo", "gspo")}
    chosen = {
        recipe: (rl.advantages, rl.ratio, rl.loss_divisor, rl.clip_low, rl.clip_high, rl.kl_coefficient)
        for recipe, rl in found.items()
    }
    assert chosen == {
        "grpo": ("z_score", "token", "answers", 0.2, 0.2, 0.04),
        "dr_grpo": ("mean", "token", "longest", 0.2, 0.2, 0.0),
        "dapo": ("z_score", "token", "tokens", 0.2, 0.28, 0.0),
        "gspo": ("z_score", "sequence", "answers", 0.0003, 0.0004, 0.0),
    }


def test_nanochats_recipe_divides_by_the_tokens_of_each_questions_pass():
    """nanochat: loss = −Σ (log p × A) / (tokens of the pass × passes per question × questions); here in float64."""
    rng, config = np.random.default_rng(4), composed("model=d12").rl
    questions, samples, rows = 3, config.samples_per_question, config.answers_per_pass
    assert (samples, rows) == (16, 8)
    mask = (rng.random((questions * samples, 11)) < 0.6).astype(np.float64)
    advantages, now = rng.normal(size=len(mask)), -rng.random(mask.shape)
    loss, weights = 0.0, np.zeros(mask.shape)
    for question in range(questions):
        for start in range(0, samples, rows):
            own = slice(question * samples + start, question * samples + start + rows)
            scale = 1 / (mask[own].sum() * (samples // rows) * questions)
            weights[own] = mask[own] * advantages[own, None] * scale
            loss -= (now[own] * weights[own]).sum()
    got = policy_loss(mask, advantages, config)
    np.testing.assert_allclose(got.weights, weights, rtol=1e-12)
    assert -(got.weights * now).sum() == pytest.approx(loss, rel=1e-12)


def test_importance_weights_make_the_samples_mean_the_policys():
    """Σ over all tokens of μ × weight × gain = Σ π × gain where no weight is truncated; 1e-12."""
    rng = np.random.default_rng(0)
    logits, gain = rng.normal(size=50), rng.normal(size=50)
    rounded = logits + rng.normal(scale=0.1, size=50)
    own, drawn = (np.exp(x) / np.exp(x).sum() for x in (logits, rounded))
    got, numbers = importance_weights(np.log(own)[:, None], np.log(drawn)[:, None], np.ones((50, 1)), rl_config())
    assert (drawn * got[:, 0] * gain).sum() == pytest.approx((own * gain).sum(), abs=1e-12)
    assert numbers["rollout_capped"] == 0


def test_importance_weights_are_truncated_and_may_be_per_sequence():
    mask, old, drawn = (np.array([row]) for row in ([1.0, 0, 1], [-1.0, 0, -1.5], [-2.0, 0, -1]))
    token, numbers = importance_weights(old, drawn, mask, rl_config())
    np.testing.assert_allclose(token, [[2.0, 1.0, np.exp(-0.5)]])
    assert numbers == {"rollout_kl": -0.25, "rollout_capped": 0.5}
    sequence, _ = importance_weights(old, drawn, mask, rl_config(ratio="sequence"))
    np.testing.assert_allclose(sequence, np.exp([[0.25] * 3]))


# RL: which parameters learn at which rate


@pytest.mark.parametrize("kind", ["muon_oct2025", "adamw"])
def test_table_lr_frac_scales_embeddings_and_head_only(kind):
    context: Any = SimpleNamespace(stage="rl", config=SimpleNamespace(optimizer=optimizer_config(kind)))
    config, model = composed("experiment=smoke").rl, make_model()
    one, other = (
        make_optimizer(context, config, model, table_lr_frac=share, clip_gradients=False) for share in (1.0, 0.1)
    )
    assert one.muon_lr == other.muon_lr
    for name, rule in one.adamw_rules.items():
        share = 1.0 if ".h." in name else 0.1
        assert other.adamw_rules[name].lr == pytest.approx(share * rule.lr)
    assert {"transformer.wte.weight", "lm_head.weight"} <= one.adamw_rules.keys()
    assert other.config.grad_clip is None
