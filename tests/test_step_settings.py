"""`with`: settings of one step, typed and checked like the stage's section, and part of that step's key only."""

from pathlib import Path

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.errors import ConfigError
from mlxchat.pipeline import plan_of
from mlxchat.runner.plan import PlannedStep
from mlxchat.store.store import Store

TWO = ("experiment=smoke", "pipeline=two_sft")


def plan(*overrides: str, outputs: str = "nowhere") -> dict[str, PlannedStep]:
    config = compose_config([*TWO, *overrides]).config
    return {step.name: step for step in plan_of(config, Store(Path(outputs)))}


def test_step_settings_give_the_key_of_equal_run_settings():
    steps = plan("pipeline.sft_long.with={num_epochs: 4, batch: {tokens: 1024}}")
    section = steps["sft_long"].config.sft
    assert (section.num_epochs, section.batch.tokens) == (4, 1024)
    assert section.batch.row_tokens == steps["sft_short"].config.sft.batch.row_tokens, "the rest is the stage's"
    whole = plan("~pipeline.sft_long.with", "sft.num_epochs=4", "sft.batch.tokens=1024")
    assert steps["sft_long"].key == whole["sft_long"].key
    before = plan()
    changed = {name for name, step in before.items() if steps[name].key != step.key}
    assert changed == {"sft_long", "eval_long"}


def test_mistakes_in_step_settings_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        plan(
            "pipeline.sft_long.with.num_epoch=2", "pipeline.sft_short.with.num_epochs=many",
            "+pipeline.midtrain.with={train_on: everything}", "+pipeline.eval_long.with=5",
        )  # fmt: skip
    lines = str(caught.value).splitlines()
    assert any('no "pipeline.sft_long.with.num_epoch". Did you mean "num_epochs"?' in line for line in lines)
    assert any(line.startswith("pipeline.sft_short.with.num_epochs: Value 'many'") for line in lines)
    assert any(line.startswith('pipeline.midtrain.with: midtrain.train_on is "everything"') for line in lines)
    assert any("pipeline.eval_long.with is 5, expected settings of eval as a mapping" in line for line in lines)
    assert len(lines) == 4
