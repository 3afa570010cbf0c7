"""The plan for several machines against published numbers."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from mlxchat.composition.compose import compose_config

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "internals" / "several_machines.py"


def test_d32_has_the_steps_and_flops_of_the_published_run(monkeypatch):
    """71,680 steps of 1.572 s on eight GPUs, which share Muon's products in nanochat."""
    spec = spec_from_file_location("several_machines", SCRIPT)
    plan = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, plan)  # where dataclasses look for it
    spec.loader.exec_module(plan)
    load = plan.load_of(compose_config(["experiment=speedrun_d20", "model=d32"]).config)
    assert load.num_iterations == 71_680
    flops = load.gradient_flops + load.update_flops
    assert flops / (8 * plan.H100.flops) == pytest.approx(1.572, rel=0.02)
