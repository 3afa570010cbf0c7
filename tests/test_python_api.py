"""mlxchat from Python: compose, plan, run, open."""

import json

import mlx.core as mx
import numpy as np
import pytest

import mlxchat
from mlxchat.errors import ConfigError, DataError, StoreError


def test_composed_pipeline_is_planned_and_returns_its_artifacts(finished, tiny, capsys):
    pipeline = mlxchat.compose(*tiny, f"outputs={finished.outputs}")
    assert {step.state for step in pipeline.plan()} == {"done"}
    made = pipeline.run()
    assert "nothing to do" in capsys.readouterr().out
    assert list(made) == list(pipeline.config.pipeline)
    assert made["sft"].path == mlxchat.open("sft", finished.outputs).path
    with pytest.raises(ConfigError, match=r'Did you mean "sft\.num_epochs"'):
        mlxchat.compose("sft.num_epoch=2")


def test_artifact_has_metrics_config_and_curves(finished):
    pretrain = mlxchat.open("pretrain", finished.outputs)
    manifest = json.loads((pretrain.path / "manifest.json").read_text())
    assert pretrain.metrics == manifest["metrics"]
    assert pretrain.config["model"]["depth"] == manifest["config"]["model"]["depth"]
    records = [json.loads(line) for line in (pretrain.path / "metrics.jsonl").read_text().splitlines()]
    expected = [(each["iteration"], each["loss"]) for each in records if "loss" in each]
    iterations, values = pretrain.curves()["loss"]
    assert list(zip(iterations.tolist(), values.tolist(), strict=True)) == expected
    assert values[-1] < values[0]


def test_checkpoint_answers_as_the_command_does(finished, say):
    sft = mlxchat.open("sft", finished.outputs)
    assert sft.chat("What is 1 + 1?", max_new_tokens=8) in say(
        "chat", "sft", "-p", "What is 1 + 1?", "--max-tokens", "8", "--temperature", "0",
        f"outputs={finished.outputs}",
    )  # fmt: skip
    logits = sft.model()(mx.array([[1, 2, 3]]))
    assert logits.shape[:2] == (1, 3)
    assert np.isfinite(np.array(logits.astype(mx.float32))).all()
    base = mlxchat.open("pretrain", finished.outputs)
    assert isinstance(base.generate("The", max_new_tokens=4, temperature=1.0, seed=3), str)


def test_wrong_names_are_one_message(finished):
    with pytest.raises(DataError, match="is a corpus, no model"):
        mlxchat.open("corpus", finished.outputs).chat("Hello")
    with pytest.raises(StoreError, match="nothing"):
        mlxchat.open("nothing", finished.outputs)
