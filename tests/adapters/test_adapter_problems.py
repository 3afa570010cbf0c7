"""Adapters in the configuration: groups and stages, impossible values, keys, memory."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import NO_ADAPTER, Config
from mlxchat.errors import ConfigError
from mlxchat.model.adapter_problems import adapter_sizes_of
from mlxchat.model.sizes import AdapterSizes, count_adapter_parameters, matrices_of, sizes_of
from mlxchat.planning.memory import Device, Training, predict_peak
from mlxchat.runner.plan import make_plan
from mlxchat.store.store import Store


@cache
def composed(*overrides: str) -> Config:
    return compose_config(["experiment=smoke", *overrides]).config


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_config(["experiment=smoke", *overrides])
    return str(caught.value)


def ids(*overrides: str) -> dict[str, str]:
    config = composed(*overrides)
    plan = make_plan(config, config.pipeline, Store(Path("/none")), targets=None, seed=1, force=[])
    return {step.name: step.key for step in plan}


def test_stages_can_override_the_group():
    config = composed("adapter=dora", "adapter.rank=4", "sft.adapter.rank=2", "rl.adapter.kind=none")
    assert [stage.adapter.kind for stage in (config.midtrain, config.sft, config.rl)] == ["dora", "dora", "none"]
    assert [stage.adapter.rank for stage in (config.midtrain, config.sft)] == [4, 2]


def test_steps_without_adapters_keep_their_keys():
    plain = ids()
    later = ids("adapter=lora", "adapter.rank=4", "midtrain.adapter.kind=none")
    same = {name for name, rid in plain.items() if later[name] == rid}
    assert same == {"corpus", "tokenizer", "pretrain", "midtrain", "eval_base", "eval_mid"}


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        ("adapter=lora adapter.kind=lara", ['adapter.kind is "lara", expected none, lora, dora.']),
        (
            "adapter=lora adapter.targets=[c_p,atention,h.7.attn.c_q] adapter.rank=65 adapter.bits=4 "
            "adapter.group_size=128",
            ['the model has no matrix "c_p"', 'Did you mean "attention"?', 'no matrix "h.7.attn.c_q"',
             "does not divide the model's width of 64"],
        ),
        ("adapter=lora adapter.rank=65", ["rank is 65, but transformer.h.0.attn.c_q is 64 × 64: at most 64"]),
        (
            "adapter=lora adapter.targets=[] adapter.rank=0 adapter.bits=3 adapter.group_size=48 adapter.dropout=1 "
            "adapter.scale=0 adapter.learning_rate=0 adapter.beta2=1 adapter.weight_decay=-1",
            ["adapter.targets is empty", "adapter.rank is 0, expected at least 1",
             "adapter.bits is 3, expected 4 or 8, or null", "adapter.group_size is 48, expected 32, 64 or 128",
             "adapter.dropout is 1, expected at least 0 (off) and below 1", "adapter.scale is 0, expected more than 0",
             "adapter.learning_rate is 0, expected more than 0", "adapter.beta2 is 1, expected at least 0 and below 1",
             "adapter.weight_decay is -1, expected at least 0"],
        ),
        ("adapter.rank=4", ["adapter.rank: set, but there is no adapter. Choose adapter=lora"]),
        ("adapter=lora rl.adapter.rank=0", ["rl.adapter.rank is 0"]),
        ("adapter=lora sft.warm_start=true pipeline.sft.checkpoint=pretrain", ["start is true, but sft.adapter"]),
    ],
)  # fmt: skip
def test_impossible_values_are_one_line_each(overrides, messages):
    lines = refusal(*overrides.split()).splitlines()
    for message in messages:
        assert len([line for line in lines if message in line]) == 1, message


def test_adapters_of_a_model_known_later_are_checked_then():
    config = composed("adapter=lora")
    sizes = sizes_of(config.model, config.architecture, 512)
    with pytest.raises(ConfigError, match=r"sft\.adapter\.rank is 65"):
        adapter_sizes_of("sft.adapter", replace(config.sft.adapter, rank=65), sizes)
    assert adapter_sizes_of("sft.adapter", NO_ADAPTER, sizes) is None


FUSED = "+pipeline.whole={stage: fused, checkpoint: %s}"


def test_fusing_without_adapters_is_refused_before_training():
    message = refusal(FUSED % "sft", "rl.adapter.kind=lora")
    assert message.startswith("pipeline.whole: sft trains all weights, so it has no adapters to fuse.")
    assert "set sft.adapter.kind=lora" in message
    assert "pipeline.whole: pretrain trains all weights" in refusal(FUSED % "pretrain", "adapter=lora")
    assert composed(FUSED % "sft", "adapter=lora").pipeline["whole"]["stage"] == "fused"


def test_predicted_moments_are_the_adapters():
    config = composed()
    sizes = sizes_of(config.model, config.architecture, 512)
    adapters = AdapterSizes("dora", 3, 2.0, tuple(matrices_of(sizes)))
    numbers = sum(3 * (rows + columns) + rows for rows, columns in matrices_of(sizes).values())
    assert count_adapter_parameters(adapters, sizes) == numbers
    training = Training(
        sizes=sizes, optimizer=config.optimizer, rows=4, row_tokens=64, device=Device(num_lanes=2), adapters=adapters
    )
    found = predict_peak(training, 2)
    assert (found.moments, found.gradients) == (8 * numbers, 8 * numbers)
