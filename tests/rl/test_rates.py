"""RL: which parameters learn at which rate."""

from types import SimpleNamespace
from typing import Any

import pytest

from kit.models import composed, make_model
from kit.training import optimizer_config
from mlxchat.training.finetune import make_optimizer


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
