"""RL: which parameters learn at which rate."""

import pytest

from kit.models import make_model
from kit.training import optimizer_config
from mlxchat.optim.optimizer import Optimizer
from mlxchat.training.finetune import rates_of


@pytest.mark.parametrize("kind", ["muon_oct2025", "adamw"])
def test_table_lr_frac_scales_embeddings_and_head_only(kind):
    rates = (rates_of(optimizer_config(kind), table_lr_frac=share, clip_gradients=False) for share in (1.0, 0.1))
    one, other = (Optimizer(make_model(), each, width=64, lr_frac=0.5) for each in rates)
    assert one.muon_lr == other.muon_lr
    for name, rule in one.adamw_rules.items():
        share = 1.0 if ".h." in name else 0.1
        assert other.adamw_rules[name].lr == pytest.approx(share * rule.lr)
    assert {"transformer.wte.weight", "lm_head.weight"} <= one.adamw_rules.keys()
    assert other.config.grad_clip is None
