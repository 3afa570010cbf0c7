"""DPO and ORPO: the published formulas, and derivatives by central differences in float64."""

import math
from typing import Any

import numpy as np
import pytest

from kit.models import composed
from mlxchat.config.schema import PreferenceConfig
from mlxchat.preference.loss import pair_loss
from mlxchat.rl.loss import Floats

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(1, 9, (5, 2)).astype(float)
SUMS = -LENGTHS * RNG.uniform(0.05, 4.0, (5, 2))
REFERENCE = SUMS + RNG.normal(0, 2.0, (5, 2))
LOSSES: list[dict[str, Any]] = [
    {"loss": "dpo", "beta": 0.1}, {"loss": "dpo", "beta": 0.7, "label_smoothing": 0.2},
    {"loss": "orpo", "odds_weight": 0.1}, {"loss": "orpo", "odds_weight": 1.5}, {"loss": "orpo", "odds_weight": 0.0},
]  # fmt: skip


def make_config(**changes: Any) -> PreferenceConfig:
    return PreferenceConfig(**vars(composed("experiment=smoke").preference) | changes)


def published(sums: Floats, config: PreferenceConfig) -> list[float]:
    """Return each pair's loss as the papers write it: arXiv 2305.18290 eq. 7 (with smoothing), 2403.07691 eq. 6."""
    found = []
    for (chosen, rejected), (chosen_ref, rejected_ref), lengths in zip(sums, REFERENCE, LENGTHS, strict=True):
        if config.loss == "dpo":
            right = 1 / (1 + math.exp(-config.beta * ((chosen - chosen_ref) - (rejected - rejected_ref))))
            found.append(-(1 - config.label_smoothing) * math.log(right) - config.label_smoothing * math.log(1 - right))
        else:
            p, q = math.exp(chosen / lengths[0]), math.exp(rejected / lengths[1])
            ratio = (p / (1 - p)) / (q / (1 - q))
            found.append(-math.log(p) - config.odds_weight * math.log(1 / (1 + math.exp(-math.log(ratio)))))
    return found


@pytest.mark.parametrize("changes", LOSSES)
def test_values_and_weights_are_those_of_the_published_loss(changes):
    config, step = make_config(**changes), 1e-5
    found = pair_loss(SUMS, LENGTHS, REFERENCE, config)
    assert found.values == pytest.approx(published(SUMS, config), rel=1e-12)
    for place in np.ndindex(SUMS.shape):
        up, down = SUMS.copy(), SUMS.copy()
        up[place] += step
        down[place] -= step
        slope = (np.mean(published(up, config)) - np.mean(published(down, config))) / (2 * step)
        assert found.weights[place] == pytest.approx(-slope, rel=1e-6, abs=1e-10)


def test_margins_are_positive_where_the_chosen_answer_is_preferred():
    dpo, orpo = (pair_loss(SUMS, LENGTHS, REFERENCE, make_config(loss=loss)) for loss in ("dpo", "orpo"))
    gained = SUMS - REFERENCE
    assert ((dpo.margins > 0) == (gained[:, 0] > gained[:, 1])).all()
    means = SUMS / LENGTHS
    assert ((orpo.margins > 0) == (means[:, 0] > means[:, 1])).all()


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_extreme_log_probabilities_give_finite_losses_and_weights(loss):
    sums, lengths = np.array([[0.0, -1e4], [-1e4, 0.0], [-1e-9, -1e-9]]), np.ones((3, 2))
    found = pair_loss(sums, lengths, np.zeros((3, 2)), make_config(loss=loss))
    assert np.isfinite(found.values).all()
    assert np.isfinite(found.weights).all()
