"""Ranks send the bytes per step that docs/internals/several_machines.md predicts."""

import mlx.core as mx
import numpy as np
import pytest

from kit import ranks
from kit.training import make_optimizer
from mlxchat.cpu import runtime
from mlxchat.distributed.team import Team
from mlxchat.model.gpt import GPT, init_weights
from mlxchat.model.sizes import GPTSizes, count_parameters
from mlxchat.optim.optimizer import Rates
from mlxchat.training.batches import mean_batch
from mlxchat.training.team_step import make_step

SIZES = GPTSizes(
    vocab_size=1024, num_layers=6, num_heads=2, num_kv_heads=2, width=64, context_tokens=64, rope_theta=1e4
)
ROWS, TOKENS = 6, 64


def count_bytes(team: Team) -> float:
    """Return the bytes that rank 0 sends in the second step."""
    runtime.set_blas_threads(1)
    model = GPT(SIZES)
    init_weights(model, 1)
    optimizer = make_optimizer(model)
    step = make_step(team, model, optimizer, micro_tokens=TOKENS, dtype=mx.float32)
    ids = np.arange(ROWS * (TOKENS + 1), dtype=np.int32).reshape(ROWS, TOKENS + 1) % 1000
    batch = mean_batch([(row[:-1], row[1:]) for row in ids])
    step(batch, Rates(1.0, 0.9, 1.0), 0)
    before = team.group.traffic.sent_bytes
    step(batch, Rates(1.0, 0.9, 1.0), 1)
    return float(team.group.traffic.sent_bytes - before)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_step_sends_the_predicted_bytes(size):
    """To 6 %: matrices are not cut, so some ranks hold more than 1/n of the weights."""
    found = ranks.lead_ranks(count_bytes, size)
    batch, parameters = 12 * ROWS * TOKENS, 4 * count_parameters(SIZES)["total"]
    expected = (size - 1) / size * (2 * batch + 2 * parameters + parameters)
    assert found == pytest.approx(expected, rel=0.06)
