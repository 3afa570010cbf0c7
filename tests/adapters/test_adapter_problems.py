"""Adapters in the configuration: groups and stages, impossible values, keys."""

from functools import cache
from pathlib import Path

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import Config
from mlxchat.errors import ConfigError
from mlxchat.runner.plan import make_plan
from mlxchat.store.store import Store


@cache
def composed(*overrides: str) -> Config:
    return compose_config(["experiment=smoke", *overrides]).config


def ids(*overrides: str) -> dict[str, str]:
    config = composed(*overrides)
    plan = make_plan(config, config.pipeline, Store(Path("/none")), targets=None, seed=1, force=[])
    return {step.name: step.key for step in plan}


def test_steps_without_adapters_keep_their_keys():
    plain = ids()
    later = ids("adapter=lora", "adapter.rank=4", "midtrain.adapter.kind=none")
    same = {name for name, rid in plain.items() if later[name] == rid}
    assert same == {"corpus", "tokenizer", "pretrain", "midtrain", "eval_base", "eval_mid"}


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        ("adapter=lora adapter.kind=lara", ['adapter.kind is "lara", expected none or lora or dora.']),
        (
            "adapter=lora adapter.targets=[c_p,atention] adapter.rank=65 adapter.bits=4 adapter.group_size=128",
            ['the model has no matrix "c_p"', 'Did you mean "attention"?', "does not divide the model's width of 64"],
        ),
        (
            "adapter=lora adapter.targets=[] adapter.rank=0 adapter.bits=3 adapter.group_size=48 adapter.dropout=1",
            ["adapter.targets is empty", "adapter.rank is 0, expected at least 1", "adapter.bits is 3, expected 4, 8",
             "adapter.group_size is 48, expected 32 or 64 or 128", "adapter.dropout is 1"],
        ),
        ("adapter.rank=4", ["adapter: rank set, but there is no adapter. Choose adapter=lora"]),
        ("adapter=lora rl.adapter.rank=0", ["rl.adapter.rank is 0"]),
        ("adapter=lora sft.warm_start=true pipeline.sft.checkpoint=pretrain", ["start is true, but sft.adapter"]),
    ],
)  # fmt: skip
def test_impossible_values_are_one_line_each(overrides, messages):
    with pytest.raises(ConfigError) as caught:
        compose_config(["experiment=smoke", *overrides.split()])
    for message in messages:
        assert len([line for line in str(caught.value).splitlines() if message in line]) == 1, message
