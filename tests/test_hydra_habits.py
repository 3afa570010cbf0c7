"""Hydra's command line, and `with`: settings of one step, checked like the stage's, part of that step's key only."""

import re
from pathlib import Path

import pytest

from mlxchat.composition.compose import compose_config, split_options
from mlxchat.errors import ConfigError
from mlxchat.pipeline import plan_of
from mlxchat.runner.plan import PlannedStep
from mlxchat.store.store import Store
from mlxchat.sweep.sweeper import read_sweep


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a primary file that builds on ours, and a recipe."""
    (tmp_path / "mine.yaml").write_text(
        "defaults:\n  - config\n  - override model: d6\n  - override experiment: smoke\n  - _self_\nname: mine\n"
    )
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "recipe.yaml").write_text(
        "# @package _global_\ndefaults: [smoke, _self_]\nname: recipe\n"
    )
    return tmp_path


def test_config_name_replaces_the_primary_file(own):
    recipe = compose_config(["experiment=recipe"], [str(own)])
    assert (recipe.config.name, recipe.command) == ("recipe", f"mlxchat --config-dir {own} experiment=recipe")
    for words in (["-cn", "mine", "-cd", str(own)], [f"--config-path={own}", "--config-name", "mine.yaml", "model=d3"]):
        overrides, folders, primary = split_options(words)
        composed = compose_config(overrides, folders, primary)
        assert primary == own / "mine.yaml"
        assert composed.config.name == "mine"
        assert composed.config.model.name == ("d3" if overrides else "d6")
        assert (composed.choices["experiment"], composed.config.pretrain.num_iterations) == ("smoke", 20)
        assert composed.implied == [], "the file is the recipe"
        assert split_options(composed.command.split()[1:])[1:] == (folders, primary)


def test_primary_file_needs_the_schema(own):
    (own / "bare.yaml").write_text("name: x\n")
    with pytest.raises(ConfigError, match=r"bare\.yaml does not have mlxchat's schema: .*start with `- config`"):
        compose_config([], [], own / "bare.yaml")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("hydra.run.dir=x", r"a run's folder is OUTPUTS/runs/.*outputs=PATH"),
        ("hydra/launcher=joblib", r"executor=slurm, ray or submitit_local"),
        ("+hydra.sweeper.params={seed: 1}", r"-m KEY=A,B"),
    ],
)
def test_ignored_hydra_settings_are_refused(override, reason):
    for refuse in (compose_config, read_sweep):
        with pytest.raises(ConfigError, match=rf"^{re.escape(override)}: .*{reason}"):
            refuse([override])


def test_cfg_shows_the_primary_file(own, say):
    assert "depth: 6\naspect_ratio: 32" in say("--cfg", "job", "-p", "model", "-cn", "mine", "-cd", own)


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
