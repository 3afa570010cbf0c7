"""The plan for several machines: formulas against a simulated ring, numbers against published ones."""

import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import Config

DOCS = Path(__file__).resolve().parents[1] / "docs" / "internals"
D32 = ["experiment=speedrun_d20", "model=d32"]


def load_script() -> ModuleType:
    spec = spec_from_file_location("several_machines", DOCS / "several_machines.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


plan: Any = load_script()
LINK = plan.Link("test", 1000.0, 0.5, "")


@pytest.fixture(scope="module")
def config() -> Config:
    return compose_config(D32).config


def simulate_sum(ranks: int, numbers: int) -> tuple[int, int]:
    """Simulate a sum around a ring; return rounds, and numbers that a rank sends."""
    data = np.random.default_rng(0).integers(0, 9, (ranks, ranks, numbers // ranks))
    total, rounds, sent = data.sum(axis=0), 0, 0
    for turn in range(2 * (ranks - 1)):
        adds = turn < ranks - 1
        messages = [(rank, (rank - turn) % ranks) for rank in range(ranks)]
        moving = [data[rank, part].copy() for rank, part in messages]
        for (rank, part), message in zip(messages, moving, strict=True):
            data[(rank + 1) % ranks, part] = data[(rank + 1) % ranks, part] + message if adds else message
        rounds, sent = rounds + 1, sent + len(moving[0])
    assert all((data[rank] == total).all() for rank in range(ranks))
    return rounds, sent


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_sum_sends_the_messages_of_a_simulated_ring(ranks: int) -> None:
    rounds, sent = simulate_sum(ranks, 24 * ranks)
    assert plan.sum_seconds(24 * ranks, ranks, LINK) == pytest.approx(sent / 1000 + rounds * 0.5)
    # Gradients are summed; weights are gathered, which is the second half of a sum.
    assert plan.bytes_sent(24 * ranks, 0, ranks) == pytest.approx(4 * sent + 4 * sent / 2)
    assert plan.gather_seconds(24, ranks, LINK) == pytest.approx((ranks - 1) * (0.024 + 0.5))


def test_muon_costs_its_products(config: Config) -> None:
    sizes = replace(plan.load_of(config).sizes, num_layers=1, num_heads=2, num_kv_heads=2, width=8)
    flops = 0
    for rows, columns in [(8, 8)] * 4 + [(8, 32)] * 2:
        x = np.ones((rows, columns))
        for left, right in ((x, x.T), (x @ x.T, x @ x.T), (x @ x.T, x)):
            flops += 5 * 2 * left.shape[0] * left.shape[1] * right.shape[1]
    assert plan.orthogonalising_flops(sizes) == flops


def test_d32_on_eight_gpus_takes_the_published_time(config: Config) -> None:
    """71,680 steps of 1.572 s, 31.3 hours; within 8 %, because nanochat overlaps some communication."""
    load = plan.load_of(config)
    assert load.num_iterations == 71_680
    case = plan.step_on(load, plan.H100, 8, plan.LINKS[-1])
    assert case.compute_seconds == pytest.approx(1.572, rel=0.02)
    assert case.days * 24 == pytest.approx(31.3, rel=0.08)
