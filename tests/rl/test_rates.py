"""RL: which parameters learn at which rate."""

from __future__ import annotations

import pytest

from kit.models import make_model
from mlxchat.composition.compose import compose_config
from mlxchat.optim.optimizer import Optimizer
from mlxchat.training.finetune import rates_of


@pytest.mark.parametrize("kind", ["muon_oct2025", "adamw"])
def test_embeddings_and_head_learn_at_their_share_of_the_rate_and_matrices_at_the_whole(kind: str) -> None:
    whole, low = (
        compose_config([f"optimizer={kind}", f"rl.table_lr_frac={share}", "rl.clip_gradients=false"]).config
        for share in (1.0, 0.1)
    )
    model = make_model()
    rates = (
        rates_of(each.optimizer, table_lr_frac=each.rl.table_lr_frac, clip_gradients=each.rl.clip_gradients)
        for each in (whole, low)
    )
    one, other = (Optimizer(model, each, width=64, lr_frac=0.5) for each in rates)
    assert one.muon_lr == other.muon_lr
    for name, rule in one.adamw_rules.items():
        share = 1.0 if ".h." in name else 0.1
        assert other.adamw_rules[name].lr == pytest.approx(share * rule.lr)
    assert any("wte" in name for name in one.adamw_rules)
    assert any("lm_head" in name for name in one.adamw_rules)
    assert other.config.grad_clip is None
