"""The recipes' gradients against PyTorch's of the losses as the papers write them, through a softmax.

Runs where there is a PyTorch, which is no dependency. Of mlxchat only the recipes' numbers are in the losses here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import RLConfig
from mlxchat.rl.loss import advantages_of, policy_loss

torch: Any = pytest.importorskip("torch")

QUESTIONS, SAMPLES, LENGTH, VOCABULARY = 3, 4, 7, 11
ANSWERS = QUESTIONS * SAMPLES


class Rollout:
    """Answers of different lengths, some with forced tokens, that an older policy sampled; and a reference."""

    def __init__(self, moved: float) -> None:
        draw = np.random.default_rng(11)
        lengths = draw.integers(1, LENGTH + 1, ANSWERS)
        self.mask = (np.arange(LENGTH) < lengths[:, None]) & (draw.random((ANSWERS, LENGTH)) < 0.8)
        self.mask[:, 0] = True
        self.tokens = draw.integers(0, VOCABULARY, (ANSWERS, LENGTH))
        self.rewards = draw.integers(0, 2, (QUESTIONS, SAMPLES)).astype(np.float64)
        self.rewards[0] = [1.0, 0.0, 0.0, 0.5]
        old = draw.normal(0, 1, (ANSWERS, LENGTH, VOCABULARY))
        self.logits = torch.tensor(old + moved * draw.normal(0, 1, old.shape), requires_grad=True)
        self.sampled = self.chosen(torch.tensor(old)).numpy()
        self.reference = self.chosen(torch.tensor(old + 0.3 * draw.normal(0, 1, old.shape))).numpy()

    def chosen(self, logits: Any) -> Any:
        """Return the log-probabilities of the tokens."""
        return torch.log_softmax(logits, -1).gather(-1, torch.tensor(self.tokens)[..., None])[..., 0]


def advantages(rollout: Rollout, config: RLConfig) -> Any:
    rewards = torch.tensor(rollout.rewards)
    centred = rewards - rewards.mean(1, keepdim=True)
    if config.advantages == "z_score":
        centred = centred / (rewards.std(1, keepdim=True) + 1e-4)  # unbiased, as TRL
    return centred.reshape(-1)


def grpo(rollout: Rollout, logp: Any, config: RLConfig) -> Any:
    """DeepSeekMath, equations 3 and 4: the mean over answers of the mean over tokens."""
    ratio = torch.exp(logp - torch.tensor(rollout.sampled))
    gain = advantages(rollout, config)[:, None]
    clipped = torch.clamp(ratio, 1 - config.clip_low, 1 + config.clip_high)
    apart = torch.tensor(rollout.reference) - logp
    each = torch.minimum(ratio * gain, clipped * gain) - config.kl_coefficient * (torch.exp(apart) - apart - 1)
    mask = torch.tensor(rollout.mask)
    return -torch.stack([row[own].mean() for row, own in zip(each, mask, strict=True)]).mean()


def dr_grpo(rollout: Rollout, logp: Any, config: RLConfig) -> Any:
    """Dr. GRPO, §3: sums over tokens, divided by what is the same for all answers."""
    ratio = torch.exp(logp - torch.tensor(rollout.sampled))
    gain = advantages(rollout, config)[:, None]
    each = torch.minimum(ratio * gain, torch.clamp(ratio, 1 - config.clip_low, 1 + config.clip_high) * gain)
    return -(each * torch.tensor(rollout.mask)).sum(1).mean() / config.max_new_tokens


def dapo(rollout: Rollout, logp: Any, config: RLConfig) -> Any:
    """DAPO, equation 8: the mean over all tokens; the bounds differ."""
    ratio = torch.exp(logp - torch.tensor(rollout.sampled))
    gain = advantages(rollout, config)[:, None]
    each = torch.minimum(ratio * gain, torch.clamp(ratio, 1 - config.clip_low, 1 + config.clip_high) * gain)
    return -each[torch.tensor(rollout.mask)].mean()


def gspo(rollout: Rollout, logp: Any, config: RLConfig) -> Any:
    """GSPO, equations 5 and 7: one ratio for an answer, the geometric mean of its tokens'."""
    gains = []
    for answer, gain in enumerate(advantages(rollout, config)):
        own = torch.tensor(rollout.mask[answer])
        ratio = torch.exp((logp[answer] - torch.tensor(rollout.sampled[answer]))[own].mean())
        gains.append(torch.minimum(ratio * gain, torch.clamp(ratio, 1 - config.clip_low, 1 + config.clip_high) * gain))
    return -torch.stack(gains).mean()


def nanochat(rollout: Rollout, logp: Any, config: RLConfig) -> Any:
    """chat_rl.py: log p × advantage over the sampled tokens of all answers; it is on-policy, there is no ratio."""
    gain = advantages(rollout, config)[:, None]
    mask = torch.tensor(rollout.mask)
    return -(logp * gain * mask).sum() / mask.sum()


LOSSES = {"grpo": grpo, "dr_grpo": dr_grpo, "dapo": dapo, "gspo": gspo, "nanochat": nanochat}
# How far the policy has moved since it sampled. nanochat's trains only on answers that were just sampled.
CASES = [(recipe, moved) for recipe in LOSSES for moved in (0.0, 0.05, 0.5) if not (moved and recipe == "nanochat")]


@pytest.mark.parametrize(("recipe", "moved"), CASES)
def test_the_gradient_of_the_weighted_cross_entropy_is_that_of_the_recipes_loss(recipe: str, moved: float) -> None:
    """In float64, to 1e-12 of the largest slope."""
    config = compose_config([f"rl={recipe}", "rl.max_new_tokens=9"]).config.rl
    rollout = Rollout(moved)
    logp = rollout.chosen(rollout.logits)
    (expected,) = torch.autograd.grad(LOSSES[recipe](rollout, logp, config), rollout.logits, retain_graph=True)
    gains = advantages_of(rollout.rewards, config.advantages).reshape(-1)
    known: dict[str, Any] = {}
    if recipe != "nanochat":
        known = {"log_probs": logp.detach().numpy(), "old_log_probs": rollout.sampled}
    if config.kl_coefficient:
        known["ref_log_probs"] = rollout.reference
    weights = policy_loss(rollout.mask.astype(np.float64), gains, config, **known).weights
    (got,) = torch.autograd.grad(-(torch.tensor(weights) * logp).sum(), rollout.logits)
    assert expected.abs().max() > 1e-3
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()
